"""The objective of every structure, in both forms, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg.blocks import DenseBlock, DiagonalBlock, KroneckerBlock, TensorBlock
from fishleg.blocks.base import AbstractBlock
from fishleg.objective import (
    curvature_and_trace,
    expected_objective,
    gradient_product,
    log_det_objective,
    probe_objective,
)
from tests import reference

DAMPING = 0.05
ROWS, COLUMNS, COUNT = 3, 5, 12  # columns: 2 inputs x 2 kernel positions, and a bias
EXACT = 1e-10
MONTE_CARLO_PROBES = 40_000
MONTE_CARLO_SIGMAS = 5.0

KINDS = [
    "kronecker",
    "kronecker_scaled",
    "tensor",
    "tensor_scaled",
    "block",
    "diagonal",
    "full",
]


def definite(*shape: int, seed: int) -> Tensor:
    root = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / shape[-1] + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


def positive(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)


def make_block(kind: str) -> AbstractBlock:
    scale = positive(ROWS, COLUMNS, seed=9) if kind.endswith("scaled") else None
    if kind.startswith("kronecker"):
        return KroneckerBlock(
            definite(ROWS, ROWS, seed=1), definite(COLUMNS, COLUMNS, seed=2), scale
        )
    if kind.startswith("tensor"):
        out, inner, kernel = (definite(n, n, seed=n + i) for i, n in enumerate((ROWS, 2, 2)))
        return TensorBlock(out, inner, kernel, positive(1, seed=4), scale)
    if kind == "diagonal":
        return DiagonalBlock(positive(ROWS, COLUMNS, seed=5))
    size = {"block": 4, "full": ROWS * COLUMNS}[kind]
    chunks = -(-ROWS * COLUMNS // size)
    return DenseBlock(definite(chunks, size, size, seed=6), (ROWS, COLUMNS))


def make_gradients() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(COUNT, ROWS, COLUMNS, generator=generator, dtype=torch.float64) / COUNT**0.5


def make_mask() -> Tensor:
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(8)) < 0.6
    mask[1] = False
    return mask


def dense(block: AbstractBlock) -> Tensor:
    return reference.block_matrix(type(block).__name__, block.tensors(), ROWS * COLUMNS)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_expected_objective_is_the_dense_one(kind, masked):
    block, gradients, mask = make_block(kind), make_gradients(), make_mask() if masked else None
    fisher = reference.gradient_fisher(gradients)
    expected = reference.objective(dense(block), fisher, DAMPING, mask)
    torch.testing.assert_close(
        expected_objective(block, gradients, DAMPING, mask), expected, rtol=EXACT, atol=0
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_the_tensors_is_dense_autograd_of_j(kind, masked):
    block, gradients, mask = make_block(kind), make_gradients(), make_mask() if masked else None
    fisher = reference.gradient_fisher(gradients)
    leaves = {name: tensor.requires_grad_() for name, tensor in block.tensors().items()}
    fast = expected_objective(block, gradients, DAMPING, mask)
    slow = reference.objective(dense(block), fisher, DAMPING, mask)
    pairs = zip(
        torch.autograd.grad(fast, list(leaves.values())),
        torch.autograd.grad(slow, list(leaves.values())),
        strict=True,
    )
    for found, wanted in pairs:
        torch.testing.assert_close(symmetric(found), symmetric(wanted), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_log_det_objective_and_its_gradient_are_the_dense_ones(kind):
    block, gradients = make_block(kind), make_gradients()
    fisher = reference.gradient_fisher(gradients)
    leaves = {name: tensor.requires_grad_() for name, tensor in block.tensors().items()}
    fast = log_det_objective(block, gradients, DAMPING)
    slow = dense_log_det_objective(dense(block), fisher)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=0)
    pairs = zip(
        torch.autograd.grad(fast, list(leaves.values())),
        torch.autograd.grad(slow, list(leaves.values())),
        strict=True,
    )
    for found, wanted in pairs:
        torch.testing.assert_close(symmetric(found), symmetric(wanted), rtol=EXACT, atol=EXACT)


def dense_log_det_objective(q: Tensor, fisher: Tensor) -> Tensor:
    damped = fisher + DAMPING * torch.eye(len(fisher), dtype=fisher.dtype)
    return (q * damped).sum() - torch.linalg.slogdet(q)[1]


def test_the_inverse_minimises_the_log_det_objective():
    fisher = reference.gradient_fisher(make_gradients())
    inverse = reference.damped_inverse(fisher, DAMPING).requires_grad_()
    least = dense_log_det_objective(inverse, fisher)
    (slope,) = torch.autograd.grad(least, inverse)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    size = ROWS * COLUMNS
    assert float(least.detach()) == pytest.approx(
        size - float(torch.linalg.slogdet(inverse.detach())[1])
    )


def symmetric(slope: Tensor) -> Tensor:
    """Drop what a change of a factor, always symmetric, cannot see."""
    square = slope.ndim >= 2 and slope.shape[-1] == slope.shape[-2]
    return (slope + slope.mT) / 2 if square else slope


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_is_the_mean_over_probes(kind, masked):
    block, gradients, mask = make_block(kind), make_gradients(), make_mask() if masked else None
    generator = torch.Generator().manual_seed(10)
    probes = torch.randn(
        MONTE_CARLO_PROBES, ROWS, COLUMNS, generator=generator, dtype=torch.float64
    )
    values = torch.stack([probe_value(block, gradients, u, mask) for u in probes.split(400)])
    noise = float(values.std()) / len(values) ** 0.5
    closed = float(expected_objective(block, gradients, DAMPING, mask))
    assert abs(float(values.mean()) - closed) < MONTE_CARLO_SIGMAS * noise
    assert noise < 0.02 * float(curvature_and_trace(block, [gradients], DAMPING, mask)[1])


def probe_value(
    block: AbstractBlock, gradients: Tensor, probes: Tensor, mask: Tensor | None
) -> Tensor:
    return probe_objective(block, probes, lambda v: gradient_product(gradients, v), DAMPING, mask)


def test_probe_objective_by_hand():
    # Q = 2, F = 3, gamma = 1, u = 5: Qu = 10, 1/2 10 (3 + 1) 10 - 5 10 = 150
    block = DiagonalBlock(torch.tensor([[2.0]]))
    value = probe_objective(block, torch.tensor([[[5.0]]]), lambda v: 3.0 * v, 1.0)
    assert value.item() == 150.0


def test_gradient_product_is_the_fisher():
    gradients = make_gradients()
    v = torch.randn(
        2, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    fisher = reference.gradient_fisher(gradients)
    torch.testing.assert_close(
        gradient_product(gradients, v).flatten(1), v.flatten(1) @ fisher, rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("masked", [False, True])
def test_least_at_the_inverse(masked):
    gradients, mask = make_gradients(), make_mask() if masked else None
    fisher = reference.gradient_fisher(gradients if mask is None else gradients * mask)
    matrices = reference.damped_inverse(fisher, DAMPING)[None].requires_grad_()
    block = DenseBlock(matrices, (ROWS, COLUMNS))
    value = expected_objective(block, gradients, DAMPING, mask)
    least = reference.least_objective(fisher, DAMPING, mask)
    torch.testing.assert_close(value, least, rtol=EXACT, atol=0)
    (slope,) = torch.autograd.grad(value, matrices)
    assert slope.abs().max() < EXACT


def test_masked_kronecker_formula():
    """J_M as it is written in the theory."""
    block, gradients, mask = make_block("kronecker"), make_gradients(), make_mask()
    b, c, m = block.b, block.c, mask.double()
    value = -(b.diagonal() * (m @ c.diagonal())).sum()
    value += DAMPING / 2 * (b.square() * (m @ c.square() @ m.T)).sum()
    value += 0.5 * sum((m * (b @ (m * g) @ c)).square().sum() for g in gradients)
    torch.testing.assert_close(
        expected_objective(block, gradients, DAMPING, mask), value, rtol=EXACT, atol=0
    )


def test_best_scale():
    block, gradients = make_block("kronecker"), make_gradients()
    curvature, trace = curvature_and_trace(block, gradients.split(5), DAMPING)
    best = trace / curvature
    values = [
        expected_objective(KroneckerBlock(a * block.b, block.c), gradients, DAMPING)
        for a in (0.99 * best, best, 1.01 * best)
    ]
    assert values[1] < min(values[0], values[2])
    torch.testing.assert_close(values[1], -0.5 * trace**2 / curvature, rtol=EXACT, atol=0)
