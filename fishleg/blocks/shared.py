"""One matrix that all rows share: the inverse Hessian of a layer's outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent, log_det_of, resolve
from fishleg.errors import ShapeMismatch
from fishleg.linalg import invert_damped


class SharedBlock(AbstractBlock):
    """Q = blockdiag_k( I_(rows / h) (x) C_k ) over h convolution groups: V_k -> V_k C_k.

    Every row of convolution group k (h = 1 for an ordinary layer) has the same inverse C_k, and is
    independent of the other rows.

    Args:
        inverse: C, (h, columns, columns), each symmetric positive definite.
        shape: (rows, columns), rows divisible by h.

    Raises:
        ShapeMismatch: the matrices do not fit the shape.
    """

    def __init__(self, inverse: Tensor, shape: tuple[int, int]):
        conv_groups = inverse.shape[0] if inverse.ndim == 3 else 0
        if not conv_groups or inverse.shape[1:] != (shape[1], shape[1]) or shape[0] % conv_groups:
            raise ShapeMismatch(
                f"inverse: expected (h, {shape[1]}, {shape[1]}) with h a divisor of {shape[0]}, "
                f"got {tuple(inverse.shape)}."
            )
        self.inverse = inverse
        self.shape = shape

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SharedBlock:
        """Return the block that `tensors()` described."""
        return cls(tensors["inverse"], shape)

    def matvec(self, v: Tensor) -> Tensor:
        """Return V_k C_k for all k, V (..., rows, columns). Cost O(rows columns^2)."""
        return (v.unflatten(-2, (len(self.inverse), -1)) @ self.inverse).flatten(-3, -2)

    def invert(self) -> SharedBlock:
        """Return the inverse, of the matrices C_k^-1."""
        return SharedBlock(invert_damped(self.inverse, 0.0), self.shape)

    def resolvent(self) -> Resolvent:
        """Return the resolvent, in the eigenbases of C_k. Cost O(h columns^3), then 2 `matvec`."""
        values, basis = torch.linalg.eigh(self.inverse)

        def apply(v: Tensor, rho: float) -> Tensor:
            inner = (basis * resolve(values, rho).unsqueeze(-2)) @ basis.mT
            return SharedBlock(inner, self.shape).matvec(v)

        return apply

    def diagonal(self) -> Tensor:
        """Return diag(Q), (rows, columns): diag(C_k) in every row of k."""
        diagonal = self.inverse.diagonal(dim1=-2, dim2=-1)
        return diagonal.repeat_interleave(self._rows, dim=0)

    def log_det(self) -> Tensor:
        """Return the sum of (rows / h) log det C_k."""
        return self._rows * log_det_of(self.inverse).sum()

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat positions `index` (..., n)."""
        row, column = index // self.shape[1], index % self.shape[1]
        part = (row // self._rows).unsqueeze(-1)
        entries = self.inverse[part, column.unsqueeze(-1), column.unsqueeze(-2)]
        return entries * (row.unsqueeze(-1) == row.unsqueeze(-2))

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2 = sum over rows r of M_r C^o2 M_r^T."""
        keep = self.inverse.new_ones(self.shape) if mask is None else mask.to(self.inverse.dtype)
        squares = SharedBlock(self.inverse.square(), self.shape)
        return (keep * squares.matvec(keep)).sum()

    def tensors(self) -> dict[str, Tensor]:
        """Return {"inverse": (h, columns, columns)}."""
        return {"inverse": self.inverse}

    @property
    def row_runs(self) -> int:
        """Number of rows: each is independent."""
        return self.shape[0]

    def of_rows(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return a copy of C_k for each row of `rows` (n), (n, s, s); see `AbstractBlock`."""
        part = torch.div(rows, self._rows, rounding_mode="floor")
        if columns is None:
            return self.inverse[part]
        return self.inverse[part[:, None, None], columns.unsqueeze(-1), columns.unsqueeze(-2)]

    @property
    def _rows(self) -> int:
        return self.shape[0] // len(self.inverse)
