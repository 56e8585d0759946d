"""What the model's outputs mean: losses, labels drawn from the model, and the output Fisher.

For one sample with outputs f and loss l(f, y) = -log p(y | f), the output Fisher is
H(f) = E_{y ~ p(.|f)}[ l' l'^T ] with l' = dl/df; that of the parameters is F = E_x[ J^T H J ] with
J = df/dw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log, pi
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.rng import SampleGenerator


class Likelihood(Protocol):
    """What a likelihood of the user's own must offer; `AbstractLikelihood` need not be its base.

    An `enumerate` and a `match` (see `AbstractLikelihood`) are optional.
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample, (n,)."""

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return targets (n, ...) drawn from the model's own distribution."""

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return H(f_n) v_n for each sample, in the shape of `outputs`."""


class AbstractLikelihood(ABC):
    """Base of the likelihoods here. All functions act on each sample of a batch alone."""

    @abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood of each sample, (n,), differentiable in `outputs`."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return one target for each sample, drawn from p(. | outputs)."""

    @abstractmethod
    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return H(f_n) v_n for each sample, (n, ...) as `outputs`."""

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return targets whose weighted gradients give the output Fisher exactly, or None.

        Returns:
            targets (C, n, ...): C batches of targets; weights (n, C) >= 0. For each sample n,
            sum_c weights[n, c] l'(f_n, targets[c, n]) l'(f_n, targets[c, n])^T = H(f_n).
        """
        return None

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return KL( p(. | reference) || p(. | outputs) ) of each sample, (n,), in nats.

        This default sums the losses' differences over enumerated labels, which is exact where they
        are all the labels there are.

        Raises:
            FishLegError: the labels cannot be enumerated.
        """
        found = self.enumerate(reference)
        if found is None:
            raise FishLegError(
                f"{type(self).__name__} cannot enumerate its labels; give it a method `divergence`."
            )
        targets, weights = found
        losses = [self.nll(outputs, one) - self.nll(reference, one) for one in targets]
        return (torch.stack(losses, dim=1) * weights).sum(1)

    def match(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return targets whose loss gradients have mean 0 and covariance H, as sampled ones do.

        The Fisher depends on the labels through these two moments only, so any such targets
        estimate it without bias. Sampled labels do by default.
        """
        return self.sample(outputs, generator)


