"""Shapes of documents: what may be relied on where one is read.

A shape is a pydantic model, or a dataclass, whose annotations are checked strictly.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.base.text import cut

_REASON_CHARACTERS = 300

Time = Annotated[float, Field(ge=0, le=1e11)]  # Unix seconds, up to the year 5138
Step = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Lists = dict[str, list[str]]
Texts = dict[str, str]
_Shape = TypeVar("_Shape")


class Document(BaseModel):
    """A document with these fields, and perhaps more."""

    model_config = ConfigDict(strict=True, frozen=True)


class Known(Document):
    """A document without any fields but these."""

    model_config = ConfigDict(extra="forbid")


def first_wrong(error: ValidationError) -> str:
    """Return the first field that is wrong, what it should be, and what it is."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = cut(".".join(map(str, first["loc"])), _REASON_CHARACTERS)
    wanted = first["msg"][:1].lower() + first["msg"][1:]
    got = "" if first["type"] == "missing" else f", got {cut(repr(first['input']), 80)}"
    return f"{place}: {wanted}{got}"


def read_json(shape: type[_Shape], data: bytes) -> _Shape:
    """Return the document that JSON text holds, as its shape.

    Raises:
        ValueError: it has another shape; names the first field that is wrong, and what it should
            be.
    """
    try:
        document: _Shape = _adapter(cast(Any, shape)).validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(first_wrong(error)) from None
    return document


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
