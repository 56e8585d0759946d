"""Numbers over several seeds: means, standard deviations, clear differences, and error bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

Numbers = Sequence[float]
Order = Literal["above", "below", "level"]

_CLEAR = 3.0  # standard errors
CLEAR = "a difference is clear if its mean over seeds exceeds three of its standard errors"


def deviation(numbers: Numbers) -> float:
    """Return the standard deviation of a sample, by n - 1; 0 for a single number."""
    return stdev(numbers) if len(numbers) > 1 else 0.0


def show(numbers: Numbers, digits: int = 1) -> str:
    """Return mean ± standard deviation; a single number has no deviation."""
    spread = f" ± {deviation(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{spread}"


def explain(numbers: Numbers) -> str:
    """Return what `show` shows of numbers, one for each seed, for a legend.

    >>> explain([90.0, 91.0, 92.0])
    'mean ± standard deviation (n - 1) over n = 3 seeds'
    """
    return f"mean ± standard deviation (n - 1) over n = {len(numbers)} seeds"


def order(first: Numbers, second: Numbers) -> Order:
    """Tell whether the first numbers are clearly above or below the second, seed by seed.

    Clear is |mean d| > 3 s_d / sqrt(n) for the n differences d of the same seeds, s_d their
    standard deviation: a two-sided level of 4 % with five seeds (Student's t), for one comparison.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    if abs(fmean(differences)) <= _CLEAR * deviation(differences) / len(differences) ** 0.5:
        return "level"
    return "above" if fmean(differences) > 0 else "below"


def tally(pairs: Iterable[tuple[Numbers, Numbers]]) -> Counter[Order]:
    """Return how often the first of a pair is above, below and level with the second."""
    return Counter(order(first, second) for first, second in pairs)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes of a figure.

    Attributes:
        title: above it.
        xlabel: below it.
        ylabel: beside it.
        lines: label -> place on the x axis -> the numbers of all seeds there.
        dashed: labels whose lines are dashed.
        xlog: whether the x axis is logarithmic.
        ylog: whether the y axis is.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, Mapping[float, Numbers]]
    dashed: tuple[str, ...] = ()
    xlog: bool = False
    ylog: bool = False


def draw(panels: Sequence[Panel], path: Path, columns: int) -> None:
    """Write the panels as PNG, row by row; bars are one standard deviation up and down.

    Panels of the same lines share a legend below them.
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel)
    alike = len({tuple(panel.lines) for panel in panels}) == 1
    if alike:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    else:
        for axis, _ in zip(axes.flat, panels, strict=False):
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_panel(axis: Any, panel: Panel) -> None:
    for label, points in panel.lines.items():
        axis.errorbar(
            list(points),
            [fmean(numbers) for numbers in points.values()],
            [deviation(numbers) for numbers in points.values()],
            marker=".",
            capsize=3,
            label=label,
            linestyle="--" if label in panel.dashed else "-",
        )
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.xlabel)
    axis.set_ylabel(panel.ylabel)
    if panel.xlog:
        axis.set_xscale("log")
        label_decades(axis.xaxis)
    if panel.ylog:
        axis.set_yscale("log")
        label_decades(axis.yaxis)
    axis.grid(alpha=0.3)


def label_decades(axis: Any, labelled: Sequence[float] = (1.0, 3.0)) -> None:
    """Label some numbers of each decade: 1 and 3 are enough for a single decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=labelled))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
