"""Stage `prune_oneshot`: removes weights in one step, and moves the others."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fishleg.certificate import pruning_certificate
from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients.source import GradientSource
from fishleg.pruning import count_masks, group_masks
from pipeline.stage import Context, StageError
from stages.data.dataset import DataSet
from stages.data.source import load_data
from stages.determinism import compute_deterministically
from stages.estimate import load_estimate
from stages.metrics import NotFinite, measure
from stages.model_folder import Model, input_model
from stages.pruning import begin, finish, made_by, prune

_PARTS = 2**10  # the bisection resolves sparsity to 1 / _PARTS

if TYPE_CHECKING:
    from stages.catalogue import OneshotParams


def prune_oneshot(ctx: Context) -> None:
    """Prune input `model` by input `curvature`, to a sparsity or a budget; write output `model`.

    Raises:
        StageError: the curvature was estimated on another model.
    """
    params: OneshotParams = ctx.params
    compute_deterministically(ctx.device)
    model = input_model(ctx, "model")
    dataset, _ = load_data(model.facts.data)
    partition = model.facts.partition(model.network)
    folder = cast(Path, ctx.input("curvature").path)
    estimate = load_estimate(folder, partition, ctx.device)
    if estimate.model_key != ctx.input("model").key:
        raise StageError(
            f"{ctx.input('curvature').cell} is the curvature of another model than "
            f"{ctx.input('model').cell}; connect both to the same one."
        )
    estimator, recipe = estimate.estimator, estimate.recipe
    source = recipe.calibration.gradients(model, partition, dataset)
    begin(ctx, partition, params.sparsity)
    before = copy.deepcopy(model.network)
    sparsity = params.sparsity
    if sparsity is None:
        sparsity = _sparsest_within(ctx, model, estimator, source, dataset)
    pruned, warnings = prune(
        ctx, model, estimator, source, dataset, params=params, sparsity=sparsity
    )
    step = made_by("prune_oneshot", params, estimator, warnings)
    facts = recipe.facts(mode="oneshot", target=sparsity)
    finish(ctx, pruned.after(estimate.step, step, **facts), dataset)
    chosen = recipe.calibration.indices(dataset)[: params.certificate_samples]
    if len(chosen):
        dense = replace(model, network=before)
        unpruned = recipe.calibration.gradients(dense, partition, dataset, chosen)
        found = pruning_certificate(unpruned, dict(pruned.network.named_parameters()))
        ctx.log({f"pruned/{name}": value for name, value in found.items()})


def _sparsest_within(
    ctx: Context,
    model: Model,
    estimator: AbstractEstimator,
    source: GradientSource,
    dataset: DataSet,
) -> float:
    """Return the highest sparsity, to 1/1024, within the budget of accuracy.

    Bisection assumes that accuracy falls with sparsity. It begins at the model's own sparsity,
    since removed weights stay removed. Each trial prunes a copy, by the same estimate, and
    measures it on the validation split.
    """
    params: OneshotParams = ctx.params
    points = cast(float, params.within)
    partition = estimator.partition
    removed, prunable = count_masks(partition, group_masks(partition, model.masks))
    best = removed / max(prunable, 1)
    dense = measure(model.network, dataset, dataset.validation)["accuracy"]
    removable = sum(
        math.floor((1 - params.min_kept) * group.rows * group.weight_columns)
        for group in partition.prunable
    )
    low, high = math.ceil(_PARTS * best), min(_PARTS, _PARTS * removable // max(prunable, 1) + 1)
    trials = max(high - low - 1, 0).bit_length()
    for done in range(trials):
        middle = (low + high) // 2
        trial = replace(model, network=copy.deepcopy(model.network))
        pruned, _ = prune(
            ctx, trial, estimator, source, dataset, params=params, sparsity=middle / _PARTS
        )
        lost = dense - _validated(pruned, dataset)
        if lost <= points:
            low, best = middle, middle / _PARTS
        else:
            high = middle
        ctx.say(f"sparsity {middle / _PARTS:.4f}: {lost:.2f} points of accuracy lost")
        ctx.progress(done + 1, trials, "bisection")
    return best


def _validated(model: Model, dataset: DataSet) -> float:
    """Return a trial's accuracy on the validation split; 0 where outputs are not finite."""
    try:
        return measure(model.network, dataset, dataset.validation)["accuracy"]
    except NotFinite:
        return 0.0
