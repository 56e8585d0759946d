"""The application, and the functions that its commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

from pipeline.base.console import RedactingConsole
from pipeline.base.secrets import presentable
from pipeline.base.variables import VARIABLES, check_variables
from pipeline.running.record import RunRecord
from pipeline.running.runs import find_run
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec
from pipeline.store.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])


def _paragraph(title: str, lines: Iterable[str]) -> str:
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="fls",
    help="Trains, prunes and compares networks, as one reproducible pipeline.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_paragraph(
        "Environment variables:", [f"{one.name}: {one.purpose}" for one in VARIABLES]
    ),
)


@app.callback()
def _begin() -> None:
    if not {"-h", "--help"} & set(sys.argv):
        check_variables()


def command(*examples: str, name: str | None = None) -> Callable[[Command], Command]:
    """Make a function a command whose help ends with examples."""
    return app.command(name, epilog=_paragraph("Examples:", examples))


def read_spec(file: Path, overrides: Sequence[str] = ()) -> Spec:
    """Return the spec of a pipeline file; print its notes on moved paths."""
    spec = load_spec(file, overrides)
    for sentence in spec.moved:
        typer.echo(presentable(sentence), err=True)
    return spec


def console_here() -> Console:
    """Return the console on standard output."""
    width = None if sys.stdout.isatty() else 200
    return RedactingConsole(width=width)


def find(store: Store, run: str, storage: str | None) -> RunRecord:
    """Return a run, whose printed commands repeat the option --storage."""
    record = find_run(store, run)
    record.storage = storage
    return record


def print_json(value: object) -> None:
    """Print a value as JSON, without secrets."""
    typer.echo(presentable(json.dumps(value, indent=1, ensure_ascii=False)))


def open_store(file: Path, storage: str | None) -> Store:
    """Return the existing store at `storage`, or for None that of a pipeline file."""
    return Store(read_spec(file).storage if storage is None else storage).require()
