"""Passes of one batch, and the fast path of per-sample gradients.

The fast path takes the gradients of linear, convolution and normalisation layers from hooks: one
forward and one backward pass for a whole batch. The general path (`general_path`) is right for any
parameter, and several times slower; `paths` chooses. Parameters have their state-dict names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishleg.calibration import Batch
from fishleg.errors import FishLegError
from fishleg.finite import check_finite, ruled_in
from fishleg.gradients.capture import Call, output_gradients, recording
from fishleg.gradients.graph import Uses, count_uses
from fishleg.gradients.layers import is_supported, layer_gradients
from fishleg.network import Network
from fishleg.precision import widen, without_autocast

_log = logging.getLogger(__name__)
_LONGEST = 200  # characters of another library's message


@dataclass(frozen=True)
class Pass:
    """One batch of n samples with D labels each, after the forward and backward passes.

    Attributes:
        batch: the samples.
        targets: (D, n, ...).
        scales: (n, D), factors of the losses.
        inputs: name of a hooked module -> its input (n, ...). Modules that were not called exactly
            once, with the samples in the first dimension, are missing here and in `gradients`.
        gradients: name of a hooked module -> scaled gradients of its output, (n, D, ...).
        fast: parameters whose gradients follow from these: in the graph of this batch, only the one
            call of a hooked module uses them.
    """

    batch: Batch
    targets: Tensor
    scales: Tensor
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    fast: frozenset[str]


def run_passes(
    network: Network,
    batch: Batch,
    hooked: Collection[str],
    label: Callable[[Tensor, Batch], tuple[Tensor, Tensor]],
    *,
    draws_at_once: int,
    thorough: bool = False,
) -> Iterator[Pass]:
    """Run `batch` forward once, and backward for each label, down to the modules `hooked`.

    Args:
        network: gives outputs and losses.
        batch: the samples, prepared.
        hooked: module names.
        label: returns targets (D, n, ...) and scales (n, D) for the outputs.
        draws_at_once: labels of the D in one pass, which limits the memory.
        thorough: check inputs and gradients of layers, too, which takes up to a fifth of a pass.

    Raises:
        FishLegError: a part of the model hides its parameters from autograd; or an output or loss
            is not finite, or (if `thorough`) a gradient or a layer's input.
    """
    modules = {name: network.model.get_submodule(name) for name in sorted(hooked)}
    with network.computing():
        with recording(modules) as calls:
            outputs = network.outputs(batch)
        check_finite({"The outputs": ruled_in(outputs)}, batch, network.model)
        targets, scales = label(outputs, batch)
        by_label = [network.likelihood.nll(outputs, target) for target in targets]
        check_finite({"The loss": torch.stack(by_label, dim=1)}, batch, network.model)
        losses = [
            (scale * each).sum() for scale, each in zip(scales.unbind(1), by_label, strict=True)
        ]
        uses = count_uses(outputs)
        if uses.hides:
            raise FishLegError(
                "The model recomputes a part of itself by a checkpoint that hides its parameters "
                "from torch.autograd.grad, which then gives zeros for them; expected "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        fast = _used_once(modules, calls, uses)
    plain = {name: found[0] for name, found in calls.items() if _is_plain(found, batch)}
    inputs = {name: widen(call.activation) for name, call in plain.items()}
    if thorough:
        seen = {f"The input of {name}": x for name, x in inputs.items()}
        check_finite(seen, batch, network.model)
    for start in range(0, len(losses), draws_at_once):
        part = slice(start, start + draws_at_once)
        with network.computing():  # a checkpoint computes the model again
            gradients = output_gradients(list(plain.values()), losses[part])
        found = {name: widen(g) for name, g in zip(plain, gradients, strict=True)}
        if thorough:
            back = {f"The gradient by the output of {name}": g for name, g in found.items()}
            check_finite(back, batch, network.model)
        yield Pass(
            batch,
            targets[part],
            scales[:, part],
            inputs,
            found,
            frozenset(name for name, module in fast.items() if module in plain),
        )


def _is_plain(calls: Sequence[Call], batch: Batch) -> bool:
    n = len(batch.indices)
    return len(calls) == 1 and calls[0].activation.shape[:1] == (n,) == calls[0].output_shape[:1]


def _used_once(
    modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[Call]], uses: Uses
) -> dict[str, str]:
    """Return parameter name -> module, of those that only the module's one call uses.

    A call whose output the model drops is no use; any other operation on the parameter is one.
    """
    found = {}
    for module, made in calls.items():
        if len(made) != 1:
            continue
        own = int(made[0].edge.node in uses.nodes)
        for leaf, parameter in modules[module].named_parameters(recurse=False):
            if uses.of(parameter) == own:
                found[_join(module, leaf)] = module
    return found


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def fast_gradients(model: nn.Module, one: Pass, module: str) -> dict[str, Tensor]:
    """Return parameter name -> scaled gradients (n, D, *its shape) for a hooked module."""
    with without_autocast():
        found = layer_gradients(
            model.get_submodule(module), one.inputs[module], one.gradients[module]
        )
    return {_join(module, leaf): value for leaf, value in found.items()}


def candidates(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return parameter name -> module whose hook may give its gradients."""
    known = {name for name, module in model.named_modules() if is_supported(module)}
    found = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module in known and leaf in ("weight", "bias"):
            found[name] = module
    return found
