"""Kronecker blocks: one factor for the rows, one for the columns, and an optional full scale."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent, log_det_of
from fishleg.blocks.spectrum import Spectrum, resolvent_of
from fishleg.errors import ShapeMismatch
from fishleg.linalg import invert_damped


class KroneckerBlock(AbstractBlock):
    """Q: V -> A o [ B (A o V) C ], B and C symmetric positive definite, A nowhere zero.

    As a matrix, Q = D_A (B (x) C) D_A with D_A = diag(vec A), row-major. Without a scale A = 1.

    Args:
        b: row factor B, (rows, rows), floating.
        c: column factor C, (columns, columns), same dtype and device.
        scale: A, (rows, columns), or None.

    Raises:
        ShapeMismatch: a factor is not square, or the scale does not fit.
    """

    def __init__(self, b: Tensor, c: Tensor, scale: Tensor | None = None):
        require_square("b", b)
        require_square("c", c)
        self.shape = (b.shape[0], c.shape[0])
        require_scale(scale, self.shape)
        self.b = b
        self.c = c
        self.scale = scale

    def matvec(self, v: Tensor) -> Tensor:
        """Return A o [ B (A o V) C ]; cost O(rows columns (rows + columns)) a matrix."""
        inner = v if self.scale is None else self.scale * v
        # B from the right of V^T, so that leading dimensions fold into one large product
        image = (inner.mT @ self.b).mT @ self.c
        return image if self.scale is None else self.scale * image

    def invert(self) -> KroneckerBlock:
        """Return the inverse, of the factors B^-1 and C^-1 and the scale 1 / A."""
        b, c = invert_damped(self.b, 0.0), invert_damped(self.c, 0.0)
        return KroneckerBlock(b, c, None if self.scale is None else 1 / self.scale)

    def resolvent(self) -> Resolvent:
        """Return the resolvent, in the factors' eigenbases. Cost O(rows^3 + columns^3), once."""
        (b, left), (c, right) = torch.linalg.eigh(self.b), torch.linalg.eigh(self.c)
        spectrum = Spectrum(
            values=torch.outer(b, c),
            analyse=KroneckerBlock(left, right).matvec,
            synthesise=KroneckerBlock(left.mT, right.mT).matvec,
        )
        return resolvent_of(spectrum, self.scale)

    def diagonal(self) -> Tensor:
        """Return A^o2 o (diag B)(diag C)^T."""
        outer = torch.outer(self.b.diagonal(), self.c.diagonal())
        return outer if self.scale is None else self.scale.square() * outer

    def log_det(self) -> Tensor:
        """Return columns log det B + rows log det C + 2 sum log |A|."""
        rows, columns = self.shape
        total = columns * log_det_of(self.b) + rows * log_det_of(self.c)
        return total if self.scale is None else total + 2.0 * self.scale.abs().log().sum()

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], whose entry (ij, kl) is A_ij B_ik C_jl A_kl."""
        row, column = index // self.shape[1], index % self.shape[1]
        entries = gather_square(self.b, row) * gather_square(self.c, column)
        return entries if self.scale is None else scale_square(entries, self.scale, index)

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2 = sum over A^o2 o [ B^o2 (A^o2) C^o2 ], A masked."""
        if self.scale is None and mask is None:
            return self.b.square().sum() * self.c.square().sum()
        weight = squared_weight(self.b, self.shape, self.scale, mask)
        squares = KroneckerBlock(self.b.square(), self.c.square())
        return (weight * squares.matvec(weight)).sum()

    def tensors(self) -> dict[str, Tensor]:
        """Return `b`, `c` and, if there is one, `scale`."""
        out = {"b": self.b, "c": self.c}
        return out if self.scale is None else {**out, "scale": self.scale}


def require_square(name: str, factor: Tensor) -> None:
    """Raise unless `factor` is a square matrix.

    Raises:
        ShapeMismatch: it is not.
    """
    if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
        raise ShapeMismatch(f"{name}: expected a square matrix, got {tuple(factor.shape)}.")


def require_scale(scale: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise unless `scale` is None or a matrix of the shape `shape`.

    Raises:
        ShapeMismatch: it is not.
    """
    if scale is not None and tuple(scale.shape) != shape:
        raise ShapeMismatch(f"scale: expected {shape}, got {tuple(scale.shape)}.")


def gather_square(factor: Tensor, index: Tensor) -> Tensor:
    """Return factor[index, index] (..., n, n) for `index` (..., n)."""
    return factor[index.unsqueeze(-1), index.unsqueeze(-2)]


def scale_square(entries: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Return D entries D for D = diag(scale at the flat positions `index`)."""
    chosen = scale.flatten()[index]
    return chosen.unsqueeze(-1) * entries * chosen.unsqueeze(-2)


def squared_weight(
    like: Tensor, shape: tuple[int, int], scale: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return (M o A)^o2 as a matrix of `shape`; ones where there is neither."""
    weight = like.new_ones(shape) if scale is None else scale.square()
    return weight if mask is None else weight * mask
