"""The cells between a dense model and a pruned one: their costs and findings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.store.manifest import Manifest
from pipeline.store.store import Store

_DENSE = {"pretrain", "import_checkpoint"}


@dataclass(frozen=True)
class Step:
    """A cell on a model's path, and the part of its cost that made the model.

    Attributes:
        manifest: the cell's.
        cost: `seconds`, `cpu_seconds`, `peak_bytes` and, on a GPU, `gpu_peak_bytes`.
    """

    manifest: Manifest
    cost: Mapping[str, float]


def path_to(store: Store, key: str) -> list[Step]:
    """Return the cells from the dense model (exclusive) to a model (inclusive), each once.

    Of the candidates of `select` only the path of the chosen one counts; of the several-step
    pruning upstream of `pick` only the time up to the chosen step, with processor time in
    proportion. These two stages copy a model, and are not on the path themselves.

    Args:
        store: where the manifests are.
        key: of the model's cell.
    """
    found: dict[str, Step] = {}
    ahead: list[tuple[str, int | None]] = [(key, None)]
    while ahead:
        key, step = ahead.pop()
        manifest = store.manifest(key)
        if manifest is None or manifest.ingredients["stage"] in _DENSE:
            continue
        inputs: dict[str, list[str]] = manifest.ingredients["inputs"]
        if manifest.ingredients["stage"] == "select":
            names = manifest.ingredients["names"]["inputs"]["candidates"]
            chosen = names.index(_model_facts(store, key)["selected"])
            ahead.append((inputs["candidates"][chosen], None))
        elif manifest.ingredients["stage"] == "pick":
            ahead.append((inputs["steps"][0], _model_facts(store, key)["picked"]["step"]))
        else:
            found[key] = Step(manifest, _cost(store, manifest, step))
            ahead += [(one, None) for upstream in inputs.values() for one in upstream]
    return list(found.values())


def _cost(store: Store, manifest: Manifest, step: int | None) -> dict[str, float]:
    """Return the cost of a cell; with `step` given, up to that step of its pruning.

    An interrupted attempt counts up to its last checkpoint: its later work was repeated.
    """
    attempts = [number for number in store.attempts(manifest.key) if number <= manifest.attempt]
    events = {number: store.read_events(manifest.key, number)[0] for number in attempts}
    parts: list[Mapping[str, float]] = [manifest.making]
    for number in attempts:
        if number < manifest.attempt:
            parts += [event for event in events[number] if event["type"] == "checkpoint"][-1:]
    cost = _added(parts)
    if step is not None:
        seconds = next(
            event["values"]["step/seconds"]
            for number in reversed(attempts)
            for event in events[number]
            if event["type"] == "metrics" and event["step"] == step
            if "step/seconds" in event["values"]
        )
        cost["cpu_seconds"] *= seconds / max(cost["seconds"], 1e-3)
        cost["seconds"] = seconds
    return cost


def cost_of(path: Iterable[Step]) -> dict[str, float]:
    """Return the cost of a path: the sum of the seconds, and the largest memory."""
    return _added([step.cost for step in path])


def _added(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    added: dict[str, float] = {
        name: round(sum(cost[name] for cost in costs), 3) for name in ("seconds", "cpu_seconds")
    }
    added["peak_bytes"] = max((cost["peak_bytes"] for cost in costs), default=0)
    if any("gpu_peak_bytes" in cost for cost in costs):
        added["gpu_peak_bytes"] = max(cost.get("gpu_peak_bytes", 0) for cost in costs)
    return added


def findings_of(store: Store, path: Iterable[Step]) -> dict[str, Any]:
    """Return `certificate`: the network's numbers of `fishleg.certificate.certify`, if known."""
    found: dict[str, Any] = {}
    for step in path:
        if step.manifest.ingredients["stage"] == "curvature":
            folder = store.fetch(step.manifest.key, "curvature")
            facts = json.loads((folder / "curvature.json").read_text(encoding="utf-8"))
            if facts["certificate"] is not None:
                found["certificate"] = facts["certificate"]["network"]
    return found


def _model_facts(store: Store, key: str) -> dict[str, Any]:
    return json.loads((store.fetch(key, "model") / "model.json").read_text(encoding="utf-8"))
