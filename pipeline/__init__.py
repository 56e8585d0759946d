"""The runner: pipeline files, plans, the store, executors, tracking and command line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Results, Run, plan, results, run

__all__ = ["Results", "Run", "plan", "results", "run"]


def __getattr__(name: str) -> Any:
    """Import the runner when it is first asked for: stages, which import from here, need none.

    Raises:
        AttributeError: there is no such name.
    """
    if name in __all__:
        return getattr(import_module("pipeline.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
