"""The commands that read a pipeline file: `validate`, `plan`, `inspect`, `graph` and `list`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.base.errors import BadInput, SpecError, nearest
from pipeline.cli.app import command, console_here, print_json, read_spec
from pipeline.cli.options import (
    NONE_GIVEN,
    File,
    ForceOption,
    FromOption,
    JsonOption,
    OnlyOption,
    SetOption,
    UntilOption,
)
from pipeline.cli.printing import print_inspections, print_names, print_plan, print_stage
from pipeline.planning.inspection import inspect as inspect_cells
from pipeline.planning.notes import plan_notes
from pipeline.planning.planner import Selection, make_plan
from pipeline.running.record import DEFAULT_FILE
from pipeline.running.trust import BUILT_IN
from pipeline.spec.describe import description_of, names_of
from pipeline.spec.load import load_spec
from pipeline.spec.plugins import import_catalogue
from pipeline.spec.render import cell_drawing, dot, mermaid, stage_drawing
from pipeline.stage import Stage
from pipeline.store.store import Store


class Format(StrEnum):
    """Languages of drawn graphs."""

    MERMAID = "mermaid"
    DOT = "dot"


@command(
    "fls validate experiments/cifar10_resnet18.yaml",
    "fls validate pipeline.yaml --json",
)
def validate(
    file: File = DEFAULT_FILE, set_: SetOption = NONE_GIVEN, as_json: JsonOption = False
) -> None:
    """Check a pipeline file, and report all its mistakes at once."""
    if as_json:
        found = _mistakes(file, set_)
        print_json(found)
        sys.exit(SpecError.exit_code if found["mistakes"] else 0)
    spec = read_spec(file, set_)
    typer.echo(f"{file}: {len(spec.stages)} stages, {len(spec.cells)} cells, no mistakes.")


@command(
    "fls plan --why",
    "fls plan pipeline.yaml --set finetune.epochs=20 --json",
)
def plan(
    file: File = DEFAULT_FILE,
    why: Annotated[
        bool,
        typer.Option("--why", help="Give each cell's reason, and the run it is compared with."),
    ] = False,
    as_json: JsonOption = False,
    from_: FromOption = NONE_GIVEN,
    only: OnlyOption = NONE_GIVEN,
    until: UntilOption = NONE_GIVEN,
    force: ForceOption = NONE_GIVEN,
    set_: SetOption = NONE_GIVEN,
) -> None:
    """Show the cells that `fls run` would run; with --why, also the reasons."""
    spec = read_spec(file, set_)
    selection = Selection(from_=from_, only=only, until=until, force=force)
    made = make_plan(spec, Store(spec.storage), selection)
    if as_json:
        print_json([planned.row() for planned in made.cells])
    else:
        print_plan(made, console_here(), why=why)
        for line in plan_notes(made, Store(spec.storage)):
            console_here().print(line, soft_wrap=True)


@command(
    "fls inspect pipeline.yaml",
    "fls inspect pipeline.yaml 'oneshot[method=eigen,seed=0,sparsity=0.9]' --json",
)
def inspect(
    file: File = DEFAULT_FILE,
    cell: Annotated[
        str | None, typer.Argument(help="A cell or a stage; default: all.", show_default=False)
    ] = None,
    set_: SetOption = NONE_GIVEN,
    as_json: JsonOption = False,
) -> None:
    """Build the networks of a pipeline, and show their prunable weights.

    Nothing is trained, and nothing is written. Each distinct network is shown once: its weights
    with two or more dimensions, and the reason for each that is not prunable.
    """
    found = inspect_cells(load_spec(file, set_), cell)
    if as_json:
        print_json(found)
    else:
        print_inspections(found, console_here())


@command(
    "fls graph pipeline.yaml",
    "fls graph pipeline.yaml --format dot --cells | dot -Tsvg > graph.svg",
)
def graph(
    file: File = DEFAULT_FILE,
    form: Annotated[Format, typer.Option("--format", help="Language to draw in.")] = Format.MERMAID,
    cells: Annotated[bool, typer.Option("--cells", help="Draw each cell.")] = False,
) -> None:
    """Draw a pipeline as Mermaid or as DOT."""
    spec = read_spec(file)
    drawing = cell_drawing(spec.cells) if cells else stage_drawing(spec.cells)
    typer.echo(dot(drawing) if form == "dot" else mermaid(drawing), nl=False)


@command(
    "fls list",
    "fls list pretrain",
    "fls list curvature --file experiments/cifar10_resnet18.yaml --json",
    name="list",
)
def list_names(
    stage: Annotated[
        str | None, typer.Argument(help="A stage type; default: all.", show_default=False)
    ] = None,
    file: Annotated[
        Path, typer.Option("--file", help="The pipeline whose plugins are listed.")
    ] = DEFAULT_FILE,
    as_json: JsonOption = False,
) -> None:
    """List stage types and registered names, or describe one stage type.

    A description has inputs, outputs, and each parameter with type, default, range and meaning.
    Without a pipeline.yaml, the built-in plugin is listed.
    """
    fresh = file == DEFAULT_FILE and not file.exists()
    built_in = import_catalogue(BUILT_IN) if fresh else None
    plugins = [built_in] if built_in else read_spec(file).plugins
    if stage is None:
        catalogues = {plugin.module: plugin.catalogue for plugin in plugins}
        if as_json:
            print_json({module: names_of(found) for module, found in catalogues.items()})
        for module, found in {} if as_json else catalogues.items():
            print_names(module, found, console_here())
        return
    found_stage = _stage(stage, [one for plugin in plugins for one in plugin.catalogue.stages])
    if as_json:
        print_json(description_of(found_stage))
    else:
        print_stage(found_stage, console_here())


def _mistakes(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the mistakes of a pipeline file, or its size if there are none."""
    try:
        spec = read_spec(file, overrides)
    except SpecError as error:
        return {"mistakes": [problem.to_dict() for problem in error.problems]}
    return {"mistakes": [], "stages": len(spec.stages), "cells": len(spec.cells)}


def _stage(name: str, stages: Sequence[Stage]) -> Stage:
    """Return the stage type called `name`.

    Raises:
        BadInput: there is none.
    """
    known = {one.name: one for one in stages}
    if name not in known:
        raise BadInput(f"{name!r} is no stage type{nearest(name, known)}; `fls list` lists them.")
    return known[name]
