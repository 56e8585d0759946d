"""Stages of a spec, the cells that a matrix makes of them, and their names."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import BadInput, nearest
from pipeline.base.shapes import exact
from pipeline.spec.yaml_loader import read_scalar
from pipeline.stage import Params, Resources, Stage

Scalar = str | int | float | bool | None


@exact
@dataclass(frozen=True, kw_only=True)
class Registration:
    """That a cell's model is to be registered.

    Attributes:
        name: of the registered model.
        output: the output that holds it.
        loader: see `pipeline.stage.Catalogue`.
    """

    name: str
    output: str
    loader: str


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One entry of the spec's `stages:`.

    Attributes:
        name: its name in the spec.
        declaration: the stage type that `uses:` names.
        matrix: axis -> values.
        inputs: input name -> names of upstream stages.
        params: the parameters given, without axes and defaults.
        resources: what a cell needs.
        retries: how often the driver tries again after a failure that is not the user's.
        timeout_s: seconds after which an attempt is stopped, or None.
        checkpoint_every_s: seconds between in-stage checkpoints.
        log_bytes: how much is kept of an attempt's log: half of its beginning, half of its end.
        keep: "all", or "results": its files may go once all that follows is there.
        registration: of its cells' models, or None.
    """

    name: str
    declaration: Stage
    matrix: Mapping[str, Sequence[Scalar]]
    inputs: Mapping[str, Sequence[str]]
    params: Mapping[str, Any]
    resources: Resources
    retries: int
    timeout_s: float | None
    checkpoint_every_s: float
    log_bytes: int
    keep: str
    registration: Registration | None = None

    def count_cells(self) -> int:
        """Return how many cells there are; nothing is made."""
        return math.prod(map(len, self.matrix.values()))

    def points(self) -> list[dict[str, Scalar]]:
        """Return the axis values of each cell, the last axis varying fastest."""
        combinations = itertools.product(*self.matrix.values())
        return [dict(zip(self.matrix, values, strict=True)) for values in combinations]


@dataclass(frozen=True)
class Upstream:
    """One connected upstream output: `output` of the cell named `cell`."""

    cell: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a stage: what is run, cached and named.

    Attributes:
        name: such as `oneshot[method=fishleg,seed=0]`, axes sorted; the stage's name without axes.
        stage: the stage's name in the spec.
        declaration: the stage type.
        axes: axis -> value, in the spec's order.
        params: the validated parameters, axes among them.
        inputs: input name -> upstream outputs, in the spec's order of stages, then of cells.
        resources: what it needs.
        retries: see `StageSpec`.
        timeout_s: see `StageSpec`.
        checkpoint_every_s: see `StageSpec`.
        log_bytes: see `StageSpec`.
        keep: see `StageSpec`.
        registration: see `StageSpec`.
    """

    name: str
    stage: str
    declaration: Stage
    axes: Mapping[str, Scalar]
    params: Params
    inputs: Mapping[str, Sequence[Upstream]]
    resources: Resources
    retries: int
    timeout_s: float | None
    checkpoint_every_s: float
    log_bytes: int
    keep: str
    registration: Registration | None = None

    @property
    def sources(self) -> list[str]:
        """Names of the cells that this one takes from, each once."""
        joined = itertools.chain.from_iterable(self.inputs.values())
        return list(dict.fromkeys(source.cell for source in joined))


def cell_name(stage: str, axes: Mapping[str, Scalar]) -> str:
    """Return a cell's full name."""
    if not axes:
        return stage
    return f"{stage}[{','.join(f'{axis}={show(axes[axis])}' for axis in sorted(axes))}]"


def show(value: Scalar) -> str:
    """Return an axis value as it stands in a cell's name."""
    return value if isinstance(value, str) else json.dumps(value)


def coordinates(
    point: Mapping[str, Scalar], axes: Sequence[str]
) -> tuple[tuple[bool, Scalar], ...]:
    """Return a point's values on `axes`, such that 1 and 1.0 are equal, but 1 and true are not."""
    return tuple((isinstance(point[axis], bool), point[axis]) for axis in axes)


def resolve(address: str, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that `address` names, in the order of `cells`.

    Args:
        address: a stage (`oneshot`), a group (`oneshot[method=fishleg]`: any subset of the axes) or
            a cell (all axes).
        cells: the cells of a spec.

    Raises:
        BadInput: no cell has the address; the message has the nearest name.
    """
    stage, bracket, rest = address.partition("[")
    mine = [cell for cell in cells if cell.stage == stage]
    if not mine:
        known = list(dict.fromkeys(cell.stage for cell in cells))
        raise BadInput(
            f"unknown stage {stage!r} in {address!r}{nearest(stage, known)}; "
            f"stages: {', '.join(known)}"
        )
    if bracket and not rest.endswith("]"):
        raise BadInput(f"{address!r} lacks its closing bracket; write {stage}[axis=value,...]")
    for part in filter(None, rest[:-1].split(",")):
        axis, _, text = (piece.strip() for piece in part.partition("="))
        mine = _narrow(address, mine, axis, text)
    return mine


def _narrow(address: str, cells: Sequence[Cell], axis: str, text: str) -> list[Cell]:
    """Return those of one stage's cells whose `axis` has the value written as `text`.

    Raises:
        BadInput: there is no such axis, or none has the value.
    """
    axes = cells[0].axes
    if axis not in axes:
        known = ", ".join(axes) or "none"
        raise BadInput(f"unknown axis {axis!r} in {address!r}{nearest(axis, axes)}; axes: {known}")
    wanted = coordinates({axis: read_scalar(text)}, [axis])
    found = [
        cell
        for cell in cells
        if show(cell.axes[axis]) == text or coordinates(cell.axes, [axis]) == wanted
    ]
    if not found:
        values = list(dict.fromkeys(show(cell.axes[axis]) for cell in cells))
        raise BadInput(
            f"no cell has {axis}={text} in {address!r}{nearest(text, values)}; "
            f"values: {', '.join(values)}"
        )
    return found


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """Return `names` as a list for people, only the first `limit` if there are many."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
