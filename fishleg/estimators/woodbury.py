"""Optimal brain surgeon with dense blocks of the Fisher: WoodFisher, oBERT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.dense import DenseBlock, invert_damped
from fishleg.estimators.onepass import AbstractOnePassEstimator
from fishleg.gradients import GradientSource
from fishleg.moments import Progress, accumulate, chunk_products
from fishleg.parameters import Partition


class BlockWoodbury(AbstractOnePassEstimator):
    """Q = blockdiag( (F_k + damping I)^-1 ), F_k the Fisher of b consecutive entries of a group.

    The inverse that WoodFisher (Singh and Alistarh 2020, eq. 10) and oBERT (Kurtic et al. 2022)
    reach by one Sherman-Morrison update a gradient. Here F_k is summed and inverted by Cholesky:
    the same matrix, at less cost. With N gradients of P entries in all, the sum takes 2 N P b
    FLOPs as one batched matrix product and the inversion P b^2, where rank-one (or rank-m Woodbury)
    updates of Q take 4 N P b and cannot be reordered; and rounding does not build up over N steps.
    Blocks run along the row-major vector, within one group.

    Memory while fitting: 8 P b bytes of float64 sums, beside the 4 P b bytes of the float32 result.

    Args:
        partition: the groups.
        damping: gamma > 0.
        block_size: b >= 1; a group smaller than b is one full block.

    Raises:
        ValueError: `block_size` is less than 1.
    """

    name = "obs"
    options = ("block_size",)

    def __init__(self, partition: Partition, *, damping: float, block_size: int = 64):
        super().__init__(partition, damping=damping)
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}.")
        self.block_size = block_size

    def _estimate(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None, progress: Progress
    ) -> dict[str, AbstractBlock]:
        products = partial(chunk_products, block_size=self.block_size)
        sums = accumulate(source, products, masks=masks, progress=progress)
        blocks = {}
        for name in self.partition.names:
            (fisher,) = sums.pop(name)  # so that each sum is freed once inverted
            block = DenseBlock(invert_damped(fisher, self.damping), self.partition[name].shape)
            blocks[name] = self._cast(source, name, block)
        return blocks
