"""The commands that show runs: `status`, `logs`, `results`, `export` and `ui`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.base.rows import csv_text
from pipeline.base.secrets import presentable
from pipeline.cli.app import command, console_here, find, open_store, print_json, read_spec
from pipeline.cli.options import NONE_GIVEN, File, FileOption, JsonOption, SetOption, StorageOption
from pipeline.cli.printing import (
    follow_log,
    print_log,
    print_rows,
    print_run,
    print_runs,
    run_summary,
)
from pipeline.running.record import DEFAULT_FILE
from pipeline.running.results import export as export_cell
from pipeline.running.results import result_rows
from pipeline.running.runs import find_run, load_runs
from pipeline.spec.cells import shorten
from pipeline.store.store import Store
from pipeline.tracking.ui import serve_ui


@command(
    "fls status",
    "fls status last",
    "fls status last --json",
)
def status(
    run: Annotated[str | None, typer.Argument(help="A run, or 'last'; default: all.")] = None,
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all runs, or one of them."""
    if run is not None:
        record = find(open_store(file, storage), run, storage)
        if as_json:
            cells = [asdict(status) for status in record.cells.values()]
            print_json({**run_summary(record), "cells": cells})
        else:
            print_run(record, console_here())
        return
    store = Store(read_spec(file).storage if storage is None else storage)
    fresh = storage is None and not store.exists()
    records, problems = ([], []) if fresh else load_runs(store.require())
    if as_json:
        print_json([run_summary(record) for record in records])
    elif fresh:
        console_here().print(f"{store.url}: no runs yet; see `fls run`.", soft_wrap=True)
    else:
        print_runs(records, console_here())
    for problem in problems:
        typer.echo(presentable(problem), err=True)


@command(
    "fls logs 'pretrain[seed=0]'",
    "fls logs 'pretrain[seed=0]' --tail 20 --follow",
    "fls logs compare --run 20260730-101500-042-1f2e",
)
def logs(
    cell: Annotated[str, typer.Argument(help="A cell's full name.")],
    run: Annotated[str, typer.Option("--run", help="A run.")] = "last",
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print until the cell has ended.")
    ] = False,
    tail: Annotated[
        int | None,
        typer.Option(
            "--tail", "-n", metavar="N", min=0, help="Only the last N lines of the newest attempt."
        ),
    ] = None,
) -> None:
    """Print a cell's log, and the traceback if the cell failed."""
    store = open_store(file, storage)
    record = find_run(store, run)
    if follow:
        follow_log(store, record.run_id, cell, console_here(), tail=tail)
    else:
        print_log(store, record.status(cell), console_here(), tail=tail)


@command(
    "fls results pipeline.yaml --json",
    "fls results experiments/mnist_mlp.yaml --csv > mnist.csv",
)
def results(
    file: File = DEFAULT_FILE,
    set_: SetOption = NONE_GIVEN,
    as_json: Annotated[
        bool | None, typer.Option("--json/--csv", help="Print JSON or CSV, not a table.")
    ] = None,
) -> None:
    """Print the results of a pipeline: one row per evaluated model."""
    spec = read_spec(file, set_)
    columns, rows, absent = result_rows(spec, Store(spec.storage))
    if as_json is None:
        print_rows(columns, rows, console_here())
    elif as_json:
        print_json(rows)
    else:
        typer.echo(presentable(csv_text(columns, rows)), nl=False)
    if absent:
        typer.echo(f"No results yet of: {shorten(absent)}; `{spec.command()}`.", err=True)


@command(
    "fls export pipeline.yaml 'oneshot[method=eigen,seed=0,sparsity=0.9]' my_model",
)
def export(
    file: Annotated[Path, typer.Argument(help="The pipeline.")],
    cell: Annotated[str, typer.Argument(help="The cell that made the model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Destination; created if missing.")],
    set_: SetOption = NONE_GIVEN,
) -> None:
    """Copy a cell's model out of the store: weights and description."""
    spec = read_spec(file, set_)
    export_cell(spec, Store(spec.storage), cell, folder)
    typer.echo(presentable(f"{folder}: {', '.join(sorted(os.listdir(folder)))}"))


@command(
    "fls ui",
    "fls ui experiments/mnist_mlp.yaml --port 0",
)
def ui(
    file: File = DEFAULT_FILE,
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; a free one if it is taken or 0.")
    ] = 5000,
) -> None:
    """Serve MLflow's pages on a pipeline's runs, and print the link to them; Ctrl-C ends it.

    The link holds a password, new each time, which keeps other users of this machine out.

    For a tracking server, which serves its own pages, only the address is printed.
    """
    serve_ui(read_spec(file).tracking_uri(), port)