class Categorical(AbstractLikelihood):
    """Classes with logits: p = softmax(f), H = diag(p) - p p^T. Outputs (n, C).

    Targets are class numbers (n,), or weights of the classes (n, C) of sum 1, floating point.
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return log sum_c exp f_c - f_y for each sample, (n,), averaged over weighted classes."""
        wanted = targets if targets.is_floating_point() else targets.long()
        return functional.cross_entropy(outputs, wanted, reduction="none")

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return classes (n,) drawn from softmax(outputs), by inversion of the distribution."""
        _check_logits(outputs)
        cumulative = outputs.detach().double().softmax(-1).cumsum(-1)
        below = (cumulative < generator.uniform(1)).sum(-1)
        # The last sum may fall short of 1 by rounding.
        return below.clamp_(max=outputs.shape[-1] - 1)

    def match(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return weights of the classes (n, C) with the mean and covariance of one-hot labels.

        y = p - sqrt(p) o e + p (sqrt(p) . e), e random signs: then l' = p - y has the covariance
        (diag(sqrt p) - p sqrt(p)^T)(...)^T = diag(p) - p p^T = H. A confident network's sampled
        labels nearly always agree with it and bear no gradient, but for a rare large one; here
        every sample bears one of typical size, so fewer samples estimate F as well.
        """
        _check_logits(outputs)
        p = outputs.detach().double().softmax(-1)
        signs = torch.where(generator.uniform(p.shape[-1]) < 0.5, -1.0, 1.0)
        noise = p.sqrt() * signs
        return (p - noise + p * noise.sum(-1, keepdim=True)).to(outputs.dtype)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return p o v - p (p . v) for each sample, (n, C)."""
        _check_logits(outputs)
        p = outputs.softmax(-1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return sum_c p_c (log p_c - log q_c), (n,), with p = softmax(reference)."""
        _check_logits(outputs)
        wanted, found = reference.log_softmax(-1), outputs.log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1)

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return all classes, (C, n), with their probabilities, (n, C)."""
        _check_logits(outputs)
        n, classes = outputs.shape
        targets = torch.arange(classes, device=outputs.device)[:, None].expand(classes, n)
        return targets, outputs.detach().softmax(-1)


class Gaussian(AbstractLikelihood):
    """Real targets with independent noise: y ~ N(f, variance I), H = I / variance.

    Outputs and targets are (n, ...), of equal shape.

    Args:
        variance: of each output, in squared units of the target, > 0.

    Raises:
        ValueError: the variance is not positive.
    """

    def __init__(self, variance: float = 1.0):
        if not variance > 0:
            raise ValueError(f"variance: expected a positive number, got {variance}.")
        self.variance = variance

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ||y - f||^2 / (2 variance) + d/2 log(2 pi variance) for each sample, (n,).

        A ShapeMismatch if targets and outputs differ in shape.
        """
        _check_same_shape(outputs, targets)
        squares = (outputs - targets).flatten(1).square() / self.variance
        return 0.5 * (squares + log(2 * pi * self.variance)).sum(-1)

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return f + sqrt(variance) e, e standard normal, in the shape of `outputs`."""
        noise = generator.normal(*outputs.shape[1:]).to(outputs.dtype)
        return outputs.detach() + self.variance**0.5 * noise

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return v / variance."""
        return v / self.variance

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return ||f_reference - f||^2 / (2 variance), (n,)."""
        return 0.5 * (reference - outputs).flatten(1).square().sum(-1) / self.variance

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return one target for each of the d outputs, f + sqrt(d variance) e_j, of weight 1/d.

        A quadrature rule: with l' = (f - y) / variance, sum_j 1/d l'_j l'_j^T = I / variance.
        """
        f = outputs.detach().flatten(1)
        n, d = f.shape
        step = (d * self.variance) ** 0.5
        offsets = step * torch.eye(d, dtype=f.dtype, device=f.device)[:, None, :]
        targets = (f + offsets).reshape(d, *outputs.shape)
        return targets, torch.full((n, d), 1 / d, dtype=f.dtype, device=f.device)


class Bernoulli(AbstractLikelihood):
    """Independent yes or no, of logits: p = sigmoid(f), H = diag(p (1 - p)).

    Outputs and targets are (n, ...), of equal shape; targets lie in [0, 1], such as grey values.
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return sum_i log(1 + exp f_i) - y_i f_i over all outputs of each sample, (n,).

        A ShapeMismatch if targets and outputs differ in shape.
        """
        _check_same_shape(outputs, targets)
        losses = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return losses.flatten(1).sum(-1)

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
        return (p + (p * (1 - p)).sqrt() * signs).to(outputs.dtype)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return p (1 - p) v."""
        p = outputs.sigmoid()
        return p * (1 - p) * v

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return sum_i p_i log(p_i / q_i) + (1 - p_i) log((1 - p_i) / (1 - q_i)), (n,)."""
        p = reference.sigmoid()
        gaps = functional.softplus(outputs) - functional.softplus(reference)
        return (gaps - p * (outputs - reference)).flatten(1).sum(-1)

    def enumerate(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return one target for each of the d outputs, p + sqrt(d p (1 - p)) e_j, of weight 1/d.

        A quadrature rule, as for `Gaussian`; the targets may leave [0, 1].
        """
        p = outputs.detach().sigmoid().flatten(1)
        n, d = p.shape
        steps = (d * p * (1 - p)).sqrt()
        offsets = torch.eye(d, dtype=p.dtype, device=p.device)[:, None, :] * steps
        targets = (p + offsets).reshape(d, *outputs.shape)
        return targets, torch.full((n, d), 1 / d, dtype=p.dtype, device=p.device)


def _check_same_shape(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ShapeMismatch(
            f"targets: expected the outputs' shape {tuple(outputs.shape)}, "
            f"got {tuple(targets.shape)}."
        )


def _check_logits(outputs: Tensor) -> None:
    if outputs.ndim != 2:
        raise ShapeMismatch(
            f"Categorical: expected outputs (samples, classes), got {tuple(outputs.shape)}; "
            "flatten further dimensions into samples, or write a likelihood that sums over them."
        )
