"""Saliency: the cost of removing weights, with the best adjustment of the rest of the block.

In the quadratic model 1/2 d^T Q^-1 d of the loss around the present weights w, the least cost of
d_i = -w_i is w_i^2 / (2 Q_ii) (optimal brain surgeon; Hassibi and Stork, 1993, equation 5), and of
removing a set q together 1/2 w_q^T (Q_qq)^-1 w_q. Zeros of earlier steps are constraints: in a
later step with a Q of the full Fisher, C of `Conditioned` takes the place of Q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.errors import NotPositiveDefinite
from fishleg.estimators.base import AbstractEstimator
from fishleg.pruning.conditioning import Conditioned, condition

Score = Callable[[AbstractEstimator, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Group name -> scores (rows, columns), of an estimate and group name -> weights."""


def saliency(
    estimator: AbstractEstimator,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return w_i^2 / (2 C_ii) for every weight, in units of the loss.

    Args:
        estimator: a fitted estimate of Q.
        weights: group name -> (rows, columns), of any of its groups.
        masks: group name -> bool (rows, columns), the survivors of earlier steps, which C is of;
            None is the estimate's support: C = Q.

    Returns:
        Group name -> (rows, columns); exactly 0 where the weight is 0, for any C_ii.

    Cost: one diagonal a group; after earlier steps that of `Conditioned`.
    """
    out = {}
    for name, matrix in weights.items():
        cost = matrix.square() / (2.0 * condition(estimator, name, masks).diagonal())
        # a removed weight may have left the block's support, where C_ii = 0 would give 0 / 0
        out[name] = torch.where(matrix == 0, torch.zeros_like(cost), cost)
    return out


def group_saliency(block: AbstractBlock | Conditioned, weights: Tensor, index: Tensor) -> Tensor:
    """Return 1/2 w_q^T (Q_qq)^-1 w_q for sets q of weights, in units of the loss.

    Args:
        block: the group's block of Q; in a later step `condition(estimator, name, masks)`.
        weights: the group's matrix (rows, columns).
        index: (..., b) distinct flat row-major positions of each set, int64.

    Returns:
        (...) saliencies.

    Raises:
        NotPositiveDefinite: a Q_qq is not positive definite.

    Cost: O(b^3) a set.
    """
    chosen = weights.flatten()[index].unsqueeze(-1)
    factor, failed = torch.linalg.cholesky_ex(block.submatrix(index))
    if failed.any():
        raise NotPositiveDefinite(
            f"group saliency: expected positive definite Q_qq, got {int((failed > 0).sum())} of "
            f"{failed.numel()} that are not; keep the sets on the estimate's support, or raise the "
            "damping."
        )
    white = torch.linalg.solve_triangular(factor, chosen, upper=False)
    return 0.5 * white.squeeze(-1).square().sum(dim=-1)
