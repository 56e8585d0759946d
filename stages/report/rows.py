"""Readers of a row of results, also of one from before there were settings."""

from __future__ import annotations

import json
from typing import Any

from stages.columns import Row


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
