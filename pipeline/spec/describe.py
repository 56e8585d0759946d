"""Descriptions of stage types for `fls list STAGE` and the documentation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.stage import Catalogue, Params, Registry, Stage

_WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    dict: "mapping",
    list: "list",
    NoneType: "null",
    Any: "anything",
}
_BOUNDS: Mapping[str, tuple[str, Callable[[list[Any]], Any]]] = {
    "ge": ("at least", max),
    "gt": ("above", max),
    "le": ("at most", min),
    "lt": ("below", min),
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a stage type.

    Attributes:
        name: as in a pipeline file, with dots for groups.
        type: in words, such as "number or null", or the choices.
        default: as YAML, or None of a required parameter.
        range: in words, or "".
        meaning: one line.
    """

    name: str
    type: str
    default: str | None
    range: str
    meaning: str


def parameters_of(stage: Stage) -> list[Parameter]:
    """Return the parameters of a stage type, in the order of their declaration."""
    return list(_walk(stage.params, ""))


def example_of(stage: Stage) -> str:
    """Return an entry of a pipeline file with all required keys, as one line of YAML."""
    parts = [f"uses: {stage.name}"]
    inputs = [f"{name}: ..." for name, one in stage.inputs.items() if not one.optional]
    if inputs:
        parts.append(f"inputs: {{{', '.join(inputs)}}}")
    required = [f"{one.name}: ..." for one in parameters_of(stage) if one.default is None]
    if required:
        parts.append(f"params: {{{', '.join(required)}}}")
    return f"my_{stage.name}: {{{', '.join(parts)}}}"


def description_of(stage: Stage) -> dict[str, Any]:
    """Return inputs, outputs and parameters of a stage type as JSON data."""
    return {
        "name": stage.name,
        "summary": stage.summary,
        "inputs": {name: asdict(one) for name, one in stage.inputs.items()},
        "outputs": {name: one.kind for name, one in stage.outputs.items()},
        "parameters": [asdict(one) for one in parameters_of(stage)],
        "example": example_of(stage),
    }


def names_of(catalogue: Catalogue) -> dict[str, dict[str, str]]:
    """Return the names that a plugin declares: kind -> name -> summary."""
    found = {"stage type": {stage.name: stage.summary for stage in catalogue.stages}}
    for registry in catalogue.registries:
        families = {f"{prefix}...": entry for prefix, entry in registry.prefixes.items()}
        entries = {**registry.entries, **families}
        found[registry.kind] = {name: entry.summary for name, entry in entries.items()}
    return found


def _walk(params: type[Params], prefix: str) -> Iterator[Parameter]:
    for name, field in params.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, Params):
            yield from _walk(group, f"{prefix}{name}.")
        else:
            yield Parameter(
                name=prefix + name,
                type=_type(group, field.metadata),
                default=None if field.is_required() else _default(field),
                range=_range(field),
                meaning=field.description or "",
            )


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value)


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Return a type in words; `fls list` shows the names of a registry."""
    for one in metadata:
        if isinstance(one, Registry):
            return f"name of a {one.kind}"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in {Union, UnionType}:
        return " or ".join(dict.fromkeys(_type(one, []) for one in inner))
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type(annotation.__origin__, list(annotation.__metadata__))
    if origin is list and inner:
        return f"list of: {_type(inner[0], [])}"
    return _WORDS.get(origin or annotation, str(annotation))


def _range(field: FieldInfo) -> str:
    """Return the strictest bounds of a number in words, such as "at least 0, below 1"."""
    found = []
    for name, (word, strictest) in _BOUNDS.items():
        bounds = [getattr(one, name, None) for one in _constraints(field)]
        if known := [bound for bound in bounds if bound is not None]:
            found.append(f"{word} {strictest(known):,}")
    return ", ".join(found)


def _constraints(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for one in get_args(field.annotation):
        yield from getattr(one, "__metadata__", ())
