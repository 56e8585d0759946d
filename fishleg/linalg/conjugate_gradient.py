"""Conjugate gradients on tensors of any shape.

A vector is a tensor of any one shape; the inner product sums over all its entries. So a system
over the matrix of a parameter group, or over symmetric matrices, is solved without flattening.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg.errors import NotPositiveDefinite, ShapeMismatch

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CGReport:
    """The course of a solve by conjugate gradients.

    Attributes:
        iterations: iterations made (each one product with the operator).
        residual: ||b - A x|| / ||b|| at the end, computed from x (0 for b = 0).
        converged: whether `residual` reached the tolerance.
    """

    iterations: int
    residual: float
    converged: bool


def conjugate_gradient(
    operator: Operator,
    rhs: Tensor,
    *,
    preconditioner: Operator | None = None,
    initial: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    wide: Operator | None = None,
) -> tuple[Tensor, CGReport]:
    """Solve A x = b for a symmetric positive definite A (Hestenes and Stiefel, 1952).

    Every iterate lowers 1/2 x^T A x - b^T x, so an early stop is still progress. A may be singular
    outside a subspace that holds b, `initial` and the preconditioner's range, such as the support
    of a mask. Differs from `scipy.sparse.linalg.cg` in that the tolerance is relative only, and
    that a direction of non-positive curvature is an error rather than a wrong answer. It also
    computes the residual itself at the end: where that has left the recurrence's behind, the
    iterations begin again from x, as long as each such round halves it (iterative refinement).

    Args:
        operator: x -> A x, for x shaped like `rhs`.
        rhs: b, any shape, floating.
        preconditioner: r -> M r with M ~ A^-1 symmetric positive definite; None is the identity.
        initial: where to start (unmodified); None is zero.
        tolerance: stop at ||b - A x|| <= tolerance ||b||; > 0.
        max_iterations: iterations at most, of all rounds; >= 0.
        wide: the operator in float64, for the residual between the rounds, while the iterations run
            in the dtype of `rhs`; None is `operator`.

    Returns:
        x, shaped like `rhs`, in float64 where `wide` is given, and how it went.

    Raises:
        ShapeMismatch: `initial` is not shaped like `rhs`.

    A direction p with p^T A p <= 0, or not a number, is a NotPositiveDefinite.

    Cost: one product with A and one with M an iteration, and one with A a round; memory for seven
    vectors.
    """
    if initial is not None and initial.shape != rhs.shape:
        raise ShapeMismatch(
            f"initial: expected {tuple(rhs.shape)}, got {tuple(initial.shape)}; "
            "pass a start shaped like rhs, or None."
        )
    precondition = preconditioner or (lambda r: r)
    target = rhs if wide is None else rhs.double()
    product = wide or operator
    scale = float(torch.linalg.vector_norm(target))
    if scale == 0.0:
        return torch.zeros_like(target), CGReport(iterations=0, residual=0.0, converged=True)
    x = torch.zeros_like(target) if initial is None else initial.to(target, copy=True)
    residual = target.clone() if initial is None else target - product(x)
    size = float(torch.linalg.vector_norm(residual)) / scale
    iteration, first = 0, True
    while not size <= tolerance and iteration < max_iterations:
        goal = (tolerance if first else tolerance / 4) * scale
        change, made = _descend(
            operator, residual.to(rhs.dtype), precondition, goal, max_iterations - iteration, first
        )
        iteration += made
        closer = x + change
        residual = target - product(closer)
        reached = float(torch.linalg.vector_norm(residual)) / scale
        halved = reached <= size / 2
        if first or reached < size:
            x, size = closer, reached
        if not (first or halved) or made == 0:
            break
        first = False
    return x, CGReport(iterations=iteration, residual=size, converged=size <= tolerance)


def _descend(
    operator: Operator,
    residual: Tensor,
    precondition: Operator,
    goal: float,
    iterations: int,
    strict: bool,
) -> tuple[Tensor, int]:
    """Return the change of x, and the iterations made, until the recurrence's residual is `goal`.

    Where it is not `strict`, a direction of non-positive curvature ends it: nothing but rounding is
    left.

    Raises:
        NotPositiveDefinite: p^T A p <= 0, or not a number, along a search direction p.
    """
    residual, begin = residual.clone(), float(torch.linalg.vector_norm(residual))
    x, direction = torch.zeros_like(residual), torch.zeros_like(residual)
    rho, size = 1.0, begin
    for iteration in range(iterations):
        preconditioned = precondition(residual)
        rho, previous = _dot(residual, preconditioned), rho
        direction = preconditioned + direction * (rho / previous)
        image = operator(direction)
        curvature = _dot(direction, image)
        if not curvature > 0.0:
            if not strict:
                return x, iteration
            raise NotPositiveDefinite(
                f"conjugate gradients: expected p^T A p > 0, got {curvature:.3g} in iteration "
                f"{iteration + 1} at {size / begin:.3g} of the first residual; raise the damping, "
                "or use float64."
            )
        step = rho / curvature
        x.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        size = float(torch.linalg.vector_norm(residual))
        if size <= goal:
            return x, iteration + 1
    return x, iterations


def _dot(a: Tensor, b: Tensor) -> float:
    """Return the sum over all entries of a b."""
    return float((a * b).sum())
