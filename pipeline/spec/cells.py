"""Stages of a spec, the cells of their matrices, and the names of cells."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pipeline.base.errors import BadInput, nearest
from pipeline.base.shapes import exact
from pipeline.spec.yaml_loader import read_scalar
from pipeline.stage import Params, Resources, Stage

Scalar = str | int | float | bool | None


@exact
@dataclass(frozen=True, kw_only=True)
class Registration:
    """The registration of a cell's model: its name there, its output and its loader.

    `loader`: see `pipeline.stage.Catalogue`.
    """

    name: str
    output: str
    loader: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all cells of a stage share.

    Attributes:
        declaration: the stage type that `uses:` names.
        resources: the resources of a cell.
        retries: number of retries after a failure that a retry may correct.
        timeout_s: seconds after which an attempt is stopped, or None.
        checkpoint_every_s: seconds between in-stage checkpoints.
        log_bytes: maximal size of an attempt's log: half for its beginning, half for its end.
        keep: "all", or "results": files may be collected once all downstream cells are complete.
        registration: of the cells' models, or None.
    """

    declaration: Stage
    resources: Resources
    retries: int
    timeout_s: float | None
    checkpoint_every_s: float
    log_bytes: int
    keep: str
    registration: Registration | None = None


@dataclass(frozen=True, kw_only=True)
class StageSpec(Settings):
    """One entry of the spec's `stages:`.

    Attributes:
        name: its name in the spec.
        matrix: axis -> values.
        inputs: input name -> names of upstream stages.
        params: the parameters in the file, without axes and defaults.
    """

    name: str
    matrix: Mapping[str, Sequence[Scalar]]
    inputs: Mapping[str, Sequence[str]]
    params: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """Return the settings that its cells share, by name."""
        return {one.name: getattr(self, one.name) for one in fields(Settings)}

    def count_cells(self) -> int:
        """Return the number of cells, without making them."""
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
class Cell(Settings):
    """One cell of a stage, the unit of running and caching.

    Attributes:
        name: such as `oneshot[method=eigen,seed=0]`, axes sorted; the stage's name without axes.
        stage: the stage's name in the spec.
        axes: axis -> value, in the spec's order.
        params: the validated parameters, including axes.
        inputs: input name -> upstream outputs, in the spec's order of stages, then of cells.
    """

    name: str
    stage: str
    axes: Mapping[str, Scalar]
    params: Params
    inputs: Mapping[str, Sequence[Upstream]]

    @property
    def sources(self) -> list[str]:
        """Names of the upstream cells, each once."""
        joined = itertools.chain.from_iterable(self.inputs.values())
        return list(dict.fromkeys(source.cell for source in joined))


def cell_name(stage: str, axes: Mapping[str, Scalar]) -> str:
    """Return a cell's full name."""
    if not axes:
        return stage
    return f"{stage}[{','.join(f'{axis}={show(axes[axis])}' for axis in sorted(axes))}]"


def show(value: Scalar) -> str:
    """Return an axis value as cell names show it."""
    return value if isinstance(value, str) else json.dumps(value)


def coordinates(
    point: Mapping[str, Scalar], axes: Sequence[str]
) -> tuple[tuple[bool, Scalar], ...]:
    """Return a point's values on `axes`; 1 and 1.0 are equal, 1 and true are not."""
    return tuple((isinstance(point[axis], bool), point[axis]) for axis in axes)


def resolve(address: str, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that `address` names, in the order of `cells`.

    Args:
        address: a stage (`oneshot`), a group (`oneshot[method=eigen]`: any subset of the axes) or
            a cell (all axes).
        cells: the cells of a spec.

    Raises:
        BadInput: no cell has the address; names the nearest one.
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
    """Return the first `limit` names as text, with the number of the others."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
