"""The comparison as a Markdown table for people and a CSV file for programs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.stage import csv_text
from stages.columns import COLUMNS, Row, target_of
from stages.report.summary import PUBLISHED, Lines, Point, Summary


def markdown(summary: Summary, title: str) -> str:
    """Return one table a section: a row for each method, a column for each sparsity."""
    parts = [f"# {title}"]
    for name, point in summary.dense.items():
        parts.append(f"{dense_title(name)}: {_cell(point)} % accuracy.")
    for section, lines in summary.sections.items():
        parts += [f"## {section}", _table(lines)]
    parts.append(
        "Accuracy in percent, mean ± half the range over seeds; the best of a column is bold. "
        "Columns are the fractions of prunable weights that were asked to be removed."
    )
    parts += _footnotes(summary)
    if summary.failed:
        cells = "\n".join(f"- `{name}`" for name in summary.failed)
        parts.append(f"† Failed, so not in the numbers:\n\n{cells}")
    return "\n\n".join(parts) + "\n"


def dense_title(label: str) -> str:
    """Return the title of a dense network.

    >>> dense_title("dense"), dense_title("dense (width 8)")
    ('Dense network', 'Dense network (width 8)')
    """
    return label.replace("dense", "Dense network", 1)


def _footnotes(summary: Summary) -> list[str]:
    """Return the warnings, and the weights that are not prunable."""
    parts = []
    if summary.warnings:
        found = [f"- {text} ({_listed(cells)})" for text, cells in summary.warnings.items()]
        parts.append("⚠ Read with care:\n\n" + "\n".join(found))
    if summary.unprunable:
        reasons: dict[str, list[str]] = {}
        for name, why in summary.unprunable.items():
            reasons.setdefault(why, []).append(name)
        found = [f"- {_listed(names)}: {why}" for why, names in reasons.items()]
        parts.append("Weights that are not prunable, and so not counted:\n\n" + "\n".join(found))
    return parts


def _listed(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + rest


def _table(lines: Lines) -> str:
    sparsities = sorted({sparsity for points in lines.values() for sparsity in points})
    best = {sparsity: _best(lines, sparsity) for sparsity in sparsities}
    out = [
        f"| method | {' | '.join(f'{sparsity:g}' for sparsity in sparsities)} |",
        f"|---|{'---:|' * len(sparsities)}",
    ]
    for method, points in lines.items():
        cells = [
            _cell(points[sparsity], bold=method == best[sparsity]) if sparsity in points else ""
            for sparsity in sparsities
        ]
        name = f"*{method}*" if method.endswith(PUBLISHED) else method
        out.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(out)


def _best(lines: Lines, sparsity: float) -> str:
    """Return the method with the highest mean, published ones left out; the first of equals."""
    means = {
        method: points[sparsity].mean
        for method, points in lines.items()
        if sparsity in points and points[sparsity].accuracies and not method.endswith(PUBLISHED)
    }
    return max(means, key=means.__getitem__) if len(means) > 1 else ""


def _cell(point: Point, *, bold: bool = False) -> str:
    mark = (" †" if point.failed else "") + (" ⚠" if point.warned else "")
    if not point.accuracies:
        return f"failed{mark}"
    text = f"{point.mean:.2f}"
    if len(point.accuracies) > 1:
        text += f" ± {point.spread:.2f}"
    return (f"**{text}**" if bold else text) + mark


def table_csv(rows: Sequence[Row]) -> str:
    """Return all rows, one line for each evaluated model, with all that tells them apart."""
    names = [column.name for column in COLUMNS if column.in_tables and not column.by_runner]
    return csv_text(names, [{**row, "target": target_of(row)} for row in rows])
