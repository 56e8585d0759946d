"""The surgeon: one pruning step on a model, from saliency to exact zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishleg.errors import UnknownName
from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients import GradientSource
from fishleg.linalg import CGReport
from fishleg.parameters import Partition
from fishleg.pruning.compensation import compensate
from fishleg.pruning.layerwise import greedy_saliency
from fishleg.pruning.masks import Masks, apply_masks, count_masks, dense_masks
from fishleg.pruning.saliency import saliency
from fishleg.pruning.selection import select

SELECTIONS = ("single", "greedy")


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What one pruning step did.

    Attributes:
        masks: group name -> bool (rows, columns), the survivors after the step.
        sparsity: fraction of the prunable weights removed so far, in [0, 1).
        removed: number of weights removed so far.
        prunable: number of prunable weights.
        compensation: the method that moved the survivors.
        saliency: sum of the single-weight saliencies of what this step removed, in units of the
            loss.
        predicted: 1/2 d^T F_g d of the whole move by the method's own curvature, damping included,
            in units of the loss; None for `none` and `independent`.
        solves: group name (or "network") -> how its conjugate gradients went.
    """

    masks: Masks
    sparsity: float
    removed: int
    prunable: int
    compensation: str
    saliency: float
    predicted: float | None
    solves: Mapping[str, CGReport]


def prune_once(
    model: nn.Module,
    estimator: AbstractEstimator,
    *,
    sparsity: float,
    masks: Mapping[str, Tensor] | None = None,
    selection: str = "single",
    distribution: str = "global",
    compensation: str = "joint",
    source: GradientSource | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> PruneReport:
    """Remove the least salient weights of `model` up to `sparsity`, and move the others in place.

    Args:
        model: the network that `estimator` was fitted on, at the same weights.
        estimator: a fitted estimate of the inverse Fisher.
        sparsity: fraction of all prunable weights removed after the step, in [0, 1).
        masks: group name -> bool (rows, columns), the survivors before it; None is the estimate's
            own support (for a Q of the full Fisher: everything).
        selection: by what a weight costs: "single", removed alone, or "greedy", after the others
            of its row that cost less; see `greedy_saliency`.
        distribution: "global" or "uniform"; see `select`.
        compensation: "none", "independent", "joint" or "fisher"; see `compensate`.
        source: for "fisher": gradients of `model` on calibration data.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: conjugate-gradient iterations at most a solve.

    Returns:
        The masks and everything that was counted; removed weights are exactly 0. Errors are those
        of `greedy_saliency`, `select` and `compensate`, and leave the model unchanged.

    Raises:
        UnknownName: no such selection.
    """
    if selection not in SELECTIONS:
        raise UnknownName("selection", selection, SELECTIONS)
    partition = estimator.partition
    weights = _matrices(model, partition)
    before = masks or estimator.masks or dense_masks(partition)
    before = {name: mask.to(weights[name].device) for name, mask in before.items()}
    prunable = {group.name: weights[group.name] for group in partition.prunable}
    if selection == "greedy":
        scores = greedy_saliency(estimator, prunable, before)
    else:
        scores = saliency(estimator, prunable)
    return prune_to(
        model,
        estimator,
        masks=select(partition, scores, before, sparsity, distribution),
        compensation=compensation,
        source=source,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


@torch.no_grad()
def prune_to(
    model: nn.Module,
    estimator: AbstractEstimator,
    *,
    masks: Masks,
    compensation: str = "joint",
    source: GradientSource | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> PruneReport:
    """Remove all weights outside `masks`, however chosen, and move the others in place.

    Arguments, results and errors as for `prune_once`, but `masks` are the survivors after the step.
    """
    partition = estimator.partition
    weights = _matrices(model, partition)
    deltas, report = compensate(
        estimator,
        weights,
        masks,
        method=compensation,
        source=source,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    # what was removed in earlier steps is 0, and so is its saliency
    scores = saliency(estimator, {name: weights[name] for name in masks})
    parameters = dict(model.named_parameters())
    for name, delta in partition.scatter(deltas).items():
        parameters[name].add_(delta)
    apply_masks(model, partition, masks)
    removed, prunable = count_masks(partition, masks)
    return PruneReport(
        masks=masks,
        sparsity=removed / prunable if prunable else 0.0,
        removed=removed,
        prunable=prunable,
        compensation=report.method,
        saliency=sum(float(scores[name][~mask].double().sum()) for name, mask in masks.items()),
        predicted=report.predicted,
        solves=report.solves,
    )


def _matrices(model: nn.Module, partition: Partition) -> dict[str, Tensor]:
    """Return copies of the model's weights as group name -> (rows, columns)."""
    named = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return partition.gather(named)
