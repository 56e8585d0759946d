"""M-FAC: the inverse of a low-rank Fisher, made of a few gradients, without its matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.low_rank import invert_low_rank
from fishleg.estimators.onepass import AbstractOnePassEstimator, DataPass
from fishleg.gradients.running_sums import Progress, RunningSums, Sums
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint
from fishleg.options import MfacOptions
from fishleg.parameters import Partition
from fishleg.rng import SampleGenerator


class MFAC(AbstractOnePassEstimator):
    """Q = (damping I + sum_k v_k v_k^T)^-1 of m vectors v_k, a block a group (arXiv 2107.03356).

    With at least as many vectors as gradient rows, N <= m, each v is the gradient of one sample
    and Q the exact inverse of the group's damped Fisher on these samples. Otherwise the rows are
    cut into m runs, and v_k = sum +-g over the scaled gradients of run k with random signs. Then
    E[v_k v_k^T] is the sum of g g^T over the run, so that the Fisher is estimated without bias
    from all samples. This differs from the paper, which takes the mean of a mini-batch of B: the
    cross terms of a mean vanish only for labels drawn from the model, and the rest is F / B, which
    no damping corrects. Random signs avoid both.

    Directions outside the span of the m vectors have the inverse curvature 1 / damping, the
    largest.

    Time: a pass of the gradients, 2 N P FLOPs, 3 m^2 P in float64 for the inverse, 4 m P for a
    product with Q and 2 m P for its diagonal. Memory: s (m P + 1 a group) bytes; while fitting
    24 (m^2 + 8192 m) more, or 3 n s r c for the largest group.

    Args:
        partition: the groups.
        damping: gamma > 0.
        gradients: m >= 1, vectors kept a group; never more than there are gradient rows.
        seed: of the signs.
        memory_limit: see `AbstractEstimator`.

    Raises:
        ValueError: `gradients` is less than 1.
    """

    name = "mfac"
    remedy = "fewer gradients (m)"
    options: MfacOptions

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        gradients: int = MfacOptions.gradients,
        seed: int = MfacOptions.seed,
        memory_limit: int | None = None,
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.options = MfacOptions(gradients=gradients, seed=seed)

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        def invert(name: str, sums: list[Tensor]) -> AbstractBlock:
            return invert_low_rank(sums[0], self.damping)

        vectors = partial(self.vectors, source, self.partition.names, masks)
        return [DataPass(vectors, invert)]

    def vectors(
        self,
        source: GradientSource,
        groups: Sequence[str],
        masks: Mapping[str, Tensor] | None = None,
        *,
        running: RunningSums | None = None,
        progress: Progress | None = None,
    ) -> Sums:
        """Return group name -> [v], v (m, rows, columns), of the groups asked for.

        Args:
            source: of scaled gradients.
            groups: names.
            masks: group name -> bool (rows, columns); gradients of removed weights count as zero.
            running: sums of an interrupted pass, which is resumed; holds the vectors.
            progress: is given the gradient rows done so far.
        """
        count = min(self.options.gradients, source.rows)

        def add(sums: Sums, batch: Mapping[str, Tensor], first_row: int) -> int:
            rows = 0
            for name, gradients in batch.items():
                rows = len(gradients)
                if name not in sums:
                    sums[name] = [gradients.new_zeros(count, *gradients.shape[1:])]
                numbers = torch.arange(first_row, first_row + rows, device=gradients.device)
                signs = self._signs(numbers, count, source.rows).to(gradients.dtype)
                signed = gradients * signs[:, None, None]
                if masks is not None and name in masks:
                    signed *= masks[name]
                sums[name][0].index_add_(0, numbers * count // source.rows, signed)
            return rows

        running = running or RunningSums()
        running.run(source, lambda part: part.stream(groups), add, progress)
        return running.sums

    def _signs(self, numbers: Tensor, count: int, rows: int) -> Tensor:
        """Return the sign of each gradient row; 1 where each vector is one row."""
        if count == rows:
            return torch.ones_like(numbers)
        coins = SampleGenerator(self.options.seed, numbers).uniform(1).squeeze(1)
        return torch.where(coins < 0.5, -1, 1)

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs; see the class."""
        size, bytes_each = self.partition[name].size, source.element_size(name)
        count = min(self.options.gradients, source.rows)
        summing = 3 * bytes_each * source.rows_at_once * size
        return Footprint(
            held=bytes_each * (count * size + 1),
            sums=bytes_each * count * size,
            work=max(summing, 24 * count * (count + min(size, 8192))),
        )
