"""Starts of the solvers: a first Q from cheap statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishleg.blocks.kronecker import KroneckerBlock
from fishleg.linalg import invert_damped
from fishleg.options import CLOSED_FORM, Structure

_POWER_ITERATIONS = 100


def start_from(
    statistics: Sequence[Tensor] | None,
    structure: Structure,
    shape: tuple[int, int],
    damping: float,
    like: Tensor,
) -> KroneckerBlock:
    """Return the first Q of a structure, before it has the structure's form.

    Args:
        statistics: of a group's gradients: None for I / gamma; (diag F,) for its inverse; or the
            row and column factors of K-FAC, one of each for every convolution group.
        structure: of the block.
        shape: of the group, (rows, columns).
        damping: gamma > 0.
        like: a tensor of the dtype and device of I / gamma.
    """
    if statistics is None:
        return identity_start(shape, damping, like)
    if len(statistics) == 1:
        scaled = structure.endswith("_scaled") or structure in CLOSED_FORM
        return diagonal_start(statistics[0], damping, scaled=scaled)
    return factored_start(*whole_factors(*statistics), damping)


def whole_factors(gamma: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return a group's factors of those of its convolution groups, which share the column's."""
    return torch.block_diag(*gamma), a.mean(0)


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
