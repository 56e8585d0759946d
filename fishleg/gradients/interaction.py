"""The check that a model acts on each sample alone, as per-sample gradients need.

Three causes look alike in a sum and are distinguished: samples that interact; rounding; and a model
that decides by the values of a batch which operations to run, which gets one sample at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fishleg.calibration import Batch
from fishleg.errors import FishLegError
from fishleg.gradients.general_path import shorten
from fishleg.modes import transformable
from fishleg.nests import map_tensors, take
from fishleg.network import Network
from fishleg.precision import widest

_DATA_DEPENDENT = "data-dependent control flow"  # vmap's error for `if x.sum() > 0`
_EXACT, _ROUNDED, _HALF = 1e-8, 1e-4, 0.3


def check_samples(network: Network, batch: Batch) -> str | None:
    """Return why the model needs one sample at a time, or None.

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
    """Return vmap's error if the model decides by values which operations to run, or None.

    Its decision holds for all samples of a batch, and may differ for a single one.
    """

    def alone(x: object) -> Tensor:
        return network.run(None, map_tensors(lambda leaf: leaf[None], x))

    with network.computing(), transformable(), torch.no_grad():
        try:
            vmap(alone, randomness="same")(batch.inputs)
        except Exception as error:  # of any type; the general path handles other refusals
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
            network.outputs(batch)  # raises if it fails on the whole batch, too
        raise FishLegError(
            f"The samples of a batch interact{_culprit(network)}: the model fails where a sample "
            f"comes alone, and not on {len(batch.indices)} of them. Expected a model that acts on "
            f"each sample alone. {error}"
        ) from error
    if apart <= (_EXACT if _is_double(network) else _ROUNDED):
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
            f"{apart:.1e} of their size from those when it comes alone. Expected a model that acts "
            "on each sample alone, as per-sample gradients and the Fisher need. "
            "Give a batch norm running statistics, or replace it by a layer or group norm; a "
            "model that decides about a batch as a whole needs batch_size=1."
        )


def _is_double(network: Network) -> bool:
    return any(one.dtype == torch.float64 for one in network.model.parameters())


def _apart(network: Network, batch: Batch, *, whole: bool = False) -> float:
    """Return the distance of outputs from those of the samples alone, in units of their size.

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
    """Return, for the message, the batch norms that take their statistics from the batch."""
    norms = [
        name
        for name, module in network.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    return f" in {', '.join(norms)}, batch norm without running statistics" if norms else ""
