"""Alternating minimisation of the FishLeg objective for Kronecker blocks: exact half-steps.

For fixed C, J is a convex quadratic in B, and the other way round (`docs/theory.md`, section 3):

    B <- tr(C) ( E[G C^2 G^T] + gamma ||C||_F^2 I )^-1,
    C <- tr(B) ( E[G^T B^2 G] + gamma ||B||_F^2 I )^-1.

The log-det objective L is minimised in the same way, with the same cost (`objective: log_det`):

    B <- columns ( E[G C G^T] + gamma tr(C) I )^-1,
    C <- rows ( E[G^T B G] + gamma tr(B) I )^-1.

Under a mask M (`mask_fit`), `damped` masks the gradients in these formulas, which acts as a
stronger damping; `exact` minimises J_M itself, by conjugate gradients over symmetric matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fishleg.blocks.kronecker import KroneckerBlock
from fishleg.errors import ShapeMismatch
from fishleg.objective import curvature_and_trace
from fishleg.options import FishLegOptions, MaskFit, Objective
from fishleg.solvers.base import AbstractSolver, SolverState
from fishleg.solvers.half_steps import (
    Columns,
    HalfStep,
    Rows,
    Side,
    closed_step,
    exact_step,
    log_det_step,
)


class AlternatingSolver(AbstractSolver):
    """Alternates between the factors, B first; after each sweep ||B||_F = ||C||_F.

    Every half-step (one unit) lowers its objective: J, or J_M for exact masked ones, or the J of
    the masked gradients for damped ones. A step that would leave the positive definite matrices is
    shortened, and counted. Rows and columns without a survivor leave the factors: they are
    decoupled, with the mean of the diagonal.

    Exact masked half-steps begin at the present factors or, if J_M is less there, at the result of
    one damped sweep, at its best scale: the straight line from an unmasked Q soon meets the edge of
    the positive definite matrices.

    A state's `numbers`: `before` and `objective`, around the last half-step; `shortened`, the
    steps shortened so far; `iterations` of conjugate gradients so far.

    With the objective `log_det` each half-step lowers L; `prior.b` and `prior.c` of a state's
    `extra` hold the K-FAC factors Gamma and A that a pull is towards.

    Cost: 2 n r c (r + c) FLOPs for n gradients a half-step; exact masked ones about as much again
    for each iteration. The inverses are made in float64. A pass of the data a half-step; exact
    masked ones with pieces that are not a list: a pass for each iteration.

    Args:
        damping: gamma > 0.
        sweeps: pairs of half-steps, >= 1.
        mask: survivors, bool (rows, columns), at least one; None keeps all.
        mask_fit: the objective under a mask.
        iterations: of conjugate gradients at most, in an exact masked half-step.
        objective: J, in closed form ("expected"), or L ("log_det", without exact masked steps).
        pull: towards the K-FAC factors of the state, in [0, 1]; see `log_det_step`.
    """

    def __init__(
        self,
        damping: float,
        sweeps: int,
        mask: Tensor | None = None,
        *,
        mask_fit: MaskFit = FishLegOptions.mask_fit,
        iterations: int = FishLegOptions.cg_iterations,
        objective: Objective = "expected",
        pull: float = 0.0,
    ):
        super().__init__(damping, mask)
        self.objective = objective
        self.pull = pull
        self.units = 2 * sweeps
        self.iterations = iterations
        self._rows = self._columns = self._exact = None
        if mask is not None:
            self._rows, self._columns = (mask.any(d).nonzero().flatten() for d in (1, 0))
            if mask_fit == "exact":
                self._exact = mask[self._rows][:, self._columns]

    def prepare(self, gradients: Tensor) -> Tensor:
        """Return gradients (n, rows, columns) as a piece (r, n, c), masked and live only."""
        piece = super().prepare(gradients)
        if self._rows is None or self._columns is None:
            return piece
        if len(self._rows) < len(piece):
            piece = piece[self._rows]
        if len(self._columns) < piece.shape[2]:
            piece = piece[:, :, self._columns]
        return piece

    def run(self, pieces: Iterable[Tensor], state: SolverState) -> Iterator[SolverState]:
        """Yield the state after each half-step.

        Raises:
            ShapeMismatch: the state's block is not a Kronecker block without scale.
        """
        block = state.block
        if not isinstance(block, KroneckerBlock) or block.scale is not None:
            raise ShapeMismatch(
                f"Alternating half-steps: expected a Kronecker block without scale, got "
                f"{type(block).__name__}; use Adam for other structures."
            )
        b, c = _restrict(block.b, self._rows), _restrict(block.c, self._columns)
        if self._exact is not None and state.done == 0:
            b, c = self._exact_start(pieces, b, c)
        prior = (state.extra["prior.b"], state.extra["prior.c"]) if self.pull else None
        numbers = {"shortened": 0, "iterations": 0} | state.numbers
        for index in range(state.done, self.units):
            if index % 2 == 0:
                step = self._half_step(Rows(), pieces, b, c, prior)
                b = step.factor
            else:
                step = self._half_step(Columns(), pieces, c, b, prior and prior[::-1])
                b, c = balance(b, step.factor)
            numbers = {
                "before": step.before,
                "objective": step.objective,
                "shortened": numbers["shortened"] + step.shortened,
                "iterations": numbers["iterations"] + step.iterations,
            }
            full = KroneckerBlock(
                _embed(b, self._rows, block.shape[0]), _embed(c, self._columns, block.shape[1])
            )
            yield SolverState(block=full, done=index + 1, extra=state.extra, numbers=numbers)

    def _half_step(
        self,
        side: Side,
        pieces: Iterable[Tensor],
        own: Tensor,
        other: Tensor,
        prior: tuple[Tensor, Tensor] | None,
    ) -> HalfStep:
        if self.objective == "log_det":
            return log_det_step(side, pieces, own, other, self.damping, prior, self.pull)
        if self._exact is None:
            return closed_step(side, pieces, own, other, self.damping)
        mask = side.own_first(self._exact).to(own.dtype)
        return exact_step(side, pieces, own, other, self.damping, mask, self.iterations)

    def _exact_start(self, pieces: Iterable[Tensor], b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors where exact half-steps begin; see the class."""
        swept = closed_step(Rows(), pieces, b, c, self.damping).factor
        candidates = [
            (b, c),
            (swept, closed_step(Columns(), pieces, c, swept, self.damping).factor),
        ]
        found = []
        for b, c in candidates:
            gradients = (piece.transpose(0, 1) for piece in pieces)
            curvature, trace = curvature_and_trace(
                KroneckerBlock(b, c), gradients, self.damping, self._exact
            )
            found.append((float(-0.5 * trace**2 / curvature), b * (trace / curvature), c))
        return min(found, key=lambda entry: entry[0])[1:]


def balance(b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the same Q with ||B||_F = ||C||_F."""
    ratio = (torch.linalg.matrix_norm(c) / torch.linalg.matrix_norm(b)).sqrt()
    return b * ratio, c / ratio


def _restrict(factor: Tensor, live: Tensor | None) -> Tensor:
    """Return the factor's rows and columns `live`."""
    return factor if live is None else factor[live][:, live]


def _embed(factor: Tensor, live: Tensor | None, size: int) -> Tensor:
    """Undo `_restrict`: entries that are not live are decoupled, with the mean of the diagonal."""
    if live is None:
        return factor
    out = factor.diagonal().mean() * torch.eye(size, dtype=factor.dtype, device=factor.device)
    out[live.unsqueeze(1), live] = factor
    return out
