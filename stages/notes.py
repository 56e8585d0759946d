"""Notes of `fls plan` about a model in the store, from its `model.json`; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(facts: Mapping[str, Any]) -> list[str]:
    """Return a line for each weight of a model that is not prunable.

    >>> notes({"unprunable": {"embed.weight": "an embedding; prunable when named"}})
    ['not prunable: embed.weight: an embedding; prunable when named']
    """
    found: Mapping[str, str] = facts.get("unprunable", {})
    return [f"not prunable: {name}: {why}" for name, why in found.items()]
