"""The command line: `python -m benchmarks list`, `run NAME` and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.harness.pipelines import run_pipeline
from benchmarks.harness.report import RESULTS, write_report
from benchmarks.harness.scripts import run_script
from benchmarks.harness.suite import find_benchmark, list_benchmarks
from pipeline.errors import PipelineError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command("list")
def list_names() -> None:
    """Print the benchmarks' names."""
    for benchmark in list_benchmarks():
        print(benchmark.name)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(help="The benchmarks; none for all.")] = [],  # noqa: B006
    only: Annotated[
        str | None,
        typer.Option(help="Run the cells whose names fit; * stands for any text."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the results are kept.")] = RESULTS,
) -> None:
    """Run the cells that are not finished, and keep each result as JSON."""
    console = Console()
    chosen = [find_benchmark(name) for name in names] if names else list_benchmarks()
    code = 0
    for benchmark in chosen:
        if benchmark.is_pipeline:
            code = run_pipeline(benchmark, out, only, console) or code
            if code >= 128:  # stopped by a signal
                break
            continue
        failed = run_script(benchmark, out, only, console)
        for cell, reason in failed.items():
            console.print(f"{benchmark.name}: {cell}: {reason}", markup=False, soft_wrap=True)
        code = 1 if failed else code
    sys.exit(code)


@app.command()
def report() -> None:
    """Make docs/results.md from the results that are kept."""
    write_report()


def main() -> None:
    """Run a command; a user's error is one paragraph and exit code 2."""
    try:
        app()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
