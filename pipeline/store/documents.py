"""The shapes of stored documents: what may be relied on where one is read.

A seal tells that a document is as somebody wrote it, not that this program did. What an earlier
version left out has a default here, or is missed where it is read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline.base.shapes import (
    Count,
    Document,
    Known,
    Lists,
    Step,
    Texts,
    Time,
    first_wrong,
    read_json,
)
from pipeline.code.provenance import Source


class _Options(Document):
    file: str = ""
    overrides: list[str] = []
    from_: list[str] = []
    only: list[str] = []
    until: list[str] = []
    executor: str = ""
    tracking: str = ""
    tracking_later: bool = False
    max_parallel: Count | None = None


class _Environment(Document):
    python: str = ""
    packages: Texts = {}


class _Run(Document):
    options: _Options = _Options()
    spec_text: str = ""
    environment: _Environment = _Environment()
    began: Time = 0.0


class _Failure(Document):
    message: str
    traceback: str = ""


class _Cell(Document):
    cell: str
    stage: str
    key: str
    state: str
    began: Time | None
    seconds: float | None
    progress: tuple[float, float, str] | None
    moved: Time | None = None
    gap_s: float | None = None
    said: str | None = None
    error: _Failure | None


class _State(Document):
    state: str
    host: str
    machine: str = ""
    pid: Count
    life: Count
    heartbeat: Time
    cells: list[_Cell]


class _Cursor(Document):
    attempt: Count
    segment: Count


class _Ids(Document):
    run: str = ""
    cells: Texts = {}
    records: dict[str, Texts] = {}
    series: dict[str, dict[str, Any]] = {}


class _Tracking(Document):
    cursors: dict[str, _Cursor]
    keys: Texts
    closed: list[str]
    registered: list[str]
    ids: _Ids
    ended: bool
    tracked: bool
    destination: str = ""


class _Names(Document):
    inputs: Lists
    files: Texts
    unchecked: list[str] = []


class _Ingredients(Document):
    stage: str
    code: Texts
    rule: Count = 1
    params: dict[str, Any]
    inputs: Lists
    files: Texts
    data: Texts
    names: _Names
    generation: Count


class _PlannedCell(Document):
    key: str
    ingredients: _Ingredients
    keep: str


class _Plan(Document):
    pipeline: str
    cells: dict[str, _PlannedCell]


class _RunFacts(Known):
    run_id: str
    name: str
    experiment: str
    uri: str
    spec_file: str
    spec_text: str
    resolved: str = ""
    overrides: list[str] = []
    selection: dict[str, list[str]] = {}
    environment: Texts = {}
    tags: Texts = {}
    folder: str = ""
    driver: dict[str, Any] = {}
    resumed: bool = False


class _Registration(Known):
    name: str
    output: str
    loader: str


class _CellFacts(Known):
    cell: str
    stage: str
    key: str
    params: dict[str, Any] = {}
    digests: Texts = {}
    kept: list[str] = []
    promoted: list[str] = []
    tags: Texts = {}
    registration: _Registration | None = None


class _Facts(Document):
    run: _RunFacts
    cells: list[_CellFacts]


class _File(Document):
    sha256: str
    bytes: Annotated[int, Field(ge=0)]


class _Making(Document):
    run: str = ""
    cell: str = ""
    seconds: float = 0.0
    packages: Texts = {}


class _Manifest(Document):
    key: str
    attempt: Count
    ingredients: dict[str, Any]
    outputs: dict[str, dict[str, _File]]
    facts: _Making
    time: Time


class _Storage(Document):
    format: Count
    token: str


class _Accepted(Document):
    code: Texts
    as_: Texts = Field(alias="as")
    who: str
    why: str
    time: Time


class _Event(Document):
    type: str


class _Timed(_Event):
    time: Time


class _Start(_Timed):
    run: str = ""
    host: str = ""
    pid: Count = 0


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


class _Cost(_Timed):
    seconds: float = 0.0
    cpu_seconds: float = 0.0


_EVENTS: dict[str, type[_Event]] = {
    "start": _Start,
    "metrics": _Metrics,
    "system": _Sample,
    "progress": _Progress,
    "text": _Text,
    "record": _Record,
    "checkpoint": _Cost,
    "end": _Cost,
}
_SHAPES: dict[str, type] = {
    "source": Source,
    "run": _Run,
    "state": _State,
    "tracking": _Tracking,
    "plan": _Plan,
    "facts": _Facts,
    "failure": _Failure,
    "manifest": _Manifest,
    "collected": _Manifest,
    "storage": _Storage,
    "accepted": _Accepted,
}


def require_shape(name: str, data: bytes) -> None:
    """Check that a document, as it is stored, has what `name`s have, see `read_json`."""
    if name not in _SHAPES:
        return
    read_json(_SHAPES[name], data)


def require_event(event: Any) -> None:
    """Check that an event, as JSON says it, has what its type has; of unknown types only the type.

    Raises:
        ValueError: it does not; names the first field that is wrong, and what it should be.
    """
    kind = event.get("type") if isinstance(event, dict) else None
    shape = _EVENTS.get(kind, _Event) if isinstance(kind, str) else _Event
    try:
        shape.model_validate(event)
    except ValidationError as error:
        raise ValueError(f"{kind or 'event'}: {first_wrong(error)}") from None
