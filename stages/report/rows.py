"""Readers of a row of results, also of one from before there were settings."""

from __future__ import annotations

import json
from typing import Any

from stages.columns import Row
from stages.lineage import BEST_OF


def settings_of(row: Row) -> dict[str, Any]:
    """Return all that tells the row's model from others, but seeds and target; and the split.

    A row of before there were settings has those that it had columns for.
    """
    known = row.get("settings")
    if known is None:
        known = {"structure": row.get("structure"), "damping": row.get("damping")}
    return {**known, "split": row["split"]}


def seeds_of(row: Row) -> dict[str, int]:
    """Return the seeds of all stages before the model."""
    return dict(row["seeds"]) if "seeds" in row else {"seed": row["seed"]}


def name_of(row: Row) -> str:
    """Return the name of the row's method in tables, with its structure where it has one.

    Earlier rows have the method eigen as method fishleg in structure eigen. Every other method
    keeps its own name.

    >>> row = {"method": "fishleg", "structure": "eigen", "split": "test"}
    >>> name_of(row), name_of({**row, "structure": "kronecker"})
    ('eigen', 'fishleg (kronecker)')
    >>> name_of({**row, "method": "kfac", "structure": None})
    'kfac'
    """
    chosen = [
        value
        for key, value in settings_of(row).items()
        if key.rpartition(".")[2] == "structure" and str(value).startswith(BEST_OF)
    ]
    structure = chosen[0] if chosen else row.get("structure")
    if row["method"] == "fishleg" and structure == "eigen":
        return "eigen"
    return f"{row['method']} ({structure})" if structure else row["method"]


def model_of(row: Row) -> str:
    """Return the identity of the row's model."""
    return row["key"] or json.dumps(dict(row), sort_keys=True)


def stage_of(row: Row) -> str:
    """Return the name of the stage that made the model, or should have."""
    return row.get("stage") or str(row["model_cell"]).partition("[")[0]


def warnings_of(row: Row) -> list[str]:
    """Return the warnings about the row's model, a sentence each."""
    found = list(row.get("warnings", ()))
    emptied = row.get("emptied", ())
    if emptied and not any(all(name in text for name in emptied) for text in found):
        found.append(f"Layers that have lost every weight: {', '.join(emptied)}.")
    return found
