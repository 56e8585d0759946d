"""What a row of results says, also one that was written before there were targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
"""One evaluated model, as `evaluate` writes it."""


def target_of(row: Row) -> float:
    """Return the sparsity that was asked for; once that was what `sparsity` meant."""
    return row.get("target", row["sparsity"])
