"""Compensation: how the survivors move when weights are removed.

Letters: w weights, P the constrained set, r the survivors, E_P its selector, Q ~ (F + gamma I)^-1.

The constrained set follows from the estimate alone, so the two kinds of estimate cannot be mixed:
P = (support of Q) minus (survivors after the step). A Q fitted on survivors has these as support,
and P holds the weights that this step removes. A Q of the full Fisher has every weight as support,
and P holds all weights removed so far, whose zeros are constraints too. All products are masked to
the support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from fishleg.blocks import AbstractBlock, LowRankBlock
from fishleg.errors import FishLegError, UnknownName
from fishleg.estimators.base import AbstractEstimator
from fishleg.fisher import fisher_vector_product
from fishleg.gradients.source import GradientSource
from fishleg.linalg import CGReport, conjugate_gradient
from fishleg.options import Compensation
from fishleg.parameters import Partition
from fishleg.pruning.masks import Masks, check_masks

COMPENSATIONS: tuple[str, ...] = get_args(Compensation)
NETWORK = "network"
"""The name under which `fisher` reports its one solve."""


@dataclass(frozen=True, kw_only=True)
class CompensationReport:
    """The result of a compensation.

    Attributes:
        method: one of `COMPENSATIONS`.
        predicted: 1/2 d^T F_g d of the whole move d, damping included, in units of the loss: by
            `joint` with Q^-1 for F_g, by `fisher` with F_g itself; None for the others.
        solves: group name (or `NETWORK`) -> how its conjugate gradients went.
    """

    method: str
    predicted: float | None
    solves: dict[str, CGReport]


def compensate(
    estimator: AbstractEstimator,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    method: str = "joint",
    source: GradientSource | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> tuple[dict[str, Tensor], CompensationReport]:
    """Return the move d of all weights that leaves exact zeros outside `masks`.

        none          d = -E_P w_P
        independent   d = -sum_i Q e_i w_i / Q_ii over i in P (the sum of single-weight updates)
        joint         d = -Q E_P x, Q_PP x = w_P, block by block
        fisher        (F_rr + gamma I) d_r = F_rP w_P over the whole network, F exact

    then d_P = -w_P exactly. `joint` is least in 1/2 d^T Q^-1 d, `fisher` in 1/2 d^T F_g d; they
    agree when Q = F_g^-1. Where at most a tenth of a block survives, and its support is everything,
    `joint` solves the same for the survivors: (Q^-1)_rr d_r = (Q^-1)_rP w_P.
    Conjugate gradients are preconditioned by 1/diag(Q) on P, and by Q on r; of `joint` they run in
    the weights' dtype, with the residuals between their rounds in float64.

    Args:
        estimator: a fitted estimate; its `masks` are the support of Q (None: everything).
        weights: group name -> (rows, columns), all groups, at the point that Q was fitted around.
        masks: group name -> bool (rows, columns), the survivors after the step.
        method: one of `COMPENSATIONS`.
        source: for `fisher`: gradients of the model that holds `weights`, on calibration data.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: iterations at most a solve.

    Returns:
        Group name -> d (rows, columns) for every group of `weights`, and a report. A solve that
        stopped short is reported, not raised: d_P is exact, and d_r better than none.

    Raises:
        UnknownName: no such method.
        FishLegError: `fisher` has no source; also as `constrained_set` and `conjugate_gradient`.

    Cost: `joint` one product with a block an iteration, `fisher` one exact F-vector product.
    """
    if method not in COMPENSATIONS:
        raise UnknownName("compensation", method, COMPENSATIONS)
    removed = constrained_set(estimator, weights, masks)
    if method == "fisher":
        if source is None:
            raise FishLegError("compensation 'fisher' needs `source`, got None.")
        move = _by_fisher(estimator, source, weights, removed, tolerance, max_iterations)
    else:
        move = _by_blocks(estimator, weights, removed, method, tolerance, max_iterations)
    deltas, report = move
    for name, gone in removed.items():
        deltas[name] = torch.where(gone, -weights[name], deltas[name])
        if estimator.masks is not None:
            deltas[name].masked_fill_(~estimator.masks[name], 0.0)
    return deltas, report


def constrained_set(
    estimator: AbstractEstimator, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Masks:
    """Return P, group name -> bool (rows, columns): the support of Q minus the survivors `masks`.

    Raises:
        FishLegError: a survivor lies outside the support of Q, or a weight outside it is not 0;
            also as `check_masks`.
    """
    check_masks(estimator.partition, masks)
    if estimator.masks is None:
        return {name: ~mask for name, mask in masks.items()}
    check_masks(estimator.partition, estimator.masks)
    out: Masks = {}
    for name, mask in masks.items():
        support = estimator.masks[name]
        outside = int((mask & ~support).sum())
        if outside:
            raise FishLegError(
                f"{name}: {outside} survivors lie outside the weights that {estimator.name} was "
                "fitted on, where it is undefined; refine or fit it under these masks first."
            )
        stray = int((weights[name][~support] != 0).sum())
        if stray:
            raise FishLegError(
                f"{name}: expected 0 for the weights that {estimator.name} was fitted without, got "
                f"{stray} others; apply_masks to the model first."
            )
        out[name] = support & ~mask
    return out


# ------------------------------------------------------------------------------ block by block


def _by_blocks(
    estimator: AbstractEstimator,
    weights: Mapping[str, Tensor],
    removed: Mapping[str, Tensor],
    method: str,
    tolerance: float,
    max_iterations: int,
) -> tuple[dict[str, Tensor], CompensationReport]:
    """Return the moves of `none`, `independent` or `joint`, before zeros are made exact."""
    deltas = {name: torch.zeros_like(matrix) for name, matrix in weights.items()}
    solves: dict[str, CGReport] = {}
    predicted = 0.0
    for name, gone in removed.items():
        if method == "none" or not gone.any():
            continue
        block = estimator.block(name)
        target = torch.where(gone, weights[name], 0.0)
        if method == "independent":
            deltas[name] = -block.matvec(_restrict(gone, target / block.diagonal()))
            continue
        everywhere = estimator.masks is None or bool(estimator.masks[name].all())
        solve = _on_survivors if everywhere and _prefers_survivors(block, gone) else _on_removed
        move, cost, solves[name] = solve(block, gone, target, tolerance, max_iterations)
        deltas[name] = move.to(target)
        predicted += cost
    return deltas, CompensationReport(
        method=method, predicted=predicted if method == "joint" else None, solves=solves
    )


def _prefers_survivors(block: AbstractBlock, gone: Tensor) -> bool:
    """Tell whether to solve for the survivors: where they are at most a tenth of a block.

    There (Q^-1)_rr is the smaller matrix and the better conditioned one; with fewer zeros Q_PP is,
    by one or two orders at a half (docs/log.md). Of a low-rank block Q^-1 is known less well.
    """
    kept = gone.numel() - int(gone.sum())
    return 10 * kept <= gone.numel() and not isinstance(block, LowRankBlock)


def _on_removed(
    block: AbstractBlock, gone: Tensor, target: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, float, CGReport]:
    """Return d = -Q E_P x with Q_PP x = w_P, 1/2 d^T Q^-1 d = 1/2 x^T Q x, and how it went."""
    diagonal, wide = block.diagonal(), block.double()
    multiplier, report = conjugate_gradient(
        lambda x: _restrict(gone, block.matvec(x)),
        target,
        preconditioner=lambda r: _restrict(gone, r / diagonal),
        tolerance=tolerance,
        max_iterations=max_iterations,
        wide=lambda x: _restrict(gone, wide.matvec(x)),
    )
    move = -wide.matvec(multiplier)
    return move, -0.5 * float((multiplier * move).sum()), report


def _on_survivors(
    block: AbstractBlock, gone: Tensor, target: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, float, CGReport]:
    """Return d with H_rr d_r = H_rP w_P, H = Q^-1, and d_P = -w_P, 1/2 d^T H d, and how it went."""
    wide = block.double().invert()
    near = wide.restore({name: one.to(target) for name, one in wide.tensors().items()}, block.shape)
    image = _restrict(~gone, wide.matvec(target.double()))
    survivors, report = conjugate_gradient(
        lambda x: _restrict(~gone, near.matvec(x)),
        image.to(target),
        preconditioner=lambda r: _restrict(~gone, block.matvec(r)),
        tolerance=tolerance
        / 10,  # at equal residuals d_r has ten times the error of the other side
        max_iterations=max_iterations,
        wide=lambda x: _restrict(~gone, wide.matvec(x)),
    )
    report = replace(report, converged=report.residual <= tolerance)
    move = survivors - target
    return move, 0.5 * float((move * wide.matvec(move)).sum()), report


def _restrict(kept: Tensor, v: Tensor) -> Tensor:
    """Return v on `kept` and 0 elsewhere, also where v is not finite."""
    return torch.where(kept, v, 0.0)


# -------------------------------------------------------------------------- across the network


def _by_fisher(
    estimator: AbstractEstimator,
    source: GradientSource,
    weights: Mapping[str, Tensor],
    removed: Mapping[str, Tensor],
    tolerance: float,
    max_iterations: int,
) -> tuple[dict[str, Tensor], CompensationReport]:
    """Return the move of `fisher`, before zeros are made exact."""
    partition = estimator.partition
    flat = _Flattening(partition)
    gone = {name: torch.zeros_like(weights[name], dtype=torch.bool) for name in partition.names}
    gone.update(removed)
    support = {name: torch.ones_like(mask) for name, mask in gone.items()}
    support.update(estimator.masks or {})
    target = flat.join({name: _restrict(gone[name], weights[name]) for name in partition.names})
    survives = flat.join({name: support[name] & ~gone[name] for name in partition.names})

    image = flat.join(_fisher_product(source, partition, flat.split(target)))
    rhs = _restrict(survives, image)
    moves, solve = solve_on_survivors(
        estimator,
        source,
        flat.split(rhs),
        flat.split(survives),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    # d = move - target; by Galerkin, move^T (F_rr + gamma I) move = move^T rhs at every iterate
    within = float((target * (image + estimator.damping * target)).sum())
    gained = float((flat.join(moves) * rhs).sum())
    return moves, CompensationReport(
        method="fisher", predicted=0.5 * (within - gained), solves={NETWORK: solve}
    )


def solve_on_survivors(
    estimator: AbstractEstimator,
    source: GradientSource,
    rhs: Mapping[str, Tensor],
    survives: Mapping[str, Tensor],
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[dict[str, Tensor], CGReport]:
    """Solve (F_rr + gamma I) x_r = b_r across the network, F exact, and x = 0 elsewhere.

    Conjugate gradients, preconditioned by m o Q o m.

    Args:
        estimator: gives Q and gamma.
        source: of F, at the model's present weights.
        rhs: group name -> b (rows, columns), all groups.
        survives: group name -> bool (rows, columns), r, all groups.
        tolerance: relative residual at which they stop.
        max_iterations: at most.

    Returns:
        Group name -> x (rows, columns), and how it went. Errors as for `conjugate_gradient`.

    Cost: an exact F-vector product over the source's samples, and a product with Q, an iteration.
    """
    partition = estimator.partition
    flat = _Flattening(partition)
    kept = flat.join(survives)

    def damped(v: Tensor) -> Tensor:
        image = flat.join(_fisher_product(source, partition, flat.split(v)))
        return _restrict(kept, image + estimator.damping * v)

    solution, solve = conjugate_gradient(
        damped,
        _restrict(kept, flat.join(rhs)),
        preconditioner=lambda r: _restrict(kept, flat.join(estimator.matvec(flat.split(r)))),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return flat.split(solution), solve


def _fisher_product(
    source: GradientSource, partition: Partition, v: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return F v, group name -> (rows, columns), exactly."""
    return partition.gather(fisher_vector_product(source, partition.scatter(v), form="exact"))


class _Flattening:
    """Joins the matrices of all groups into one vector, and splits it again."""

    def __init__(self, partition: Partition):
        self._shapes = {group.name: group.shape for group in partition.groups}

    def join(self, matrices: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([matrices[name].flatten() for name in self._shapes])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([rows * columns for rows, columns in self._shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
