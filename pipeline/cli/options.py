"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.executors import ExecutorName
from pipeline.tracking import TrackerName

NONE_GIVEN: list[str] = []


def read_duration(text: str) -> float:
    """Return a duration such as 90s, 9m, 1.5h or 30d in seconds.

    Raises:
        ValueError: the text has another form, or the duration is not above 0.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] not in units or not (seconds := float(text[:-1]) * units[text[-1]]) > 0:
        raise ValueError(f"expected a duration such as 90s, 9m or 2h, got {text!r}")
    return seconds


def show_duration(seconds: float) -> str:
    """Return a duration as `read_duration` reads it.

    >>> show_duration(3600), show_duration(90), show_duration(2 * 86400)
    ('1h', '90s', '2d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


File = Annotated[Path, typer.Argument(help="The pipeline.", show_default=True)]
FileOption = Annotated[Path, typer.Option("--file", help="The pipeline whose storage is read.")]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="The storage; no pipeline file is read."),
]
ExecutorOption = Annotated[ExecutorName, typer.Option("--executor", help="Executor of the cells.")]
TrackingOption = Annotated[TrackerName, typer.Option("--tracking", help="Tracker of the run.")]
FromOption = Annotated[
    list[str],
    typer.Option(
        "--from",
        metavar="CELLS",
        help="Run these and all downstream cells; the others must be in the store.",
    ),
]
OnlyOption = Annotated[
    list[str],
    typer.Option(
        "--only", metavar="CELLS", help="Run only these; the others must be in the store."
    ),
]
UntilOption = Annotated[
    list[str], typer.Option("--until", metavar="CELLS", help="Run these and all upstream cells.")
]
ForceOption = Annotated[
    list[str],
    typer.Option(
        "--force",
        metavar="CELLS",
        help="Run these (a stage, a cell or a group) and all downstream cells again.",
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set a parameter: stage.param=value, stage.axis=[values] or vars.name=value.",
    ),
]
LaterOption = Annotated[
    bool,
    typer.Option(
        "--tracking-later",
        help="Run without the tracking server while it is unavailable; `fls sync` sends later.",
    ),
]
ParallelOption = Annotated[
    int | None,
    typer.Option(
        "--max-parallel", metavar="N", min=1, help="Maximum number of cells at the same time."
    ),
]
StopOption = Annotated[
    float | None,
    typer.Option(
        "--stop-after",
        metavar="TIME",
        parser=read_duration,
        help="Stop after this time (90s, 9m, 2h); a later run resumes.",
    ),
]
GraceOption = Annotated[
    float | None,
    typer.Option(
        "--grace",
        metavar="TIME",
        parser=read_duration,
        help="After a stop: time to wait for checkpoints.",
        show_default="10s",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import all code that the run's stored spec names, even if --file does not name it: "
        "every user who can write to the store can then run code as you.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
