"""Plugins: the modules that declare the stage types of a spec."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from pipeline.base.names import store_around
from pipeline.code.digest import find_module
from pipeline.stage import Catalogue


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin's catalogue, and the module of it."""

    module: str
    catalogue: Catalogue


def import_catalogue(name: str) -> Plugin | None:
    """Return the CATALOGUE of the module `name.catalogue`, or else of `name`; None without one.

    Raises:
        ImportError: the module lies in a store.
    """
    inner = f"{name}.catalogue"
    chosen = inner if find_module(inner) else name
    place = find_module(chosen)
    store = store_around(place.file) if place and place.file else None
    if store:
        raise ImportError(f"it lies in the store {store}, from which no code is taken")
    module = importlib.import_module(chosen)
    found = getattr(module, "CATALOGUE", None)
    return Plugin(module=module.__name__, catalogue=found) if found is not None else None
