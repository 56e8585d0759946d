"""One pruning step on a model, and what is reported about it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients import GradientSource
from fishleg.pruning import group_masks, prune_once, reestimate_norms, weight_masks
from pipeline.stage import Context
from stages.estimate import user_errors
from stages.model_folder import Model

if TYPE_CHECKING:
    from stages.catalogue import PruningParams

_AT_ONCE = 500  # samples that a batch norm is measured on, about


def prune(
    ctx: Context,
    model: Model,
    estimator: AbstractEstimator,
    source: GradientSource,
    *,
    params: PruningParams,
    sparsity: float,
    step: int | None = None,
) -> Model:
    """Prune the network in place to `sparsity`, and return it with its new masks.

    Batch norms are measured anew on the samples of `source`, if wanted.

    Args:
        ctx: takes the report.
        model: the model that `estimator` was fitted on.
        estimator: a fitted estimate.
        source: gradients of the model on its calibration samples.
        params: selection, distribution, compensation and norms.
        sparsity: fraction of the prunable weights removed after the step, in [0, 1).
        step: number of the step in the metrics' series, or None for a single one.
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
            compensation=params.compensation,
            source=source,
            max_iterations=params.cg_iterations,
        )
    if params.norms == "reestimated":
        count = len(source.calibration)
        pieces = -(-count // _AT_ONCE)  # of about equal size, since one sample has no variance
        batches = source.batches(-(-count // pieces))
        reestimate_norms(model.network, (batch.inputs for batch in batches))
    found = {"pruned/sparsity": report.sparsity, "pruned/saliency": report.saliency}
    if report.predicted is not None:
        found["pruned/predicted"] = report.predicted
    ctx.log(found, step=step)
    for warning in report.warnings:
        ctx.say(warning)
    return replace(model, masks=weight_masks(partition, report.masks))
