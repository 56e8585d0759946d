"""Greedy removal within a layer: one weight after another, with the exact inverse each time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishleg.blocks import AbstractBlock, DiagonalBlock, SharedBlock
from fishleg.errors import FishLegError, NotPositiveDefinite
from fishleg.estimators.base import AbstractEstimator

_MEMORY_BYTES = 256 << 20  # of inverses that are updated together


def greedy_saliency(
    estimator: AbstractEstimator,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    memory_bytes: int = _MEMORY_BYTES,
) -> dict[str, Tensor]:
    """Return what each weight costs when its turn comes, in place of what it costs alone.

    Each row of a layer loses its weights one by one, always the one that costs least then. With C
    the inverse Hessian restricted to the row's remaining weights, removing p costs
    w_p^2 / (2 C_pp), and (OBC, arXiv 2208.11580, lemma 1)

        w <- w - C_:p w_p / C_pp,     C <- C - C_:p C_p: / C_pp.

    A row's k-th cost counts as the largest of its first k costs, and a rounding unit more than its
    (k-1)-th, so that a threshold over all rows takes from each row a beginning of its order: as in
    OBC, where the row whose next removal costs least is always the next. `select` is that
    threshold. The survivors' weights are those of `joint` compensation, exactly: both minimise the
    same quadratic on the same survivors.

    Args:
        estimator: fitted, its prunable blocks the same for all rows or diagonal (`LayerHessian`,
            `DiagonalFisher`, `Identity`): blocks in which rows know nothing of each other.
        weights: group name -> (rows, columns), of prunable groups, at the estimate's own point.
        masks: group name -> bool (rows, columns), the survivors so far; what is removed already
            leaves first.
        memory_bytes: of the inverses that are updated at once, beside one row's.

    Returns:
        Group name -> float64 (rows, columns): 0 for what was removed already, inf in the bias
        column.

    Errors are a FishLegError where a block couples the rows, and those of `GreedyRemoval.run`.

    Time: 2 r c^3 FLOPs a group, in c dependent steps of 2 r c^2. Memory: s c^2 bytes for each row
    that is updated, up to `memory_bytes`.
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
            cost = _by_rows(name, block, matrix, kept, removable, memory_bytes)
        out[name] = cost.masked_fill(~removable, torch.inf)
    return out


def _by_rows(
    name: str,
    block: AbstractBlock,
    weights: Tensor,
    kept: Tensor,
    removable: Tensor,
    memory_bytes: int,
) -> Tensor:
    """Return the costs of one group, as many rows at once as fit the memory.

    Raises:
        FishLegError: the block couples the rows.
    """
    if not isinstance(block, SharedBlock):
        raise FishLegError(
            f"{name}: greedy removal works row by row, but a {type(block).__name__} couples the "
            "rows; expected the method layer, diagonal or magnitude, or the selection 'single'."
        )
    at_once = max(1, memory_bytes // (weights.shape[1] ** 2 * weights.element_size()))
    costs = []
    for rows in torch.arange(len(weights), device=weights.device).split(at_once):
        removal = GreedyRemoval(weights[rows], block.of_rows(rows))
        costs.append(removal.run(kept[rows], removable))
    return torch.cat(costs)


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

    def remove(self, chosen: Tensor) -> None:
        """Remove weight `chosen` (n) of each row. Cost 2 n columns^2 FLOPs."""
        column = self.inverse[self._rows, :, chosen]
        pivot = column[self._rows, chosen].unsqueeze(1)
        step = column / pivot
        self.weights -= step * self.weights[self._rows, chosen].unsqueeze(1)
        self.inverse.baddbmm_(column.unsqueeze(2), step.unsqueeze(1), alpha=-1)
        # rounding leaves a little there, which would come back through later steps
        self.weights[self._rows, chosen] = 0.0
        self.inverse[self._rows, :, chosen] = 0.0
        self.inverse[self._rows, chosen] = 0.0

    def run(self, kept: Tensor, removable: Tensor) -> Tensor:
        """Remove all that is removable, and return each weight's cost, rising in a row's order.

        Args:
            kept: bool (n, columns); what is not kept leaves first, at no cost.
            removable: bool (columns).

        Returns:
            float64 (n, columns), 0 for what is not kept or not removable.

        Raises:
            NotPositiveDefinite: a C_pp is not positive.
        """
        out = torch.zeros(self.weights.shape, dtype=torch.float64, device=self.weights.device)
        waiting = removable.expand_as(kept).clone()
        reached = out.new_zeros(len(out))
        broken = torch.zeros((), dtype=torch.bool, device=out.device)
        above = torch.full_like(reached, torch.inf)
        for _ in range(int(removable.sum())):
            pivots = self.inverse.diagonal(dim1=1, dim2=2)
            broken |= (waiting & ~(pivots > 0)).any()
            costs = self.costs().masked_fill(~kept, -1.0).masked_fill(~waiting, torch.inf)
            chosen = costs.argmin(dim=1)
            cost = costs[self._rows, chosen].double()
            risen = torch.maximum(cost, torch.nextafter(reached, above))
            reached = torch.where(cost < 0, reached, risen)
            out[self._rows, chosen] = reached
            waiting[self._rows, chosen] = False
            self.remove(chosen)
        if broken:
            raise NotPositiveDefinite(
                "greedy removal: expected positive C_pp throughout, but rounding has used up the "
                "inverse; raise the damping, or use float64."
            )
        return out
