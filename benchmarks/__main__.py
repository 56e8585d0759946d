"""The command line: `python -m benchmarks list`, `run NAME` and `report`."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.harness.pages import write_pages
from benchmarks.harness.pipelines import run_pipeline
from benchmarks.harness.report import RESULTS, write_report
from benchmarks.harness.scripts import run_script
from benchmarks.harness.suite import Benchmark, find_benchmark, list_benchmarks
from pipeline.base.console import RedactingConsole
from pipeline.base.errors import PipelineError
from pipeline.cli.options import StopOption

ALL: list[str] = []

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command("list")
def list_names() -> None:
    """Print the benchmarks' names."""
    for benchmark in list_benchmarks():
        print(benchmark.name)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(help="The benchmarks; none for all.")] = ALL,
    only: Annotated[
        list[str],
        typer.Option(help="Run the cells whose names match; * matches any text. Repeatable."),
    ] = ALL,
    out: Annotated[Path, typer.Option(help="The folder of the results.")] = RESULTS,
    stop_after: StopOption = None,
) -> None:
    """Run the unfinished cells, and keep each result as JSON."""
    console = RedactingConsole()
    stop_s = math.inf if stop_after is None else time.monotonic() + stop_after
    code = 0
    for benchmark in [find_benchmark(name) for name in names] or list_benchmarks():
        left_s = None if stop_after is None else max(0.0, stop_s - time.monotonic())
        if benchmark.is_pipeline:
            ended = run_pipeline(benchmark, out, only, console, left_s)
        else:
            ended = _run_script(benchmark, out, only, console, left_s)
        code = ended or code
        if ended >= 128:  # stopped by a signal, or out of time
            break
    sys.exit(code)


def _run_script(
    benchmark: Benchmark, out: Path, only: Sequence[str], console: Console, left_s: float | None
) -> int:
    """Run a module's cells, print the failed ones, and return the exit code."""
    try:
        failed = run_script(benchmark, out, only, console, left_s)
    except subprocess.TimeoutExpired:
        console.print("Stopped. The same command resumes.")
        return 128 + signal.SIGTERM
    for cell, reason in failed.items():
        console.print(f"{benchmark.name}: {cell}: {reason}", markup=False, soft_wrap=True)
    return 1 if failed else 0


@app.command()
def report() -> None:
    """Write docs/results.md, and the parts of other pages, from the stored results."""
    write_report()
    write_pages(RESULTS)


def main() -> None:
    """Run a command; a user's error is one paragraph and exit code 2."""
    try:
        app()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
