"""A damped sum of m outer products, and its inverse by Woodbury's identity."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock, Resolvent, log_det_of, resolve
from fishleg.errors import NotPositiveDefinite, ShapeMismatch

_CHUNK = 8192  # columns that are held in float64 at once


class LowRankBlock(AbstractBlock):
    """Q = (I - W^T W) / damping, W (m, rows columns) with all singular values below 1.

    With G the m gradients as rows and L L^T = damping I + G G^T, W = L^-1 G makes it the inverse
    of damping I + G^T G: Woodbury's identity, without a matrix of the size of Q.

    Args:
        root: W, (m, rows, columns).
        damping: gamma > 0, a scalar tensor.

    Raises:
        ShapeMismatch: `root` is not a batch of matrices.
    """

    def __init__(self, root: Tensor, damping: Tensor):
        if root.ndim != 3:
            raise ShapeMismatch(f"root: expected (m, rows, columns), got {tuple(root.shape)}.")
        self.root = root
        self.damping = damping
        self.shape = (root.shape[1], root.shape[2])

    def matvec(self, v: Tensor) -> Tensor:
        """Return (V - W^T W V) / damping, V (..., rows, columns). Cost O(m rows columns)."""
        root = self.root.flatten(1)
        flat = v.flatten(-2)
        return ((flat - (flat @ root.mT) @ root) / self.damping).reshape(v.shape)

    def invert(self) -> GramBlock:
        """Return damping (I + V^T V), V = K^-1 W and K K^T = I - W W^T. Cost O(m^2 rows columns).

        Raises:
            NotPositiveDefinite: rounding has brought a singular value of W to 1.
        """
        root = self.root.flatten(1)
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        factor, failed = torch.linalg.cholesky_ex(eye - root @ root.mT)
        if bool(failed):
            raise NotPositiveDefinite(_lost(self))
        white = torch.linalg.solve_triangular(factor, root, upper=False)
        return GramBlock((self.damping.sqrt() * white).reshape_as(self.root), self.damping)

    def resolvent(self) -> Resolvent:
        """Return V, rho -> V / (gamma + rho) - W^T U diag(d) U^T W V, I - W W^T = U diag(k) U^T.

        d = gamma / ((gamma + rho k)(gamma + rho)). Cost O(m^2 rows columns), then 2 `matvec`.
        """
        root, gamma = self.root.flatten(1), self.damping
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        left, basis = torch.linalg.eigh(eye - root @ root.mT)
        left = left.clamp(min=0)

        def apply(v: Tensor, rho: float) -> Tensor:
            weight = gamma / ((gamma + rho * left) * (gamma + rho))
            return _add_low_rank(root, basis, -weight, 1 / (gamma + rho), v)

        return apply

    def conditioned(self, kept: Tensor, held: Tensor) -> LowRankBlock:
        """Return Q_rr - Q_rg (Q_gg)^-1 Q_gr = (I - W_r^T (I - W_g W_g^T)^-1 W_r) / damping.

        Args:
            kept: bool (rows, columns), r; outside it the result is I / damping.
            held: bool (rows, columns), g.

        Raises:
            NotPositiveDefinite: rounding has brought a singular value of W_g to 1.

        Cost: O(m^2 rows columns + m^3), in float64.
        """
        root, kept, held = self.root.flatten(1), kept.flatten(), held.flatten()
        gram = torch.eye(len(root), dtype=torch.float64, device=root.device)
        for chunk in held.nonzero().flatten().split(_CHUNK):
            wide = root[:, chunk].double()
            gram.addmm_(wide, wide.mT, alpha=-1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed):
            raise NotPositiveDefinite(_lost(self))
        out = torch.zeros_like(root)
        for chunk in kept.nonzero().flatten().split(_CHUNK):
            wide = root[:, chunk].double()
            out[:, chunk] = torch.linalg.solve_triangular(factor, wide, upper=False).to(out)
        return LowRankBlock(out.reshape_as(self.root), self.damping)

    def diagonal(self) -> Tensor:
        """Return (1 - sum_m W_m^o2) / damping, (rows, columns). Cost O(m rows columns)."""
        return (1 - torch.einsum("mij,mij->ij", self.root, self.root)) / self.damping

    def log_det(self) -> Tensor:
        """Return log det(I_m - W W^T) - rows columns log damping. Cost O(m^2 rows columns)."""
        root = self.root.flatten(1).double()
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        inner = log_det_of(eye - root @ root.mT) - root.shape[1] * self.damping.double().log()
        return inner.to(self.root.dtype)

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat positions `index` (..., n)."""
        chosen = self.root.flatten(1)[:, index].movedim(0, -2)
        same = index[..., :, None] == index[..., None, :]
        return (same.to(chosen.dtype) - chosen.mT @ chosen) / self.damping

    def squared_norm(self, mask: Tensor | None = None) -> Tensor:
        """Return ||M o Q o M||_F^2 = (p - m + ||I_m - W M W^T||_F^2) / damping^2, p survivors."""
        root = self.root.flatten(1)
        kept = root if mask is None else root * mask.flatten()
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        survivors = root.shape[1] if mask is None else mask.sum()
        inner = (eye - kept @ kept.mT).square().sum()
        return (survivors - len(root) + inner) / self.damping.square()

    def tensors(self) -> dict[str, Tensor]:
        """Return {"root": (m, rows, columns), "damping": ()}."""
        return {"root": self.root, "damping": self.damping}


