"""Which path the per-sample gradients of each parameter take, and whether a model has any.

The model has to act on each sample alone: a gradient of one sample means nothing else. Three
things are told apart that look alike in a sum: samples that interact, rounding, and a model that
looks at the values of a batch to decide what to compute, which is given one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fishleg.calibration import Batch
from fishleg.capture import transformable
from fishleg.errors import FishLegError
from fishleg.nests import map_tensors, take
from fishleg.network import Network
from fishleg.persample import GeneralPath, Pass, candidates, fast_gradients, shorten
from fishleg.precision import widest
from fishleg.rng import SampleGenerator

_DATA_DEPENDENT = "data-dependent control flow"  # what vmap says of `if x.sum() > 0`
# In float32 the matrix units of a GPU may round to 10 bits.
_EXACT, _ROUNDED, _HALF = 1e-8, 2e-2, 0.3

Run = Callable[[Batch, set[str]], Iterator[Pass]]


@dataclass
class Paths:
    """What was found out about a model; shared by all sources of it.

    Attributes:
        fast: parameter name -> hooked module, of those on the fast path.
        rounded: parameters whose gradients agree with autograd's up to rounding in float64 only.
    """

    fast: dict[str, str]
    rounded: tuple[str, ...] = ()


def find_paths(
    network: Network, general: GeneralPath, names: Sequence[str], batch: Batch, run: Run
) -> Paths:
    """Return the paths of the parameters `names`, by the graph and by a trial on `batch`.

    The graph says which parameters nothing but a hooked module uses. For these the trial is a
    second line, and for the others the only one: with random numbers c_n, sum_n c_n g_n over the
    samples is compared with autograd's gradient of sum_n c_n loss_n. The random factors also
    unmask gradients given to the wrong sample.

    Args:
        network: gives outputs and losses.
        general: the general path.
        names: all parameters in question.
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
    return Paths(fast, tuple(failed))


# ------------------------------------------------------------------- what a model does to samples


def check_samples(network: Network, batch: Batch) -> str | None:
    """Return why the model has to be given one sample at a time, or None.

    Args:
        network: gives the outputs.
        batch: some samples, prepared.

    A FishLegError if samples interact, or outputs change from call to call. Cost: four forward
    passes of the batch.
    """
    singly = _decides(network, batch)
    if singly is None and len(batch.indices) > 1:
        _check_alone(network, batch)
    return singly


def _decides(network: Network, batch: Batch) -> str | None:
    """Return what shows that the model looks at values to decide what to compute, or None.

    What it decides holds for all samples of a batch, and may be another for one of them alone.
    """

    def alone(x: object) -> Tensor:
        return network.run(None, map_tensors(lambda leaf: leaf[None], x))

    with network.computing(), transformable(), torch.no_grad():
        try:
            vmap(alone, randomness="same")(batch.inputs)
        except Exception as error:  # of any type; other refusals are the general path's business
            return shorten(error) if _DATA_DEPENDENT in str(error) else None
    return None


def _check_alone(network: Network, batch: Batch) -> None:
    """Check that each sample's outputs are the same alone and among others.

    Raises:
        FishLegError: they are not, or not even from call to call.
    """
    try:
        apart = _apart(network, batch)
    except FishLegError as error:
        with network.computing(), torch.no_grad():
            network.outputs(batch)  # does not return if it is not being alone that is wrong
        raise FishLegError(
            f"The samples of a batch interact{_culprit(network)}: the model fails where a sample "
            f"comes alone, and not on {len(batch.indices)} of them. Expected a model that acts on "
            f"each sample alone. {error}"
        ) from error
    if apart <= (_EXACT if _is_double(network) else 1e-4):
        return
    again = _apart(network, batch, whole=True)
    if again > 0.1 * apart:
        raise FishLegError(
            "The model's outputs: expected the same for the same samples in each call, got others "
            f"that differ by {again:.1e} of their size. Something in it is random in evaluation "
            "mode: dropout through a functional call needs training=self.training."
        )
    exact = replace(network, cast=widest)
    try:
        apart, allowed = _apart(exact, exact.prepare(batch)), _EXACT
    except FishLegError:  # its code converts by itself, and cannot be computed in float64
        allowed = _HALF
    if apart > allowed:
        raise FishLegError(
            f"The samples of a batch interact{_culprit(network)}: a sample's outputs differ by "
            f"{apart:.1e} of their size from what they are when it comes alone. Expected a model "
            "that acts on each sample alone, which per-sample gradients and the Fisher are of. "
            "Give a batch norm running statistics, or replace it by a layer or group norm; a "
            "model that decides about a batch as a whole needs batch_size=1."
        )


def _is_double(network: Network) -> bool:
    return any(one.dtype == torch.float64 for one in network.model.parameters())


def _apart(network: Network, batch: Batch, *, whole: bool = False) -> float:
    """Return how far outputs are from those of the samples alone, in units of their size.

    Args:
        network: gives the outputs.
        batch: the samples.
        whole: compare with another call of the whole batch instead.
    """
    with network.computing(), torch.no_grad():
        together = network.outputs(batch)
        if whole:
            others = network.outputs(batch)
        else:
            parts = [slice(row, row + 1) for row in range(len(batch.indices))]
            ones = [batch._replace(inputs=take(batch.inputs, part)) for part in parts]
            others = torch.cat([network.outputs(one) for one in ones])
    if together.shape != others.shape:
        return float("inf")
    same = (together == others) | (together.isnan() & others.isnan())
    gaps = torch.where(same, 0.0, (together - others).double().abs())
    size = together.double().abs().masked_fill(~together.isfinite(), 0.0).max()
    return float(gaps.max() / size.clamp(min=1e-30)) if gaps.numel() else 0.0


def _culprit(network: Network) -> str:
    """Return the batch norms that take their statistics from the batch, for the message."""
    norms = [
        name
        for name, module in network.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    return f" in {', '.join(norms)}, batch norm without running statistics" if norms else ""


# ------------------------------------------------------------------------------------- the trial


def _comparison(network: Network, names: Sequence[str], one: Pass) -> Callable[[str, Tensor], bool]:
    """Return a test of per-sample gradients (n, *shape) of a parameter against autograd."""
    scale = one.scales[:, 0]
    factors = SampleGenerator(0, one.batch.indices).uniform().to(scale.dtype) + 0.5
    with network.computing():
        losses = network.likelihood.nll(network.outputs(one.batch), one.targets[0])
        reference = _autograd(network, names, (factors * scale * losses).sum())
    # A gradient may also be zero but for rounding (a key's bias in attention); so a share of the
    # largest one counts as zero.
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
            f"the model cannot be computed in float64 to tell whether that is rounding ({error})."
        ) from error
    for name, value in found.items():
        if not agrees(name, value[:, 0]):
            raise FishLegError(
                f"{name}: the samples' gradients do not add up to the gradient of the batch, not "
                "in float64 either: the backward pass of a function of the model's own is of "
                "another function than its forward pass, or mixes samples."
            )
