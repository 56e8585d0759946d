"""The documents of a run in the store: its request, its progress and its tracking."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, with_config
from typing_extensions import TypedDict

from pipeline.base.shapes import Count, Texts, Time, checked_as, exact
from pipeline.base.states import CellState, RunState
from pipeline.executors import ExecutorName
from pipeline.planning.planner import Selection
from pipeline.store.attempt import Failure
from pipeline.tracking import TrackerName, TrackingProgress


@with_config(ConfigDict(extra="allow"))
class _Environment(TypedDict, total=False):
    python: str
    packages: Texts


@exact
@dataclass(kw_only=True)
class CellStatus:
    """The status of one cell.

    Attributes:
        cell: its name.
        stage: its stage's name.
        key: its key.
        state: see `CellState`.
        began: Unix time at which its running attempt began, or None.
        seconds: how long its last attempt took, or None.
        progress: (done, total, unit) inside the stage, or None.
        moved: Unix time of the last progress, or None.
        gap_s: usual seconds between two reports of progress, or None.
        said: the stage's last message, or None.
        error: `message`, and mostly `traceback`, of a failure or the reason of a skip; or None.
    """

    cell: str
    stage: str
    key: str
    state: CellState = CellState.WAITING
    began: Time | None = None
    seconds: float | None = None
    progress: tuple[float, float, str] | None = None
    moved: Time | None = None
    gap_s: float | None = None
    said: str | None = None
    error: Failure | None = None


def _require_file(name: str) -> str:
    if not Path(name).name.strip(".") or "\0" in name:
        raise ValueError(f"{name!r} names no file")
    return name


@exact
@dataclass(frozen=True, kw_only=True)
class RunOptions(Selection):
    """The request for a run: with the spec's text, all that `fls resume` needs.

    The effect of `force` lasts, so a resume does not repeat it.

    Attributes:
        file: the spec's path as given.
        overrides: the `--set` options.
        executor: name of the executor.
        tracking: name of the tracker.
        tracking_later: whether neither beginning nor end wait for the tracking server.
        max_parallel: maximum number of cells at once, or None.
    """

    file: Annotated[str, AfterValidator(_require_file)]
    overrides: Sequence[str] = ()
    executor: ExecutorName = ExecutorName.RAY
    tracking: TrackerName = TrackerName.MLFLOW
    tracking_later: bool = False
    max_parallel: Count | None = None

    @property
    def selection(self) -> dict[str, Sequence[str]]:
        """The options that select cells, with their values."""
        given = {
            "--from": self.from_,
            "--only": self.only,
            "--until": self.until,
            "--force": self.force,
        }
        return {option: values for option, values in given.items() if values}


@dataclass(kw_only=True)
class RunRequest:
    """The request for a run; written once.

    Attributes:
        options: the options of the command line.
        spec_text: the text of the spec.
        environment: versions of Python and of packages, see `pipeline.code.provenance`.
        began: Unix time.
    """

    DOCUMENT: ClassVar[str] = "run"
    options: RunOptions
    spec_text: str = ""
    environment: Annotated[Mapping[str, Any], checked_as(_Environment)] = field(
        default_factory=dict
    )
    began: Time = field(default_factory=time.time)


@dataclass(kw_only=True)
class DriverStatus:
    """The state of a run and its driver, as the driver last wrote it.

    Attributes:
        state: see `RunState`.
        host: the name of the driver's machine.
        machine: the driver's machine; see `this_machine`.
        pid: the driver's process.
        life: which of the run's drivers that is, from 1.
        heartbeat: Unix time, by the driver's clock, of its last sign of life; 0 once it has left
            the run.
    """

    state: RunState = RunState.RUNNING
    host: str = ""
    machine: str = ""
    pid: Count = 0
    life: Count = 0
    heartbeat: Time = 0.0


@dataclass(kw_only=True)
class RunProgress(DriverStatus):
    """The progress of a run; rewritten every few seconds, which is also the driver's heartbeat.

    Attributes:
        cells: the status of each.
    """

    DOCUMENT: ClassVar[str] = "state"
    cells: Sequence[CellStatus]


@dataclass(kw_only=True)
class RunTracking(TrackingProgress):
    """The progress of a run's tracking, with its destination.

    Attributes:
        tracked: whether it is complete.
        destination: see `pipeline.tracking.destination`; "" before it begins.
    """

    DOCUMENT: ClassVar[str] = "tracking"
    tracked: bool
    destination: str = ""


# The documents of a run that has begun.
DOCUMENTS = (RunRequest, RunProgress, RunTracking)
