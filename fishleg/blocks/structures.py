"""Structures of blocks: their sizes, and their fits to a Kronecker start."""

from __future__ import annotations

import torch

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.dense import DenseBlock, chunk_count
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.blocks.kronecker import KroneckerBlock
from fishleg.blocks.tensor import TensorBlock
from fishleg.options import Structure
from fishleg.parameters import ParameterGroup


def fit_structure(
    start: KroneckerBlock, structure: Structure, *, kernel: int, block_size: int
) -> AbstractBlock:
    """Return a positive definite block of the given structure near `start`.

    Dense and diagonal structures copy their part of Q. The tensor structure takes partial
    traces of the column factor, exact where that is a product, and the bias's own entry.

    Args:
        start: from `solvers.starts`; unscaled for structures without a scale.
        structure: the structure wanted.
        kernel: positions of the kernel, k k, for the tensor structure; a column beyond in k k is
            the bias.
        block_size: chunk length for the block structure.
    """
    if structure == "diagonal":
        return DiagonalBlock(start.diagonal())
    if structure in {"block", "full"}:
        size = start.shape[0] * start.shape[1]
        return _chunks(start, size if structure == "full" else min(block_size, size))
    scale = start.scale
    if scale is None and structure.endswith("_scaled"):
        scale = start.b.new_ones(start.shape)
    if structure.startswith("kronecker"):
        return KroneckerBlock(start.b, start.c, scale)
    inner = start.shape[1] // kernel
    weight = start.c[: inner * kernel, : inner * kernel].unflatten(0, (inner, kernel))
    weight = weight.unflatten(2, (inner, kernel))
    over_kernel = torch.einsum("ikjk->ij", weight)
    over_inner = torch.einsum("ikil->kl", weight) / over_kernel.trace()
    bias = start.c[-1, -1].reshape(1) if start.shape[1] > inner * kernel else None
    return TensorBlock(start.b, over_kernel, over_inner, bias, scale)


def count_numbers(structure: Structure, group: ParameterGroup, *, block_size: int) -> int:
    """Return the count of numbers that a block of a structure holds, padding included.

    Args:
        structure: of the block.
        group: r rows and c columns.
        block_size: b, of the block structure.

    Returns:
        r^2 + c^2 (kronecker), r^2 + in^2 + (k k)^2 and 1 for a bias (tensor), r c more with a
        scale; ceil(r c / b) b^2 (block), r c (diagonal), (r c)^2 (full).
    """
    if structure in {"block", "full"}:
        chunk = group.size if structure == "full" else min(block_size, group.size)
        return chunk_count(group.size, chunk) * chunk**2
    if structure == "diagonal":
        return group.size
    scale = group.size if structure.endswith("_scaled") else 0
    if structure.startswith("kronecker"):
        return group.rows**2 + group.columns**2 + scale
    inner = group.weight_columns // group.kernel
    return group.rows**2 + inner**2 + group.kernel**2 + (group.bias is not None) + scale


def count_eigen_numbers(group: ParameterGroup, conv_groups: int) -> int:
    """Return the count of numbers of an eigenbasis block: r^2 / h + h c^2 + r c.

    Args:
        group: r rows and c columns.
        conv_groups: h, convolution groups with a basis each.
    """
    return group.rows**2 // conv_groups + conv_groups * group.columns**2 + group.size


def _chunks(start: KroneckerBlock, block_size: int) -> DenseBlock:
    """Return the diagonal chunks of Q, the last one padded with the identity."""
    size = start.shape[0] * start.shape[1]
    flat = torch.arange(chunk_count(size, block_size) * block_size, device=start.b.device)
    inside = (flat < size).reshape(-1, block_size)
    matrices = start.submatrix(flat.clamp(max=size - 1).reshape(-1, block_size))
    both = inside.unsqueeze(-1) & inside.unsqueeze(-2)
    eye = torch.eye(block_size, dtype=matrices.dtype, device=matrices.device)
    return DenseBlock(torch.where(both, matrices, eye), start.shape)
