"""K-FAC with exact damping: Kronecker factors of layers, inverted in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.dense import DenseBlock, invert_damped
from fishleg.blocks.eigen import invert_factors
from fishleg.estimators.onepass import AbstractOnePassEstimator
from fishleg.gradients import GradientSource
from fishleg.moments import (
    Progress,
    accumulate,
    as_factors,
    chunk_products,
    kronecker_products,
    layer_moments,
)
from fishleg.parameters import Partition


class KFAC(AbstractOnePassEstimator):
    """Q = (Gamma (x) A + damping I)^-1, the damping exact, one pair a convolution group.

    Gamma is the second moment of the gradients with respect to a layer's outputs, A that of its
    inputs, a bias being one more input of ones; see `moments.layer_moments`. The factors describe
    the full Fisher, so `refine` estimates them afresh on the full Fisher.

    Groups without a linear or convolution layer (norms, bare, tied) are not left out:
    - up to `dense_size` entries, their full Fisher is summed and inverted, exactly;
    - beyond, F ~ E[G G^T] (x) E[G^T G] / tr F, from per-sample gradients, damped as above. This is
      F itself for vectors and wherever F is a Kronecker product.

    Cost: two passes over the data (one, if all groups are layers).

    Args:
        partition: the groups.
        damping: gamma > 0.
        dense_size: entries up to which a group without a layer gets its full Fisher.
    """

    name = "kfac"
    restricts = False
    passes = 2
    options = ("dense_size",)

    def __init__(self, partition: Partition, *, damping: float, dense_size: int = 1024):
        super().__init__(partition, damping=damping)
        self.dense_size = dense_size

    def _estimate(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None, progress: Progress
    ) -> dict[str, AbstractBlock]:
        factors = layer_moments(source, self.partition.names, progress)
        blocks: dict[str, AbstractBlock] = {
            name: invert_factors(gamma, a, self.damping) for name, (gamma, a) in factors.items()
        }
        others = [name for name in self.partition.names if name not in factors]
        if others:
            blocks |= self._substitutes(source, others, progress)
        progress(self.passes * source.rows)
        return {name: self._cast(source, name, blocks.pop(name)) for name in self.partition.names}

    def _substitutes(
        self, source: GradientSource, names: Sequence[str], progress: Progress
    ) -> dict[str, AbstractBlock]:
        """Return the blocks of groups without a layer, from per-sample gradients."""

        def moments(gradients: Tensor) -> tuple[Tensor, ...]:
            if gradients[0].numel() <= self.dense_size:
                return chunk_products(gradients, self.dense_size)
            return kronecker_products(gradients)

        def report(done: int) -> None:
            progress(source.rows + done)

        blocks: dict[str, AbstractBlock] = {}
        for name, sums in accumulate(source, moments, groups=names, progress=report).items():
            if len(sums) == 1:
                inverse = invert_damped(sums[0], self.damping)
                blocks[name] = DenseBlock(inverse, self.partition[name].shape)
            else:
                blocks[name] = invert_factors(*as_factors(*sums), self.damping)
        return blocks
