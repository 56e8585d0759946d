"""Draws the graph of a spec, stage by stage or cell by cell, as Mermaid or DOT text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.spec.cells import Cell


@dataclass(frozen=True)
class Drawing:
    """A graph to be drawn.

    Attributes:
        labels: node -> the lines of its label.
        edges: (from, to) along the flow of data.
    """

    labels: Mapping[str, Sequence[str]]
    edges: Sequence[tuple[str, str]]


def stage_drawing(cells: Sequence[Cell]) -> Drawing:
    """Draw stages, each with its number of cells and its axes."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.stage, []).append(cell)
    stage_of = {cell.name: cell.stage for cell in cells}
    edges = [(stage_of[source], cell.stage) for cell in cells for source in cell.sources]
    labels = {
        stage: [stage, f"{len(group)} cells: {' x '.join(group[0].axes)}"]
        if group[0].axes
        else [stage]
        for stage, group in groups.items()
    }
    return Drawing(labels, list(dict.fromkeys(edges)))


def cell_drawing(cells: Sequence[Cell]) -> Drawing:
    """Draw every cell."""
    edges = [(source, cell.name) for cell in cells for source in cell.sources]
    return Drawing({cell.name: [cell.name] for cell in cells}, edges)


def mermaid(drawing: Drawing) -> str:
    """Return a drawing as a Mermaid flowchart."""
    ids = {node: f"n{index}" for index, node in enumerate(drawing.labels)}
    lines = ["flowchart LR"]
    for node, label in drawing.labels.items():
        text = "<br/>".join(line.replace('"', "#quot;") for line in label)
        lines.append(f'    {ids[node]}["{text}"]')
    lines += [f"    {ids[source]} --> {ids[target]}" for source, target in drawing.edges]
    return "\n".join(lines) + "\n"


def dot(drawing: Drawing) -> str:
    """Return a drawing as DOT, for Graphviz."""
    lines = ["digraph pipeline {", "    rankdir=LR;", "    node [shape=box];"]
    for node, label in drawing.labels.items():
        text = r"\n".join(map(_escape, label))
        lines.append(f'    "{_escape(node)}" [label="{text}"];')
    for source, target in drawing.edges:
        lines.append(f'    "{_escape(source)}" -> "{_escape(target)}";')
    return "\n".join([*lines, "}"]) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
