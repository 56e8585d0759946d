"""Tensor blocks: one factor for each of out, in and kernel of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent, log_det_of
from fishleg.blocks.kronecker import (
    gather_square,
    require_scale,
    require_square,
    scale_square,
    squared_weight,
)
from fishleg.blocks.spectrum import Spectrum, resolvent_of
from fishleg.errors import ShapeMismatch
from fishleg.linalg import invert_damped


class TensorBlock(AbstractBlock):
    """Q = D_A ( B (x) (I (x) K) ) D_A: a Kronecker block whose column factor is a product itself.

    B is out x out, I is in x in, K is k k x k k, all symmetric positive definite. A bias is one
    more column, which no kernel position belongs to: the column factor is then the block diagonal
    of I (x) K and one positive number, so bias and weight correlate through B only.

    Args:
        out: B, (rows, rows), floating.
        inner: I, (in, in), with in the channels of the kernel: in/groups.
        kernel: K, (k k, k k).
        bias: the bias column's number, shape (1,), or None for a group without bias.
        scale: A, (rows, columns), or None.

    Raises:
        ShapeMismatch: a factor is not square, or bias or scale do not fit.
    """

    def __init__(
        self,
        out: Tensor,
        inner: Tensor,
        kernel: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
    ):
        for name, factor in (("out", out), ("inner", inner), ("kernel", kernel)):
            require_square(name, factor)
        if bias is not None and tuple(bias.shape) != (1,):
            raise ShapeMismatch(f"bias: expected (1,), got {tuple(bias.shape)}.")
        self._weight_columns = inner.shape[0] * kernel.shape[0]
        self.shape = (out.shape[0], self._weight_columns + (bias is not None))
        require_scale(scale, self.shape)
        self.out = out
        self.inner = inner
        self.kernel = kernel
        self.bias = bias
        self.scale = scale

    def matvec(self, v: Tensor) -> Tensor:
        """Return Q vec(V); cost O(rows columns (rows + in + k k)) a matrix."""
        image = v if self.scale is None else self.scale * v
        image = (image.mT @ self.out).mT
        weight = image[..., : self._weight_columns].unflatten(-1, (self.inner.shape[0], -1))
        weight = ((weight.mT @ self.inner).mT @ self.kernel).flatten(-2)
        if self.bias is not None:
            weight = torch.cat([weight, image[..., -1:] * self.bias], dim=-1)
        return weight if self.scale is None else self.scale * weight

    def invert(self) -> TensorBlock:
        """Return the inverse, of the inverse factors and scale."""
        out, inner, kernel = (
            invert_damped(one, 0.0) for one in (self.out, self.inner, self.kernel)
        )
        bias, scale = (None if one is None else 1 / one for one in (self.bias, self.scale))
        return TensorBlock(out, inner, kernel, bias, scale)

    def resolvent(self) -> Resolvent:
        """Return the resolvent, in the factors' eigenbases. Cost O(rows^3 + in^3 + k^6), once."""
        factors = (self.out, self.inner, self.kernel)
        values, (out, inner, kernel) = zip(*map(torch.linalg.eigh, factors), strict=True)
        one = None if self.bias is None else torch.ones_like(self.bias)
        columns = torch.outer(values[1], values[2]).flatten()
        if self.bias is not None:
            columns = torch.cat([columns, self.bias])
        spectrum = Spectrum(
            values=torch.outer(values[0], columns),
            analyse=TensorBlock(out, inner, kernel, one).matvec,
            synthesise=TensorBlock(out.mT, inner.mT, kernel.mT, one).matvec,
        )
        return resolvent_of(spectrum, self.scale)

    def diagonal(self) -> Tensor:
        """Return A^o2 o (diag B)(diag of the column factor)^T."""
        columns = torch.outer(self.inner.diagonal(), self.kernel.diagonal()).flatten()
        if self.bias is not None:
            columns = torch.cat([columns, self.bias])
        outer = torch.outer(self.out.diagonal(), columns)
        return outer if self.scale is None else self.scale.square() * outer

    def log_det(self) -> Tensor:
        """Return the sum of the factors' log determinants, each times the size of the others."""
        rows, columns = self.shape
        inner, kernel = len(self.inner), len(self.kernel)
        total = columns * log_det_of(self.out)
        total = total + rows * (kernel * log_det_of(self.inner) + inner * log_det_of(self.kernel))
        if self.bias is not None:
            total = total + rows * self.bias.log().sum()
        return total if self.scale is None else total + 2.0 * self.scale.abs().log().sum()

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index] from the entries of the factors."""
        row, column = index // self.shape[1], index % self.shape[1]
        entries = gather_square(self.out, row) * self._column_entries(column)
        return entries if self.scale is None else scale_square(entries, self.scale, index)

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2: the squares of the entries factorise like the entries."""
        weight = squared_weight(self.out, self.shape, self.scale, mask)
        bias = None if self.bias is None else self.bias.square()
        squares = TensorBlock(self.out.square(), self.inner.square(), self.kernel.square(), bias)
        return (weight * squares.matvec(weight)).sum()

    def tensors(self) -> dict[str, Tensor]:
        """Return `out`, `inner`, `kernel` and, where there are, `bias` and `scale`."""
        found = {
            "out": self.out,
            "inner": self.inner,
            "kernel": self.kernel,
            "bias": self.bias,
            "scale": self.scale,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _column_entries(self, column: Tensor) -> Tensor:
        """Return the column factor at [column, column], (..., n, n)."""
        is_bias = column == self._weight_columns
        weight = torch.where(is_bias, 0, column)
        positions = self.kernel.shape[0]
        entries = gather_square(self.inner, weight // positions) * gather_square(
            self.kernel, weight % positions
        )
        if self.bias is None:
            return entries
        both = is_bias.unsqueeze(-1) & is_bias.unsqueeze(-2)
        either = is_bias.unsqueeze(-1) | is_bias.unsqueeze(-2)
        return torch.where(both, self.bias, entries.masked_fill(either, 0.0))
