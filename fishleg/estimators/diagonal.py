"""The inverse of the Fisher's diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.estimators.onepass import AbstractOnePassEstimator, DataPass
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint
from fishleg.moments import accumulate, squares


class DiagonalFisher(AbstractOnePassEstimator):
    """Q = diag(1 / (F_ii + damping)): saliency w^2 (F_ii + damping) / 2, and no compensation.

    Time: a pass of the gradients, and 2 N P FLOPs. Memory: s P bytes; while fitting another 8 P of
    float64 sums, and 2 n s r c for the largest group.

    Args:
        partition: the groups.
        damping: gamma > 0.
        memory_limit: see `AbstractEstimator`.
    """

    name = "diagonal"
    averages = True
    remedy = "the method magnitude"

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        def invert(name: str, sums: list[Tensor]) -> DiagonalBlock:
            return DiagonalBlock(1 / (sums[0] + self.damping))

        return [DataPass(partial(accumulate, source, squares, masks=masks), invert)]

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs; see the class."""
        size = self.partition[name].size
        held = source.element_size(name) * size
        return Footprint(held=held, sums=8 * size + held, work=2 * source.rows_at_once * held)
