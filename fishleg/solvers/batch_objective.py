"""The objective of one block on a batch, as a loss and as sums over several batches: J or L."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.objective import (
    curvature_and_trace,
    expected_objective,
    gradient_product,
    image_energy,
    image_square,
    log_det_objective,
    probe_objective,
    probe_terms,
    sign_combinations,
)
from fishleg.options import FlsOptions
from fishleg.rng import SampleGenerator


@dataclass(frozen=True)
class BatchObjective:
    """The objective that the options name.

    Under a mask M it is that of M o Q o M; L is that of masked gradients.

    Attributes:
        options: `objective` and `directions`.
        damping: gamma > 0.
    """

    options: FlsOptions
    damping: float

    def loss(
        self,
        block: AbstractBlock,
        gradients: Tensor,
        generator: SampleGenerator,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the objective on a batch, a scalar that is differentiable in the block's tensors.

        Args:
            block: Q.
            gradients: of the batch, scaled, (n, rows, columns).
            generator: of the probes, one sample each.
            mask: survivors, bool (rows, columns); None keeps all.
        """
        options = self.options
        if options.objective == "log_det":
            return log_det_objective(block, _masked(gradients, mask), self.damping)
        if options.objective == "expected":
            return expected_objective(block, gradients, self.damping, mask)
        if options.directions == "normal":
            curving, probes = gradients, generator.normal(*block.shape).to(gradients.dtype)
        else:
            given, curving = _halves(gradients)
            probes = _normalised(sign_combinations(given, generator))
        return probe_objective(
            block, probes, partial(gradient_product, curving), self.damping, mask
        )

    def terms(
        self, block: AbstractBlock, gradients: Tensor, weight: float, mask: Tensor | None = None
    ) -> Tensor:
        """Return a batch's part of the sums that `value` takes, float64 (2,).

        Without probe noise: the expectation over normal probes, or each gradient of one half.

        Args:
            block: Q.
            gradients: (n, rows, columns), scaled as in the whole pass.
            weight: the batch's part of the rows of a pass, in (0, 1].
            mask: as above.
        """
        zero = gradients.new_zeros((), dtype=torch.float64)
        if self._by_gradients:
            given, curving = _halves(gradients * weight**-0.5)
            probes, product = _normalised(given), partial(gradient_product, curving)
            found = torch.stack(probe_terms(block, probes, product, self.damping, mask))
            return found.double() * (weight / len(probes))
        if self.options.objective == "log_det":
            return torch.stack([image_energy(block, _masked(gradients, mask)).double(), zero])
        return torch.stack([image_square(block, gradients, mask).double(), zero])

    def value(
        self, block: AbstractBlock, sums: Tensor, mask: Tensor | None = None
    ) -> tuple[float, float]:
        """Return the objective of a block, and the scale a > 0 at which that of a Q is least.

        Args:
            block: Q.
            sums: of `terms` over a pass.
            mask: as above.
        """
        data, linear = sums.tolist()
        if self.options.objective == "log_det":
            energy = data + self.damping * float(block.trace())
            return energy - float(block.log_det()), block.shape[0] * block.shape[1] / energy
        if not self._by_gradients:
            ridge, trace = curvature_and_trace(block, [], self.damping, mask)
            data, linear = data + float(ridge), float(trace)
        return 0.5 * data - linear, linear / data if data > 0 else 1.0

    @property
    def _by_gradients(self) -> bool:
        """Whether J averages over directions that are distributed as the gradients."""
        return self.options.objective == "probe" and self.options.directions == "gradients"


def _masked(gradients: Tensor, mask: Tensor | None) -> Tensor:
    return gradients if mask is None else gradients * mask


def _halves(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of scaled gradients (n, rows, columns); of one gradient, it twice.

    The second half is scaled as the whole.
    """
    half = len(gradients) // 2
    if not half:
        return gradients, gradients
    return gradients[:half], gradients[half:] * (len(gradients) / (len(gradients) - half)) ** 0.5


def _normalised(directions: Tensor) -> Tensor:
    """Return directions (p, rows, columns) of the length that standard normal ones have."""
    size = torch.linalg.vector_norm(directions, dim=(1, 2), keepdim=True)
    wanted = (directions.shape[1] * directions.shape[2]) ** 0.5
    return directions * (wanted / size.clamp(min=torch.finfo(size.dtype).tiny))
