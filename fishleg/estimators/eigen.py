"""EK-FAC with shrinkage: measured eigenvalues in a Kronecker eigenbasis, shrunk to K-FAC's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from fishleg.blocks.eigen import invert_factors
from fishleg.blocks.structures import count_eigen_numbers, count_numbers, fit_structure
from fishleg.estimators.group_fit import AbstractGroupFit, cast_block, is_small_vector
from fishleg.estimators.groupwise import AbstractGroupwiseEstimator
from fishleg.linalg import invert_damped
from fishleg.moments import as_factors, kronecker_products
from fishleg.options import EigenChanges, EigenOptions
from fishleg.parameters import Partition
from fishleg.solvers.alternating import AlternatingSolver
from fishleg.solvers.base import AbstractSolver, SolverState, total
from fishleg.solvers.closed import ClosedFormSolver
from fishleg.solvers.starts import factored_start, identity_start

_OWN_DAMPING = 0.1  # of factors that are damped exactly afterwards, in units of the damping


class Eigen(AbstractGroupwiseEstimator):
    """Q = B diag(1 / (lambda + damping)) B^T, B a Kronecker eigenbasis, lambda shrunk.

    lambda = (1 - shrinkage) E[(B^T g)^2] + shrinkage a kappa: the curvature measured along B
    (EK-FAC, George et al. 2018), shrunk towards the products kappa of the factors' eigenvalues
    (K-FAC), which a brings to the same sum. Nothing is learned by a descent; half-steps learn the
    basis `log_det` alone. Vectors (biases and normalisation) of up to 1,024 parameters get the
    inverse of their full Fisher.

    Time: a pass of the gradients a pack of groups, one of the layers' signals for the factors
    (basis kfac, log_det), 2 N r c (r + c) FLOPs for N gradients of a group, and O(r^3 + c^3) for
    its basis; the basis `log_det` as much again each half-step.
    Memory: s (r^2 / h + h c^2 + r c) bytes a group; while fitting also a pack's gradients, N s r c
    each and up to `memory_bytes`, and its factors, 8 (r^2 / h + h c^2) each; and for the largest
    group 64 (r^2 + c^2) + 24 r c beside 3 n s r c.

    Args:
        partition: the groups.
        damping: gamma > 0.
        memory_limit: see `AbstractEstimator`.
        options: of the fit; None for the defaults.
        changes: fields of `EigenOptions` that differ from `options`.

    Attributes:
        options: see `EigenOptions`.
        report: see `AbstractGroupwiseEstimator`.
    """

    name = "eigen"
    remedy = "another method, or smaller memory_bytes"
    carries_blocks = False  # the basis follows the mask
    options: EigenOptions

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        memory_limit: int | None = None,
        options: EigenOptions | None = None,
        **changes: Unpack[EigenChanges],
    ):
        super().__init__(
            partition,
            damping=damping,
            memory_limit=memory_limit,
            options=replace(options or EigenOptions(), **changes),
        )

    def _fit_of(self, name: str) -> EigenFit:
        return EigenFit(self.partition[name], self.damping, self.options)


@dataclass(frozen=True)
class EigenFit(AbstractGroupFit):
    """The fit of one group by Eigen.

    Attributes:
        options: of the estimator.
    """

    options: EigenOptions

    @property
    def structure(self) -> str:
        """The structure of the group's block: "eigen", or "full" for a small vector."""
        return "full" if is_small_vector(self.group) else "eigen"

    @property
    def from_layer(self) -> bool:
        """Whether the basis is made of the K-FAC factors of the group's layer."""
        return self.options.basis != "moments" and self.structure == "eigen"

    def solver(self, gradients: int, *, refines: bool, mask: Tensor | None) -> AbstractSolver:
        """Return the solver of the group's block; see `AbstractGroupFit`."""
        del gradients, refines
        return ClosedFormSolver(self.damping, mask, shrinkage=self.options.shrinkage)

    def start(
        self, pieces: Iterable[Tensor], factors: Sequence[Tensor] | None, like: Tensor
    ) -> SolverState:
        """Return the state with the group's basis and the product of its factors."""
        group = self.group
        if self.structure == "full":  # its form alone counts
            first = identity_start(group.shape, self.damping, like)
            dense = fit_structure(first, "full", kernel=group.kernel, block_size=group.size)
            return SolverState(block=cast_block(dense, like))
        # of each convolution group
        gamma, a = factors or as_factors(*total(pieces, kronecker_products))
        if self.options.basis == "log_det":
            gamma, a = self._learned_factors(pieces, gamma, a, like)
        return SolverState(block=cast_block(invert_factors(gamma, a, self.damping), like))

    def _learned_factors(
        self, pieces: Iterable[Tensor], gamma: Tensor, a: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the inverses of the factors that log-det half-steps learn, float64 (1, n, n)."""
        damping = self.damping * _OWN_DAMPING
        start = factored_start(torch.block_diag(*gamma), a.mean(0), damping)
        solver = AlternatingSolver(damping, self.options.basis_sweeps, objective="log_det")
        state = SolverState(block=cast_block(start, like))
        *_, last = solver.run(pieces, state)
        b, c = (invert_damped(one.double(), 0.0)[None] for one in last.block.tensors().values())
        return b, c

    def count(self, conv_groups: int) -> int:
        """Return the count of numbers in the block; each convolution group has a basis (kfac)."""
        if self.structure == "full":
            return count_numbers("full", self.group, block_size=self.group.size)
        return count_eigen_numbers(self.group, conv_groups if self.options.basis == "kfac" else 1)
