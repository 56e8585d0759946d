"""The interface of trackers, and the facts about a run and its cells that they record.

The driver alone writes tracking data, so that no two writers meet in a fresh database and a stage
needs no tracking library. The store holds all news, so tracking may fall behind and catch up: see
`pipeline.tracking.recorder`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from pipeline.base.places import absolute_uri
from pipeline.base.secrets import redact
from pipeline.base.shapes import Texts, checked_as, exact
from pipeline.base.states import CellState, RunState
from pipeline.spec.cells import Registration
from pipeline.store.events import Cursor, Event


class TrackerName(StrEnum):
    """The names of the trackers."""

    MLFLOW = "mlflow"
    JSONL = "jsonl"


# Imported by name: one of them imports MLflow, which `fls plan` must not pay for.
_CLASSES = {
    TrackerName.MLFLOW: "pipeline.tracking.mlflow:MLflowTracker",
    TrackerName.JSONL: "pipeline.tracking.jsonl:JsonLinesTracker",
}

_OTHERS = r"(?!(__main__|pipeline|stages|fishleg)\b)"  # modules outside of this project


@exact
@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts about a run that a tracker records.

    Attributes:
        run_id: the runner's id.
        name: the spec's name.
        experiment: of the run in MLflow.
        uri: the tracking server or database.
        spec_file: the spec's path as given.
        spec_text: the spec as it was read.
        resolved: a spec that repeats the run by itself, see `pipeline.spec.resolved`.
        overrides: the `--set` options.
        selection: option, such as `--only` -> its values.
        environment: the variables that the spec refers to, with their values.
        tags: further facts, such as the commit.
        driver: facts about the driver's process, of the kind in a manifest about a worker's.
        folder: of JSON lines.
        resumed: whether an earlier life of this run may have been recorded.
    """

    run_id: str
    name: str
    experiment: str
    uri: str
    spec_file: str
    spec_text: str
    resolved: str = ""
    overrides: Sequence[str] = ()
    selection: Mapping[str, Sequence[str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    driver: Mapping[str, Any] = field(default_factory=dict)
    folder: str = "tracking"
    resumed: bool = False


def _refuse(calls: object) -> object:
    raise ValueError("expected none from a store")


@exact
@dataclass(frozen=True, kw_only=True)
class CellFacts:
    """The facts about a cell that a tracker records; JSON.

    Attributes:
        cell: its name.
        stage: its stage's name.
        key: its key.
        params: its parameters.
        digests: parameter -> digest of the file that it names, or of the data behind the result.
        kept: outputs whose files are uploaded with it.
        promoted: outputs whose files are uploaded with the run itself.
        tags: facts that few cells have.
        registration: of the model to register, or None.
        calls: what its loader may import and call by what is kept in a stored file, see
            `pipeline.stage.call_text`; never kept in a store.
    """

    cell: str
    stage: str
    key: str
    params: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    kept: Sequence[str] = ()
    promoted: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    registration: Registration | None = None
    calls: Annotated[Sequence[str], Field(exclude=True), BeforeValidator(_refuse)] = ()


@dataclass(frozen=True, kw_only=True)
class CellEnd:
    """The end of a cell.

    Attributes:
        state: `done`, `failed` or `stopped`; `cached` of a result that was there already.
        outputs: output name -> folder whose files are to be kept with the cell.
        making: about the making of its result, see `Manifest`.
        output_bytes: size of all its outputs, or None where there is no result.
        time_s: Unix time of its result's publication; 0 where there is none.
    """

    state: CellState
    outputs: Mapping[str, Path] = field(default_factory=dict)
    making: Mapping[str, Any] = field(default_factory=dict)
    output_bytes: int | None = None
    time_s: float = 0.0


class AbstractTracker(ABC):
    """Records one run; all calls come from one thread, `open_run` first and `close_run` last.

    Every call may be repeated without effect, because after an error the caller cannot know how
    much of it was done.

    Attributes:
        ids: JSON data that the tracker needs to continue the run: `cells` (cell -> id) and
            `records` (cell -> record name -> id), if it has ids. The keys of each dictionary in it
            are cells.
        notices: new messages for the user; the reader removes them.
    """

    def __init__(self) -> None:
        self.ids: dict[str, Any] = {}
        self.notices: list[str] = []

    @abstractmethod
    def open_run(self, run: RunFacts) -> None:
        """Begin the run, or continue its records; called again after an error."""

    @abstractmethod
    def open_cell(self, cell: CellFacts) -> None:
        """Note that the cell runs; called again when a later attempt of it begins."""

    @abstractmethod
    def log(self, cell: str, events: list[Event]) -> None:
        """Record events of an open cell."""

    @abstractmethod
    def close_cell(self, cell: str, end: CellEnd) -> None:
        """Note an open cell's end."""

    @abstractmethod
    def forget_cell(self, cell: str, *, records: bool = False) -> None:
        """Drop the data of a cell whose result is lost, or replaced by another one.

        Args:
            cell: its name.
            records: whether to drop its records as well, because none will be reported again.
        """

    @abstractmethod
    def link_cached(self, cell: CellFacts, source: str | None, made: CellEnd) -> None:
        """Note a cell whose result the store had.

        Args:
            cell: the cell.
            source: the tracking id of the attempt that made it, if known.
            made: the end of that attempt.
        """

    @abstractmethod
    def register(self, cell: CellFacts, folder: Path) -> None:
        """Register the model in `folder` as `cell.registration` says, once for each key."""

    @abstractmethod
    def promote(self, output: str, folder: Path) -> None:
        """Keep an output's files with the run itself; a `table.md` among them is its summary."""

    @abstractmethod
    def close_run(self, state: RunState) -> None:
        """Note the run's end: done, failed or stopped."""

    @abstractmethod
    def close_orphan(self, run: RunFacts, state: RunState, cells: Mapping[str, CellState]) -> bool:
        """Set the end of another run whose driver died before it could; nothing else of it.

        Args:
            run: that run.
            state: its end, as for `close_run`.
            cells: cell -> end, as far as known; others are "stopped".

        Returns:
            Whether the tracker has the run.
        """

    @abstractmethod
    def is_outage(self, error: Exception) -> bool:
        """Tell whether the same call may succeed later: the server is away, and did not refuse."""


def make_tracker(name: TrackerName) -> AbstractTracker:
    """Return the tracker called `name`.

    From then on this process ignores warnings of other projects' modules: under `-W error` a
    deprecation inside a tracker's library would end the tracking.
    """
    warnings.filterwarnings("ignore", module=_OTHERS)
    module, _, attribute = _CLASSES[name].partition(":")
    tracker: AbstractTracker = getattr(importlib.import_module(module), attribute)()
    return tracker


def destination(run: RunFacts, tracker: TrackerName) -> str:
    """Return the identity of the place where a run is recorded, without a user.

    >>> run = dict(run_id="", name="", experiment="", spec_file="", spec_text="")
    >>> uri = "http://me:secret@host:5000/"
    >>> destination(RunFacts(**run, uri=uri), TrackerName.MLFLOW)
    'http://host:5000'
    """
    return os.path.abspath(run.folder) if tracker is TrackerName.JSONL else place(run.uri)


def place(uri: str) -> str:
    """Return the identity of an MLflow server, without a user."""
    scheme, separator, rest = absolute_uri(uri).partition("://")
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    plain: str = redact(f"{scheme}{separator}{host}{slash}{path}")
    return plain.rstrip("/")


@with_config(ConfigDict(extra="allow"))
class _Ids(TypedDict, total=False):
    run: str
    cells: Texts
    records: dict[str, Texts]
    series: dict[str, dict[str, Any]]


@dataclass(kw_only=True)
class TrackingProgress:
    """The progress of a run's tracking.

    Attributes:
        cursors: cell -> cursor after its last recorded event.
        keys: cell -> key of its cursor.
        closed: cells whose result is recorded.
        registered: cells whose model is registered.
        ids: see `AbstractTracker.ids`.
        ended: whether the run's end is recorded.
    """

    cursors: dict[str, Cursor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)
    ids: Annotated[dict[str, Any], checked_as(_Ids)] = field(default_factory=dict)
    ended: bool = False

    def copy(self) -> TrackingProgress:
        """Return a deep copy.

        Cost: about 1.4 microseconds a cell; `copy.deepcopy` takes six times as long.
        """
        return TrackingProgress(
            cursors=dict(self.cursors),
            keys=dict(self.keys),
            closed=list(self.closed),
            registered=list(self.registered),
            ids=_copy_json(self.ids),
            ended=self.ended,
        )

    def follow(self, live: TrackingProgress, cell: str) -> None:
        """Copy the progress of one cell from the progress that this is an earlier copy of.

        Cost: O(1) per cell, apart from two searches in lists.
        """
        _take(cell, live.cursors, self.cursors)
        _take(cell, live.keys, self.keys)
        for theirs, ours in ((live.closed, self.closed), (live.registered, self.registered)):
            if (cell in theirs) != (cell in ours):
                (ours.remove if cell in ours else ours.append)(cell)
        for name, value in live.ids.items():
            if isinstance(value, dict):
                _take(cell, value, self.ids.setdefault(name, {}))
            else:
                self.ids[name] = value


def _take(name: str, theirs: Mapping[str, Any], ours: dict[str, Any]) -> None:
    """Copy one value of a dictionary, or its absence."""
    if name in theirs:
        ours[name] = _copy_json(theirs[name])
    else:
        ours.pop(name, None)


def _copy_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_copy_json(one) for one in value]
    return value
