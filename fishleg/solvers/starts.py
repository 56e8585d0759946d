"""Starts of the solvers: a first Q from cheap statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.blocks.kronecker import KroneckerBlock
from fishleg.linalg import invert_damped

_POWER_ITERATIONS = 100


def identity_start(shape: tuple[int, int], damping: float, like: Tensor) -> KroneckerBlock:
    """Return I / gamma, in the dtype and on the device of `like`: the Q of a Fisher of zero."""
    factors = (damping**-0.5 * torch.eye(n, dtype=like.dtype, device=like.device) for n in shape)
    return KroneckerBlock(*factors)


def diagonal_start(fisher: Tensor, damping: float, *, scaled: bool) -> KroneckerBlock:
    """Return 1 / (F_ii + gamma): exactly, as a scale, or its best Kronecker fit without one.

    The best fit in the Frobenius norm to the diagonal matrix diag(vec D) is diag(x) (x) diag(y)
    with x y^T the best rank-one fit to D, found by power iterations. Both are positive, as D is.

    Args:
        fisher: diag F as a matrix (rows, columns), >= 0.
        damping: gamma > 0.
        scaled: whether the block may have a scale.
    """
    inverse = 1.0 / (fisher + damping)
    if scaled:
        b, c = (torch.eye(n, dtype=fisher.dtype, device=fisher.device) for n in fisher.shape)
        return KroneckerBlock(b, c, inverse.sqrt())
    y = inverse.mean(0)
    for _ in range(_POWER_ITERATIONS):
        x = inverse @ (y / torch.linalg.vector_norm(y))
        y = inverse.mT @ (x / torch.linalg.vector_norm(x))
    size = torch.linalg.vector_norm(y)
    x, y = x / torch.linalg.vector_norm(x) * size.sqrt(), y / size.sqrt()
    return KroneckerBlock(x.diag(), y.diag())


def factored_start(row: Tensor, column: Tensor, damping: float) -> KroneckerBlock:
    """Return the damped inverse of the Kronecker product of two second moments, F ~ row (x) column.

        B = (row + sqrt(gamma) / pi I)^-1,   C = (column + pi sqrt(gamma) I)^-1,

    pi^2 the ratio of their mean eigenvalues, column's to row's (Martens and Grosse, 2015, eq. 31).

    Args:
        row: (rows, rows), symmetric positive semi-definite.
        column: (columns, columns), the same.
        damping: gamma > 0.
    """
    means = [float(moment.diagonal().mean()) for moment in (row, column)]
    ratio = (means[1] / means[0]) ** 0.5 if min(means) > 0 else 1.0  # no gradient at all: F = 0
    b = invert_damped(row.double(), damping**0.5 / ratio)
    c = invert_damped(column.double(), damping**0.5 * ratio)
    return KroneckerBlock(b, c)
