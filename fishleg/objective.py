"""The FishLeg objective of one block, in both forms.

    J = E_u[ 1/2 (Qu)^T F_g (Qu) - u^T Q u ],   u ~ N(0, I),   F_g = F + gamma I,

is least, over all symmetric Q, at Q = F_g^-1, where J = -1/2 tr F_g^-1 (Garcia et al., ICLR 2023;
McGowan et al., arXiv 2412.02328). Given a mask M of survivors, Q means M o Q o M throughout:
J_M is least where Q inverts F_g restricted to the survivors.

    L = tr(F_g Q) - log det Q

has the same minimiser over all positive definite Q, where L = size + log det F_g. It is the log-det
divergence of Q from F_g^-1, up to a constant (Stein's loss; Kulis et al., JMLR 2009), and does not
depend on the scale of the weights: the relative errors of Q count, where J weighs errors by Q^2.

Gradients are scaled, so that F = sum_n vec(G_n) vec(G_n)^T. Everything here is differentiable in
the block's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.kronecker import KroneckerBlock
from fishleg.errors import ShapeMismatch
from fishleg.rng import SampleGenerator


def expected_objective(
    block: AbstractBlock, gradients: Tensor, damping: float, mask: Tensor | None = None
) -> Tensor:
    """Return J with the exact expectation over u, without probe noise.

        J = 1/2 sum_n ||Q g_n||^2 + gamma/2 ||Q||_F^2 - tr Q

    Args:
        block: Q.
        gradients: (n, rows, columns), scaled.
        damping: gamma > 0.
        mask: survivors, bool (rows, columns); None keeps all.

    Returns:
        J, a scalar.

    Cost: one product with Q a gradient, one squared norm and one trace of Q.
    """
    curvature, trace = curvature_and_trace(block, [gradients], damping, mask)
    return 0.5 * curvature - trace


def log_det_objective(block: AbstractBlock, gradients: Tensor, damping: float) -> Tensor:
    """Return L = sum_n g_n^T Q g_n + gamma tr Q - log det Q.

    Args:
        block: Q, positive definite.
        gradients: (n, rows, columns), scaled.
        damping: gamma > 0.

    Returns:
        L, a scalar.

    Cost: one product with Q a gradient, and one log determinant.
    """
    return image_energy(block, gradients) + damping * block.trace() - block.log_det()


def image_energy(block: AbstractBlock, gradients: Tensor) -> Tensor:
    """Return sum_n g_n^T Q g_n = tr(F Q), a scalar, for gradients (n, rows, columns)."""
    return (block.matvec(gradients) * gradients).sum()


def probe_objective(
    block: AbstractBlock,
    probes: Tensor,
    product: Callable[[Tensor], Tensor],
    damping: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return J averaged over given probes u, through products with F: the paper's form.

    Args:
        block: Q.
        probes: u, (p, rows, columns), standard normal.
        product: V -> F vec(V) for V (p, rows, columns), undamped; `gradient_product`, or any other.
        damping: gamma > 0.
        mask: survivors, bool (rows, columns); None keeps all.

    Returns:
        The mean over the p probes, a scalar whose expectation is `expected_objective`.

    Cost: one product with Q and one with F a probe.
    """
    curvature, linear = probe_terms(block, probes, product, damping, mask)
    return (0.5 * curvature - linear) / len(probes)


