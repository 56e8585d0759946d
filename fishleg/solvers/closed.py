"""The minimiser of the FishLeg objective where it has a closed form: Q = (F + gamma I)^-1.

Inside the dense-block and diagonal structures J is a sum over the blocks, each least at the inverse
of its own part of F_g. Masked gradients have zero entries outside the mask, so that the inverse is
that of the restricted F_g there, and 1 / gamma on removed weights.

In a fixed Kronecker eigenbasis U (x) W, J is a sum over the eigenvalues S of Q, least at
S = 1 / (lambda + gamma) with lambda = E[(U^T G W)^o2]. In the basis of K-FAC that is EK-FAC
(George et al. 2018, theorem 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fishleg.blocks.dense import DenseBlock
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.blocks.eigen import EigenBlock
from fishleg.errors import ShapeMismatch
from fishleg.linalg import invert_damped
from fishleg.moments import chunk_products, squares
from fishleg.options import Objective
from fishleg.solvers.base import AbstractSolver, SolverState, total


class ClosedFormSolver(AbstractSolver):
    """Replaces a dense or diagonal block, or an eigenbasis block's values, by the minimiser.

    An eigenbasis block has as many lambda as weights, which are noisy on few samples. They are
    shrunk towards those of the start, rescaled to their sum: (1 - shrinkage) lambda + shrinkage a
    lambda_start. At 0 the result is the minimiser of J on these samples.

    Args:
        damping: gamma > 0.
        mask: survivors, bool (rows, columns), at least one; None keeps all.
        shrinkage: in [0, 1], of eigenbasis blocks.
        objective: the one that is reported of dense and diagonal blocks: J or, for "log_det", L.
            Their minimiser is the same. Eigenbasis blocks report J.

    Cost: for blocks of size b, 2 n rows columns b FLOPs for n gradients, and rows columns b^2 for
    the inverses, made in float64; in an eigenbasis, 2 n rows columns (rows + columns) FLOPs.
    """

    units = 1

    def __init__(
        self,
        damping: float,
        mask: Tensor | None = None,
        *,
        shrinkage: float = 0.0,
        objective: Objective = "expected",
    ):
        super().__init__(damping, mask)
        self.shrinkage = shrinkage
        self.objective = objective

    def run(self, pieces: Iterable[Tensor], state: SolverState) -> Iterator[SolverState]:
        """Yield the result; of a dense or diagonal start only the structure matters.

        Raises:
            ShapeMismatch: the block is none of the three.
        """
        if state.done:
            return
        block = state.block
        if isinstance(block, EigenBlock):
            yield self._in_eigenbasis(pieces, block)
            return
        if isinstance(block, DiagonalBlock):
            (fisher,) = total(pieces, squares)
            block = DiagonalBlock((1.0 / (fisher + self.damping)).to(block.values.dtype))
        elif isinstance(block, DenseBlock):
            size = block.matrices.shape[-1]
            (chunks,) = total(pieces, lambda gradients: chunk_products(gradients, size))
            inverse = invert_damped(chunks, self.damping)
            block = DenseBlock(inverse.to(block.matrices.dtype), block.shape)
        else:
            raise ShapeMismatch(
                f"No closed form for a {type(block).__name__}; expected a dense, diagonal or "
                "eigenbasis block, use the alternating solver or Adam."
            )
        # at the minimiser Q F_g = 1
        if self.objective == "log_det":
            objective = block.shape[0] * block.shape[1] - float(block.log_det())
        else:
            objective = -0.5 * float(self._support(block.diagonal()).sum())
        yield SolverState(block=block, done=1, numbers={"objective": objective})

    def _in_eigenbasis(self, pieces: Iterable[Tensor], start: EigenBlock) -> SolverState:
        (measured,) = total(pieces, lambda gradients: (start.energies(gradients),))
        prior = (1.0 / start.values.double() - self.damping).clamp(min=0.0)
        prior *= measured.sum() / prior.sum().clamp(min=torch.finfo(prior.dtype).eps)  # F may be 0
        values = 1.0 / (torch.lerp(measured, prior, self.shrinkage) + self.damping)
        objective = float((values * (0.5 * values * (measured + self.damping) - 1.0)).sum())
        block = EigenBlock(start.left, start.right, values.to(start.values.dtype))
        return SolverState(block=block, done=1, numbers={"objective": objective})

    def _support(self, matrix: Tensor) -> Tensor:
        return matrix if self.mask is None else matrix * self.mask
