"""Numbers that are not finite, and their origin."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishleg.calibration import Batch
from fishleg.errors import FishLegError
from fishleg.nests import tensors_of


def check_finite(values: Mapping[str, Tensor], batch: Batch, model: nn.Module) -> None:
    """Check that all values of all samples are finite.

    Args:
        values: description for the message -> (n, ...), a row a sample.
        batch: the samples.
        model: the origin of the values.

    Raises:
        FishLegError: a value is not; the message names the sample, and a possible origin.

    Cost: the values are read once, and a GPU is waited for once.
    """
    if not values:
        return
    # NaN and inf survive a sum; a sum that overflows is examined below
    totals = [one.detach().sum() for one in values.values()]
    if bool(torch.stack([one.to(totals[0].device) for one in totals]).isfinite().all()):
        return
    for what, one in values.items():
        bad = ~one.detach().reshape(len(one), -1).isfinite()
        if bool(bad.any()):
            row = int(bad.any(1).nonzero()[0])
            got = float(one.detach().reshape(len(one), -1)[row][bad[row]][0])
            raise FishLegError(
                f"{what} of sample {int(batch.indices[row])}: expected finite numbers, got {got}"
                f"{_origin(batch, row, model)}"
            )


def ruled_in(outputs: Tensor) -> Tensor:
    """Return the outputs with 0 for -inf, which excludes a class."""
    return outputs.detach().masked_fill(outputs.detach() == -torch.inf, 0.0)


def _origin(batch: Batch, row: int, model: nn.Module) -> str:
    """Return the end of the message: the possible origin of the number, and the remedy."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f". {name} of the model is not finite itself: correct the model first."
    inputs = (one[row] for one in tensors_of(batch.inputs))
    if not all(bool(one.isfinite().all()) for one in inputs):
        return ". Its inputs are not finite: correct them, or leave the sample out."
    return ". Its inputs are finite: leave the sample out, or correct what the model makes of it."
