"""The surgeon: one pruning step on a model, from saliency to exact zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import get_args

import torch
from torch import Tensor, nn

from fishleg.checks import check_function
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients.source import GradientSource
from fishleg.linalg import CGReport
from fishleg.options import (
    AdmmOptions,
    Compensation,
    Distribution,
    PruningOptions,
    Selection,
    Zeros,
)
from fishleg.parameters import ParameterGroup, Partition, used_weight
from fishleg.precision import in_full, widen
from fishleg.pruning.admm import AdmmReport, admm_masks
from fishleg.pruning.compensation import compensate
from fishleg.pruning.layerwise import greedy_saliency
from fishleg.pruning.masks import (
    Masks,
    apply_masks,
    check_masks,
    count_masks,
    dense_masks,
    made_zeros,
    zero_masks,
)
from fishleg.pruning.report import PruneReport, report_layers
from fishleg.pruning.saliency import Score, saliency
from fishleg.pruning.selection import check_prunable, listed, removal_count, select

SELECTIONS: tuple[str, ...] = get_args(Selection)
ZEROS: tuple[str, ...] = get_args(Zeros)


@in_full
def prune_once(
    model: nn.Module,
    estimator: AbstractEstimator,
    *,
    sparsity: float,
    masks: Mapping[str, Tensor] | None = None,
    selection: Selection | Score = PruningOptions.selection,
    distribution: Distribution | None = PruningOptions.distribution,
    min_kept: float = PruningOptions.min_kept,
    zeros: Zeros = "keep",
    compensation: Compensation = PruningOptions.compensation,
    source: GradientSource | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = PruningOptions.cg_iterations,
    admm: AdmmOptions | None = None,
) -> PruneReport:
    """Remove the least salient weights of `model` up to `sparsity`, and move the others in place.

    Args:
        model: the network that `estimator` was fitted on, at the same weights.
        estimator: a fitted estimate of the inverse Fisher.
        sparsity: fraction of all prunable weights removed after the step, in [0, 1).
        masks: group name -> bool (rows, columns), the survivors before it; None is the estimate's
            own support (for a Q of the full Fisher: everything), without the zeros that `zeros`
            keeps.
        selection: by the cost of a weight: "single", removed alone, or "greedy", after the cheaper
            ones of its row; see `greedy_saliency`. Or the mask of least cost that ADMM finds
            ("admm"); see `admm_masks`. Or a function `score(estimator,
            weights)` that returns group name -> (rows, columns) of scores, the lowest removed
            first, from the estimate and group name -> weights (rows, columns); see `saliency`,
            which is one. `distribution` compares its scores.
        distribution: "global" or "uniform", see `select`; None is the estimator's own.
        min_kept: fraction of each group that survives at the least, in [0, 1]; see `select`.
        zeros: where `masks` is None, weights that are 0 already count as removed and stay 0
            ("keep"; see `zero_masks` for which), or are like any others ("free").
        compensation: "none", "independent", "joint" or "fisher"; see `compensate`.
        source: for "fisher": gradients of `model` on calibration data.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: conjugate-gradient iterations at most a solve.
        admm: options of the selection "admm"; None for the defaults.

    Returns:
        The masks and the counts; removed weights are exactly 0. Errors are those of
        `greedy_saliency`, `select` and `compensate`, and leave the model unchanged.

    Raises:
        FishLegError: more weights are 0 already than are to be removed.
        UnknownName: no such selection, or `zeros` is neither.
    """
    check_selection(selection)
    if zeros not in ZEROS:
        raise UnknownName("zeros", zeros, ZEROS)
    partition = estimator.partition
    weights = _matrices(model, partition)
    before = masks or estimator.masks or dense_masks(partition)
    check_masks(partition, before)
    before = {name: mask.to(weights[name].device) for name, mask in before.items()}
    found: dict[str, int] = {}
    options = {} if zeros == "keep" and not masks else {"at_least": inf}
    for name, mask in zero_masks(model, partition, **options).items():
        if gone := int((before[name] & ~mask).sum()):
            found[name] = gone
            before[name] = before[name] & mask
    removed, count = count_masks(partition, before)
    if found and removal_count(count, sparsity) < removed:
        remedy = "" if "at_least" in options else ", or let them go with zeros='free'"
        raise FishLegError(
            f"sparsity {sparsity}: expected at least {removed / count:.6g}, since {removed} of "
            f"{count} weights are 0 already ({listed(found)}) and stay removed; ask for more"
            f"{remedy}."
        )
    prunable = {group.name: weights[group.name] for group in partition.prunable}
    singles = saliency(estimator, prunable, before)
    spread = estimator.distribution if distribution is None else distribution

    def keep_best(scores: Mapping[str, Tensor]) -> Masks:
        return select(partition, scores, before, sparsity, spread, min_kept=min_kept)

    course: AdmmReport | None = None
    if selection == "admm":
        after, course = admm_masks(
            estimator, prunable, singles, keep_best, before=before, options=admm
        )
    elif callable(selection):
        after = keep_best(_own_scores(selection, estimator, prunable))
    elif selection == "greedy":
        after = keep_best(greedy_saliency(estimator, prunable, before))
    else:
        after = keep_best(singles)
    report = _remove(
        model, estimator, singles, after, compensation, source, tolerance, max_iterations
    )
    warnings = (*_say_zeros(found), *report.warnings)
    return replace(report, zeros=found, admm=course, warnings=warnings)


def check_selection(selection: str | Score) -> None:
    """Check that a selection is one of `SELECTIONS`, or a function.

    Raises:
        UnknownName: it is another name.
    """
    if not isinstance(selection, str):
        check_function("selection", selection, "a name or a function")
    elif selection not in SELECTIONS:
        raise UnknownName("selection", selection, SELECTIONS)


def _own_scores(
    score: Score, estimator: AbstractEstimator, weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the scores of a user's function.

    Raises:
        ShapeMismatch: it gives a group no tensor of the group's shape.
    """
    given = {name: matrix.clone() for name, matrix in weights.items()}  # it may write into them
    scores = score(estimator, given)
    for name, matrix in weights.items():
        found = scores.get(name) if isinstance(scores, Mapping) else None
        if not isinstance(found, Tensor) or found.shape != matrix.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeMismatch(
                f"score: expected scores {tuple(matrix.shape)} of group {name}, got {got}."
            )
    return scores


