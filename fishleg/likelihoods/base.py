"""The interface of likelihoods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fishleg.errors import FishLegError, WrongType
from fishleg.rng import SampleGenerator


class Likelihood(Protocol):
    """The interface of a user's own likelihood; `AbstractLikelihood` need not be its base.

    `enumerate`, `match`, `given` and `check_targets` (see `AbstractLikelihood`) are optional.
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample, (n,)."""

    def sample(self, outputs: Tensor, generator: SampleGenerator) -> Tensor:
        """Return targets (n, ...) drawn from the model's own distribution."""

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Return H(f_n) v_n for each sample, in the shape of `outputs`."""


_Likelihood = TypeVar("_Likelihood", bound=Likelihood)


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

        This default sums the losses' differences over enumerated labels, which is exact where these
        are all labels.

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

    def given(self, targets: Tensor | None) -> Self:
        """Return the likelihood for samples with these targets.

        It differs where the targets determine which outputs count.
        """
        return self

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check the values of the data's targets, which waits for a GPU; `nll` checks shapes alone.

        Raises:
            FishLegError: one of them has no loss.
        """
        if targets.is_floating_point() and not bool(targets.isfinite().all()):
            where = tuple((~targets.isfinite()).nonzero()[0].tolist())
            raise FishLegError(
                f"targets: expected finite numbers, got {targets[where].item()} at {where} of a "
                "batch; leave such samples out."
            )


def given_targets(likelihood: _Likelihood, targets: Tensor | None) -> _Likelihood:
    """Return `likelihood.given(targets)`, or the likelihood where it has no such method."""
    given = getattr(likelihood, "given", None)
    return likelihood if given is None else given(targets)


def check_likelihood(likelihood: Any) -> None:
    """Check that an object has the interface of a likelihood; see `Likelihood`.

    Raises:
        WrongType: it does not.
    """
    wanted = ("nll", "sample", "fisher_product")
    missing = [name for name in wanted if not callable(getattr(likelihood, name, None))]
    if missing or isinstance(likelihood, type):
        got = repr(likelihood) if isinstance(likelihood, type) else type(likelihood).__name__
        raise WrongType(
            "likelihood: expected an object with the methods nll, sample and fisher_product, such "
            f"as Categorical(), got {got}."
        )


def check_targets(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    """Call `likelihood.check_targets`, where it has such a method."""
    check = getattr(likelihood, "check_targets", None)
    if check is not None:
        check(outputs, targets)
