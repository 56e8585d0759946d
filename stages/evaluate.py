"""Stage `evaluate`: measures models, with a row and a tracked run for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import Artifact, Context, StageError, write_json
from stages.answers import pack
from stages.checkpoint import Checkpoint
from stages.columns import COLUMNS
from stages.data.dataset import digest_split
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.expectation import require_accuracy
from stages.lineage import choices, seeds, settings
from stages.metrics import accuracy_text, low_accuracy, measure_each
from stages.model_folder import Facts, load_facts, load_model
from stages.report.rows import name_of

if TYPE_CHECKING:
    from stages.catalogue import EvaluateParams


def evaluate(ctx: Context) -> None:
    """Write output `results`: `rows.json`, and `failed.json` with the models that failed upstream.

    Dense networks come first, in the log and in the measurements: a StageError ends the stage where
    one has not the accuracy that is expected. A checkpoint holds the rows so far, so that a kill
    costs one model's measurement.
    """
    compute_deterministically(ctx.device)
    last = Checkpoint.last(ctx)
    rows: dict[str, dict[str, Any]] = dict(last.cursor["rows"]) if last else {}
    models = [(one, one.path) for one in ctx.inputs["models"] if one.path is not None]
    facts = {model.cell: load_facts(folder) for model, folder in models}
    _say_dense_accuracies(ctx, facts.values())
    _require_known_accuracies(ctx, facts)
    dense_first = sorted(models, key=lambda one: facts[one[0].cell].mode != "dense")
    for done, (model, folder) in enumerate(dense_first, start=1):
        if model.cell not in rows:
            rows[model.cell] = _evaluate(ctx, model, folder)
            if ctx.checkpoint_due():
                Checkpoint(cursor={"rows": rows}).write(ctx)
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


def _say_dense_accuracies(ctx: Context, models: Iterable[Facts]) -> None:
    """Log the accuracy of the dense networks behind the models, each once."""
    for line in dict.fromkeys(accuracy_text(one.dense_accuracy) for one in models):
        if line:
            ctx.say(f"dense accuracy: {line}")


def _require_known_accuracies(ctx: Context, models: Mapping[str, Facts]) -> None:
    """Compare the dense accuracies in the facts of pruned models with the accuracy expected.

    Args:
        ctx: its parameters hold the expectation, if any.
        models: cell -> facts of its model.

    Raises:
        StageError: they differ, or no model here has a dense accuracy.
    """
    params: EvaluateParams = ctx.params
    if params.expect_accuracy is None:
        return
    compared = any(_is_dense(facts) for facts in models.values())
    for cell, facts in models.items():
        known = facts.dense_accuracy.get(params.split)
        if known is not None:
            compared = True
            origin = f"the dense network of {cell}"
            require_accuracy(params, known, params.split, load_data(facts.data)[0], origin)
    if models and not compared:
        raise StageError(
            "expect_accuracy: there is nothing to compare; expected a dense network among the "
            f"models, or one whose dense accuracy on the {params.split} split is known. Connect "
            "the dense network as well, or set expect_accuracy where it is imported."
        )


def _is_dense(facts: Facts) -> bool:
    return facts.mode == "dense" and not facts.finetuned


def _evaluate(ctx: Context, artifact: Artifact, folder: Path) -> dict[str, Any]:
    params: EvaluateParams = ctx.params
    model = load_model(folder, ctx.device)
    facts = model.facts
    dataset, _ = load_data(facts.data)
    split = dataset.split(params.split)
    found, right = measure_each(model.network, dataset, split, params.batch_size)
    if _is_dense(facts):
        require_accuracy(params, found["accuracy"], params.split, dataset, artifact.cell)
    judged = model.findings()
    alarming = low_accuracy(facts, found["accuracy"], params.split)
    for warning in [*judged["warnings"], *alarming]:
        ctx.say(f"{artifact.cell}: {warning}")
    return {
        "model_cell": artifact.cell,
        "key": artifact.key,
        **facts.of_pruning(),
        "split": params.split,
        "images": len(split),
        "images_digest": digest_split(split),
        "right": pack(right.numpy()),
        **found,
        **judged,
        "warnings": [*judged["warnings"], *alarming],
        "dense_accuracy": facts.dense_accuracy_on(params.split),
        "settings": settings(facts.lineage),
        "seeds": seeds(facts.lineage),
        "choices": choices(facts.lineage),
    }


def _record(ctx: Context, name: str, row: dict[str, Any]) -> None:
    """Give the model a tracked run."""
    params = {column.name: row[column.name] for column in COLUMNS if column.param}
    numbers = {column.name: row[column.name] for column in COLUMNS if column.metric}
    metrics = {key: value for key, value in numbers.items() if value is not None}
    told = {name: ", ".join(row[name]) for name in ("emptied", "warnings") if row[name]}
    label = {"label": name_of(row)}
    ctx.record(name, params={**params, **label, **told, **row["settings"]}, metrics=metrics)
