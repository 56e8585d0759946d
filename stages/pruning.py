"""One pruning step on a model, and its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import Tensor

from fishleg.calibration import Calibration
from fishleg.calling import model_device
from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients.source import GradientSource
from fishleg.options import AdmmOptions
from fishleg.parameters import Partition
from fishleg.pruning import group_masks, prune_once, reestimate_norms, weight_masks
from pipeline.stage import Context, StageError
from stages.data.batches import training_batches
from stages.data.dataset import DataSet
from stages.determinism import derive_seed
from stages.estimate import user_errors
from stages.lineage import Step
from stages.metrics import log_validation, low_accuracy
from stages.model_folder import Model, save_model

if TYPE_CHECKING:
    from stages.catalogue import PruningParams

_AT_ONCE = 500  # samples, about, in a batch that norms are measured on
_PASSES = 4  # of augmented samples, each with crops and flips of its own


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
    dataset: DataSet,
    *,
    params: PruningParams,
    sparsity: float,
    step: int | None = None,
) -> tuple[Model, tuple[str, ...]]:
    """Prune the network in place; return it with its new masks, and the report's warnings.

    Unless `norms` is "kept", batch norms are measured again on the samples of `source`.

    Args:
        ctx: takes the report.
        model: the model that `estimator` was fitted on.
        estimator: a fitted estimate.
        source: gradients of the model on its calibration samples.
        dataset: holds them in its training split.
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
            admm=AdmmOptions.taken_from(params.admm),
        )
    if params.norms != "kept":
        augmented = params.norms == "augmented"
        reestimate_norms(model.network, _norm_batches(source, dataset, augmented=augmented))
    found = {"pruned/sparsity": report.sparsity, "pruned/saliency": report.saliency}
    if report.predicted is not None:
        found["pruned/predicted"] = report.predicted
    if report.admm is not None:
        course = report.admm
        found |= {"pruned/cost_single": course.before, "pruned/cost_admm": course.after}
        settled = "settled" if course.settled else "not settled"
        ctx.say(
            f"ADMM: {course.iterations} iterations, {settled}; quadratic cost {course.before:.3g} "
            f"of single weights -> {course.after:.3g}"
        )
    ctx.log(found, step=step)
    for warning in report.warnings:
        ctx.say(warning)
    pruned = replace(model, masks=weight_masks(partition, report.masks))
    return pruned, report.warnings


def _norm_batches(source: GradientSource, dataset: DataSet, *, augmented: bool) -> Iterable[Tensor]:
    """Return the inputs that norms are measured on, in batches: the same ones in every run."""
    count = len(source.calibration)
    pieces = -(-count // _AT_ONCE)  # of about equal size: one sample has no variance
    size = -(-count // pieces)
    if not augmented:
        return (batch.inputs for batch in source.batches(size))
    # the calibration samples of a stage are chosen by number from the training split
    indices = cast(Tensor, cast(Calibration, source.calibration).indices)
    chosen = replace(dataset, train=dataset.train.take(indices))
    seed, device = derive_seed(0, "norms"), model_device(source.model)
    return (
        inputs.to(device)
        for epoch in range(_PASSES)
        for inputs, _ in training_batches(chosen, batch_size=size, seed=seed, epoch=epoch)
    )