@in_full
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
    """Remove all weights outside `masks`, and move the others in place.

    Arguments, results and errors as for `prune_once`, but `masks` are the survivors after the step.
    """
    partition = estimator.partition
    check_prunable(partition)
    check_masks(partition, masks)
    weights = _matrices(model, partition)
    before = {name: mask | (weights[name] != 0) for name, mask in masks.items()}
    singles = saliency(estimator, {name: weights[name] for name in masks}, before)
    return _remove(
        model, estimator, singles, masks, compensation, source, tolerance, max_iterations
    )


@torch.no_grad()
def _remove(
    model: nn.Module,
    estimator: AbstractEstimator,
    singles: Mapping[str, Tensor],
    masks: Masks,
    compensation: str,
    source: GradientSource | None,
    tolerance: float,
    max_iterations: int,
) -> PruneReport:
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
    # weights removed in earlier steps are 0, and so are their saliencies
    costs = {name: float(singles[name][~mask].double().sum()) for name, mask in masks.items()}
    _move(model, partition, deltas, masks)
    removed, prunable = count_masks(partition, masks)
    emptied = tuple(
        group.name
        for group in partition.prunable
        if not masks[group.name][:, : group.weight_columns].any()
    )
    return PruneReport(
        masks=masks,
        sparsity=removed / prunable if prunable else 0.0,
        removed=removed,
        prunable=prunable,
        compensation=report.method,
        saliency=sum(costs.values()),
        predicted=report.predicted,
        solves=report.solves,
        layers=report_layers(model, partition, masks, costs),
        unprunable=partition.unprunable,
        emptied=emptied,
        warnings=(
            *_say_emptied(emptied),
            *_say_short(report.solves, tolerance),
            *estimator.warnings,
        ),
    )


def _move(
    model: nn.Module, partition: Partition, deltas: Mapping[str, Tensor], masks: Masks
) -> None:
    """Add the moves, and set removed weights to exactly 0 where the forward pass reads them.

    Raises:
        FishLegError: a weight is not finite afterwards, or a removed one is not 0; the model is
            unchanged then.
    """
    parameters = dict(model.named_parameters())
    moves = partition.scatter(deltas)
    for name, move in moves.items():
        if not (parameters[name] + move).to(parameters[name].dtype).isfinite().all():
            raise FishLegError(
                f"{name}: expected finite weights after the step, got others; raise the damping, "
                "or look for overflow in the curvature."
            )
    made = [group for group in partition.prunable if group.used != group.weight]
    before = {name: value.clone() for name, value in parameters.items()} if made else {}
    for name, move in moves.items():
        parameters[name].add_(move)
    apply_masks(model, partition, masks)
    try:
        for group in made:
            _check_made(used_weight(model, group), group, masks[group.name])
    except FishLegError:
        for name, value in before.items():
            parameters[name].copy_(value)
        raise


def _check_made(made: Tensor, group: ParameterGroup, mask: Tensor) -> None:
    """Check the weight that a module computes from its stored tensors.

    Raises:
        FishLegError: it is not finite, or not 0 where it is removed.
    """
    removed = ~mask[:, : group.weight_columns].reshape(group.weight_shape)
    if (made[removed] == 0).all() and made.isfinite().all():
        return
    raise FishLegError(
        f"{group.used}: expected zeros for the removed weights and finite numbers for the others, "
        f"as the module makes them of {group.weight}, got others; let something of each slice that "
        "is divided by its norm survive, or remove the parametrization first "
        "(torch.nn.utils.parametrize.remove_parametrizations)."
    )


def _say_zeros(found: Mapping[str, int]) -> tuple[str, ...]:
    if not found:
        return ()
    return (
        f"{sum(found.values())} weights were exactly 0 before the step and count as removed "
        f"({listed(found)}).",
    )


def _say_emptied(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"Layers that have lost every weight: {', '.join(names)}; nothing of their input "
        "passes. Set min_kept, or a lower sparsity.",
    )


def _say_short(solves: Mapping[str, CGReport], tolerance: float) -> tuple[str, ...]:
    return tuple(
        f"compensation of {name}: conjugate gradients stopped at the relative residual "
        f"{solve.residual:.1e} after {solve.iterations} iterations, short of {tolerance:.1e}; "
        "raise max_iterations, or the damping."
        for name, solve in solves.items()
        if not solve.converged
    )


def _matrices(model: nn.Module, partition: Partition) -> dict[str, Tensor]:
    """Return copies of the model's weights, in float32 at least, as group name -> (rows, columns).

    Where the module makes zeros of a stored weight (see `made_zeros`), they are 0 here.
    """
    named = {name: widen(p.detach()).clone() for name, p in model.named_parameters()}
    for group in partition.prunable:
        if group.used != group.weight:
            named[group.weight].masked_fill_(made_zeros(model, group), 0.0)
    return partition.gather(named)
