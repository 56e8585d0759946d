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
        residual: ||b - A x|| / ||b|| at the end, by the recurrence (0 for b = 0).
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
) -> tuple[Tensor, CGReport]:
    """Solve A x = b for a symmetric positive definite A (Hestenes and Stiefel, 1952).

    Every iterate lowers 1/2 x^T A x - b^T x, so an early stop is still progress. A may be singular
    outside a subspace that holds b, `initial` and the preconditioner's range, such as the support
    of a mask. Differs from `scipy.sparse.linalg.cg` in that the tolerance is relative only, and
    that a direction of non-positive curvature is an error rather than a wrong answer.

    Args:
        operator: x -> A x, for x shaped like `rhs`.
        rhs: b, any shape, floating.
        preconditioner: r -> M r with M ~ A^-1 symmetric positive definite; None is the identity.
        initial: where to start (unmodified); None is zero.
        tolerance: stop at ||b - A x|| <= tolerance ||b||; > 0.
        max_iterations: iterations at most; >= 0.

    Returns:
        x, shaped like `rhs`, and how it went.

    Raises:
        ShapeMismatch: `initial` is not shaped like `rhs`.
        NotPositiveDefinite: p^T A p <= 0, or not a number, along a search direction p.

    Cost: one product with A and one with M an iteration, memory for five vectors.
    """
    if initial is not None and initial.shape != rhs.shape:
        raise ShapeMismatch(
            f"initial: expected {tuple(rhs.shape)}, got {tuple(initial.shape)}; "
            "pass a start shaped like rhs, or None."
        )
    precondition = preconditioner or (lambda r: r)
    x = torch.zeros_like(rhs) if initial is None else initial.clone()
    residual = rhs.clone() if initial is None else rhs - operator(x)
    scale = float(torch.linalg.vector_norm(rhs))
    if scale == 0.0:
        return torch.zeros_like(rhs), CGReport(iterations=0, residual=0.0, converged=True)
    size = float(torch.linalg.vector_norm(residual)) / scale
    direction, rho, iteration = torch.zeros_like(rhs), 1.0, 0
    while not size <= tolerance and iteration < max_iterations:
        preconditioned = precondition(residual)
        rho, previous = _dot(residual, preconditioned), rho
        direction = preconditioned + direction * (rho / previous)
        image = operator(direction)
        curvature = _dot(direction, image)
        if not curvature > 0.0:
            raise NotPositiveDefinite(
                f"conjugate gradients: expected p^T A p > 0, got {curvature:.3g} in iteration "
                f"{iteration + 1} at relative residual {size:.3g}; raise the damping, or use "
                "float64."
            )
        step = rho / curvature
        x.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        size = float(torch.linalg.vector_norm(residual)) / scale
        iteration += 1
    return x, CGReport(iterations=iteration, residual=size, converged=size <= tolerance)


def _dot(a: Tensor, b: Tensor) -> float:
    """Return the sum over all entries of a b."""
    return float((a * b).sum())
