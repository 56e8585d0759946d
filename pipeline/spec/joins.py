"""Joins of cells: each takes the upstream cells with equal values on shared axes.

An axis that only the upstream stage has is a fan-in, for inputs that are declared `many`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from pipeline.base import limits
from pipeline.spec.cells import Cell, Scalar, StageSpec, Upstream, cell_name, coordinates, shorten
from pipeline.stage import Params


class JoinError(Exception):
    """Cells of a stage cannot be joined to an input; the text is for the user."""


def topological(stages: Mapping[str, StageSpec]) -> tuple[list[str], list[list[str]]]:
    """Sort stages topologically, else in the given order; ignores unknown upstream stages.

    Returns:
        The sorted names, and the cycles, each as [a, b, ..., a] along the flow of data. Each cycle
        is cut at its last step. After `limits.PROBLEMS` cycles the order is the given one.
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
    """Rotate a cycle to begin and end with its first name in `order`."""
    ring = cycle[:-1]
    start = ring.index(min(ring, key=order.index))
    return [*ring[start:], *ring[:start], ring[start]]


def _output_of_kind(upstream: StageSpec, kind: str) -> str:
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
    # Returns the upstream cells of each point of `stage`.
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
        stages: name -> stage, in topological order, with declared inputs only.
        params: cell name -> validated parameters; cells without them are left out.
        report: called with stage, input, upstream stage and message of each failed join.

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
        connections = [(name, other) for name, others in stage.inputs.items() for other in others]
        for name, upstream in [(name, stages[one]) for name, one in connections if one in stages]:
            declared = stage.declaration.inputs[name]
            try:
                output = _output_of_kind(upstream, declared.kind)
                connected = _join(stage, upstream, points, declared.many)
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
                cell = Cell(
                    name=full_name,
                    stage=stage.name,
                    axes=point,
                    params=params[full_name],
                    inputs=wire,
                    **stage.settings(),
                )
                cells.append(cell)
    return cells


def _require_few_links(count: int) -> None:
    if count > limits.LINKS:
        raise JoinError(
            f"expected at most {limits.LINKS:,} connections between cells, got {count:,} with "
            "these; give both stages the same axes, or fewer values"
        )
