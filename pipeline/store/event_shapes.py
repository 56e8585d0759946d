"""The shapes of events: the fields of each type, and their check."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pipeline.base.shapes import Count, Step, Time, first_wrong


class _Event(TypedDict):
    type: str


class _Timed(_Event):
    time: Time


class _Start(_Timed, total=False):
    run: str
    host: str
    pid: Count


class _Metrics(_Timed):
    values: dict[str, float]
    step: Step | None


class _Sample(_Timed):
    values: dict[str, float]


class _Progress(_Timed):
    done: float
    total: float
    unit: str


class _Text(_Timed):
    text: str


class _Record(_Timed):
    name: str
    params: dict[str, Any]
    metrics: dict[str, float]


class _Cost(_Timed, total=False):
    seconds: float
    cpu_seconds: float


_SHAPES: dict[str, Any] = {
    "start": _Start,
    "metrics": _Metrics,
    "system": _Sample,
    "progress": _Progress,
    "text": _Text,
    "record": _Record,
    "checkpoint": _Cost,
    "end": _Cost,
}


def require_event(event: Any) -> None:
    """Check that a JSON value is an event: it has the fields of its type, or an unknown type.

    Raises:
        ValueError: it is none; names the first wrong field, and the expected value.
    """
    kind = event.get("type") if isinstance(event, dict) else None
    try:
        shape = _SHAPES.get(kind, _Event) if isinstance(kind, str) else _Event
        _adapter(shape).validate_python(event, strict=True)
    except ValidationError as error:
        raise ValueError(f"{kind or 'event'}: {first_wrong(error)}") from None


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
