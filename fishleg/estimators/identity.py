"""No curvature at all: pruning by it is magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.estimators.onepass import AbstractOnePassEstimator
from fishleg.gradients import GradientSource
from fishleg.moments import Progress


class Identity(AbstractOnePassEstimator):
    """Q = I, whatever the damping: saliency w^2 / 2, and no compensation. Reads no data.

    Args:
        partition: the groups.
        damping: ignored.
    """

    name = "magnitude"

    def _estimate(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None, progress: Progress
    ) -> dict[str, AbstractBlock]:
        blocks: dict[str, AbstractBlock] = {}
        for group in self.partition.groups:
            weight = source.model.get_parameter(group.weight)
            ones = torch.ones(group.shape, dtype=weight.dtype, device=weight.device)
            blocks[group.name] = DiagonalBlock(ones)
        progress(source.rows)
        return blocks
