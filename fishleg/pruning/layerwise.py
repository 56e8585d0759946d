"""Greedy removal within a layer: one weight after another, with the exact inverse each time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishleg.blocks import DiagonalBlock
from fishleg.errors import NotPositiveDefinite
from fishleg.estimators.base import AbstractEstimator
from fishleg.pruning.conditioning import Conditioned, condition, survivors_first

_MEMORY_BYTES = 256 << 20  # of inverses that are updated together


def greedy_saliency(
    estimator: AbstractEstimator,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    memory_bytes: int = _MEMORY_BYTES,
) -> dict[str, Tensor]:
    """Return the cost of each weight when its turn comes, in place of its cost alone.

    Each row of a layer loses its weights one by one, the cheapest first, while the other rows keep
    theirs. With C the row's part of `Conditioned`, and so of Q while nothing is removed, removing p
    costs w_p^2 / (2 C_pp), and (OBC, arXiv 2208.11580, lemma 1)

        w <- w - C_:p w_p / C_pp,     C <- C - C_:p C_p: / C_pp.

    Two weights that replace one another are cheap alone and expensive together, which only an order
    shows: the sum of a row's costs is exactly 1/2 d^T Q^-1 d for removing them all, the whole group
    adjusting, where C is exact: in a first step, with a Q fitted on the survivors, and in a later
    one with the blocks that `Conditioned` lists. The present step's removals in other rows do not
    enter; where rows are independent (`LayerHessian`) this is exact, and is OBC.

    A row's k-th cost counts as the largest of its first k costs, and a rounding unit more than its
    (k-1)-th, so that a threshold over all rows (`select`) takes the first weights of each row's
    order: the row whose next removal costs least is always the next.

    Args:
        estimator: a fitted estimate of Q.
        weights: group name -> (rows, columns), of prunable groups, at the estimate's own point.
        masks: group name -> bool (rows, columns), the survivors so far. C is conditioned on
            removed weights of all rows that Q covers, since their zeros are constraints; a Q fitted
            on the survivors takes them into account.
        memory_bytes: of the inverses that are updated at once, beside one row's.

    Returns:
        Group name -> float64 (rows, columns): 0 for removed weights, inf in the bias column.

    Errors are those of `GreedyRemoval.run`.

    Time: 2 r s^3 FLOPs a group, s the most survivors of a row, in s dependent steps of 2 r s^2;
    and the cost of `Conditioned`. Memory: c^2 numbers for each
    row that is updated, up to `memory_bytes`, and about five times that while conditioning.
    """
    out = {}
    for name, matrix in weights.items():
        block = estimator.block(name)
        group = estimator.partition[name]
        removable = torch.arange(group.columns, device=matrix.device) < group.weight_columns
        kept = masks[name].to(matrix.device)
        if isinstance(block, DiagonalBlock):
            cost = matrix.double().square() / (2 * block.diagonal())
            cost.masked_fill_(~kept, 0.0)
        else:
            conditioned = condition(estimator, name, masks)
            cost = _by_rows(conditioned, matrix, kept, removable, memory_bytes)
        out[name] = cost.masked_fill(~removable, torch.inf)
    return out


def _by_rows(
    conditioned: Conditioned,
    weights: Tensor,
    kept: Tensor,
    removable: Tensor,
    memory_bytes: int,
) -> Tensor:
    """Return the costs of one group, as many rows at once as fit the memory."""
    costs = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
    at_once = max(1, memory_bytes // (weights.shape[1] ** 2 * weights.element_size()))
    for rows in torch.arange(len(weights), device=weights.device).split(at_once):
        order = survivors_first(kept[rows])
        removable_here = kept[rows].gather(1, order) & removable[order]
        removal = GreedyRemoval(weights[rows].gather(1, order), conditioned.of_rows(rows, order))
        costs[rows] = costs[rows].scatter(1, order, removal.run(removable_here))
    return costs


class GreedyRemoval:
    """Rows that lose their weights one by one, each row its own.

    Args:
        weights: w, (n, columns); not modified.
        inverse: C, (n, columns, columns), each symmetric positive definite; overwritten.

    Attributes:
        weights: of the survivors, where the others' are 0.
        inverse: restricted to the survivors; rows and columns of the others are 0.
    """

    def __init__(self, weights: Tensor, inverse: Tensor):
        self.weights = weights.clone()
        self.inverse = inverse
        self._rows = torch.arange(len(weights), device=weights.device)

    def costs(self) -> Tensor:
        """Return w_p^2 / (2 C_pp) for each weight, (n, columns); not a number for the removed."""
        return self.weights.square() / (2 * self.inverse.diagonal(dim1=1, dim2=2))

    def remove(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Remove weight `chosen` (m) of each of `rows` (m), or of all; 2 m columns^2 FLOPs."""
        rows = self._rows if rows is None else rows
        column = self.inverse[rows, :, chosen]
        step = column / self.inverse[rows, chosen, chosen].unsqueeze(1)
        self.weights[rows] -= step * self.weights[rows, chosen].unsqueeze(1)
        if len(rows) == len(self._rows):
            self.inverse.baddbmm_(column.unsqueeze(2), step.unsqueeze(1), alpha=-1)
        else:
            self.inverse[rows] -= column.unsqueeze(2) * step.unsqueeze(1)
        # rounding leaves a remainder there, which would enter later steps
        self.weights[rows, chosen] = 0.0
        self.inverse[rows, :, chosen] = 0.0
        self.inverse[rows, chosen] = 0.0

    def run(self, removable: Tensor) -> Tensor:
        """Remove all removable weights, and return each weight's cost, rising in a row's order.

        Args:
            removable: bool (n, columns).

        Returns:
            float64 (n, columns), 0 for weights that are not removable.

        Raises:
            NotPositiveDefinite: a C_pp is not positive.
        """
        out = torch.zeros(self.weights.shape, dtype=torch.float64, device=self.weights.device)
        waiting = removable.clone()
        reached = out.new_zeros(len(out))
        broken = torch.zeros((), dtype=torch.bool, device=out.device)
        above = torch.full_like(reached, torch.inf)
        counts = removable.sum(1)
        for step in range(int(counts.max())):
            pivots = self.inverse.diagonal(dim1=1, dim2=2)
            broken |= (waiting & ~(pivots > 0)).any()
            costs = self.costs().masked_fill(~waiting, torch.inf)
            rows = (counts > step).nonzero().flatten()
            chosen = costs[rows].argmin(dim=1)
            cost = costs[rows, chosen].double()
            reached[rows] = torch.maximum(cost, torch.nextafter(reached[rows], above[rows]))
            out[rows, chosen] = reached[rows]
            waiting[rows, chosen] = False
            self.remove(chosen, rows)
        if broken:
            raise NotPositiveDefinite(
                "greedy removal: expected positive C_pp throughout, but rounding has used up the "
                "inverse; raise the damping, or use float64."
            )
        return out
