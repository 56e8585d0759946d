"""Notes of plugins on cached results."""

from __future__ import annotations

import importlib
import json

from pipeline.base.errors import StoreError
from pipeline.planning.planner import Plan
from pipeline.spec.cells import shorten
from pipeline.store.store import Store


def plan_notes(plan: Plan, store: Store) -> list[str]:
    """Return the plugins' notes on cached cells with outputs of a kind that they describe.

    Cells that take an input of that kind are left out, and so are unreadable outputs.

    Cost: one read of a small file for each such cell.
    """
    said: dict[str, list[str]] = {}
    for plugin in plan.spec.plugins:
        for about in plugin.catalogue.notes:
            module, _, attribute = about.entry.partition(":")
            describe = getattr(importlib.import_module(module), attribute)
            for planned in plan.cells:
                declared = planned.cell.declaration
                taken = {one.kind for one in declared.inputs.values()}
                outputs = [n for n, one in declared.outputs.items() if one.kind == about.kind]
                if planned.manifest is None or planned.collected or about.kind in taken:
                    continue
                for output in outputs:
                    try:
                        data = store.read_file(planned.manifest, output, about.file)
                        lines = describe(json.loads(data))
                    except (OSError, StoreError, ValueError, TypeError, AttributeError):
                        continue  # damaged
                    for line in lines:
                        said.setdefault(line, []).append(planned.cell.name)
    return [f"{shorten(cells)}: {line}" for line, cells in said.items()]
