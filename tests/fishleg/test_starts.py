"""Warm starts: what each is, and how it is fitted into a structure."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from fishleg.blocks import DenseBlock, TensorBlock
from fishleg.blocks.structures import fit_structure
from fishleg.options import Structure
from fishleg.solvers.starts import diagonal_start, factored_start, identity_start
from tests import reference

DAMPING = 0.01
ROWS, INNER, KERNEL = 4, 3, 2
COLUMNS = INNER * KERNEL + 1
EXACT = 1e-10


def definite(n: int, seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def fisher_diagonal() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64)


def test_identity_is_the_inverse_of_the_damping():
    block = identity_start((ROWS, COLUMNS), DAMPING, torch.ones(1, dtype=torch.float64))
    q = reference.kronecker_matrix(block.b, block.c)
    torch.testing.assert_close(q, torch.eye(len(q)).double() / DAMPING)


def test_diagonal_with_scale_is_exact():
    fisher = fisher_diagonal()
    block = diagonal_start(fisher, DAMPING, scaled=True)
    q = reference.kronecker_matrix(block.b, block.c, block.scale)
    torch.testing.assert_close(q, (1 / (fisher + DAMPING)).flatten().diag(), rtol=EXACT, atol=0)


def test_diagonal_without_scale_is_the_best_kronecker_fit():
    """By the singular value decomposition, the best rank-one fit to a matrix."""
    fisher = fisher_diagonal()
    block = diagonal_start(fisher, DAMPING, scaled=False)
    u, s, v = torch.linalg.svd(1 / (fisher + DAMPING))
    best = (s[0] * torch.outer(u[:, 0], v[0])).flatten().diag()
    found = reference.kronecker_matrix(block.b, block.c)
    torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-8)
    assert (found.diagonal() > 0).all()


def test_factored_start_by_hand():
    # pi^2 = mean eigenvalue of the columns over that of the rows = 9 / 1; gamma = 0.09
    block = factored_start(torch.eye(2).double(), 9 * torch.eye(3).double(), 0.09)
    torch.testing.assert_close(block.b, torch.eye(2).double() / (1 + 0.3 / 3))
    torch.testing.assert_close(block.c, torch.eye(3).double() / (9 + 0.3 * 3))


def test_factored_start_inverts_a_kronecker_fisher():
    row, column = definite(ROWS, 1), definite(COLUMNS, 2)
    block = factored_start(row, column, 1e-14)
    inverse = torch.linalg.inv(torch.kron(row, column))
    found = reference.kronecker_matrix(block.b, block.c)
    torch.testing.assert_close(found, inverse, rtol=1e-4, atol=1e-4)  # sqrt of the damping


def test_factored_start_without_any_gradient():
    block = factored_start(torch.zeros(2, 2).double(), torch.zeros(3, 3).double(), DAMPING)
    q = reference.kronecker_matrix(block.b, block.c)
    torch.testing.assert_close(q, torch.eye(6).double() / DAMPING)


@pytest.mark.parametrize("structure", get_args(Structure))
def test_every_structure_starts_positive_definite(structure):
    start = factored_start(definite(ROWS, 1), definite(COLUMNS, 2), DAMPING)
    block = fit_structure(start, structure, kernel=KERNEL, block_size=5)
    assert block.shape == (ROWS, COLUMNS)
    assert torch.linalg.eigvalsh(block.dense())[0] > 0
    assert ("scale" in block.tensors()) == structure.endswith("_scaled")


def test_dense_and_diagonal_structures_take_their_part_of_q():
    start = factored_start(definite(ROWS, 1), definite(COLUMNS, 2), DAMPING)
    q = reference.kronecker_matrix(start.b, start.c)
    full, block, diagonal = (
        fit_structure(start, structure, kernel=1, block_size=5).dense()
        for structure in ("full", "block", "diagonal")
    )
    torch.testing.assert_close(full, q, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(diagonal, q.diagonal().diag(), rtol=EXACT, atol=EXACT)
    same = torch.arange(len(q)) // 5
    chunks = q * (same[:, None] == same)
    torch.testing.assert_close(block, chunks, rtol=EXACT, atol=EXACT)


def test_padding_of_the_last_chunk_is_the_identity():
    start = factored_start(definite(ROWS, 1), definite(COLUMNS, 2), DAMPING)
    block = fit_structure(start, "block", kernel=1, block_size=5)
    assert isinstance(block, DenseBlock)
    inside = ROWS * COLUMNS % 5
    padding = block.matrices[-1][inside:]
    assert torch.equal(padding, torch.eye(5, dtype=torch.float64)[inside:])


@pytest.mark.parametrize("scaled", [False, True])
def test_tensor_start_is_exact_where_the_factor_is_a_product(scaled):
    inner, kernel = definite(INNER, 3), definite(KERNEL, 4)
    columns = torch.block_diag(torch.kron(inner, kernel), torch.tensor([[0.7]]).double())
    start = factored_start(definite(ROWS, 1), torch.linalg.inv(columns), 1e-14)
    structure = "tensor_scaled" if scaled else "tensor"
    block = fit_structure(start, structure, kernel=KERNEL, block_size=1)
    assert isinstance(block, TensorBlock)
    found = reference.tensor_matrix(**block.tensors())
    wanted = reference.kronecker_matrix(start.b, start.c)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # sqrt of the damping
