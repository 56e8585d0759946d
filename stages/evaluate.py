"""Stage `evaluate`: measures any number of models, one row and one tracked run each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import Artifact, Context, write_json
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.metrics import accuracy_text, measure
from stages.model_folder import load_facts, load_model

if TYPE_CHECKING:
    from stages.catalogue import EvaluateParams

_PARAMS = ("method", "structure", "mode", "finetuned", "sparsity", "seed", "damping", "split")


def evaluate(ctx: Context) -> None:
    """Write output `results`: `rows.json`, and `failed.json` with the models that are not there.

    What is known of the dense networks is said first. Rows found so far are checkpointed, so that a
    kill costs the model at hand.
    """
    compute_deterministically(ctx.device)
    rows = _rows_so_far(ctx)
    models = [(one, one.path) for one in ctx.inputs["models"] if one.path is not None]
    _say_dense_accuracies(ctx, [folder for _, folder in models])
    for done, (model, folder) in enumerate(models, start=1):
        if model.cell not in rows:
            rows[model.cell] = _evaluate(ctx, model, folder)
            if ctx.checkpoint_due():
                with ctx.checkpoint() as part:
                    write_json(part / "rows.json", rows)
        ctx.progress(done, len(models), "model")
    for model, _ in models:
        _record(ctx, model.cell, rows[model.cell])
    failed = [
        {"model_cell": one.cell, "key": one.key, "axes": dict(one.axes)}
        for one in ctx.inputs["models"]
        if one.path is None
    ]
    results = ctx.output("results")
    write_json(results / "rows.json", [rows[model.cell] for model, _ in models])
    write_json(results / "failed.json", failed)


def _say_dense_accuracies(ctx: Context, folders: Sequence[Path]) -> None:
    """Say how accurate the dense networks were that the models began as, each of them once."""
    known = [load_facts(folder).dense_accuracy for folder in folders]
    for line in dict.fromkeys(accuracy_text(one) for one in known if one):
        ctx.say(f"dense accuracy: {line}")


def _rows_so_far(ctx: Context) -> dict[str, dict[str, Any]]:
    last = ctx.last_checkpoint()
    return json.loads((last / "rows.json").read_text("utf-8")) if last else {}


def _evaluate(ctx: Context, artifact: Artifact, folder: Path) -> dict[str, Any]:
    params: EvaluateParams = ctx.params
    model = load_model(folder, ctx.device)
    facts = model.facts
    dataset, _ = load_data(facts.data)
    return {
        "model_cell": artifact.cell,
        "key": artifact.key,
        "method": facts.method,
        "structure": facts.structure,
        "mode": facts.mode,
        "finetuned": facts.finetuned,
        "sparsity": facts.sparsity,
        "seed": facts.seed,
        "damping": facts.damping,
        "split": params.split,
        **measure(model.network, dataset, dataset.split(params.split), params.batch_size),
        **model.counts(),
    }


def _record(ctx: Context, name: str, row: dict[str, Any]) -> None:
    """Give the model a tracked run; sparsity, seed and damping also as numbers, which sort."""
    numbers = ("accuracy", "nll", "ece", "nonzero", "prunable", "parameters", "sparsity", "seed")
    metrics = {key: row[key] for key in numbers}
    if row["damping"] is not None:
        metrics["damping"] = row["damping"]
    ctx.record(name, params={key: row[key] for key in _PARAMS}, metrics=metrics)
