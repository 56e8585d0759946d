"""A stage's parameters: their mistakes in words, and the parameters that name things.

Markers stand in annotations: `Annotated[str, REGISTRY]` names an entry of a registry, and
`Annotated[str, ExternalFile()]` a file of the user's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.base.errors import nearest
from pipeline.code.digest import missing_target
from pipeline.spec.yaml_loader import Path
from pipeline.stage import ExternalFile, Registry

_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "list",
    dict: "mapping",
}


@dataclass(frozen=True)
class Issue:
    """One mistake in the values for a model, at `path`; with `key`, in the key there."""

    path: Path
    message: str
    key: bool = False


@dataclass(frozen=True)
class Marked:
    """A string parameter that names an entry of a registry or a file, as `marker` says."""

    path: Path
    marker: Registry | ExternalFile
    value: str


def issues_of(
    error: ValidationError,
    model: type[BaseModel],
    values: Any,
    elsewhere: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> list[Issue]:
    """Return pydantic's errors in words, with the nearest names.

    Args:
        error: raised by `model.model_validate(values)`.
        model: the model.
        values: the values.
        elsewhere: other place, in words -> its model, to detect misplaced keys.
    """
    return [_issue(detail, model, values, elsewhere) for detail in error.errors(include_url=False)]


def marked(params: BaseModel, path: Path = ()) -> Iterator[Marked]:
    """Yield all strings with a marker in `params`, also nested ones; fields may be missing."""
    for name, info in type(params).model_fields.items():
        value = getattr(params, name, None)
        yield from _walk(info.annotation, info.metadata, value, (*path, name))


def _walk(annotation: Any, metadata: Sequence[Any], value: Any, path: Path) -> Iterator[Marked]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(value, BaseModel):
        yield from marked(value, path)
    elif origin is Annotated:
        yield from _walk(inner[0], inner[1:], value, path)
    elif origin in {Union, UnionType}:
        for choice in inner:
            yield from _walk(choice, metadata, value, path)
    elif isinstance(value, list) and origin is list:
        for index, child in enumerate(value):
            yield from _walk(inner[0], (), child, (*path, index))
    elif isinstance(value, dict) and origin is dict:
        for name, child in value.items():
            yield from _walk(inner[1], (), child, (*path, name))
    elif isinstance(value, str):
        for marker in metadata:
            if isinstance(marker, Registry | ExternalFile):
                yield Marked(path, marker, value)


def name_trouble(mark: Marked) -> str | None:
    """Return the mistake in a parameter that names something, or None."""
    name = str(mark.path[-1])
    if isinstance(mark.marker, Registry):
        registry = mark.marker
        if mark.value in registry.renamed:
            return f"{name}: {mark.value!r} is now {registry.renamed[mark.value]!r}"
        entry = registry.find(mark.value)
        if entry is None:
            known = list(registry.entries) + [f"{prefix}..." for prefix in registry.prefixes]
            return (
                f"{name}: unknown {registry.kind} {mark.value!r}"
                f"{nearest(mark.value, registry.entries)}; known: {', '.join(known)}"
                f"{', or package.module:function' if registry.open else ''}"
            )
        return missing_target(entry.target) if entry.target == mark.value else None
    if not os.path.isfile(mark.value):
        return f"{name}: no file {mark.value!r} (searched from {os.getcwd()})"
    return None


def _issue(
    detail: ErrorDetails,
    model: type[BaseModel],
    values: Any,
    elsewhere: Mapping[str, type[BaseModel]],
) -> Issue:
    kind, path, last = detail["type"], detail["loc"], detail["loc"][-1:]
    if kind == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        places = [place for place, other in elsewhere.items() if path[-1] in _fields_at(other, ())]
        hint = (
            f"; it is a key of {places[0]}"
            if places
            else nearest(str(path[-1]), known) or f"; known: {', '.join(known) or 'none'}"
        )
        return Issue(path, f"unknown key {path[-1]!r}{hint}", key=True)
    if kind == "missing":
        return Issue(path[:-1], f"missing key {path[-1]!r}", key=True)
    path = _present(values, path)
    if last == ("[key]",):  # pydantic's name of a key
        return Issue(path, _explain(detail), key=True)
    name = ".".join(map(str, path))
    return Issue(path, f"{name}: {_explain(detail)}" if name else _explain(detail))


def _explain(detail: ErrorDetails) -> str:
    """Return pydantic's message as "expected ..., got ...", with the nearest of the choices."""
    message = detail["msg"].removeprefix("Value error, ")
    if not message.startswith("Input should be "):
        return message
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    if detail["type"] in {"dict_type", "model_type"}:
        expected = "mapping"
    if ", got " in expected:
        return f"expected {expected}"
    hint = ""
    if detail["type"] == "literal_error":
        hint = nearest(str(detail["input"]), re.findall(r"'([^']*)'", expected))
    return f"expected {expected}, got {_show(detail['input'])}{hint}"


def _show(value: Any) -> str:
    """Return a value with its type, cut after 60 characters."""
    if value is None:
        return "nothing"
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += part
        if len(text) > 60:
            text = text[:57] + "..."
            break
    return f"the {_KINDS.get(type(value), type(value).__name__)} {text}"


def _present(values: Any, path: tuple[str | int, ...]) -> Path:
    """Return the part of `path` that exists in `values`; pydantic appends names of choices."""
    for depth, part in enumerate(path):
        inside = isinstance(values, Mapping) and part in values
        if not inside and not (isinstance(values, list) and isinstance(part, int)):
            return path[:depth]
        values = values[part]
    return path


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Return the field names of the model at `path` inside `model`."""
    at: Any = model
    for part in path:
        found = (
            list(_models_in(at.model_fields[part].annotation)) if part in at.model_fields else []
        )
        if not found:
            return list(at.model_fields) if isinstance(part, int) else []
        at = found[0]
    return [field.alias or name for name, field in at.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
