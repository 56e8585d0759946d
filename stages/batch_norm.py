"""Batch norm over a batch whose parts are in several processes.

The statistics are those of the whole batch, so that training in several processes equals training
in one. `torch.nn.SyncBatchNorm` does this on GPUs only, and in every forward pass. Here the passes
inside `whole_batches` alone do: an optimiser's pass over a batch that each process holds whole
stays local.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fishleg.gradients.rank_group import RankGroup


@contextmanager
def whole_batches(network: nn.Module, rank_group: RankGroup) -> Iterator[None]:
    """Let the network's batch norms, in training mode, take statistics over the rank group."""
    norms = [one for one in network.modules() if isinstance(one, _BatchNorm)]
    if rank_group.size == 1 or not norms:
        yield
        return
    for norm in norms:
        norm.forward = partial(_forward, norm, rank_group)  # type: ignore[method-assign] # until the end
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, rank_group: RankGroup, inputs: Tensor) -> Tensor:
    """Replace the module's own `forward`, with statistics over the rank group's inputs."""
    if not norm.training:
        return type(norm).forward(norm, inputs)
    norm._check_input_dim(inputs)
    outputs, mean, variance, count = _Normalise.apply(
        inputs, norm.weight, norm.bias, norm.eps, rank_group
    )
    if norm.running_mean is not None and norm.running_var is not None:
        rate = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            rate = 1.0 / float(norm.num_batches_tracked) if rate is None else rate
        unbiased = variance * (count / (count - 1))
        norm.running_mean.lerp_(mean.to(norm.running_mean), rate or 0.0)
        norm.running_var.lerp_(unbiased.to(norm.running_var), rate or 0.0)
    return outputs


class _Normalise(torch.autograd.Function):
    """y = w (x - mean) / sqrt(variance + eps) + b, mean and variance over the rank group.

    With n values a channel in all, s = 1 / sqrt(variance + eps) and sums over the rank group,
    dx = w s (dy - sum(dy) / n - (x - mean) s^2 sum(dy (x - mean)) / n) (S. Ioffe and C. Szegedy,
    arXiv 1502.03167). The gradients of w and b are this process's share, as all others are. Sums
    are float64, as in torch on a CPU, so that the split into parts changes hardly a bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rank_group: RankGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        total = wide.sum(axes, dtype=torch.float64)
        sums = torch.cat([total, total.new_tensor([inputs[:, 0].numel()])])
        rank_group.sum([sums])
        count = sums[-1].clone()
        mean = sums[:-1] / count
        centred = wide - _along(mean, wide)
        squares = centred.square().sum(axes, dtype=torch.float64)
        rank_group.sum([squares])
        variance = squares / count
        scale = torch.rsqrt(variance + eps)
        slope = scale if weight is None else scale * weight
        shift = -mean * slope if bias is None else bias - mean * slope
        outputs = torch.addcmul(_along(shift, wide), wide, _along(slope, wide))
        ctx.save_for_backward(inputs, mean, scale, weight, count)
        ctx.rank_group, ctx.axes = rank_group, axes
        ctx.mark_non_differentiable(mean, variance, count)
        return outputs.to(inputs.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, scale, weight, count = ctx.saved_tensors
        wide = slope.to(torch.promote_types(slope.dtype, torch.float32))
        centred = inputs.to(wide.dtype) - _along(mean, wide)
        plain = wide.sum(ctx.axes, dtype=torch.float64)
        along = (wide * centred).sum(ctx.axes, dtype=torch.float64)
        sums = torch.stack([plain, along])
        ctx.rank_group.sum([sums])
        means = sums / count
        rest = wide - _along(means[0], wide) - centred * _along(means[1] * scale.square(), wide)
        factor = scale if weight is None else scale * weight
        moved = (rest * _along(factor, wide)).to(slope.dtype)
        if weight is None:
            return moved, None, None, None, None
        return moved, (along * scale).to(weight.dtype), plain.to(weight.dtype), None, None


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each channel in the dtype of `like`, shaped to broadcast over it."""
    return values.to(like.dtype).reshape(1, -1, *[1] * (like.ndim - 2))
