"""Half-steps: minimise J or L over one Kronecker factor, the other one held.

Letters: r rows, c columns, n gradients in a piece (r, n, c). Both half-steps are one algorithm,
which sees the data from one side: with its `own` factor, the `other` one, and masks (own, other).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg.blocks.base import log_det_of
from fishleg.errors import NotPositiveDefinite
from fishleg.linalg import conjugate_gradient, invert_damped

_CG_TOLERANCE = 1e-5
_MARGIN = 0.3  # of its former size that a direction keeps where it would leave the cone


@dataclass(frozen=True, kw_only=True)
class HalfStep:
    """A factor after a half-step, and the report of the step.

    Attributes:
        factor: the new factor, symmetric positive definite.
        before: the objective before.
        objective: the objective after.
        shortened: whether the minimiser was not positive definite, and the step was shortened.
        iterations: of conjugate gradients; 0 for a closed form.
    """

    factor: Tensor
    before: float
    objective: float
    shortened: bool = False
    iterations: int = 0


class Rows:
    """The data as B sees them: X = G C, as (r, n c)."""

    def image(self, piece: Tensor, other: Tensor) -> Tensor:
        """Return X."""
        return (piece.flatten(0, 1) @ other).view_as(piece).flatten(1)

    def flat(self, piece: Tensor) -> Tensor:
        """Return G, as (r, n c)."""
        return piece.flatten(1)

    def own_first(self, mask: Tensor) -> Tensor:
        """Return a mask (rows, columns) as (own, other)."""
        return mask

    def masked(self, product: Tensor, mask: Tensor) -> Tensor:
        """Return M o product, for a product (r, n c)."""
        return (product.unflatten(1, (-1, mask.shape[1])) * mask.unsqueeze(1)).flatten(1)


class Columns:
    """The data as C sees them: Y = (B G)^T, as (c, r n)."""

    def image(self, piece: Tensor, other: Tensor) -> Tensor:
        """Return Y."""
        return (other @ piece.flatten(1)).view_as(piece).flatten(0, 1).mT

    def flat(self, piece: Tensor) -> Tensor:
        """Return G^T, as (c, r n)."""
        return piece.flatten(0, 1).mT

    def own_first(self, mask: Tensor) -> Tensor:
        """Return a mask (rows, columns) as (own, other)."""
        return mask.mT

    def masked(self, product: Tensor, mask: Tensor) -> Tensor:
        """Return M^T o product, for a product (c, r n)."""
        return (product.unflatten(1, (mask.shape[1], -1)) * mask.unsqueeze(2)).flatten(1)


Side = Rows | Columns


def closed_step(
    side: Side, pieces: Iterable[Tensor], own: Tensor, other: Tensor, damping: float
) -> HalfStep:
    """Minimise J(P) = 1/2 <P, P H> - tr(other) tr P, with H = E[X X^T] + gamma ||other||_F^2 I.

    Args:
        side: whose half-step it is.
        pieces: scaled gradients (r, n, c); iterated once.
        own: the factor before.
        other: the factor held.
        damping: gamma > 0.

    Cost: 2 n r c (r + c) FLOPs for n gradients; the inverse is made in float64.
    """
    curvature = torch.zeros_like(own, dtype=torch.float64)
    for piece in pieces:
        image = side.image(piece, other)
        curvature += image @ image.mT
    wide = other.double()
    ridge = damping * float(wide.square().sum())
    best = wide.trace() * invert_damped(curvature, ridge)
    curvature += ridge * torch.eye(len(own), dtype=wide.dtype, device=wide.device)

    def operator(p: Tensor) -> Tensor:
        return (p @ curvature + curvature @ p) / 2

    old = own.double()
    rhs = wide.trace() * torch.eye(len(own), dtype=wide.dtype, device=wide.device)
    return _take(operator, own, best - old, rhs, rhs - operator(old))


def log_det_step(
    side: Side,
    pieces: Iterable[Tensor],
    own: Tensor,
    other: Tensor,
    damping: float,
    prior: tuple[Tensor, Tensor] | None = None,
    pull: float = 0.0,
) -> HalfStep:
    """Minimise L(P) = tr(P S) - m log det P - n log det(other), P n x n and other m x m.

        S = (1 - a) E[X G^T] + a tr(A other) Gamma + gamma tr(other) I,   P <- m S^-1

    The image of side Rows is X = G C, that of Columns (B G)^T with G^T in place of G. A pull a > 0
    mixes the Kronecker product Gamma (x) A into the Fisher, Gamma the own side's factor; at a = 1
    the fixed point is that of these factors alone. L is geodesically convex in (B, C) (Wiesel,
    IEEE Trans. Signal Processing 2012), so the half-steps lead to its least value.

    Args:
        side: whose half-step it is.
        pieces: scaled gradients (r, n, c); iterated once.
        own: the factor before.
        other: the factor held.
        damping: gamma > 0.
        prior: Gamma and A, as (own, other); needed where there is a pull.
        pull: a, in [0, 1].

    Errors are those of `invert_damped`.

    Cost: 2 n r c (r + c) FLOPs for n gradients; the inverse is made in float64.
    """
    curvature = torch.zeros_like(own, dtype=torch.float64)
    for piece in pieces:
        curvature += side.image(piece, other) @ side.flat(piece).mT
    wide = other.double()
    if prior is not None and pull:
        curvature *= 1.0 - pull
        curvature += pull * float((prior[1].double() * wide).sum()) * prior[0].double()
    curvature = (curvature + curvature.mT) / 2
    ridge = damping * float(wide.trace())
    size = len(other)
    factor = (size * invert_damped(curvature, ridge)).to(own.dtype).contiguous()
    held = len(own) * float(log_det_of(wide))

    def objective(p: Tensor) -> float:
        p = p.double()
        energy = float((p * curvature).sum() + ridge * p.trace())
        return energy - size * float(log_det_of(p)) - held

    return HalfStep(factor=factor, before=objective(own), objective=objective(factor))


def exact_step(
    side: Side,
    pieces: Iterable[Tensor],
    own: Tensor,
    other: Tensor,
    damping: float,
    mask: Tensor,
    iterations: int,
) -> HalfStep:
    """Lower J_M(P) = 1/2 <P, O(P)> - <P, rhs> over symmetric P, from the present factor on.

    O(P) = sym( E[(M o (P X)) X^T] ) + gamma P o (M C^o2 M^T), and rhs = diag(M diag C). The
    preconditioner solves the unmasked problem of the same mean curvature; it is exact for a full
    mask, where one iteration suffices.

    Args:
        side: whose half-step it is.
        pieces: scaled gradients (r, n, c), masked; if not a list, iterated once an iteration.
        own: the factor before.
        other: the factor held.
        damping: gamma > 0.
        mask: survivors as (own, other), 0 or 1, in the factors' dtype.
        iterations: of conjugate gradients at most. Few are better than many: late ones move along
            directions of little curvature, in which the minimiser leaves the cone.

    Cost: about 4 n own^2 other FLOPs an iteration, and three iterations more.
    """
    images: Iterable[Tensor] = _Images(side, pieces, other)
    if isinstance(pieces, list):
        images = list(images)
    wide, squares = mask.double(), other.double().square()
    weight = damping * (wide @ squares @ wide.mT)

    def operator(p: Tensor) -> Tensor:
        curved = torch.zeros_like(weight)
        for image in images:
            curved += side.masked(p.to(image.dtype) @ image, mask) @ image.mT
        return (curved + curved.mT) / 2 + p * weight

    moment = torch.zeros_like(weight)
    for image in images:
        moment += image @ image.mT
    values, vectors = torch.linalg.eigh(moment * wide.mean())
    pairs = (values.unsqueeze(0) + values.unsqueeze(1)) / 2 + weight.diagonal().mean()

    def precondition(residual: Tensor) -> Tensor:
        return vectors @ ((vectors.mT @ residual @ vectors) / pairs) @ vectors.mT

    rhs = (wide @ other.double().diagonal()).diag()
    gap = rhs - operator(own.double())
    change, report = conjugate_gradient(
        operator,
        gap,
        preconditioner=precondition,
        tolerance=_CG_TOLERANCE,
        max_iterations=iterations,
    )
    return _take(operator, own, change, rhs, gap, report.iterations)


def _take(
    operator: Callable[[Tensor], Tensor],
    own: Tensor,
    change: Tensor,
    rhs: Tensor,
    gap: Tensor,
    iterations: int = 0,
) -> HalfStep:
    """Take the step `change`, or part of it: the factor stays positive definite, and J falls.

    Args:
        operator: O, of the quadratic 1/2 <P, O(P)> - <P, rhs>.
        own: P before.
        change: the minimiser less P.
        rhs: of the quadratic.
        gap: rhs - O(P), the direction of steepest descent.
        iterations: for the report.

    Raises:
        NotPositiveDefinite: even a part of the step loses it.
    """
    old = own.double()
    shortened = not _is_definite((old + change).to(own.dtype))
    if shortened:
        change = _stop_short(old, change, gap)
        change = change * min(1.0, _dot(change, gap) / _dot(change, operator(change)))
    new = old + change
    # contiguous: strides are not saved, but change the bits of later products
    factor = ((new + new.mT) / 2).to(own.dtype).contiguous()
    if not _is_definite(factor):
        raise NotPositiveDefinite(
            f"A factor of shape {tuple(own.shape)} lost positive definiteness; expected an "
            "objective that is finite. Raise the damping, use float64, or look for gradients that "
            "are not finite."
        )
    change = factor.double() - old
    before = -0.5 * _dot(old, rhs + gap)
    return HalfStep(
        factor=factor,
        before=before,
        objective=before - _dot(change, gap) + 0.5 * _dot(change, operator(change)),
        shortened=shortened,
        iterations=iterations,
    )


def _stop_short(old: Tensor, change: Tensor, gap: Tensor) -> Tensor:
    """Return a change that keeps `old` positive definite, and still lowers the quadratic.

    Seen from the old factor L L^T, the new one is 1 + e, e the eigenvalues of L^-1 change L^-T.
    Directions that would leave the cone, or come near its edge, are stopped short; the others take
    their full step. (Shortening the whole step freezes the factor: one bad direction then blocks
    all others, in every sweep.) If the clipped step does not lower the quadratic, the whole step
    is shortened.
    """
    factor = torch.linalg.cholesky(old)
    white = torch.linalg.solve_triangular(factor, change, upper=False)
    white = torch.linalg.solve_triangular(factor, white.mT, upper=False)
    values, vectors = torch.linalg.eigh((white + white.mT) / 2)
    basis = factor @ vectors
    clipped = (basis * values.clamp(min=_MARGIN - 1)) @ basis.mT
    if _dot(clipped, gap) > 0:
        return clipped
    return change * (1 - _MARGIN) / max(1.0, -float(values[0]))


@dataclass(frozen=True)
class _Images:
    """The images of all pieces, computed in each iteration over them."""

    side: Side
    pieces: Iterable[Tensor]
    other: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self.side.image(piece, self.other) for piece in self.pieces)


def _is_definite(factor: Tensor) -> bool:
    """Tell whether a symmetric matrix is positive definite, judged in float64."""
    return not bool(torch.linalg.cholesky_ex(factor.double()).info)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
