"""Batch norms of a network whose weights have changed: their means and variances, measured again.

A batch norm divides by the spread of the dense network's activations, which its running statistics
hold. Removing weights shifts and shrinks the activations, so that these statistics no longer fit.
Nothing here reads a label, and no weight is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fishleg.calibration import each_batch
from fishleg.calling import PLAIN, Calling
from fishleg.errors import FishLegError


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that keep running statistics, in module order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Any], calling: Calling = PLAIN) -> None:
    """Set the running statistics of all batch norms to those over `batches`, in place.

    With m_b and v_b a channel's mean and variance over the n_b values of batch b, N their sum:

        mean = sum_b n_b m_b / N,   var = (sum_b n_b (v_b + m_b^2) - N mean^2) / (N - 1),

    the mean and the unbiased variance of all values, while each norm normalises by the present
    batch, so that later layers see nearly their final inputs. One pass ("precise" statistics: Wu
    and Johnson, arXiv 2105.07576, section 3).

    Args:
        model: on any device, left in evaluation mode. One without batch norms stays as it is.
        batches: on the model's device, as `Refinement.step` takes them; augmented as in the
            network's training, whose statistics are those of such inputs (on clean images the dense
            ResNet20 loses three points); large ones, since small ones make noise; a single value a
            channel has no variance, and is a FishLegError.
        calling: how the model is called.

    Cost: a forward pass. Memory: two float64 numbers a channel.
    """
    sums = [_Sums(norm) for norm in running_norms(model)]
    if not sums:
        return
    model.eval()
    with ExitStack() as stack:
        for one in sums:
            stack.enter_context(_watched(one.norm, one.add))
            stack.enter_context(_by_batch(one.norm))
        for inputs, _ in each_batch(batches):
            calling.outputs(model, inputs)
    for one in sums:
        one.write()


def need_several_values(norm: nn.Module, values: Tensor) -> None:
    """Check that a norm can divide by the moments of `values`.

    Raises:
        FishLegError: there is one value a channel.
    """
    if _values_a_channel(values) < 2:
        raise FishLegError(
            f"{type(norm).__name__}: a batch of inputs {tuple(values.shape)} has one value a "
            "channel, and so no variance; leave out a last batch of one sample (drop_last=True), "
            "or cut the samples into batches of about equal size."
        )


def _values_a_channel(values: Tensor) -> int:
    return values.numel() // max(values.shape[1], 1)


@contextmanager
def normalising_by_batch(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let norms normalise by the present batch, as in training; then put them in evaluation mode.

    A batch with a single value a channel is a FishLegError.
    """
    chosen = list(norms)
    with ExitStack() as stack:
        for norm in chosen:
            stack.enter_context(_watched(norm, partial(need_several_values, norm)))
            norm.train()
        try:
            yield
        finally:
            for norm in chosen:
                norm.eval()


@contextmanager
def following_norms(model: nn.Module) -> Iterator[None]:
    """Let the running statistics follow each forward pass, while the norms normalise by them.

        mean <- (1 - momentum) mean + momentum m_b,   var likewise, before batch b is normalised,

    with each norm's own momentum. A norm that normalises by the batch, as in training, makes noise:
    on batches of 128 the dense ResNet20 itself is 0.008 nats away from its own outputs, a floor
    under every divergence measured that way. Here a network equal to the dense one is at 0.

    A batch with a single value a channel, which has no variance, leaves the statistics alone.

    Args:
        model: in evaluation mode.

    Cost: the batch's moments, about the forward pass of each norm once more.
    """

    def follow(norm: _BatchNorm, values: Tensor) -> None:
        if _values_a_channel(values) < 2:
            return  # they have no variance
        momentum = 0.1 if norm.momentum is None else norm.momentum
        nn.functional.batch_norm(values, *_statistics(norm), training=True, momentum=momentum)

    with ExitStack() as stack:
        for norm in running_norms(model):
            stack.enter_context(_watched(norm, partial(follow, norm)))
        yield


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


class _Sums:
    """Sums over the inputs of one norm."""

    def __init__(self, norm: _BatchNorm):
        self.norm = norm
        self.kept = _statistics(norm)
        self.count = 0
        self.first = torch.zeros_like(self.kept[0], dtype=torch.float64)
        self.second = torch.zeros_like(self.first)

    def add(self, values: Tensor) -> None:
        need_several_values(self.norm, values)
        others = [0, *range(2, values.ndim)]
        variance, mean = torch.var_mean(values.double(), others, correction=0)
        number = _values_a_channel(values)
        self.count += number
        self.first += number * mean
        self.second += number * (variance + mean.square())

    def write(self) -> None:
        if self.count < 2:  # no batch has reached it
            return
        mean = self.first / self.count
        spread = (self.second - self.count * mean.square()).clamp(min=0)
        self.kept[0].copy_(mean)
        self.kept[1].copy_(spread / (self.count - 1))


@contextmanager
def _by_batch(norm: _BatchNorm) -> Iterator[None]:
    """Let a norm normalise by the batch, keeping no statistics."""
    norm.track_running_stats, mean, variance = False, norm.running_mean, norm.running_var
    norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        norm.track_running_stats, norm.running_mean, norm.running_var = True, mean, variance


@contextmanager
def _watched(norm: _BatchNorm, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see` with the input of a norm, before the norm reads it."""

    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(args[0].detach())

    handle = norm.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