def probe_terms(
    block: AbstractBlock,
    probes: Tensor,
    product: Callable[[Tensor], Tensor],
    damping: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sum_p (Q u_p)^T F_g (Q u_p) and sum_p u_p^T Q u_p; see `probe_objective`."""
    image = masked_product(block, probes, mask)
    curved = product(image) + damping * image
    return (image * curved).sum(), (image * probes).sum()


def gradient_product(gradients: Tensor, v: Tensor) -> Tensor:
    """Return F vec(V) = sum_n G_n <G_n, V> for V (p, rows, columns).

    Args:
        gradients: (n, rows, columns), scaled.
        v: (p, rows, columns).

    Cost: O(n p rows columns).
    """
    flat = gradients.flatten(1)
    return ((v.flatten(1) @ flat.mT) @ flat).unflatten(1, v.shape[1:])


def sign_combinations(gradients: Tensor, generator: SampleGenerator) -> Tensor:
    """Return u = sum_n e_n g_n with random signs e, (p, rows, columns): E[u u^T] = F.

    Args:
        gradients: (n, rows, columns), scaled.
        generator: one sample a u.
    """
    signs = torch.where(generator.uniform(len(gradients)) < 0.5, -1.0, 1.0)
    flat = signs.to(gradients) @ gradients.flatten(1)
    return flat.unflatten(1, gradients.shape[1:])


def outer_product(rows: Tensor, columns: Tensor, v: Tensor) -> Tensor:
    """Return F vec(V) for gradients G_n = r_n c_n^T of rank one, which are not formed.

        F V = sum_n r_n (r_n^T V c_n) c_n^T

    Args:
        rows: r, (n, rows), scaled.
        columns: c, (n, columns).
        v: (p, rows, columns).

    Cost: 4 n p rows columns FLOPs, 4 n p rows bytes (float32).
    """
    slopes = ((columns @ v.mT) * rows).sum(-1)
    return (slopes.unsqueeze(-1) * rows).mT @ columns


def outer_square(block: KroneckerBlock, rows: Tensor, columns: Tensor) -> Tensor:
    """Return sum_n ||Q g_n||^2 = tr(Q F Q) for gradients G_n = r_n c_n^T, which are not formed.

        ||B r c^T C||_F^2 = ||B r||^2 ||C c||^2

    Args:
        block: Q; a ShapeMismatch if it has a scale, under which an image has not rank one.
        rows: r, (n, rows), scaled.
        columns: c, (n, columns).

    Cost: 2 n (rows^2 + columns^2) FLOPs, where gradients take 2 n rows columns (rows + columns).
    """
    _require_no_scale(block)
    return ((rows @ block.b).square().sum(-1) * (columns @ block.c).square().sum(-1)).sum()


def outer_directional(
    block: KroneckerBlock,
    directions: tuple[Tensor, Tensor],
    rows: Tensor,
    columns: Tensor,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Return sum_m (Q u_m)^T F_g (Q u_m) and sum_m u_m^T Q u_m, none of U_m and G_n formed.

        U = s t^T, G = r c^T:   <G, B U C> = (r^T B s)(c^T C t)

    Args:
        block: Q; a ShapeMismatch if it has a scale, under which an image has not rank one.
        directions: s, (m, rows), and t, (m, columns).
        rows: r, (n, rows), scaled.
        columns: c, (n, columns).
        damping: gamma > 0.

    Cost: 2 m (rows^2 + columns^2) + 2 m n (rows + columns) FLOPs.
    """
    _require_no_scale(block)
    s, t = directions
    left, right = s @ block.b, t @ block.c
    slopes = (left @ rows.mT) * (right @ columns.mT)
    norms = left.square().sum(-1) * right.square().sum(-1)
    linear = (left * s).sum(-1) * (right * t).sum(-1)
    return slopes.square().sum() + damping * norms.sum(), linear.sum()


def _require_no_scale(block: KroneckerBlock) -> None:
    if block.scale is not None:
        raise ShapeMismatch("Expected a Kronecker block without scale; use `outer_product`.")


def curvature_and_trace(
    block: AbstractBlock, pieces: Iterable[Tensor], damping: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return tr(Q F_g Q) and tr Q, two scalars: J(a Q) = a^2/2 tr(Q F_g Q) - a tr Q for any a.

    The best a is a* = tr Q / tr(Q F_g Q), where J = -1/2 (tr Q)^2 / tr(Q F_g Q).

    Args:
        block: Q.
        pieces: scaled gradients, (n, rows, columns) each.
        damping: gamma > 0.
        mask: survivors, bool (rows, columns); None keeps all.
    """
    curvature = damping * block.squared_norm(mask)
    for piece in pieces:
        curvature = curvature + image_square(block, piece, mask)
    return curvature, block.trace() if mask is None else (block.diagonal() * mask).sum()


def masked_product(block: AbstractBlock, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return M o Q (M o V), for V (..., rows, columns)."""
    return block.matvec(v) if mask is None else block.matvec(v * mask) * mask


def image_square(block: AbstractBlock, gradients: Tensor, mask: Tensor | None) -> Tensor:
    """Return sum_n ||Q g_n||^2 = tr(Q F Q), a scalar."""
    return masked_product(block, gradients, mask).square().sum()
