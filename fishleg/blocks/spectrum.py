"""Factored eigenbases of blocks, and the resolvents that they give, with a scale or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fishleg.blocks.base import Resolvent, resolve
from fishleg.linalg import conjugate_gradient

_TOLERANCE = 1e-6  # relative residual
_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """P = R diag(vec q) R^T of an orthogonal R that is applied factor by factor.

    Attributes:
        values: q, (rows, columns), positive.
        analyse: V (..., rows, columns) -> R^T vec(V) as a matrix.
        synthesise: V -> R vec(V) as a matrix.
    """

    values: Tensor
    analyse: Callable[[Tensor], Tensor]
    synthesise: Callable[[Tensor], Tensor]

    def weigh(self, values: Tensor, v: Tensor) -> Tensor:
        """Return R diag(vec values) R^T vec(V) as a matrix."""
        return self.synthesise(values * self.analyse(v))


def resolvent_of(spectrum: Spectrum, scale: Tensor | None) -> Resolvent:
    """Return the resolvent of Q = D_A P D_A, D_A = diag(vec A), or of P without a scale.

        (Q^-1 + rho I)^-1 = D_A (P^-1 + rho D_A^2)^-1 D_A

    by conjugate gradients, preconditioned by P^-1 + rho mean(A^2) I.

    Args:
        spectrum: of P.
        scale: A, (rows, columns), nowhere zero; None is 1.

    Cost: of a call two changes of basis, and four more in each iteration where there is a scale.
    """
    values = spectrum.values
    if scale is None:
        return lambda v, rho: spectrum.weigh(resolve(values, rho), v)
    squares = scale.square()
    mean = squares.mean()

    def apply(v: Tensor, rho: float) -> Tensor:
        near = resolve(values, float(rho * mean))
        solution, _ = conjugate_gradient(
            lambda x: spectrum.weigh(1 / values, x) + rho * squares * x,
            scale * v,
            preconditioner=lambda r: spectrum.weigh(near, r),
            tolerance=_TOLERANCE,
            max_iterations=_ITERATIONS,
        )
        return scale * solution

    return apply
