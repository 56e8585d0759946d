"""Real targets with independent noise."""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor

from fishleg.checks import check_number
from fishleg.likelihoods.base import AbstractLikelihood
from fishleg.likelihoods.shapes import as_rows, paired
from fishleg.precision import widen
from fishleg.rng import SampleGenerator


class Gaussian(AbstractLikelihood):
    """Real targets with independent noise: y ~ N(f, variance I), H = I / variance.

    Outputs and targets are (n, ...), of equal shape; (n,) counts as (n, 1).

    Args:
        variance: of each output, in squared units of the target, > 0.

    Raises:
        ValueError: the variance is not positive.
    """

    def __init__(self, variance: float = 1.0):
        check_number("variance", variance)
        if not variance > 0:
            raise ValueError(f"variance: expected a positive number, got {variance}.")
        self.variance = variance

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance:g})"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ||y - f||^2 / (2 variance) + d/2 log(2 pi variance) for each sample, (n,).

        A ShapeMismatch if targets and outputs differ in shape.
        """
        f, y = paired(widen(outputs), targets)
        squares = (f - y).square() / self.variance
        return 0.5 * (squares + log(2 * pi * self.variance)).sum(-1)

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return f + sqrt(variance) e, e standard normal, in the shape of `outputs`."""
        f = widen(outputs.detach())
        return f + self.variance**0.5 * generator.normal(*f.shape[1:]).to(f.dtype)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return v / variance."""
        return v / self.variance

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return ||f_reference - f||^2 / (2 variance), (n,)."""
        apart = widen(reference) - widen(outputs)
        return 0.5 * as_rows(apart).square().sum(-1) / self.variance

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return one target for each of the d outputs, f + sqrt(d variance) e_j, of weight 1/d.

        A quadrature rule: with l' = (f - y) / variance, sum_j 1/d l'_j l'_j^T = I / variance.
        """
        f = as_rows(widen(outputs.detach()))
        n, d = f.shape
        step = (d * self.variance) ** 0.5
        offsets = step * torch.eye(d, dtype=f.dtype, device=f.device)[:, None, :]
        targets = (f + offsets).reshape(d, *outputs.shape)
        return targets, torch.full((n, d), 1 / d, dtype=f.dtype, device=f.device)
