"""Grids of a setting's candidate values, and the values at their ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

End = Literal["lower", "upper"]


def end_of(chosen: Any, among: Sequence[Any]) -> End | None:
    """Return the end of the grid at which a chosen value is, or None for one inside.

    Values that are no numbers are no grid. Nothing is beyond 0, nor beyond 1 where 0 is the other
    end: such an end is none.

    Args:
        chosen: one of the values.
        among: the values, in any order; a value may occur twice.

    >>> end_of(0.1, [0.001, 0.01, 0.1]), end_of(0.01, [0.001, 0.01, 0.1])
    ('upper', None)
    >>> end_of("eigen", ["eigen", "full"]), end_of(1, [0, 0.5, 1]), end_of(1, [1])
    (None, None, None)
    """
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in among):
        return None
    low, high = min(among), max(among)
    if low == high or chosen == 0 or (low, chosen) == (0, 1):
        return None
    return "lower" if chosen == low else "upper" if chosen == high else None


def warnings_of_ends(choices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each setting whose chosen value is an end of its grid.

    Args:
        choices: setting -> `chosen` value and the values `among` which, see `lineage.choices`.

    >>> warnings_of_ends({"finetune.lr": {"chosen": 0.1, "among": [0.1, 0.01]}})
    ['The chosen finetune.lr, 0.1, is the upper end of its grid, 0.01 to 0.1: extend the grid.']
    """
    found = []
    for setting, choice in choices.items():
        end = end_of(choice["chosen"], choice["among"])
        if end is not None:
            low, high = min(choice["among"]), max(choice["among"])
            found.append(
                f"The chosen {setting}, {choice['chosen']:g}, is the {end} end of its grid, "
                f"{low:g} to {high:g}: extend the grid."
            )
    return found
