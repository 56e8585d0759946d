"""Stages of a spec, the cells that a matrix makes of them, and how cells join.

A cell is one combination of a stage's axis values. It takes from each upstream stage the cells with
equal values on all axes that both have; axes that only the upstream has are a fan-in, which an
input must be declared `many` to take.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipeline.base import limits
from pipeline.base.errors import BadInput, nearest
from pipeline.spec.yaml_loader import read_scalar
from pipeline.stage import Params, Resources, Stage

Scalar = str | int | float | bool | None


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
class Source:
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
    inputs: Mapping[str, Sequence[Source]]
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


class JoinError(Exception):
    """Cells of a stage that do not find what an input needs; the text is for the user."""


def cell_name(stage: str, axes: Mapping[str, Scalar]) -> str:
    """Return a cell's full name."""
    if not axes:
        return stage
    return f"{stage}[{','.join(f'{axis}={show(axes[axis])}' for axis in sorted(axes))}]"


def show(value: Scalar) -> str:
    """Return an axis value as it stands in a cell's name."""
    return value if isinstance(value, str) else json.dumps(value)


def topological(stages: Mapping[str, StageSpec]) -> tuple[list[str], list[list[str]]]:
    """Sort stages so that each follows its upstream, else in the order given.

    Args:
        stages: name -> stage; upstream stages that are not among them are ignored.

    Returns:
        The sorted names, and the cycles found, each as [a, b, ..., a] along the flow of data. A
        cycle is cut at its last step, so that the order holds for the rest. Of very many cycles
        only the first are found, and the order is the one given.
    """
    edges = {
        name: [other for others in stage.inputs.values() for other in others if other in stages]
        for name, stage in stages.items()
    }
    cycles: list[list[str]] = []
    while True:
        sorter = TopologicalSorter(edges)
        try:
            sorter.prepare()
        except CycleError as error:
            cycle = _from_first(error.args[1], list(edges))
            edges[cycle[-1]].remove(cycle[-2])
            cycles.append(cycle)
            if len(cycles) >= limits.PROBLEMS:
                return list(stages), cycles
            continue
        break
    rank = {name: index for index, name in enumerate(edges)}
    names = list(edges)
    order: list[str] = []
    ready = sorted(rank[name] for name in sorter.get_ready())
    while ready:
        order.append(names[heapq.heappop(ready)])
        sorter.done(order[-1])
        for name in sorter.get_ready():
            heapq.heappush(ready, rank[name])
    return order, cycles


def _from_first(cycle: list[str], order: Sequence[str]) -> list[str]:
    """Turn a cycle so that it begins, and ends, with the name that comes first in `order`."""
    ring = cycle[:-1]
    start = ring.index(min(ring, key=order.index))
    return [*ring[start:], *ring[:start], ring[start]]


def _output_of_kind(upstream: StageSpec, kind: str) -> str:
    """Return the name of the only output of `kind` that `upstream` gives.

    Raises:
        JoinError: it has none, or several.
    """
    outputs = upstream.declaration.outputs
    found = [name for name, output in outputs.items() if output.kind == kind]
    if len(found) == 1:
        return found[0]
    if found:
        given = f"{len(found)} outputs of that kind; expected exactly one"
    else:
        given = " and ".join(sorted({repr(output.kind) for output in outputs.values()}))
    raise JoinError(
        f"the input takes a {kind!r}, but {upstream.name!r} "
        f"(uses {upstream.declaration.name}) gives {given or 'nothing'}"
    )


