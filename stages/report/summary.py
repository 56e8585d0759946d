"""Rows of evaluated models, grouped into sections, methods and sparsities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev

from stages.answers import Answers
from stages.columns import Row, target_of
from stages.report.labels import labels_of
from stages.report.rows import model_of, stage_of, warnings_of

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
        images: number of images that each accuracy counts, or None if the rows do not tell.
        answers: of the models, in the order of their accuracies; none of published ones.
        failed: names of the cells that failed to give a model.
        warned: names of the cells whose models have a warning.
    """

    accuracies: tuple[float, ...] = ()
    images: int | None = None
    answers: tuple[Answers, ...] = ()
    failed: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a sample, by n - 1, of the accuracies; None for fewer than two."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def sampling(self) -> float | None:
        """Standard deviation in points that the draw of N images gives: sqrt(a (1 - a) / N).

        >>> f"{Point(accuracies=(80.0,), images=10_000).sampling:.2f}"
        '0.40'
        """
        if not self.images:
            return None
        return math.sqrt(max(0.0, self.mean * (100 - self.mean)) / self.images)

    @property
    def text(self) -> str:
        """Mean ± standard deviation, with two decimals; one accuracy has no deviation.

        >>> Point(accuracies=(90.0, 92.0)).text, Point(accuracies=(90.0,)).text
        ('91.00 ± 1.41', '90.00')
        """
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}"


Lines = dict[str, dict[float, Point]]
"""Method as shown -> sparsity -> point, both in order."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of table and figure.

    Attributes:
        dense: dense networks, as shown -> point.
        sections: section title -> lines.
        failed: names of all cells that failed, in order.
        warnings: warning -> names of the cells of its models.
        unprunable: weight -> why it is not prunable, over all networks.
    """

    dense: Mapping[str, Point]
    sections: Mapping[str, Lines]
    failed: tuple[str, ...]
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unprunable: Mapping[str, str] = field(default_factory=dict)


def summarise(
    rows: Sequence[Row],
    failed: Sequence[Row] = (),
    published: Sequence[tuple[str, Mapping[float, float]]] = (),
) -> Summary:
    """Group rows by section, line and target; seeds are averaged.

    Rows that differ in anything else are separate lines; see `labels_of`. A model that was
    evaluated twice counts once.

    Args:
        rows: as `evaluate` writes them.
        failed: `model_cell` and `axes` of models that failed; and `stage` of one whose evaluation
            failed, which has the place of the model_cell.
        published: (method, sparsity -> accuracy in percent) of one-shot results from elsewhere.
    """
    label = labels_of(rows)
    dense: dict[str, list[Row]] = {}
    found: dict[str, dict[str, dict[float, list[Row]]]] = {}
    for row in _each_model_once(rows):
        section = SECTIONS.get((row["mode"], row["finetuned"]))
        if row["mode"] == "dense":
            dense.setdefault(label(row), []).append(row)
        elif section is not None:
            line = found.setdefault(section, {}).setdefault(label(row), {})
            line.setdefault(target_of(row), []).append(row)
    lost = _lost_points(rows, failed, label)
    images = _images(rows)  # the published accuracies are of the same test images
    sections: dict[str, Lines] = {}
    for title in SECTIONS.values():
        gone = {key[1:]: cells for key, cells in lost.items() if key[0] == title}
        lines = _lines(found.get(title, {}), gone)
        if title == SECTIONS["oneshot", False]:
            for method, values in published:
                points = {
                    at: Point(accuracies=(one,), images=images)
                    for at, one in sorted(values.items())
                }
                lines.setdefault(method + PUBLISHED, {}).update(points)
        if lines:
            sections[title] = lines
    return Summary(
        dense={name: _point(same) for name, same in dense.items()},
        sections=sections,
        failed=tuple(row["model_cell"] for row in failed),
        warnings=_warnings(rows),
        unprunable={name: why for row in rows for name, why in row.get("unprunable", {}).items()},
    )


def _each_model_once(rows: Sequence[Row]) -> list[Row]:
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        found.setdefault((model_of(row), row["split"]), row)
    return list(found.values())


def _warnings(rows: Sequence[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for text in warnings_of(row):
            found.setdefault(text, []).append(row["model_cell"])
    return found


def _point(rows: Sequence[Row], failed: Sequence[str] = ()) -> Point:
    return Point(
        accuracies=tuple(row["accuracy"] for row in rows),
        images=_images(rows),
        answers=tuple(map(Answers.of, rows)),
        failed=tuple(failed),
        warned=tuple(row["model_cell"] for row in rows if warnings_of(row)),
    )


def _images(rows: Sequence[Row]) -> int | None:
    """Return the number of images that rows were measured on, or None if they differ in it."""
    counts = {row.get("images") for row in rows}
    return next(iter(counts)) if len(counts) == 1 else None


def _lines(
    found: Mapping[str, Mapping[float, Sequence[Row]]],
    lost: Mapping[tuple[str, float], Sequence[str]],
) -> Lines:
    names = list(dict.fromkeys([*found, *(name for name, _ in lost)]))
    lines: Lines = {}
    for name in names:
        here = found.get(name, {})
        targets = {*here, *(target for other, target in lost if other == name)}
        lines[name] = {
            target: _point(here.get(target, ()), lost.get((name, target), ()))
            for target in sorted(targets)
        }
    return lines


def _lost_points(
    rows: Sequence[Row], failed: Sequence[Row], label: Callable[[Row], str]
) -> dict[tuple[str, str, float], list[str]]:
    """Return (section, line, target) -> failed cells, where these can be inferred.

    A failed cell belongs to the section of its stage's other cells, and to the method and sparsity
    of its axes; to the line of its stage's other cells of that method, if they have one line.
    """
    section_of = {stage_of(row): SECTIONS.get((row["mode"], row["finetuned"])) for row in rows}
    lines: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        lines.setdefault((stage_of(row), row["method"]), set()).add(label(row))
    lost: dict[tuple[str, str, float], list[str]] = {}
    for row in failed:
        section = section_of.get(stage_of(row))
        axes = row["axes"]
        if section is not None and "method" in axes and "sparsity" in axes:
            same = lines.get((stage_of(row), axes["method"]), set())
            name = next(iter(same)) if len(same) == 1 else axes["method"]
            place = (section, name, axes["sparsity"])
            lost.setdefault(place, []).append(row["model_cell"])
    return lost
