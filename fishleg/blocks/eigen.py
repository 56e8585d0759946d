"""Blocks that are diagonal in a Kronecker eigenbasis: the exactly damped inverse of K-FAC."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent, resolve
from fishleg.errors import ShapeMismatch


class EigenBlock(AbstractBlock):
    """Q = blockdiag_k( (U_k (x) W_k) diag(vec S_k) (U_k (x) W_k)^T ) over h groups of rows.

    V -> U_k [ S_k o (U_k^T V_k W_k) ] W_k^T, V_k the rows of convolution group k; h = 1 for an
    ordinary layer. With F_k = Gamma_k (x) A_k, Gamma = U diag(s) U^T and A = W diag(t) W^T, the
    inverse of F + damping I is exactly this with S_ij = 1 / (s_i t_j + damping).

    Args:
        left: U, (h, rows / h, rows / h), orthogonal.
        right: W, (h, columns, columns), orthogonal.
        values: S, (h, rows / h, columns), positive.

    Raises:
        ShapeMismatch: the tensors do not fit together.
    """

    def __init__(self, left: Tensor, right: Tensor, values: Tensor):
        conv_groups, rows, columns = values.shape
        expected = (conv_groups, rows, rows), (conv_groups, columns, columns)
        if (left.shape, right.shape) != expected:
            raise ShapeMismatch(
                f"For values {tuple(values.shape)}: expected left {expected[0]} and right "
                f"{expected[1]}, got {tuple(left.shape)} and {tuple(right.shape)}."
            )
        self.left = left
        self.right = right
        self.values = values
        self.shape = (conv_groups * rows, columns)

    def matvec(self, v: Tensor) -> Tensor:
        """Return Q vec(V), V (..., rows, columns). Cost O(rows columns (rows/h + columns))."""
        parts = v.unflatten(-2, (self.values.shape[0], -1))
        inner = self.values * (self.left.mT @ parts @ self.right)
        return (self.left @ inner @ self.right.mT).flatten(-3, -2)

    def invert(self) -> EigenBlock:
        """Return the inverse, which has the same basis and the values 1 / S."""
        return EigenBlock(self.left, self.right, 1 / self.values)

    def resolvent(self) -> Resolvent:
        """Return the resolvent, which has the same basis; a call costs as much as `matvec`."""
        return lambda v, rho: EigenBlock(self.left, self.right, resolve(self.values, rho)).matvec(v)

    def diagonal(self) -> Tensor:
        """Return diag(Q) = U^o2 S (W^o2)^T, (rows, columns)."""
        squares = self.left.square() @ self.values @ self.right.square().mT
        return squares.flatten(0, 1)

    def energies(self, gradients: Tensor) -> Tensor:
        """Return sum_n (U^T G_n W)^o2, (h, rows / h, columns), of gradients (n, rows, columns)."""
        parts = gradients.unflatten(-2, (self.values.shape[0], -1))
        return (self.left.mT @ parts @ self.right).square().sum(0)

    def log_det(self) -> Tensor:
        """Return the sum of log S."""
        return self.values.log().sum()

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat positions `index` (..., n).

        Entry (p, q) is sum_ij U_pi U_qi S_ij W_pj W_qj. Cost O(n^2 rows columns / h) for each
        index set and each convolution group that occurs.
        """
        row, column = index // self.shape[1], index % self.shape[1]
        size = self.values.shape[1]
        part, row = row // size, row % size
        entries = self.values.new_zeros(*index.shape, index.shape[-1])
        for k in part.unique().tolist():
            u = self.left[k][row] * (part == k).unsqueeze(-1)
            w = self.right[k][column]
            pairs = (w.unsqueeze(-2) * w.unsqueeze(-3)) @ self.values[k].mT
            entries += (u.unsqueeze(-2) * u.unsqueeze(-3) * pairs).sum(-1)
        return entries

    @property
    def row_runs(self) -> int:
        """Number of convolution groups."""
        return len(self.values)

    def of_rows(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return W diag(sum_i U_ri^2 S_i) W^T for each row r of `rows` (n), (n, s, s).

        Columns are as in `AbstractBlock.of_rows`. Cost: 2 n s^2 columns FLOPs.
        """
        basis, values = self._of_rows(rows, columns)
        return (basis * values) @ basis.mT

    def invert_rows(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the inverse of `of_rows(rows)`, which has the same basis, at `columns` (n, s).

        Cost: 2 n s^2 columns FLOPs.
        """
        basis, values = self._of_rows(rows, columns)
        return (basis / values) @ basis.mT

    def _of_rows(self, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the basis (n, s, columns) and the values (n, 1, columns) of each row's part."""
        size = self.values.shape[1]
        part, row = rows // size, rows % size
        squares = self.left[part, row].square().unsqueeze(1)
        basis = self.right[part] if columns is None else self.right[part.unsqueeze(1), columns]
        return basis, squares @ self.values[part]

    def trace(self) -> Tensor:
        """Return tr Q = sum S."""
        return self.values.sum()

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2: sum S^o2 without a mask, else product by product."""
        return self.values.square().sum() if mask is None else super().squared_norm(mask)

    def tensors(self) -> dict[str, Tensor]:
        """Return `left`, `right` and `values`."""
        return {"left": self.left, "right": self.right, "values": self.values}


def invert_factors(left: Tensor, right: Tensor, damping: float) -> EigenBlock:
    """Return (left (x) right + damping I)^-1, exactly.

    Args:
        left: (h, r, r), symmetric positive semi-definite; give float64 where you can.
        right: (h, c, c), likewise.
        damping: gamma > 0.

    Cost: O(h (r^3 + c^3)), two symmetric eigendecompositions.
    """
    left_values, left_vectors = torch.linalg.eigh(left)
    right_values, right_vectors = torch.linalg.eigh(right)
    # Rounding can leave eigenvalues just below zero; the factors themselves have none.
    products = left_values.clamp(min=0)[:, :, None] * right_values.clamp(min=0)[:, None, :]
    return EigenBlock(left_vectors, right_vectors, 1 / (products + damping))
