"""Dense blocks of a chosen size along the flat parameter vector (one chunk: the full Q)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fishleg.blocks.base import AbstractBlock, Resolvent, log_det_of, resolve
from fishleg.errors import ShapeMismatch
from fishleg.linalg import invert_damped


class DenseBlock(AbstractBlock):
    """Q = blockdiag(Q_1, ..., Q_n) over n consecutive chunks, b long, of the row-major vector.

    Where n b exceeds rows columns, the last chunk is padded by a multiple of the identity. The
    padding is stored and counted, but never enters a result.

    Args:
        matrices: (n, b, b), each symmetric positive definite.
        shape: (rows, columns), with (n - 1) b < rows columns <= n b.

    Raises:
        ShapeMismatch: the matrices do not cover the shape.
    """

    def __init__(self, matrices: Tensor, shape: tuple[int, int]):
        size = shape[0] * shape[1]
        if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
            raise ShapeMismatch(f"matrices: expected (n, b, b), got {tuple(matrices.shape)}.")
        if chunk_count(size, matrices.shape[1]) != matrices.shape[0]:
            raise ShapeMismatch(
                f"matrices: expected {chunk_count(size, matrices.shape[1])} chunks of "
                f"{matrices.shape[1]} for a group of shape {shape}, got {matrices.shape[0]}."
            )
        self.matrices = matrices
        self.shape = shape

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> DenseBlock:
        """Return the block that `tensors()` described."""
        return cls(tensors["matrices"], shape)

    def matvec(self, v: Tensor) -> Tensor:
        """Return Q vec(V) as a matrix, V (..., rows, columns). Cost O(rows columns b) a vector."""
        chunks = cut_chunks(v, self.matrices.shape[1])
        product = torch.einsum("kij,...kj->...ki", self.matrices, chunks).flatten(-2)
        return product[..., : self.shape[0] * self.shape[1]].reshape(v.shape)

    def invert(self) -> DenseBlock:
        """Return the inverse, chunk by chunk. Cost O(n b^3)."""
        inside = cut_chunks(torch.ones_like(self.diagonal()), self.matrices.shape[1]).bool()
        return DenseBlock(invert_damped(isolate(self.matrices, inside), 0.0), self.shape)

    def resolvent(self) -> Resolvent:
        """Return the resolvent, in the chunks' eigenbases. Cost O(n b^3), then 2 `matvec`."""
        inside = cut_chunks(torch.ones_like(self.diagonal()), self.matrices.shape[1]).bool()
        values, basis = torch.linalg.eigh(isolate(self.matrices, inside))

        def apply(v: Tensor, rho: float) -> Tensor:
            chunks = cut_chunks(v, basis.shape[-1]).unsqueeze(-1)
            image = basis @ (resolve(values, rho).unsqueeze(-1) * (basis.mT @ chunks))
            return image.flatten(-3)[..., : self.shape[0] * self.shape[1]].reshape(v.shape)

        return apply

    def diagonal(self) -> Tensor:
        """Return diag(Q), (rows, columns)."""
        diagonal = self.matrices.diagonal(dim1=-2, dim2=-1).flatten()
        return diagonal[: self.shape[0] * self.shape[1]].reshape(self.shape).clone()

    def log_det(self) -> Tensor:
        """Return the sum of the chunks' log determinants, without the padding's. Cost O(n b^3)."""
        size = self.matrices.shape[1]
        inside = self.shape[0] * self.shape[1] - (len(self.matrices) - 1) * size
        last = log_det_of(self.matrices[-1, :inside, :inside])
        return log_det_of(self.matrices[:-1]).sum() + last

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat positions `index` (..., n)."""
        size = self.matrices.shape[1]
        row, column = index[..., :, None], index[..., None, :]
        chunk = row // size
        return self.matrices[chunk, row % size, column % size] * (chunk == column // size)

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2, entry by entry; the padding is left out. Cost O(n b^2)."""
        keep = self.matrices.new_ones(self.shape) if mask is None else mask.to(self.matrices.dtype)
        chunks = cut_chunks(keep, self.matrices.shape[1])
        return torch.einsum("ni,nij,nj->", chunks, self.matrices.square(), chunks)

    def tensors(self) -> dict[str, Tensor]:
        """Return {"matrices": (n, b, b)}."""
        return {"matrices": self.matrices}


def chunk_count(size: int, block_size: int) -> int:
    """Return the number of chunks of `block_size` that cover `size` entries."""
    return -(-size // block_size)


def cut_chunks(v: Tensor, block_size: int) -> Tensor:
    """Cut vec(V), V (..., rows, columns), into (..., n, block_size), padded with zeros."""
    flat = v.flatten(-2)
    missing = -flat.shape[-1] % block_size
    return functional.pad(flat, (0, missing)).unflatten(-1, (-1, block_size))


def isolate(matrices: Tensor, inside: Tensor) -> Tensor:
    """Return (n, b, b) matrices whose rows and columns outside (n, b) are those of the identity."""
    both = inside.unsqueeze(1) & inside.unsqueeze(2)
    return torch.where(both, matrices, torch.eye(matrices.shape[-1]).to(matrices))
