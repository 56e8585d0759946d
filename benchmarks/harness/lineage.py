"""How a model was made from the dense one: the cells on its path, what they cost and found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.store import Manifest, Store

_DENSE = {"pretrain", "import_checkpoint"}


@dataclass(frozen=True)
class Step:
    """A cell on a model's path, and how many of its seconds went into that model."""

    manifest: Manifest
    seconds: float

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds, in proportion where only a part of the cell's time counts."""
        facts = self.manifest.facts
        return facts["cpu_seconds"] * self.seconds / max(facts["seconds"], 1e-3)


def path_to(store: Store, key: str) -> list[Step]:
    """Return the cells from the dense model (exclusive) to a model (inclusive), each once.

    Of the candidates of `select` only the chosen one's path counts, and of the several-step pruning
    behind `pick` only the time up to the chosen step, over all attempts at it. These two stages
    copy a model, and are not on the path themselves.

    Args:
        store: where the manifests are.
        key: of the model's cell.
    """
    found: dict[str, Step] = {}
    ahead: list[tuple[str, float | None]] = [(key, None)]
    while ahead:
        key, seconds = ahead.pop()
        manifest = store.manifest(key)
        if manifest is None or manifest.ingredients["stage"] in _DENSE:
            continue
        inputs: dict[str, list[str]] = manifest.ingredients["inputs"]
        if manifest.ingredients["stage"] == "select":
            names = manifest.ingredients["names"]["inputs"]["candidates"]
            chosen = names.index(_model_facts(store, key)["selected"])
            ahead.append((inputs["candidates"][chosen], None))
        elif manifest.ingredients["stage"] == "pick":
            ahead.append((inputs["steps"][0], _model_facts(store, key)["picked"]["seconds"]))
        else:
            found[key] = Step(manifest, manifest.facts["seconds"] if seconds is None else seconds)
            ahead += [(one, None) for upstream in inputs.values() for one in upstream]
    return list(found.values())


def cost_of(path: Iterable[Step]) -> dict[str, float]:
    """Return the sums of `seconds` and `cpu_seconds`, and the largest `peak_bytes`, of a path."""
    steps = list(path)
    return {
        "seconds": round(sum(step.seconds for step in steps), 3),
        "cpu_seconds": round(sum(step.cpu_seconds for step in steps), 3),
        "peak_bytes": max((step.manifest.facts["peak_bytes"] for step in steps), default=0),
    }


def findings_of(store: Store, path: Iterable[Step]) -> dict[str, Any]:
    """Return what tells a model's estimate from others.

    Returns:
        `structure`, if the method was fishleg, and `certificate`: the network's numbers of
        `fishleg.certificate.certify`, if stage `curvature` took any; else nothing.
    """
    found: dict[str, Any] = {}
    for step in path:
        params = step.manifest.ingredients["params"]
        if params.get("method") == "fishleg" and "fishleg" in params:
            found["structure"] = params["fishleg"]["structure"]
        if step.manifest.ingredients["stage"] == "curvature":
            folder = store.fetch(step.manifest.key, "curvature")
            facts = json.loads((folder / "curvature.json").read_text(encoding="utf-8"))
            if facts["certificate"] is not None:
                found["certificate"] = facts["certificate"]["network"]
    return found


def _model_facts(store: Store, key: str) -> dict[str, Any]:
    return json.loads((store.fetch(key, "model") / "model.json").read_text(encoding="utf-8"))
