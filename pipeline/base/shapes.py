"""Strict reading and writing of stored documents, declared as dataclasses and TypedDicts."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, GetPydanticSchema, TypeAdapter, ValidationError, with_config

from pipeline.base.text import cut

_REASON_CHARACTERS = 300

Time = Annotated[float, Field(ge=0, le=1e11)]  # Unix seconds, up to the year 5138
Step = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Lists = dict[str, list[str]]
Texts = dict[str, str]
_Shape = TypeVar("_Shape")
# Decorator of a shape that refuses unknown fields.
exact = with_config(ConfigDict(extra="forbid"))


def checked_as(shape: Any) -> GetPydanticSchema:
    """Return an annotation for a mapping that is checked as a TypedDict and stays a dict."""
    return GetPydanticSchema(lambda source, handler: handler(shape))


def first_wrong(error: ValidationError) -> str:
    """Return the first wrong field, the expected value, and the value."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = cut(".".join(map(str, first["loc"])), _REASON_CHARACTERS)
    wanted = first["msg"][:1].lower() + first["msg"][1:]
    got = "" if first["type"] == "missing" else f", got {cut(repr(first['input']), 80)}"
    return f"{place}: {wanted}{got}"


def read_json(shape: type[_Shape], data: bytes) -> _Shape:
    """Parse JSON text as a shape.

    Raises:
        ValueError: it has another shape; names the first wrong field, and the expected value.
    """
    try:
        document: _Shape = _adapter(cast(Any, shape)).validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(first_wrong(error)) from None
    return document


def to_json(document: object) -> Any:
    """Return a document, a dataclass, as plain JSON data."""
    return _adapter(cast(Any, type(document))).dump_python(document, mode="json", by_alias=True)


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
