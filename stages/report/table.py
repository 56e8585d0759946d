"""The comparison as a Markdown table for people and a CSV file for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pipeline.stage import csv_text
from stages.columns import COLUMNS, Row, target_of
from stages.report.paired import DESCRIPTIONS, LEVEL, find_best, used_tests
from stages.report.summary import PUBLISHED, Lines, Point, Summary


def markdown(summary: Summary, title: str) -> str:
    """Return one table a section: a row for each method, a column for each sparsity."""
    parts = [f"# {title}"]
    for name, point in summary.dense.items():
        parts.append(f"{dense_title(name)}: {_cell(point)} % accuracy.")
    for section, lines in summary.sections.items():
        parts += [f"## {section}", table(lines)]
    parts.append(legend(summary.sections.values()))
    parts += footnotes(summary)
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


def footnotes(summary: Summary) -> list[str]:
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


def legend(sections: Iterable[Lines]) -> str:
    """Return the meaning of the numbers in tables of these sections.

    The deviation from the draw of the images is computed for the accuracies that are shown.
    """
    parts = [
        "Accuracy in percent: mean ± standard deviation (n - 1) over the n models of other seeds; "
        "one model, n = 1, has no deviation. Columns are the fractions of prunable weights that "
        "were asked to be removed."
    ]
    sections = list(sections)
    tests = [DESCRIPTIONS[test] for test in used_tests(sections)]
    if tests:
        parts.append(
            f"Bold: the best of a column, and all that a test at {100 * LEVEL:g} % cannot tell "
            f"from it: {'; '.join(tests)}. A row with n = 1 says nothing about other seeds."
        )
    elif any(len(lines) > 1 for lines in sections):
        parts.append("Bold: the best of a column, untested.")
    points = [point for lines in sections for line in lines.values() for point in line.values()]
    measured = [point for point in points if point.accuracies and point.sampling is not None]
    counts = sorted({point.images for point in measured if point.images})
    if counts:
        spread = sorted(point.sampling or 0.0 for point in measured)
        listed = " or ".join(f"{count:,}" for count in counts)
        parts.append(
            f"An accuracy a on N = {listed} images has a sampling standard deviation of "
            f"sqrt(a (1 - a) / N): {spread[0]:.2f} to {spread[-1]:.2f} points here."
        )
    return " ".join(parts)


def table(lines: Lines, further: Callable[[str, float], str] = lambda method, sparsity: "") -> str:
    """Return lines as Markdown: a row for each method, with n, a column for each sparsity.

    Args:
        lines: of one section.
        further: (method, sparsity) -> text behind the accuracy.
    """
    sparsities = sorted({sparsity for points in lines.values() for sparsity in points})
    best = {sparsity: find_best(lines, sparsity).names for sparsity in sparsities}
    out = [
        f"| method | n | {' | '.join(f'{sparsity:g}' for sparsity in sparsities)} |",
        f"|---|{'---:|' * (len(sparsities) + 1)}",
    ]
    for method, points in lines.items():
        cells = [
            _cell(points[sparsity], bold=method in best[sparsity]) + further(method, sparsity)
            if sparsity in points
            else ""
            for sparsity in sparsities
        ]
        published = method.endswith(PUBLISHED)
        name, n = (f"*{method}*", "") if published else (method, _seeds(points.values()))
        out.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return "\n".join(out)


def _seeds(points: Iterable[Point]) -> str:
    """Return the number of models behind each point, or the smallest and the largest."""
    counts = sorted({len(point.accuracies) for point in points})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _cell(point: Point, *, bold: bool = False) -> str:
    mark = (" †" if point.failed else "") + (" ⚠" if point.warned else "")
    if not point.accuracies:
        return f"failed{mark}"
    return (f"**{point.text}**" if bold else point.text) + mark


def table_csv(rows: Sequence[Row]) -> str:
    """Return all rows, one line for each evaluated model, with all that tells them apart."""
    names = [column.name for column in COLUMNS if column.in_tables and not column.by_runner]
    return csv_text(names, [{**row, "target": target_of(row)} for row in rows])
