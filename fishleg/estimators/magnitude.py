"""No curvature at all: pruning by it is magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.estimators.onepass import AbstractOnePassEstimator, DataPass
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint
from fishleg.parameters import used_weight
from fishleg.precision import widen


class Magnitude(AbstractOnePassEstimator):
    """Q = I, for any damping: saliency w^2 / 2, and no compensation. Reads no data.

    A parametrised weight w(v) is judged by the values of the forward pass: Q = (v / w)^2 entry by
    entry, so that v^2 / 2Q = w^2 / 2, for any scale of the stored tensor.

    Time: O(P). Memory: s P bytes.

    Args:
        partition: the groups.
        damping: ignored.
        memory_limit: see `AbstractEstimator`.
    """

    name = "magnitude"
    remedy = "a smaller model"
    warnings = ()

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        return []

    def _without_data(self, source: GradientSource) -> dict[str, AbstractBlock]:
        blocks: dict[str, AbstractBlock] = {}
        for group in self.partition.groups:
            weight = source.model.get_parameter(group.weight)
            values = torch.ones(group.shape, dtype=source.dtype(group.name), device=weight.device)
            if group.prunable and group.used != group.weight:
                stored = widen(weight.detach())
                scale = (stored / widen(used_weight(source.model, group))).square()
                scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
                values[:, : group.weight_columns] = scale.reshape(group.rows, -1)
            blocks[group.name] = DiagonalBlock(values)
        return blocks

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that group `name` needs: one number a parameter."""
        return Footprint(held=source.element_size(name) * self.partition[name].size, sums=0, work=0)

    def peak_bytes(self, source: GradientSource) -> int:
        """Return the bytes of the estimate: nothing else is made."""
        return self.required_bytes(source)
