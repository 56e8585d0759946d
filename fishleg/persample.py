"""Per-sample gradients of one batch, on two paths, and the choice between them.

The fast path takes the gradients of linear, convolution and normalisation layers from hooks: one
forward and one backward pass for a whole batch. The general path is `torch.func.vmap` over
`torch.func.grad`: right for any parameter (bare, tied, of a module that is used twice or through
a functional call), and several times slower. Parameters go by their state-dict names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fishleg.calibration import Batch
from fishleg.calling import PLAIN, Calling
from fishleg.capture import (
    Call,
    evaluating,
    is_supported,
    layer_gradients,
    output_gradients,
    recording,
    transformable,
)
from fishleg.errors import FishLegError
from fishleg.likelihoods import Likelihood
from fishleg.nests import Nest, map_tensors
from fishleg.rng import SampleGenerator


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
    """

    batch: Batch
    targets: Tensor
    scales: Tensor
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run_passes(
    model: nn.Module,
    likelihood: Likelihood,
    batch: Batch,
    hooked: Collection[str],
    label: Callable[[Tensor, Batch], tuple[Tensor, Tensor]],
    *,
    draws_at_once: int,
    calling: Calling = PLAIN,
) -> Iterator[Pass]:
    """Run `batch` forward once, and backward for each label, down to the modules `hooked`.

    Args:
        model: maps (n, ...) to (n, ...).
        likelihood: gives the losses.
        batch: the samples.
        hooked: module names.
        label: returns targets (D, n, ...) and scales (n, D) for the outputs.
        draws_at_once: how many of the D labels go into one pass, for memory's sake.
        calling: how the model is called.
    """
    modules = {name: model.get_submodule(name) for name in sorted(hooked)}
    with evaluating(model):
        with recording(modules) as calls:
            outputs = calling.outputs(model, batch.inputs)
        targets, scales = label(outputs, batch)
        losses = [
            (scale * likelihood.nll(outputs, target)).sum()
            for scale, target in zip(scales.unbind(1), targets, strict=True)
        ]
    plain = {name: found[0] for name, found in calls.items() if _is_plain(found, batch)}
    for start in range(0, len(losses), draws_at_once):
        part = slice(start, start + draws_at_once)
        gradients = output_gradients(list(plain.values()), losses[part])
        yield Pass(
            batch,
            targets[part],
            scales[:, part],
            {name: call.activation for name, call in plain.items()},
            dict(zip(plain, gradients, strict=True)),
        )


def _is_plain(calls: Sequence[Call], batch: Batch) -> bool:
    n = len(batch.indices)
    return len(calls) == 1 and calls[0].activation.shape[0] == n == calls[0].output_shape[0]


def fast_gradients(model: nn.Module, one: Pass, module: str) -> dict[str, Tensor]:
    """Return parameter name -> scaled gradients (n, D, *its shape) for a hooked module."""
    found = layer_gradients(model.get_submodule(module), one.inputs[module], one.gradients[module])
    return {f"{module}.{leaf}" if module else leaf: value for leaf, value in found.items()}


def general_gradients(
    model: nn.Module,
    likelihood: Likelihood,
    names: Sequence[str],
    one: Pass,
    calling: Calling = PLAIN,
) -> dict[str, Tensor]:
    """Return parameter name -> scaled gradients (n, D, *its shape) of any parameters, by vmap.

    Raises:
        FishLegError: the model does something that vmap does not support.
    """

    def loss(parameters: dict[str, Tensor], x: Nest, target: Tensor, scale: Tensor) -> Tensor:
        outputs = calling.run(model, map_tensors(lambda leaf: leaf[None], x), parameters)
        return scale * likelihood.nll(outputs, target[None])[0]

    if not names:
        return {}
    parameters = {name: model.get_parameter(name).detach() for name in names}
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    with evaluating(model), transformable(), torch.no_grad():
        try:
            draws = [
                per_sample(parameters, one.batch.inputs, target, scale)
                for target, scale in zip(one.targets, one.scales.unbind(1), strict=True)
            ]
        except (RuntimeError, ValueError) as error:
            raise FishLegError(
                f"The gradients of {', '.join(names)} need torch.func.vmap, which this model does "
                f"not support ({error}). Leave them out with partition_parameters(skip=...)."
            ) from error
    return {name: torch.stack([draw[name] for draw in draws], dim=1) for name in names}


def candidates(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return parameter name -> module whose hook may give its gradients, where there is one."""
    known = {name for name, module in model.named_modules() if is_supported(module)}
    found = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module in known and leaf in ("weight", "bias"):
            found[name] = module
    return found


def choose_paths(
    model: nn.Module,
    likelihood: Likelihood,
    names: Sequence[str],
    one: Pass,
    calling: Calling = PLAIN,
) -> dict[str, str]:
    """Return parameter name -> hooked module, for parameters whose fast path is right.

    With random numbers c_n, sum_n c_n g_n over the samples of `one` is compared with autograd's
    gradient of sum_n c_n loss_n. The random factors also unmask gradients given to the wrong
    sample, and samples that interact. The remaining parameters must pass on the general path.

    Args:
        model: the model.
        likelihood: gives the losses.
        names: all parameters in question.
        one: a pass with the modules of `candidates` hooked; its first label is used.
        calling: how the model is called.

    Raises:
        FishLegError: neither path agrees with autograd.
    """
    agrees = _comparison(model, likelihood, names, one, calling)
    fast = {}
    for module in one.inputs:
        for name, value in fast_gradients(model, one, module).items():
            if name in names and agrees(name, value[:, 0]):
                fast[name] = module
    rest = [name for name in names if name not in fast]
    for name, value in general_gradients(model, likelihood, rest, one, calling).items():
        if not agrees(name, value[:, 0]):
            raise FishLegError(
                f"{name}: the samples' gradients do not add up to the gradient of the batch: the "
                "samples of a batch interact (a batch norm without running statistics?), or a "
                "gradient is not finite. The model has to act on each sample alone."
            )
    return fast


def _comparison(
    model: nn.Module, likelihood: Likelihood, names: Sequence[str], one: Pass, calling: Calling
) -> Callable[[str, Tensor], bool]:
    """Return a test of per-sample gradients (n, *shape) of a parameter against autograd."""
    scale = one.scales[:, 0]
    factors = SampleGenerator(0, one.batch.indices).uniform().to(scale.dtype) + 0.5
    with evaluating(model):
        losses = likelihood.nll(calling.outputs(model, one.batch.inputs), one.targets[0])
        expected = torch.autograd.grad(
            (factors * scale * losses).sum(),
            [model.get_parameter(name) for name in names],
            materialize_grads=True,
        )
    reference = dict(zip(names, expected, strict=True))
    # In float32 the matrix units of a GPU may round to 10 bits. A gradient may also be zero but for
    # rounding (a key's bias in attention); so a share of the largest one counts as zero.
    tolerance = 1e-8 if scale.dtype == torch.float64 else 2e-2
    negligible = 0.01 * max(float(value.norm()) for value in expected)

    def agrees(name: str, gradients: Tensor) -> bool:
        weighted = factors.reshape(-1, *[1] * (gradients.ndim - 1)) * gradients
        error = (weighted.sum(0) - reference[name]).norm()
        return bool(error <= tolerance * (weighted.norm() + negligible))

    return agrees
