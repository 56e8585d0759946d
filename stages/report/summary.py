"""Rows of evaluated models, grouped into sections, methods and sparsities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.report.rows import Row, target_of

SECTIONS = {
    ("imported", False): "As imported",
    ("imported", True): "As imported, then fine-tuned",
    ("oneshot", False): "One-shot",
    ("multistep", False): "One-shot in several steps",
    ("refined", False): "One-shot in several steps, refined without labels",
    ("oneshot", True): "One-shot, then fine-tuned",
    ("multistep", True): "One-shot in several steps, then fine-tuned",
    ("refined", True): "One-shot in several steps, refined, then fine-tuned",
    ("gradual", False): "Gradual",
    ("gradual", True): "Gradual, then fine-tuned",
}
PUBLISHED = " (published)"


@dataclass(frozen=True, kw_only=True)
class Point:
    """The accuracies of one method at one sparsity, over the seeds.

    Attributes:
        accuracies: in percent, one for each model that was evaluated.
        failed: names of the cells that should have given a model and did not.
    """

    accuracies: tuple[float, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def spread(self) -> float:
        """Half the distance between the lowest and the highest accuracy."""
        return (max(self.accuracies) - min(self.accuracies)) / 2


Lines = dict[str, dict[float, Point]]
"""Method as shown -> sparsity -> point, both in order."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that table and figure show.

    Attributes:
        dense: the dense models' point, or None.
        sections: section title -> lines.
        failed: names of all cells that failed, in order.
    """

    dense: Point | None
    sections: Mapping[str, Lines]
    failed: tuple[str, ...]


def summarise(
    rows: Sequence[Row],
    failed: Sequence[Row] = (),
    published: Sequence[tuple[str, Mapping[float, float]]] = (),
) -> Summary:
    """Group rows by section, method and sparsity; seeds fall together.

    A method that appears with several structures, or with several dampings at one place, becomes
    one line for each.

    Args:
        rows: as `evaluate` writes them.
        failed: `model_cell` and `axes` of models that are not there.
        published: (method, sparsity -> accuracy in percent) of one-shot results from elsewhere.
    """
    label = labels_of(rows)
    dense = [row["accuracy"] for row in rows if row["mode"] == "dense"]
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        section = SECTIONS.get((row["mode"], row["finetuned"]))
        if section is not None:
            line = found.setdefault(section, {}).setdefault(label(row), {})
            line.setdefault(target_of(row), []).append(row["accuracy"])
    for method, values in published:
        line = found.setdefault(SECTIONS["oneshot", False], {}).setdefault(method + PUBLISHED, {})
        line.update({sparsity: [accuracy] for sparsity, accuracy in values.items()})
    lost = _lost_points(rows, failed)
    sections: dict[str, Lines] = {}
    for title in SECTIONS.values():
        gone = {key[1:]: cells for key, cells in lost.items() if key[0] == title}
        if title in found or gone:
            sections[title] = _lines(found.get(title, {}), gone)
    return Summary(
        dense=Point(accuracies=tuple(dense)) if dense else None,
        sections=sections,
        failed=tuple(row["model_cell"] for row in failed),
    )


def _lines(
    found: Mapping[str, Mapping[float, Sequence[float]]],
    lost: Mapping[tuple[str, float], Sequence[str]],
) -> Lines:
    methods = list(dict.fromkeys([*found, *(method for method, _ in lost)]))
    lines: Lines = {}
    for method in methods:
        here = found.get(method, {})
        sparsities = {*here, *(sparsity for name, sparsity in lost if name == method)}
        lines[method] = {
            sparsity: Point(
                accuracies=tuple(here.get(sparsity, ())),
                failed=tuple(lost.get((method, sparsity), ())),
            )
            for sparsity in sorted(sparsities)
        }
    return lines


def labels_of(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return what names a row's line: its method, and as much else as tells lines apart."""
    of_structures = _methods_with_several(rows, "structure", ("method",))
    place = ("method", "structure", "mode", "finetuned", "target", "seed")
    of_dampings = _methods_with_several(rows, "damping", place)

    def label(row: Row) -> str:
        method = row["method"]
        details: list[str] = []
        if method in of_structures and row.get("structure") is not None:
            details.append(row["structure"])
        if method in of_dampings and row["damping"] is not None:
            details.append(f"damping {row['damping']:g}")
        return f"{method} ({', '.join(details)})" if details else method

    return label


def _methods_with_several(rows: Sequence[Row], name: str, place: Sequence[str]) -> set[str]:
    """Return the methods of which two rows that are equal in `place` differ in `name`."""
    found: dict[tuple[Any, ...], set[Any]] = {}
    for row in rows:
        at = {**row, "target": target_of(row)}
        found.setdefault(tuple(at.get(key) for key in place), set()).add(row.get(name))
    return {key[place.index("method")] for key, values in found.items() if len(values) > 1}


def _lost_points(
    rows: Sequence[Row], failed: Sequence[Row]
) -> dict[tuple[str, str, float], list[str]]:
    """Return (section, method, sparsity) -> failed cells, for cells whose place is known.

    A failed cell belongs to the section of its stage's other cells, and to the method and sparsity
    of its axes.
    """
    section_of = {
        row["model_cell"].partition("[")[0]: SECTIONS.get((row["mode"], row["finetuned"]))
        for row in rows
    }
    lost: dict[tuple[str, str, float], list[str]] = {}
    for row in failed:
        section = section_of.get(row["model_cell"].partition("[")[0])
        axes = row["axes"]
        if section is not None and "method" in axes and "sparsity" in axes:
            place = (section, axes["method"], axes["sparsity"])
            lost.setdefault(place, []).append(row["model_cell"])
    return lost
