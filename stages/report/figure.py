"""The comparison as a picture: accuracy against sparsity, one line a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stages.report.summary import PUBLISHED, SECTIONS, Lines, Point, Summary

# Okabe and Ito's palette, which all kinds of colour vision distinguish; methods differ in their
# markers, too.
_COLOURS = {
    "eigen": "#D55E00",
    "obs": "#0072B2",
    "kfac": "#009E73",
    "diagonal": "#CC79A7",
    "magnitude": "#555555",
}
_SPARE_COLOURS = ("#E69F00", "#56B4E9", "#882255", "#117733", "#999933", "#332288", "#AA4499")
_SPARE_MARKERS = "o<>p*hd"
"""Markers of the methods without their own; the next is taken when the colours begin again."""
_OURS = ("eigen", "fls", "fishleg")
"""Methods whose lines are thick and in front."""
_MARKERS = {
    "eigen": "o",
    "obs": "s",
    "kfac": "^",
    "diagonal": "D",
    "magnitude": "v",
}
_GREY = "#777777"


@dataclass(frozen=True)
class _Style:
    """The style of a section's lines; `shift` separates them, in doublings of compression."""

    panel: Literal["Without training", "With training"]
    line: Literal["-", "--", ":", "-."]
    filled: bool
    shift: float = 0.0


@dataclass(frozen=True)
class _Look:
    """What distinguishes a method's line."""

    colour: str
    marker: str


_STYLES = {
    SECTIONS["oneshot", False]: _Style("Without training", "-", True),
    SECTIONS["multistep", False]: _Style("Without training", "--", False, 0.04),
    SECTIONS["refined", False]: _Style("Without training", ":", True, 0.08),
    SECTIONS["oneshot", True]: _Style("With training", "-", True),
    SECTIONS["multistep", True]: _Style("With training", "-.", False, 0.12),
    SECTIONS["refined", True]: _Style("With training", "-.", True, 0.16),
    SECTIONS["gradual", False]: _Style("With training", ":", False, 0.04),
    SECTIONS["gradual", True]: _Style("With training", "--", True, 0.08),
}


def draw(summary: Summary, title: str, path: Path) -> None:
    """Write the figure as PNG: a panel for one-shot results, one for those with training."""
    panels: dict[str, dict[str, Lines]] = {}
    for section, look in _STYLES.items():
        if section in summary.sections:
            panels.setdefault(look.panel, {})[section] = summary.sections[section]
    methods = [method for lines in summary.sections.values() for method in lines]
    looks = _looks(methods)
    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        wide = len(panels) > 1  # the legend is below, else beside
        width = 6.4 * len(panels) if wide else 9.0
        figure = Figure(figsize=(width, 5.2), layout="constrained")
        axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
        for axis, (name, sections) in zip(axes, panels.items(), strict=False):
            _draw_panel(axis, name, sections, summary.dense, looks)
        if looks:
            handles = [_handle(method, look) for method, look in looks.items()]
            figure.legend(
                handles=handles,
                loc="outside lower center" if wide else "outside right center",
                ncols=6 if wide else 1,
                frameon=False,
            )
        figure.suptitle(title, fontsize=13)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_panel(
    axis: Any,
    name: str,
    sections: Mapping[str, Lines],
    dense: Mapping[str, Point],
    looks: Mapping[str, _Look],
) -> None:
    for section, lines in sections.items():
        for method, points in lines.items():
            _draw_line(axis, _STYLES[section], method, points, looks[method])
    for label, point in dense.items():
        _draw_dense(axis, label, point.mean)
    _scale(
        axis, sorted({s for lines in sections.values() for line in lines.values() for s in line})
    )
    axis.set_title(name, fontsize=11)
    drawn = [one for lines in sections.values() for line in lines.values() for one in line.values()]
    several = any(point.deviation is not None for point in drawn)
    axis.set_ylabel("accuracy (%)" + (", mean ± standard deviation" if several else ""))
    axis.grid(axis="y", color="#E5E5E5")
    axis.set_axisbelow(True)
    handles = [_kind_handle(section) for section in sections] if len(sections) > 1 else []
    if any(point.warned for point in drawn):
        handles.append(Line2D([], [], color="black", linestyle="", marker="x", label="⚠ see table"))
    if handles:
        axis.legend(handles=handles, loc="lower left", fontsize=9, frameon=False)


