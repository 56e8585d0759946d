"""What plugins have to say of results that a plan found in the store."""

from __future__ import annotations

import importlib
import json

from pipeline.base.errors import StoreError
from pipeline.planning.planner import Plan
from pipeline.spec.cells import shorten
from pipeline.store.store import Store


def plan_notes(plan: Plan, store: Store) -> list[str]:
    """Return lines about cached cells in which something of a described kind begins.

    Cells that take an output of the same kind are left out: what is to be said is said of the first
    one. What cannot be read has nothing to say.

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
                        facts = json.loads(store.read_file(planned.manifest, output, about.file))
                        lines = describe(facts)
                    except (OSError, StoreError, ValueError, TypeError, AttributeError):
                        continue  # whatever stands there, it is not what the stage wrote
                    for line in lines:
                        said.setdefault(line, []).append(planned.cell.name)
    return [f"{shorten(cells)}: {line}" for line, cells in said.items()]