def _join(
    stage: StageSpec, upstream: StageSpec, points: Sequence[Mapping[str, Scalar]], many: bool
) -> list[list[str]]:
    """Return for each point of `stage` the cells of `upstream` it takes.

    Raises:
        JoinError: an axis that only `upstream` has, or points that find nothing.
    """
    extra = [axis for axis in upstream.matrix if axis not in stage.matrix]
    shared = [axis for axis in upstream.matrix if axis in stage.matrix]
    if extra and not many:
        names = [cell_name(upstream.name, point) for point in upstream.points()]
        raise JoinError(
            f"{stage.name!r} has no axis {' and '.join(map(repr, extra))}, so which cell of "
            f"{upstream.name!r} it takes is not said ({shorten(names)}); add the axis to its matrix"
        )
    groups: dict[tuple[tuple[bool, Scalar], ...], list[str]] = {}
    for point in upstream.points():
        name = cell_name(upstream.name, point)
        groups.setdefault(_coordinates(point, shared), []).append(name)
    lone = [point for point in points if _coordinates(point, shared) not in groups]
    if lone:
        raise JoinError(
            f"{upstream.name!r} has no cell with the {' and '.join(shared)} of "
            f"{shorten([cell_name(stage.name, point) for point in lone])}"
        )
    return [groups[_coordinates(point, shared)] for point in points]


def expand(
    stages: Mapping[str, StageSpec],
    params: Mapping[str, Params],
    report: Callable[[str, str, str, str], None],
) -> list[Cell]:
    """Make the cells of all stages and connect them.

    Args:
        stages: name -> stage, in topological order; inputs name declared inputs of theirs.
        params: cell name -> validated parameters; cells without are left out.
        report: is told what does not join: stage, input, upstream stage, message.

    Returns:
        The cells, in topological order.
    """
    cells: list[Cell] = []
    links = 0
    for stage in stages.values():
        points = stage.points()
        wires: list[dict[str, list[Source]]] = [{name: [] for name in stage.inputs} for _ in points]
        for name, upstream in _connections(stage, stages):
            try:
                output, connected = _connect(stage, name, upstream, points)
                links += sum(map(len, connected))
                _require_few_links(links)
            except JoinError as error:
                report(stage.name, name, upstream.name, str(error))
                continue
            for wire, sources in zip(wires, connected, strict=True):
                wire[name] += [Source(cell, output) for cell in sources]
        for point, wire in zip(points, wires, strict=True):
            full_name = cell_name(stage.name, point)
            if full_name in params:
                cells.append(_cell(stage, full_name, point, params[full_name], wire))
    return cells


def _connections(
    stage: StageSpec, stages: Mapping[str, StageSpec]
) -> Iterator[tuple[str, StageSpec]]:
    """Yield each input name of `stage` with each stage that is connected to it."""
    for name, connected in stage.inputs.items():
        for upstream in connected:
            if upstream in stages:
                yield name, stages[upstream]


def _connect(
    stage: StageSpec, name: str, upstream: StageSpec, points: Sequence[Mapping[str, Scalar]]
) -> tuple[str, list[list[str]]]:
    """Return what output of `upstream` the input `name` takes; for each point, of which cells."""
    declared = stage.declaration.inputs[name]
    output = _output_of_kind(upstream, declared.kind)
    return output, _join(stage, upstream, points, declared.many)


def _require_few_links(count: int) -> None:
    """Check how many connections the cells have.

    Raises:
        JoinError: too many.
    """
    if count > limits.LINKS:
        raise JoinError(
            f"expected at most {limits.LINKS:,} connections between cells, got {count:,} with "
            "these; give both stages the same axes, or fewer values"
        )


def _cell(
    stage: StageSpec,
    name: str,
    axes: Mapping[str, Scalar],
    params: Params,
    inputs: Mapping[str, Sequence[Source]],
) -> Cell:
    return Cell(
        name=name,
        stage=stage.name,
        declaration=stage.declaration,
        axes=axes,
        params=params,
        inputs=inputs,
        resources=stage.resources,
        retries=stage.retries,
        registration=stage.registration,
        timeout_s=stage.timeout_s,
        checkpoint_every_s=stage.checkpoint_every_s,
        log_bytes=stage.log_bytes,
        keep=stage.keep,
    )


def _coordinates(
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
    wanted = _coordinates({axis: read_scalar(text)}, [axis])
    found = [
        cell
        for cell in cells
        if show(cell.axes[axis]) == text or _coordinates(cell.axes, [axis]) == wanted
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
