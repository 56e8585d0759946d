"""A model as curvature sees it: in evaluation mode, and computed in float32 at least."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fishleg.calibration import Batch
from fishleg.calling import PLAIN, Calling
from fishleg.errors import FishLegError
from fishleg.likelihoods import Likelihood
from fishleg.modes import evaluating
from fishleg.nests import Nest, map_tensors, take
from fishleg.precision import is_narrow, recast, widen, without_autocast

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model with all that computing its losses needs.

    Attributes:
        model: maps (n, ...) to (n, ...).
        likelihood: the meaning of the outputs.
        calling: how the model is called.
        cast: of its parameters, buffers and inputs while it computes; None where they are wide
            enough, or where its code converts to half precision by itself and fails otherwise.
    """

    model: nn.Module
    likelihood: Likelihood
    calling: Calling = PLAIN
    cast: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Put the model in evaluation mode with autograd on, no autocast around it, and `cast`.

        Afterwards every flag and tensor is as it was. Parameters must be looked up in the block.
        """
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(without_autocast())
            if self.cast is not None:
                stack.enter_context(recast(self.model, self.cast))
            yield

    def prepare(self, batch: Batch) -> Batch:
        """Return a batch with its inputs `cast`."""
        if self.cast is None:
            return batch
        return batch._replace(inputs=map_tensors(self.cast, batch.inputs))

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return other values of parameters, `cast` as the model's own are."""
        return {name: self.cast(one) if self.cast else one for name, one in tensors.items()}

    def outputs(self, batch: Batch) -> Tensor:
        """Return the outputs (n, ...) of a prepared batch; errors as of `Calling.outputs`."""
        return widen(self.calling.outputs(self.model, batch.inputs))

    def run(self, parameters: Mapping[str, Tensor] | None, inputs: Nest) -> Tensor:
        """Return the outputs with other values of some parameters; raises as the model."""
        return widen(self.calling.run(self.model, inputs, parameters))


def has_narrow(model: nn.Module) -> bool:
    """Tell whether a model has parameters or buffers in half precision."""
    return any(is_narrow(one.dtype) for one in (*model.parameters(), *model.buffers()))


def find_network(
    model: nn.Module, likelihood: Likelihood, calling: Calling, sample: Callable[[], Batch]
) -> Network:
    """Return the network that computes in float32 at least, if the model's code permits it.

    Args:
        model: any module.
        likelihood: the meaning of its outputs.
        calling: how it is called.
        sample: gives some sample.

    Errors are those of `Calling.outputs`. Cost: where the model has weights in half precision, a
    forward pass of the sample.
    """
    network = Network(model=model, likelihood=likelihood, calling=calling)
    if not has_narrow(model):
        return network
    wide, batch = replace(network, cast=widen), sample()
    try:
        with wide.computing(), torch.no_grad():
            wide.outputs(wide.prepare(batch))
    except FishLegError as error:
        with network.computing(), torch.no_grad():
            network.outputs(batch)  # raises if the cause is not the dtype
        _log.warning(
            "The network cannot be computed in float32 (%s): its code converts to half precision "
            "by itself. Its activations are rounded to that, sums over samples are not.",
            error,
        )
        return network
    return wide


class WideModels:
    """Lets models compute in float32 at least where `find_network` permits, in their own mode.

    Args:
        likelihood: the meaning of the models' outputs.
        calling: how they are called.
    """

    def __init__(self, likelihood: Likelihood, calling: Calling = PLAIN):
        self._likelihood = likelihood
        self._calling = calling
        self._casts: dict[int, Callable[[Tensor], Tensor] | None] = {}

    @contextmanager
    def computing(self, model: nn.Module, inputs: Nest) -> Iterator[None]:
        """Let a model's parameters and buffers be wide copies; the buffers keep their final values.

        Args:
            model: one that outlives this object.
            inputs: of some samples, for the trial at a model's first use.
        """
        if id(model) not in self._casts:
            one = Batch(take(inputs, slice(0, 1)), None, torch.zeros(1, dtype=torch.int64))
            network = find_network(model, self._likelihood, self._calling, lambda: one)
            self._casts[id(model)] = network.cast
        cast = self._casts[id(model)]
        if cast is None:
            yield
            return
        with recast(model, cast, keep_buffers=True):
            yield

    def outputs_in_full(self, model: nn.Module, inputs: Nest) -> Tensor:
        """Return the outputs (n, ...) of a model computed in float32 at least."""
        with self.computing(model, inputs):
            return self.outputs(model, inputs)

    def outputs(self, model: nn.Module, inputs: Nest) -> Tensor:
        """Return the outputs (n, ...) of a model as it is, for inputs as wide as its weights."""
        if not has_narrow(model):
            inputs = map_tensors(widen, inputs)
        return widen(self._calling.outputs(model, inputs))
