"""The FishLeg objective of one block, in both forms.

    J = E_u[ 1/2 (Qu)^T F_g (Qu) - u^T Q u ],   u ~ N(0, I),   F_g = F + gamma I,

is least, over all symmetric Q, at Q = F_g^-1, where J = -1/2 tr F_g^-1 (Garcia et al., ICLR 2023;
McGowan et al., arXiv 2412.02328). Given a mask M of survivors, Q stands for M o Q o M throughout:
J_M is least where Q inverts F_g restricted to the survivors.

Gradients are scaled, so that F = sum_n vec(G_n) vec(G_n)^T. Everything here is differentiable in
the block's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from fishleg.blocks.base import AbstractBlock


def expected_objective(
    block: AbstractBlock, gradients: Tensor, damping: float, mask: Tensor | None = None
) -> Tensor:
    """Return J with the expectation over u taken: no probe noise.

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
    image = masked_product(block, probes, mask)
    curved = product(image) + damping * image
    return (image * (0.5 * curved - probes)).sum() / len(probes)


def gradient_product(gradients: Tensor, v: Tensor) -> Tensor:
    """Return F vec(V) = sum_n G_n <G_n, V> for V (p, rows, columns).

    Args:
        gradients: (n, rows, columns), scaled.
        v: (p, rows, columns).

    Cost: O(n p rows columns).
    """
    flat = gradients.flatten(1)
    return ((v.flatten(1) @ flat.mT) @ flat).unflatten(1, v.shape[1:])


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