def _draw_line(
    axis: Any, style: _Style, method: str, points: Mapping[float, Point], look: _Look
) -> None:
    """Draw one method's means with a band, or bars, of a standard deviation up and down."""
    there = {
        _to_sparsity(_from_sparsity(sparsity) + style.shift): point
        for sparsity, point in points.items()
        if point.accuracies
    }
    if not there:
        return
    low = [point.mean - (point.deviation or 0.0) for point in there.values()]
    high = [point.mean + (point.deviation or 0.0) for point in there.values()]
    handle = _handle(method, look)
    axis.plot(
        list(there),
        [point.mean for point in there.values()],
        color=look.colour,
        linestyle=handle.get_linestyle() if method.endswith(PUBLISHED) else style.line,
        linewidth=handle.get_linewidth(),
        marker=handle.get_marker(),
        markerfacecolor=handle.get_markerfacecolor() if style.filled else "white",
        markersize=6,
        zorder=4 if method.startswith(_OURS) else 3,
    )
    warned = {at: point.mean for at, point in there.items() if point.warned}
    axis.plot([*warned], [*warned.values()], "x", color="black", markersize=11, zorder=5)
    if len(there) > 1:
        axis.fill_between(list(there), low, high, color=look.colour, alpha=0.15, linewidth=0)
    else:
        axis.vlines(list(there), low, high, color=look.colour, alpha=0.4, linewidth=2)


def _draw_dense(axis: Any, label: str, accuracy: float) -> None:
    axis.axhline(accuracy, color="#999999", linewidth=1, zorder=0)
    axis.annotate(
        f"{label} {accuracy:.1f}",
        (1, accuracy),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=_GREY,
        fontsize=9,
    )


def _handle(method: str, look: _Look) -> Line2D:
    """Return the legend's line of a method; published ones are thin, dashed and hollow."""
    published = method.endswith(PUBLISHED)
    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle="--" if published else "-",
        linewidth=1.2 if published else 2.6 if method.startswith(_OURS) else 1.8,
        marker=look.marker,
        markerfacecolor="white" if published else look.colour,
        label=method,
    )


def _kind_handle(section: str) -> Line2D:
    """Return the legend's line of a section, in grey."""
    style = _STYLES[section]
    return Line2D(
        [],
        [],
        color=_GREY,
        linestyle=style.line,
        marker="o",
        markerfacecolor=_GREY if style.filled else "white",
        label=section.lower(),
    )


def _looks(methods: Iterable[str]) -> dict[str, _Look]:
    """Return each method's colour and marker, of which no two methods have the same pair."""
    found: dict[str, _Look] = {}
    spare = (
        _Look(colour=colour, marker=marker)
        for marker in _SPARE_MARKERS
        for colour in _SPARE_COLOURS
    )
    for method in dict.fromkeys(methods):
        own = _COLOURS.get(method)
        found[method] = (
            next(spare) if own is None else _Look(colour=own, marker=_MARKERS.get(method, "o"))
        )
    return found


def _scale(axis: Any, sparsities: Sequence[float]) -> None:
    """Space sparsities by doublings of compression, which separates 0.9, 0.95 and 0.98."""
    axis.set_xscale("function", functions=(_from_sparsity, _to_sparsity))
    axis.xaxis.set_major_locator(FixedLocator(list(sparsities)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    margin = 0.15
    low, high = _from_sparsity(min(sparsities)), _from_sparsity(max(sparsities))
    axis.set_xlim(_to_sparsity(low - margin), _to_sparsity(high + margin))
    axis.set_xlabel("weights removed (%)")


def _from_sparsity(sparsity: Any) -> Any:
    """Return -log2 of the fraction left."""
    return -np.log2(np.clip(1 - np.asarray(sparsity), 1e-9, None))


def _to_sparsity(place: Any) -> Any:
    """Return the sparsity at a place on the axis: `_from_sparsity` undone."""
    return 1 - np.exp2(-np.asarray(place))
