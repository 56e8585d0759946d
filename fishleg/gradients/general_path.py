"""The general path: per-sample gradients of any parameters, by vmap or by a loop over the samples.

`torch.func.vmap` over `torch.func.grad` is right for any parameter: bare, tied, of a module that
is used twice or through a functional call. Where vmap fails (a GRU, rows chosen by their values,
sparse gradients, checkpointing), a loop takes the samples one by one, slower again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap

from fishleg.errors import CapacityExceeded, FishLegError
from fishleg.finite import check_finite
from fishleg.gradients.persample import Pass
from fishleg.modes import transformable
from fishleg.nests import Nest, map_tensors, take
from fishleg.network import Network
from fishleg.precision import widen

_log = logging.getLogger(__name__)
_LONGEST = 200  # characters of another library's message


class GeneralPath:
    """The gradients of any parameters: by vmap or, once a model has refused it, by a loop.

    Attributes:
        refused: vmap's error, or None.
    """

    def __init__(self) -> None:
        self.refused: str | None = None

    def gradients(self, network: Network, names: Sequence[str], one: Pass) -> dict[str, Tensor]:
        """Return parameter name -> scaled gradients (n, D, *its shape).

        Raises:
            FishLegError: autograd cannot go through the model, or a gradient is not finite.
            CapacityExceeded: the memory was not enough.
        """
        if not names:
            return {}
        if self.refused is None and len(one.batch.indices) > 1:
            # vmap, or a model under it, may raise any type. The loop raises the model's own errors
            # again.
            try:
                return _finite(_by_vmap(network, names, one), one, network)
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise CapacityExceeded(
                    f"Per-sample gradients: the memory was not enough; lower batch_size. ({error})"
                ) from error
            except FishLegError:
                raise
            except Exception as error:
                refused = shorten(error)
            found = _by_loop(network, names, one)
            self.refused = refused
            _log.warning(
                "Per-sample gradients: the model supports no torch.func.vmap (%s); those of %s are "
                "computed one sample after the other, which is slower.",
                refused,
                ", ".join(names),
            )
            return _finite(found, one, network)
        return _finite(_by_loop(network, names, one), one, network)


def shorten(error: Exception) -> str:
    """Return the first sentence of a message, for a line of a report."""
    text = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {text[:_LONGEST]}{'...' * (len(text) > _LONGEST)}"


def _finite(found: dict[str, Tensor], one: Pass, network: Network) -> dict[str, Tensor]:
    values = {f"The gradient of {name}": value for name, value in found.items()}
    check_finite(values, one.batch, network.model)
    return found


def _by_vmap(network: Network, names: Sequence[str], one: Pass) -> dict[str, Tensor]:
    def loss(parameters: dict[str, Tensor], x: Nest, target: Tensor, scale: Tensor) -> Tensor:
        outputs = network.run(parameters, map_tensors(lambda leaf: leaf[None], x))
        return scale * network.likelihood.nll(outputs, target[None])[0]

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    with network.computing(), transformable(), torch.no_grad():
        parameters = {name: network.model.get_parameter(name).detach() for name in names}
        draws = [
            per_sample(parameters, one.batch.inputs, target, scale)
            for target, scale in zip(one.targets, one.scales.unbind(1), strict=True)
        ]
    return {name: torch.stack([widen(draw[name]) for draw in draws], dim=1) for name in names}


def _by_loop(network: Network, names: Sequence[str], one: Pass) -> dict[str, Tensor]:
    n, draws = one.scales.shape
    found: dict[str, Tensor] = {}
    with network.computing():
        parameters = [network.model.get_parameter(name) for name in names]
        for name, parameter in zip(names, parameters, strict=True):
            found[name] = widen(parameter.detach()).new_empty(n, draws, *parameter.shape)
        for row in range(n):
            part = slice(row, row + 1)
            batch = one.batch._replace(
                inputs=take(one.batch.inputs, part), indices=one.batch.indices[part]
            )
            outputs = network.outputs(batch)
            for draw, target in enumerate(one.targets):
                loss = one.scales[row, draw] * network.likelihood.nll(outputs, target[part])[0]
                gradients = _differentiate(loss, parameters, names, keep=draw + 1 < draws)
                for name, value in zip(names, gradients, strict=True):
                    found[name][row, draw] = value
    return found


def _differentiate(
    loss: Tensor, parameters: Sequence[Tensor], names: Sequence[str], *, keep: bool
) -> list[Tensor]:
    """Return the dense gradients of a loss.

    Raises:
        FishLegError: autograd cannot go through the model.
    """
    if not loss.requires_grad:
        return [torch.zeros_like(one) for one in parameters]
    try:
        found = torch.autograd.grad(loss, parameters, retain_graph=keep, materialize_grads=True)
    except (RuntimeError, ValueError) as error:
        raise FishLegError(
            f"The gradients of {', '.join(names)}: torch.autograd.grad cannot go through the model "
            f"({error}). A checkpoint needs use_reentrant=False; or leave the parameters out with "
            "partition_parameters(skip=...)."
        ) from error
    return [one if one.layout == torch.strided else one.to_dense() for one in found]
