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
        ValueError: it is no such text, or not above 0.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] not in units or not (seconds := float(text[:-1]) * units[text[-1]]) > 0:
        raise ValueError(f"{text!r} is no duration such as 90s, 9m or 2h")
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
FileOption = Annotated[
    Path, typer.Option("--file", help="The pipeline whose storage is looked into.")
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="The storage itself; no pipeline file is read."),
]
ExecutorOption = Annotated[ExecutorName, typer.Option("--executor", help="What runs the cells.")]
TrackingOption = Annotated[TrackerName, typer.Option("--tracking", help="Where runs are recorded.")]
FromOption = Annotated[
    list[str],
    typer.Option(
        "--from",
        metavar="CELLS",
        help="Run this and what depends on it; the rest must be in the store.",
    ),
]
OnlyOption = Annotated[
    list[str],
    typer.Option("--only", metavar="CELLS", help="Run this alone; the rest must be in the store."),
]
UntilOption = Annotated[
    list[str], typer.Option("--until", metavar="CELLS", help="Run this and what it needs.")
]
ForceOption = Annotated[
    list[str],
    typer.Option(
        "--force",
        metavar="CELLS",
        help="Run this again (a stage, a cell or a group), and what depends on it.",
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
        help="Neither wait for a tracking server nor end because of one; `fls sync` sends later.",
    ),
]
ParallelOption = Annotated[
    int | None,
    typer.Option("--max-parallel", metavar="N", min=1, help="Most cells at the same time."),
]
StopOption = Annotated[
    float | None,
    typer.Option(
        "--stop-after",
        metavar="TIME",
        parser=read_duration,
        help="Stop after so long (90s, 9m, 2h); a later run goes on from there.",
    ),
]
GraceOption = Annotated[
    float | None,
    typer.Option(
        "--grace",
        metavar="TIME",
        parser=read_duration,
        help="When stopped: wait so long for checkpoints.",
        show_default="10s",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import all code that the run's stored spec names, also what --file does not: then "
        "who can write to the store can run code as you.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
