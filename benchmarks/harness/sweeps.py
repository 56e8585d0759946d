"""Sweeps that do not end at an end: a grid whose best value is its end is extended beyond it.

A grid is extended by a factor of ten at a time, until the best value is inside, or the next value
would be beyond `LOWEST` or `HIGHEST`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stages.grids import end_of

FACTOR = 10.0
LOWEST = 1e-8
HIGHEST = 100.0
_OLDER_GRIDS = {
    "estimators": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2],
    "mlpnet": [1e-5, 1e-4, 1e-3],
    "resnet20": [1e-5, 1e-4, 1e-3],
}
"""Pipeline -> dampings of the rows from before a row told its grid."""


def next_value(chosen: float, grid: Sequence[float]) -> float | None:
    """Return the value by which a grid is to be extended, or None.

    Args:
        chosen: the best value of the grid.
        grid: positive numbers, in any order.

    >>> next_value(1e-6, [1e-6, 1e-5]), next_value(1e-2, [1e-3, 1e-2]), next_value(1, [0.1, 1, 10])
    (1e-07, 0.1, None)
    >>> next_value(HIGHEST, [0.1, HIGHEST]) is None
    True
    """
    end = end_of(chosen, grid)
    if end is None:
        return None
    value = float(f"{chosen / FACTOR if end == 'lower' else chosen * FACTOR:.12g}")
    return value if LOWEST <= value <= HIGHEST else None


def best_of(scores: Mapping[float, float]) -> float:
    """Return the value with the highest score; of equal ones, one inside the grid, then the first.

    >>> best_of({0.1: 5.0, 0.01: 5.0, 0.001: 5.0})
    0.01
    """
    grid = list(scores)
    return max(grid, key=lambda value: (scores[value], end_of(value, grid) is None))


def search(
    grid: Sequence[float], score: Callable[[float], Sequence[float]]
) -> dict[float, Sequence[float]]:
    """Score all values of a grid, and those by which it has to be extended.

    Args:
        grid: positive numbers.
        score: value -> its score in each of several places, such as sparsities; each place has a
            best value of its own, see `best_of`.

    Returns:
        Value -> scores, of the extended grid: in each place the best value is inside or at a
        limit.
    """
    found = {value: score(value) for value in grid}
    while wanted := _wanted(found):
        for value in wanted:
            found[value] = score(value)
    return dict(sorted(found.items()))


def _wanted(found: Mapping[float, Sequence[float]]) -> list[float]:
    places = range(len(next(iter(found.values()))))
    beyond = {
        next_value(best_of({value: scores[place] for value, scores in found.items()}), list(found))
        for place in places
    }
    return sorted(value for value in beyond if value is not None)


def ends_of(benchmark: str, cell: str, document: Mapping[str, Any]) -> list[str]:
    """Return the names of a document's choices whose grid is to be extended.

    Args:
        benchmark: its name.
        cell: of the document.
        document: a committed one.
    """
    choices = list(choices_in(document))
    if "choices" not in document and cell.partition("[")[0].endswith("best"):
        choices = [("damping", document["damping"], _OLDER_GRIDS[benchmark])]
    return [
        f"{benchmark}/{cell} {place}"
        for place, chosen, grid in choices
        if next_value(chosen, grid) is not None
    ]


def choices_in(document: Mapping[str, Any]) -> Iterator[tuple[str, float, Sequence[float]]]:
    """Yield the choices in a committed document: their place, the chosen value, and its grid.

    A pipeline's row has `choices`. A script's result has `damping`, chosen among the `dampings`
    beside it, or else those of its parameters.
    """
    for setting, choice in document.get("choices", {}).items():
        yield setting, choice["chosen"], choice["among"]
    given = document.get("params", {}).get("dampings")
    if given:
        yield from _nested_choices(document["result"], "result", given)


def _nested_choices(
    node: Any, place: str, grid: Sequence[float]
) -> Iterator[tuple[str, float, Sequence[float]]]:
    if isinstance(node, Mapping):
        if "damping" in node:
            yield place, node["damping"], node.get("dampings", grid)
        for key, value in node.items():
            yield from _nested_choices(value, f"{place}.{key}", grid)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _nested_choices(value, f"{place}[{number}]", grid)
