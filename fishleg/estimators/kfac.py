"""K-FAC with exact damping: Kronecker factors of layers, inverted in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.dense import DenseBlock
from fishleg.blocks.eigen import invert_factors
from fishleg.estimators.onepass import AbstractOnePassEstimator, DataPass
from fishleg.gradients.source import GradientSource
from fishleg.linalg import invert_damped
from fishleg.memory import Footprint
from fishleg.moments import (
    accumulate,
    as_factors,
    chunk_products,
    kronecker_products,
    layer_moments,
)
from fishleg.options import KfacOptions
from fishleg.parameters import Partition


class KFAC(AbstractOnePassEstimator):
    """Q = (Gamma (x) A + damping I)^-1, the damping exact, one pair a convolution group.

    Gamma is the second moment of the gradients with respect to a layer's outputs, A that of its
    inputs, a bias being one more input of ones; see `moments.layer_moments`. The factors are of the
    full Fisher, so `refine` estimates them again on the full Fisher.

    Groups without a linear or convolution layer (norms, bare, tied):
    - up to `dense_size` entries, their full Fisher is summed and inverted, exactly;
    - beyond, F ~ E[G G^T] (x) E[G^T G] / tr F, from per-sample gradients, damped as above. This is
      F itself for vectors and wherever F is a Kronecker product.

    Time: two passes over the data (one, if all groups are layers), 2 N T (r^2 / h + h c^2) FLOPs a
    layer of T positions, and O(r^3 / h^2 + h c^3) for its eigenvectors. Memory: s (k + r c) bytes a
    group, k = r^2 / h + h c^2, or s (r c)^2 for a dense one; while fitting 8 k bytes of float64
    sums in their place, and 32 k + 24 r c for the eigenvectors of the largest group; dense groups
    as `OBS` with b = r c.

    Args:
        partition: the groups.
        damping: gamma > 0.
        dense_size: entries up to which a group without a layer gets its full Fisher.
        memory_limit: see `AbstractEstimator`.
    """

    name = "kfac"
    averages = True
    remedy = "the method diagonal or obs, or a smaller dense_size"
    restricts = False
    options: KfacOptions

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        dense_size: int = KfacOptions.dense_size,
        memory_limit: int | None = None,
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.options = KfacOptions(dense_size=dense_size)

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        layers = [name for name in self.partition.names if source.conv_groups(name) is not None]
        others = [name for name in self.partition.names if name not in layers]
        passes = [
            DataPass(partial(layer_moments, source, layers), self._invert_factors),
            DataPass(partial(accumulate, source, self._products, groups=others), self._substitute),
        ]
        return [one for one, names in zip(passes, (layers, others), strict=True) if names]

    def _invert_factors(self, name: str, sums: list[Tensor]) -> AbstractBlock:
        gamma, a = sums
        return invert_factors(gamma, a, self.damping)

    def _products(self, gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the statistics of a batch for a group without a layer."""
        if gradients[0].numel() <= self.options.dense_size:
            return chunk_products(gradients, self.options.dense_size)
        return kronecker_products(gradients)

    def _substitute(self, name: str, sums: list[Tensor]) -> AbstractBlock:
        """Return the block of a group without a layer."""
        if len(sums) == 1:
            return DenseBlock(invert_damped(sums[0], self.damping), self.partition[name].shape)
        return invert_factors(*as_factors(*sums), self.damping)

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs; see the class."""
        group, bytes_each = self.partition[name], source.element_size(name)
        conv_groups, size = source.conv_groups(name), group.size
        gradients = 0 if conv_groups else 3 * bytes_each * source.rows_at_once * size
        if not conv_groups and size <= self.options.dense_size:
            summing = gradients + bytes_each * size**2
            return Footprint(
                held=bytes_each * size**2, sums=8 * size**2, work=max(summing, 32 * size**2)
            )
        factors = group.rows**2 // (conv_groups or 1) + (conv_groups or 1) * group.columns**2
        return Footprint(
            held=bytes_each * (factors + size),
            sums=8 * factors,
            work=max(gradients + bytes_each * factors, 32 * factors + 24 * size),
        )
