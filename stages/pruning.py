"""One pruning step on a model, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients.source import GradientSource
from fishleg.parameters import Partition
from fishleg.pruning import group_masks, prune_once, reestimate_norms, weight_masks
from pipeline.stage import Context, StageError
from stages.data.dataset import DataSet
from stages.estimate import user_errors
from stages.lineage import Step
from stages.metrics import log_validation, low_accuracy
from stages.model_folder import Model, save_model

if TYPE_CHECKING:
    from stages.catalogue import PruningParams

_AT_ONCE = 500  # samples, about, in a batch that norms are measured on


def begin(ctx: Context, partition: Partition, sparsity: float | None) -> None:
    """Log the weights that are not prunable, before any computation.

    Args:
        ctx: takes the report.
        partition: the network's groups.
        sparsity: the one asked for; None for the highest within a budget.

    Raises:
        StageError: weights are to be removed, and none is prunable.
    """
    found = [f"{name} ({why})" for name, why in partition.unprunable]
    if not partition.prunable and sparsity != 0:
        named = f"Its weights: {'; '.join(found)}" if found else "None has two or more dimensions"
        raise StageError(
            f"No weight of the network is prunable; expected at least one. {named}. Add weights to "
            "`also_prune`, or remove them from `keep`, in the stage that trains or imports the "
            "network (pretrain, import_checkpoint)."
        )
    if found:
        ctx.say(f"not prunable, {len(found)} weights: {'; '.join(found)}")


def finish(ctx: Context, model: Model, dataset: DataSet) -> None:
    """Measure a pruned model on the validation split, and write output `model`."""
    found = log_validation(ctx, model.network, dataset)
    warnings = low_accuracy(model.facts, found["accuracy"], "validation")
    for warning in warnings:
        ctx.say(warning)
    save_model(ctx.output("model"), model, warnings)


def made_by(
    stage: str, params: PruningParams, estimator: AbstractEstimator, warnings: Sequence[str]
) -> Step:
    """Return a pruning stage's step in the lineage, with the distribution that it used."""
    used = {"distribution": params.distribution or estimator.distribution}
    return Step.of(stage, params, further=used, warnings=warnings)


def prune(
    ctx: Context,
    model: Model,
    estimator: AbstractEstimator,
    source: GradientSource,
    *,
    params: PruningParams,
    sparsity: float,
    step: int | None = None,
) -> tuple[Model, tuple[str, ...]]:
    """Prune the network in place; return it with its new masks, and the report's warnings.

    With `norms: reestimated`, batch norms are measured again on the samples of `source`.

    Args:
        ctx: takes the report.
        model: the model that `estimator` was fitted on.
        estimator: a fitted estimate.
        source: gradients of the model on its calibration samples.
        params: selection, distribution, least survivors, compensation and norms.
        sparsity: fraction of the prunable weights removed after the step, in [0, 1).
        step: number of the step in the series of metrics, or None for a single step.
    """
    partition = estimator.partition
    with user_errors():
        report = prune_once(
            model.network,
            estimator,
            sparsity=sparsity,
            masks=group_masks(partition, model.masks),
            selection=params.selection,
            distribution=params.distribution,
            min_kept=params.min_kept,
            compensation=params.compensation,
            source=source,
            max_iterations=params.cg_iterations,
        )
    if params.norms == "reestimated":
        count = len(source.calibration)
        pieces = -(-count // _AT_ONCE)  # of about equal size: one sample has no variance
        batches = source.batches(-(-count // pieces))
        reestimate_norms(model.network, (batch.inputs for batch in batches))
    found = {"pruned/sparsity": report.sparsity, "pruned/saliency": report.saliency}
    if report.predicted is not None:
        found["pruned/predicted"] = report.predicted
    ctx.log(found, step=step)
    for warning in report.warnings:
        ctx.say(warning)
    pruned = replace(model, masks=weight_masks(partition, report.masks))
    return pruned, report.warnings
