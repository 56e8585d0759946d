"""What it cost to make a model from the dense one: the stages on its path, added up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.store import Manifest, Store

_DENSE = {"pretrain", "import_checkpoint"}


def path_cost(store: Store, key: str) -> dict[str, float]:
    """Return `seconds`, `cpu_seconds` and `peak_bytes` of making a model from the dense one.

    Seconds are sums over the cells on the path from the dense model (exclusive) to this one
    (inclusive), each cell once; the memory is the largest of theirs. Of the candidates of `select`
    only the chosen one's path counts, and of the several-step pruning behind `pick` only the time
    up to the chosen step, with processor time in proportion. These two copy, and cost nothing.

    Args:
        store: where the manifests are.
        key: of the model's cell.
    """
    costs = dict(_walk(store, key, None)).values()
    return {
        "seconds": round(sum(cost["seconds"] for cost in costs), 3),
        "cpu_seconds": round(sum(cost["cpu_seconds"] for cost in costs), 3),
        "peak_bytes": max((cost["peak_bytes"] for cost in costs), default=0),
    }


def _walk(
    store: Store, key: str, picked_s: float | None
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield (key, cost) of the cells on a path; `picked_s` is how much of the last one counts."""
    manifest = store.manifest(key)
    if manifest is None or manifest.ingredients["stage"] in _DENSE:
        return
    stage = manifest.ingredients["stage"]
    inputs: Mapping[str, list[str]] = manifest.ingredients["inputs"]
    if stage == "select":
        names = manifest.ingredients["names"]["inputs"]["candidates"]
        chosen = names.index(_facts(store, key)["selected"])
        yield from _walk(store, inputs["candidates"][chosen], None)
        return
    if stage == "pick":
        yield from _walk(store, inputs["steps"][0], _facts(store, key)["picked"]["seconds"])
        return
    yield key, _cost(manifest, picked_s)
    for upstream in inputs.values():
        for one in upstream:
            yield from _walk(store, one, None)


def _cost(manifest: Manifest, picked_s: float | None) -> dict[str, float]:
    facts = manifest.facts
    share = 1.0 if picked_s is None else picked_s / facts["seconds"]
    return {
        "seconds": share * facts["seconds"],
        "cpu_seconds": share * facts["cpu_seconds"],
        "peak_bytes": facts["peak_bytes"],
    }


def _facts(store: Store, key: str) -> dict[str, Any]:
    return json.loads((store.fetch(key, "model") / "model.json").read_text(encoding="utf-8"))
