"""Pipelines whose axes of candidates are extended, see `benchmarks.harness.sweeps`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness.sweeps import next_value
from pipeline.spec.cells import Cell
from pipeline.spec.spec import Spec

Grids = dict[str, list[float]]
"""`STAGE.AXIS` -> values, sorted."""


def extended_grids(spec: Spec, row: Mapping[str, Any]) -> Grids:
    """Return the grids behind a row that have to be extended, with their further values.

    Args:
        spec: the pipeline of the row, with its options.
        row: of results; its `choices` say which values are ends of their grids.

    Only an axis that a `select` lacks is a grid: of the candidates' stage, and of all stages before
    it that have the same values on this axis.
    """
    cells = {cell.name: cell for cell in spec.cells}
    grids: Grids = {}
    for setting, choice in row.get("choices", {}).items():
        if not all(isinstance(one, float) for one in choice["among"]):
            continue  # ten times as many epochs are no finer choice, but another cost
        value = next_value(choice["chosen"], choice["among"])
        axis = setting.rpartition(".")[2]
        if value is None:
            continue
        values = sorted({*choice["among"], value})
        for stage in _stages_with(spec, cells, row["model_cell"], axis):
            grids[f"{stage}.{axis}"] = values
    return grids


def with_grids(overrides: Sequence[str], grids: Grids) -> tuple[str, ...]:
    """Return the `--set` options `overrides`, with `grids` in place of theirs of the same axes."""
    kept = [one for one in overrides if one.partition("=")[0] not in grids]
    # in exponents YAML wants a dot
    listed = {axis: ", ".join(f"{one:.12e}" for one in values) for axis, values in grids.items()}
    return (*kept, *(f"{axis}=[{values}]" for axis, values in listed.items()))


def _stages_with(spec: Spec, cells: Mapping[str, Cell], name: str, axis: str) -> list[str]:
    """Return the stages before a model that have an axis which a `select` among them lacks."""
    above = {one.stage for one in _upstream(cells, name)}
    selects = {one.stage for one in _upstream(cells, name) if one.declaration.name == "select"}
    if all(axis in spec.stages[stage].matrix for stage in selects):
        return []
    return [stage for stage in spec.stages if stage in above and axis in spec.stages[stage].matrix]


def _upstream(cells: Mapping[str, Cell], name: str) -> Iterator[Cell]:
    """Yield a cell and all before it, each once."""
    seen, ahead = {name}, [name]
    while ahead:
        cell = cells[ahead.pop()]
        yield cell
        further = [source for source in cell.sources if source not in seen]
        seen.update(further)
        ahead += further
