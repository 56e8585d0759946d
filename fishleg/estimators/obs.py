"""Optimal brain surgeon with dense blocks of the Fisher: WoodFisher, oBERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fishleg.blocks.dense import DenseBlock, chunk_count
from fishleg.estimators.onepass import AbstractOnePassEstimator, DataPass
from fishleg.gradients.source import GradientSource
from fishleg.linalg import invert_damped
from fishleg.memory import Footprint
from fishleg.moments import accumulate, chunk_products
from fishleg.options import ObsOptions
from fishleg.parameters import Partition


class OBS(AbstractOnePassEstimator):
    """Q = blockdiag( (F_k + damping I)^-1 ), F_k the Fisher of b consecutive entries of a group.

    The inverse that WoodFisher (Singh and Alistarh 2020, eq. 10) and oBERT (Kurtic et al. 2022)
    reach by one Sherman-Morrison update a gradient. Here F_k is summed and inverted by Cholesky:
    the same matrix, at less cost. With N gradients of P entries in all, the sum takes 2 N P b
    FLOPs as one batched matrix product and the inversion P b^2, where rank-one (or rank-m Woodbury)
    updates of Q take 4 N P b and cannot be reordered; and rounding does not build up over N steps.
    Blocks run along the row-major vector, within one group.

    Time: a pass of the gradients, 2 N P b FLOPs for the sums and P b^2 for the inverses.
    Memory: s r c b bytes a group, padded to whole blocks; while fitting 8 r c b of float64 sums in
    their place, and for the largest group the more of 32 r c b, to invert, and s (3 n r c + r c b),
    to sum. b is the size of the group where that is smaller.

    Args:
        partition: the groups.
        damping: gamma > 0.
        block_size: b >= 1; a group smaller than b is one full block.
        by_rows: whether each row is a block, in place of `block_size`: b is the row's length.
        memory_limit: see `AbstractEstimator`.

    Raises:
        ValueError: `block_size` is less than 1.
    """

    name = "obs"
    averages = True
    options: ObsOptions
    remedy = "a smaller block_size"

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        block_size: int = ObsOptions.block_size,
        by_rows: bool = ObsOptions.by_rows,
        memory_limit: int | None = None,
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.options = ObsOptions(block_size=block_size, by_rows=by_rows)

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        products = {
            name: partial(chunk_products, block_size=self._block_size(name))
            for name in self.partition.names
        }

        def invert(name: str, sums: list[Tensor]) -> DenseBlock:
            return DenseBlock(invert_damped(sums[0], self.damping), self.partition[name].shape)

        return [DataPass(partial(accumulate, source, products, masks=masks), invert)]

    def _block_size(self, name: str) -> int:
        """Return b of a group."""
        group = self.partition[name]
        return group.columns if self.options.by_rows else min(self.options.block_size, group.size)

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs; see the class."""
        size, bytes_each = self.partition[name].size, source.element_size(name)
        block_size = self._block_size(name)
        numbers = chunk_count(size, block_size) * block_size**2
        summing = bytes_each * (3 * source.rows_at_once * size + numbers)
        return Footprint(
            held=bytes_each * numbers, sums=8 * numbers, work=max(summing, 32 * numbers)
        )
