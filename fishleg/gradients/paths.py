"""The choice of the path that each parameter's per-sample gradients take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fishleg.calibration import Batch
from fishleg.errors import FishLegError
from fishleg.gradients.general_path import GeneralPath
from fishleg.gradients.persample import Pass, candidates, fast_gradients
from fishleg.network import Network
from fishleg.precision import widest
from fishleg.rng import SampleGenerator

# In float32 the matrix units of a GPU may round to 10 bits.
_EXACT, _ROUNDED = 1e-8, 2e-2

Run = Callable[[Batch, set[str]], Iterator[Pass]]


def find_paths(
    network: Network, general: GeneralPath, names: Sequence[str], batch: Batch, run: Run
) -> dict[str, str]:
    """Return the paths of the parameters `names`, by the graph and by a trial on `batch`.

    The graph shows which parameters are used by a hooked module alone. The trial checks these
    again, and is the only check of the others: with random numbers c_n it compares sum_n c_n g_n
    over the samples with autograd's gradient of sum_n c_n loss_n. The random factors also reveal
    gradients given to the wrong sample.

    Args:
        network: gives outputs and losses.
        general: the general path.
        names: the parameters.
        batch: some samples, prepared.
        run: gives the passes of a batch with modules hooked; the first label is used.

    A FishLegError if neither path agrees with autograd.
    """
    hooked = set(candidates(network.model, names).values())
    one = next(run(batch, hooked))
    agrees = _comparison(network, names, one)
    fast = {}
    for module in one.inputs:
        for name, value in fast_gradients(network.model, one, module).items():
            if name in names and name in one.fast and agrees(name, value[:, 0]):
                fast[name] = module
    rest = [name for name in names if name not in fast]
    found = general.gradients(network, rest, one)
    failed = [name for name, value in found.items() if not agrees(name, value[:, 0])]
    if failed:
        _check_rounding(network, general, failed, one)
    return fast


def _comparison(network: Network, names: Sequence[str], one: Pass) -> Callable[[str, Tensor], bool]:
    """Return a test that compares per-sample gradients (n, *shape) of a parameter with autograd."""
    scale = one.scales[:, 0]
    factors = SampleGenerator(0, one.batch.indices).uniform().to(scale.dtype) + 0.5
    with network.computing():
        losses = network.likelihood.nll(network.outputs(one.batch), one.targets[0])
        reference = _autograd(network, names, (factors * scale * losses).sum())
    # A gradient may be zero up to rounding (a key's bias in attention), so a share of the largest
    # one counts as zero.
    tolerance = _EXACT if scale.dtype == torch.float64 else _ROUNDED
    negligible = 0.01 * max((float(value.norm()) for value in reference.values()), default=0.0)

    def agrees(name: str, gradients: Tensor) -> bool:
        weighted = factors.reshape(-1, *[1] * (gradients.ndim - 1)) * gradients
        error = (weighted.sum(0) - reference[name]).norm()
        return bool(error <= tolerance * (weighted.norm() + negligible))

    return agrees


def _autograd(network: Network, names: Sequence[str], loss: Tensor) -> Mapping[str, Tensor]:
    """Return autograd's gradients of a loss, dense."""
    parameters = [network.model.get_parameter(name) for name in names]
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    dense = [one if one.layout == torch.strided else one.to_dense() for one in found]
    return dict(zip(names, dense, strict=True))


def _check_rounding(
    network: Network, general: GeneralPath, names: Sequence[str], one: Pass
) -> None:
    """Check that gradients on the general path differ from autograd's by rounding only.

    Raises:
        FishLegError: they differ in float64, too.
    """
    exact = replace(network, cast=widest)
    wide = replace(
        one,
        batch=exact.prepare(one.batch),
        targets=widest(one.targets[:1]),
        scales=one.scales[:, :1].double(),
    )
    try:
        agrees = _comparison(exact, names, wide)
        found = general.gradients(exact, names, wide)
    except FishLegError as error:
        raise FishLegError(
            f"{names[0]}: the samples' gradients do not add up to the gradient of the batch, and "
            f"the model cannot be computed in float64 to exclude rounding ({error})."
        ) from error
    for name, value in found.items():
        if not agrees(name, value[:, 0]):
            raise FishLegError(
                f"{name}: the samples' gradients do not add up to the gradient of the batch, not "
                "in float64 either: the backward pass of a function of the model's own is of "
                "another function than its forward pass, or mixes samples."
            )
