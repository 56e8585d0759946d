"""Independent binary outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fishleg.errors import FishLegError
from fishleg.likelihoods.base import AbstractLikelihood
from fishleg.likelihoods.shapes import as_rows, paired
from fishleg.precision import widen
from fishleg.rng import SampleGenerator


class Bernoulli(AbstractLikelihood):
    """Independent binary outputs, given as logits: p = sigmoid(f), H = diag(p (1 - p)).

    Outputs and targets are (n, ...), of equal shape; (n,) counts as (n, 1). Targets lie in [0, 1],
    such as grey values, or are integers or booleans.
    """

    def __repr__(self) -> str:
        return "Bernoulli()"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return sum_i log(1 + exp f_i) - y_i f_i over all outputs of each sample, (n,).

        A ShapeMismatch if targets and outputs differ in shape.
        """
        f, y = paired(widen(outputs), targets)
        wanted = y if y.is_floating_point() else y.to(f.dtype)
        losses = functional.binary_cross_entropy_with_logits(f, wanted, reduction="none")
        return losses.sum(-1)

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return zeros and ones drawn from sigmoid(outputs), in its shape and dtype."""
        p = outputs.detach().double().sigmoid()
        return (generator.uniform(*outputs.shape[1:]) < p).to(outputs.dtype)

    def match(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return y = p + sqrt(p (1 - p)) e, e random signs: mean p and covariance H exactly.

        The targets may leave [0, 1]; the loss is linear in them.
        """
        p = outputs.detach().double().sigmoid()
        signs = torch.where(generator.uniform(*outputs.shape[1:]) < 0.5, -1.0, 1.0)
        return (p + (p * (1 - p)).sqrt() * signs).to(widen(outputs).dtype)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return p (1 - p) v."""
        p = widen(outputs).sigmoid()
        return p * (1 - p) * v

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return sum_i p_i log(p_i / q_i) + (1 - p_i) log((1 - p_i) / (1 - q_i)), (n,)."""
        reference, outputs = widen(reference), widen(outputs)
        p = reference.sigmoid()
        gaps = functional.softplus(outputs) - functional.softplus(reference)
        return as_rows(gaps - p * (outputs - reference)).sum(-1)

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return one target for each of the d outputs, p + sqrt(d p (1 - p)) e_j, of weight 1/d.

        A quadrature rule, as for `Gaussian`; the targets may leave [0, 1].
        """
        p = as_rows(widen(outputs.detach()).sigmoid())
        n, d = p.shape
        steps = (d * p * (1 - p)).sqrt()
        offsets = torch.eye(d, dtype=p.dtype, device=p.device)[:, None, :] * steps
        targets = (p + offsets).reshape(d, *outputs.shape)
        return targets, torch.full((n, d), 1 / d, dtype=p.dtype, device=p.device)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that the data's targets lie in [0, 1].

        Raises:
            FishLegError: one does not.
        """
        super().check_targets(outputs, targets)
        if targets.numel() and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise FishLegError(
                f"targets: expected values in [0, 1], got {targets.min().item():g} to "
                f"{targets.max().item():g}; scale them, or take another likelihood."
            )
