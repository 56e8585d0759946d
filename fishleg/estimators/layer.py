"""The Hessian of a layer's output error, which OBC and SparseGPT use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.blocks.shared import SharedBlock
from fishleg.errors import FishLegError
from fishleg.estimators.onepass import AbstractOnePassEstimator, DataPass
from fishleg.gradients.source import GradientSource
from fishleg.linalg import invert_damped
from fishleg.memory import Footprint
from fishleg.moments import input_moments
from fishleg.options import LayerOptions
from fishleg.parameters import Partition


class LayerHessian(AbstractOnePassEstimator):
    """Q = I_rows (x) (H + mu I)^-1 with H = E[sum_t x_t x_t^T] of a layer's inputs x_t.

    1/2 d H d^T is half the squared change of the layer's outputs by a move d of one row, summed
    over the T positions and averaged over the samples. So H, up to the factor 2 of OBC (arXiv
    2208.11580) and SparseGPT (arXiv 2301.00774), is the curvature of every row: the one of `KFAC`
    with Gamma = I. The inputs of a convolution are its patches, those of a bias are ones. No label
    enters. mu = damping + relative_damping mean(diag H); SparseGPT takes one percent
    of the mean. Saliencies are output errors, whose units differ from layer to layer; to compare
    them in one layer only, select with the distribution `uniform`. OBC is the selection `greedy`
    with it; the selection `single` is neither OBC nor SparseGPT, which remove weights one after the
    other.

    `refine` estimates the full H again, from the inputs that the pruning has changed.

    Groups that are no layer's weight have no inputs: H = 0, and Q = I / damping. A prunable group
    of that kind is refused.

    Time: a pass of the layers' signals, 2 N T h c^2 FLOPs a layer of T positions, and O(h c^3).
    Memory: s h c^2 bytes a layer, s r c for another group; while fitting 8 h c^2 of float64 sums in
    their place, and 32 h c^2 for the largest.

    Args:
        partition: the groups.
        damping: gamma > 0, in units of H.
        relative_damping: >= 0, in units of the mean of H's diagonal.
        memory_limit: see `AbstractEstimator`.

    Raises:
        ValueError: `relative_damping` is negative.
    """

    name = "layer"
    remedy = "the method diagonal or obs"
    distribution = "uniform"
    restricts = False
    options: LayerOptions

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        relative_damping: float = LayerOptions.relative_damping,
        memory_limit: int | None = None,
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.options = LayerOptions(relative_damping=relative_damping)

    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        for group in self.partition.prunable:
            if source.conv_groups(group.name) is None:
                raise FishLegError(
                    f"{group.name}: expected the weight of one linear or convolution layer, called "
                    "once; a layer's Hessian is known of these only. Leave it dense by `keep=` of "
                    "partition_parameters, or choose another method."
                )

        def invert(name: str, sums: list[Tensor]) -> SharedBlock:
            (hessian,) = sums
            mean = float(hessian.diagonal(dim1=1, dim2=2).mean())
            mu = self.damping + self.options.relative_damping * mean
            return SharedBlock(invert_damped(hessian, mu), self.partition[name].shape)

        return [DataPass(partial(input_moments, source, self.partition.names), invert)]

    def _without_data(self, source: GradientSource) -> dict[str, AbstractBlock]:
        blocks: dict[str, AbstractBlock] = {}
        for group in self.partition.groups:
            if source.conv_groups(group.name) is None:
                weight = source.model.get_parameter(group.weight)
                ones = torch.ones(group.shape, dtype=source.dtype(group.name), device=weight.device)
                blocks[group.name] = DiagonalBlock(ones / self.damping)
        return blocks

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs; see the class."""
        group, bytes_each = self.partition[name], source.element_size(name)
        conv_groups = source.conv_groups(name)
        if conv_groups is None:
            return Footprint(held=bytes_each * group.size, sums=0, work=0)
        numbers = conv_groups * group.columns**2
        return Footprint(held=bytes_each * numbers, sums=8 * numbers, work=32 * numbers)
