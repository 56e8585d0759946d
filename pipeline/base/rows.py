"""Rows of results as CSV, with nested values as columns or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header: `columns` first, then all others that any row has.

    A mapping has a column for each of its keys, `settings.damping`; a list is JSON.

    >>> print(csv_text(["a"], [{"b": {"c": 1, "d": [2]}, "a": 0}, {"a": 3}]), end="")
    a,b.c,b.d
    0,1,[2]
    3,,
    """
    flat = [dict(_flatten(row)) for row in rows]
    nested = {name for row in rows for name, value in row.items() if isinstance(value, Mapping)}
    names = dict.fromkeys(name for name in columns if name not in nested)
    names |= dict.fromkeys(name for row in flat for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flatten(row: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in row.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            found += _flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found.append((name, json.dumps(value, ensure_ascii=False) if value else ""))
        else:
            found.append((name, value))
    return found