class GramBlock(AbstractBlock):
    """Q = damping I + G^T G, G (m, rows columns): a damped Fisher of m gradients.

    Args:
        root: G, (m, rows, columns).
        damping: gamma > 0, a scalar tensor.

    Raises:
        ShapeMismatch: `root` is not a batch of matrices.
    """

    def __init__(self, root: Tensor, damping: Tensor):
        if root.ndim != 3:
            raise ShapeMismatch(f"root: expected (m, rows, columns), got {tuple(root.shape)}.")
        self.root = root
        self.damping = damping
        self.shape = (root.shape[1], root.shape[2])

    def matvec(self, v: Tensor) -> Tensor:
        """Return damping V + G^T G V, V (..., rows, columns). Cost O(m rows columns)."""
        root = self.root.flatten(1)
        flat = v.flatten(-2)
        return (self.damping * flat + (flat @ root.mT) @ root).reshape(v.shape)

    def invert(self) -> LowRankBlock:
        """Return the inverse, by `invert_low_rank`."""
        return invert_low_rank(self.root.clone(), float(self.damping))

    def resolvent(self) -> Resolvent:
        """Return V, rho -> V gamma / (1 + rho gamma) + G^T U diag(d) U^T G V.

        G G^T = U diag(g) U^T, d = 1 / ((1 + rho gamma)(1 + rho (gamma + g))). It costs as much as
        that of `LowRankBlock`.
        """
        root, gamma = self.root.flatten(1), self.damping
        gram, basis = torch.linalg.eigh(root @ root.mT)
        gram = gram.clamp(min=0)

        def apply(v: Tensor, rho: float) -> Tensor:
            weight = 1 / ((1 + rho * gamma) * (1 + rho * (gamma + gram)))
            return _add_low_rank(root, basis, weight, resolve(gamma, rho), v)

        return apply

    def diagonal(self) -> Tensor:
        """Return damping + sum_m G_m^o2, (rows, columns). Cost O(m rows columns)."""
        return self.damping + torch.einsum("mij,mij->ij", self.root, self.root)

    def log_det(self) -> Tensor:
        """Return log det(I_m + G G^T / damping) + rows columns log damping."""
        root, damping = self.root.flatten(1).double(), self.damping.double()
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        inner = log_det_of(eye + root @ root.mT / damping) + root.shape[1] * damping.log()
        return inner.to(self.root.dtype)

    def submatrix(self, index: Tensor) -> Tensor:
        """Return Q[index, index], (..., n, n), for flat positions `index` (..., n)."""
        chosen = self.root.flatten(1)[:, index].movedim(0, -2)
        same = index[..., :, None] == index[..., None, :]
        return self.damping * same.to(chosen.dtype) + chosen.mT @ chosen

    def tensors(self) -> dict[str, Tensor]:
        """Return {"root": (m, rows, columns), "damping": ()}."""
        return {"root": self.root, "damping": self.damping}


def _add_low_rank(root: Tensor, basis: Tensor, weight: Tensor, scale: Tensor, v: Tensor) -> Tensor:
    """Return scale V + R^T U diag(weight) U^T R V, R `root` (m, n), U `basis` (m, m)."""
    flat = v.flatten(-2)
    inner = ((flat @ root.mT) @ basis) * weight
    return (scale * flat + (inner @ basis.mT) @ root).reshape(v.shape)


def _lost(block: LowRankBlock) -> str:
    return (
        f"The inverse of a low-rank inverse with damping {float(block.damping):g} is lost in the "
        f"rounding of {block.root.dtype}; raise the damping."
    )


def invert_low_rank(gradients: Tensor, damping: float) -> LowRankBlock:
    """Return (damping I + sum_k vec(G_k) vec(G_k)^T)^-1, in the memory of `gradients`.

    The m x m matrix damping I + G G^T is summed and factored in float64.

    Args:
        gradients: G, (m, rows, columns), contiguous; overwritten by W.
        damping: gamma > 0.

    Raises:
        NotPositiveDefinite: the ratio of the largest curvature to the damping exceeds the precision
            of the gradients' dtype, or a gradient is not finite.

    Cost: O(m^2 rows columns + m^3), in float64; 24 (m^2 + 8192 m) bytes beside the gradients.
    """
    flat = gradients.flatten(1)
    count = len(flat)
    gram = damping * torch.eye(count, dtype=torch.float64, device=flat.device)
    for chunk in flat.split(_CHUNK, dim=1):
        wide = chunk.double()
        gram.addmm_(wide, wide.mT)
    factor, failed = torch.linalg.cholesky_ex(gram)
    for chunk in flat.split(_CHUNK, dim=1):
        chunk.copy_(torch.linalg.solve_triangular(factor, chunk.double(), upper=False))
    block = LowRankBlock(gradients, torch.tensor(damping, dtype=flat.dtype, device=flat.device))
    if bool(failed) or not bool((block.diagonal() > 0).all()):
        raise NotPositiveDefinite(
            f"A low-rank inverse with damping {damping:g} is not positive definite in "
            f"{flat.dtype}: expected a curvature of at most about "
            f"{0.1 / torch.finfo(flat.dtype).eps:.0e} times the damping. Raise the damping, use "
            "float64, or look for gradients that are not finite."
        )
    return block
