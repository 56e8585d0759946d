"""Joins of cells: each takes from an upstream stage the cells with equal values on shared axes.

Axes that only the upstream has are a fan-in, which an input must be declared `many` to take.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from pipeline.base import limits
from pipeline.spec.cells import Cell, Scalar, StageSpec, Upstream, cell_name, coordinates, shorten
from pipeline.stage import Params


class JoinError(Exception):
    """Cells of a stage that do not find what an input needs; the text is for the user."""


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
        groups.setdefault(coordinates(point, shared), []).append(name)
    lone = [point for point in points if coordinates(point, shared) not in groups]
    if lone:
        raise JoinError(
            f"{upstream.name!r} has no cell with the {' and '.join(shared)} of "
            f"{shorten([cell_name(stage.name, point) for point in lone])}"
        )
    return [groups[coordinates(point, shared)] for point in points]


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
        wires: list[dict[str, list[Upstream]]] = [
            {name: [] for name in stage.inputs} for _ in points
        ]
        for name, upstream in _connections(stage, stages):
            try:
                output, connected = _connect(stage, name, upstream, points)
                links += sum(map(len, connected))
                _require_few_links(links)
            except JoinError as error:
                report(stage.name, name, upstream.name, str(error))
                continue
            for wire, sources in zip(wires, connected, strict=True):
                wire[name] += [Upstream(cell, output) for cell in sources]
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
    inputs: Mapping[str, Sequence[Upstream]],
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
