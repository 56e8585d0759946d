"""Adam on the objective: where it arrives, what its steps are, and that it can be resumed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg.blocks import DenseBlock, DiagonalBlock, KroneckerBlock, TensorBlock
from fishleg.blocks.base import AbstractBlock
from fishleg.objective import expected_objective, gradient_product, probe_objective
from fishleg.options import FishLegOptions
from fishleg.solvers.adam import AdamSolver, preconditioned_loss
from fishleg.solvers.alternating import AlternatingSolver
from fishleg.solvers.base import SolverState
from fishleg.solvers.descent import assemble
from tests import reference

DAMPING = 1e-2
ROWS, COLUMNS, COUNT = 4, 6, 60
AGREES = 1e-3  # relative: Adam's J against the alternating solver's
MONTE_CARLO_PROBES = 50_000
MONTE_CARLO = 0.06  # relative error of a mean over that many probes


def make_gradients(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left = draw(ROWS, ROWS) * torch.logspace(0, -1, ROWS, dtype=torch.float64)
    right = draw(COLUMNS, COLUMNS) * torch.logspace(0, -1, COLUMNS, dtype=torch.float64)
    return (left @ draw(COUNT, ROWS, COLUMNS) @ right.T / COUNT**0.5).to(dtype)


def make_mask() -> Tensor:
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1] = False
    return mask


def make_start(kind: str, dtype: torch.dtype = torch.float64) -> AbstractBlock:
    def eye(n: int) -> Tensor:
        return torch.eye(n, dtype=dtype)

    ones = torch.ones(ROWS, COLUMNS, dtype=dtype)
    scale = ones if kind.endswith("scaled") else None
    if kind.startswith("kronecker"):
        return KroneckerBlock(eye(ROWS), eye(COLUMNS), scale)
    if kind.startswith("tensor"):
        return TensorBlock(eye(ROWS), eye(3), eye(2), None, scale)
    if kind == "diagonal":
        return DiagonalBlock(ones)
    size = {"block": 8, "full": ROWS * COLUMNS}[kind]
    return DenseBlock(eye(size).expand(ROWS * COLUMNS // size, size, size), (ROWS, COLUMNS))


def run(
    gradients: Tensor,
    start: AbstractBlock | SolverState,
    mask: Tensor | None = None,
    *,
    restrict: bool = False,
    batch: int = COUNT,
    steps: int = FishLegOptions.steps,
    **options,
) -> list[SolverState]:
    solver = AdamSolver(
        DAMPING,
        FishLegOptions(
            structure="kronecker", refine_steps=steps, **{"learning_rate": 0.05, **options}
        ),
        len(gradients),
        steps,
        mask,
        restrict=restrict,
    )
    pieces = [solver.prepare(part) for part in gradients.split(batch)]
    state = start if isinstance(start, SolverState) else SolverState(block=start)
    return list(solver.run(pieces, state))


def alternating_objective(gradients: Tensor) -> float:
    solver = AlternatingSolver(DAMPING, sweeps=30)
    start = SolverState(block=make_start("kronecker"))
    return list(solver.run([solver.prepare(gradients)], start))[-1].numbers["objective"]


@pytest.mark.parametrize(
    ("preconditioned", "objective"), [(0, "expected"), (100, "expected"), (0, "probe")]
)
def test_plain_last_steps_reach_the_alternating_objective(preconditioned, objective):
    gradients = make_gradients()
    last = run(
        gradients,
        make_start("kronecker"),
        steps=300,
        preconditioned_steps=preconditioned,
        objective=objective,
        probes=64,
    )[-1]
    wanted = alternating_objective(gradients)
    found = last.numbers["objective"]
    assert found > wanted * (1 + 1e-9)  # which is the least there is; both are negative
    assert found == pytest.approx(wanted, rel=AGREES if objective == "expected" else 10 * AGREES)


def test_objective_told_is_the_blocks():
    gradients = make_gradients()
    last = run(gradients, make_start("tensor_scaled"), steps=50, batch=20)[-1]
    q = reference.block_matrix("TensorBlock", last.block.tensors(), ROWS * COLUMNS)
    wanted = reference.objective(q, reference.gradient_fisher(gradients), DAMPING)
    assert last.numbers["objective"] == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("kind", ["block", "diagonal", "full"])
@pytest.mark.parametrize("masked", [False, True])
def test_reaches_the_closed_form(kind, masked):
    gradients, mask = make_gradients(), make_mask() if masked else None
    last = run(gradients, make_start(kind), mask, restrict=True, steps=300, learning_rate=0.5)[-1]
    fisher = reference.gradient_fisher(gradients)
    size = {"block": 8, "diagonal": 1, "full": ROWS * COLUMNS}[kind]
    least = 0.0
    for at in range(0, ROWS * COLUMNS, size):
        part = slice(at, at + size)
        keep = torch.ones(size, dtype=torch.bool) if mask is None else mask.flatten()[part]
        if keep.any():
            least += float(reference.least_objective(fisher[part, part], DAMPING, keep))
    assert last.numbers["objective"] == pytest.approx(least, rel=5e-3)


@pytest.mark.parametrize("kind", ["kronecker_scaled", "tensor", "tensor_scaled"])
@pytest.mark.parametrize("restrict", [False, True])
def test_masked_descent_lowers_its_objective(kind, restrict):
    gradients, mask = make_gradients(), make_mask()
    first, last = (
        run(gradients, make_start(kind), mask, restrict=restrict, steps=steps)[-1]
        for steps in (1, 100)
    )
    assert last.numbers["objective"] < 1.05 * first.numbers["objective"] < 0
    value = expected_objective(last.block, gradients * mask, DAMPING, mask if restrict else None)
    assert float(value) == pytest.approx(last.numbers["objective"], rel=1e-9)


def test_scale_can_only_help():
    gradients = make_gradients()
    plain, scaled = (
        run(gradients, make_start(kind), steps=150)[-1].numbers["objective"]
        for kind in ("kronecker", "kronecker_scaled")
    )
    assert scaled < plain


def make_field(loss) -> tuple[KroneckerBlock, callable]:
    """Return a Kronecker block and the map from its free numbers to a loss's gradient there."""
    gradients = make_gradients()
    generator = torch.Generator().manual_seed(2)
    b, c = (
        torch.eye(n, dtype=torch.float64)
        + 0.2 * torch.randn(n, n, generator=generator, dtype=torch.float64)
        for n in (ROWS, COLUMNS)
    )
    start = KroneckerBlock(b @ b.T, c @ c.T)

    def field(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        free = {
            "b": leaf[: ROWS**2].reshape(ROWS, ROWS),
            "c": leaf[ROWS**2 :].reshape(COLUMNS, COLUMNS),
        }
        return torch.autograd.grad(loss(assemble(start, free), gradients), leaf)[0]

    return start, field


def unit_probes() -> Tensor:
    """All sqrt(n) e_i: their mean over u u^T is the identity, as over Gaussian probes."""
    size = ROWS * COLUMNS
    return (size**0.5 * torch.eye(size, dtype=torch.float64)).unflatten(1, (ROWS, COLUMNS))


def jacobian(field, size: int) -> Tensor:
    step = 1e-5
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        columns.append((field(step * unit) - field(-step * unit)) / (2 * step))
    return torch.stack(columns, dim=1)


def test_a_plain_step_is_a_gradient_and_a_preconditioned_one_is_not():
    """The Jacobian of a gradient is symmetric."""
    size = ROWS**2 + COLUMNS**2
    probes = unit_probes()
    _, plain = make_field(lambda block, g: expected_objective(block, g, DAMPING))
    _, preconditioned = make_field(lambda block, g: preconditioned_loss(block, probes, g, DAMPING))
    for field, is_gradient in ((plain, True), (preconditioned, False)):
        slopes = jacobian(field, size)
        skew = (slopes - slopes.T).norm() / slopes.norm()
        assert (skew < 1e-6) if is_gradient else (skew > 0.05)


def test_preconditioned_steps_have_another_fixed_point_in_a_restricted_family():
    gradients, probes = make_gradients(), unit_probes()
    solver = AlternatingSolver(DAMPING, sweeps=200)
    best = list(
        solver.run([solver.prepare(gradients)], SolverState(block=make_start("kronecker")))
    )[-1].block
    zero = {
        name: torch.zeros_like(tensor).requires_grad_() for name, tensor in best.tensors().items()
    }
    block = assemble(best, zero)

    def size(loss: Tensor) -> float:
        slopes = torch.autograd.grad(loss, list(zero.values()), retain_graph=True)
        return float(torch.cat([slope.flatten() for slope in slopes]).norm())

    trace = float(best.trace())
    assert size(expected_objective(block, gradients, DAMPING)) < 1e-6 * trace
    assert size(preconditioned_loss(block, probes, gradients, DAMPING)) > 1e-2 * trace


def test_preconditioned_slope_is_q_times_the_residual():
    """Dense: <dQ, Q (F_g Q - I)>, Q before the residual held constant."""
    gradients, probes = make_gradients(), unit_probes()
    b, c = (torch.eye(n, dtype=torch.float64) * (1 + torch.arange(n)) for n in (ROWS, COLUMNS))
    leaves = [b.requires_grad_(), c.requires_grad_()]
    loss = preconditioned_loss(KroneckerBlock(*leaves), probes, gradients, DAMPING)
    q = reference.kronecker_matrix(*leaves)
    fixed, fisher = q.detach(), reference.gradient_fisher(gradients)
    residual = fisher @ fixed + DAMPING * fixed - torch.eye(len(q), dtype=q.dtype)
    dense = (q * (fixed @ residual)).sum()
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(dense, leaves), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found + found.T, wanted + wanted.T, rtol=1e-9, atol=1e-9)


def test_probe_gradient_has_the_expected_one_as_mean():
    gradients = make_gradients()
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(MONTE_CARLO_PROBES, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    block = make_start("kronecker_scaled")
    leaves = [tensor.requires_grad_() for tensor in block.tensors().values()]
    probed = probe_objective(block, u, lambda v: gradient_product(gradients, v), DAMPING)
    expected = expected_objective(block, gradients, DAMPING)
    pairs = zip(
        torch.autograd.grad(probed, leaves), torch.autograd.grad(expected, leaves), strict=True
    )
    for found, wanted in pairs:
        assert (found - wanted).norm() < MONTE_CARLO * wanted.norm()


@pytest.mark.parametrize("preconditioned", [0, 5])
def test_j_decides(preconditioned):
    """Steps far too large do not get through: the start, well scaled, is given back."""
    gradients = make_gradients()
    last = run(
        gradients,
        make_start("kronecker"),
        steps=10,
        preconditioned_steps=preconditioned,
        learning_rate=1e3,
    )[-1]
    assert last.numbers["rejected"] == 1 + (preconditioned > 0)
    start = make_start("kronecker")
    ratio = last.block.b[0, 0] * last.block.c[0, 0]
    q = ratio * torch.eye(ROWS * COLUMNS, dtype=torch.float64)
    found = reference.kronecker_matrix(last.block.b, last.block.c)
    torch.testing.assert_close(found, q)
    values = [
        expected_objective(KroneckerBlock(a * ratio * start.b, start.c), gradients, DAMPING)
        for a in (0.99, 1.0, 1.01)
    ]
    assert values[1] < min(values[0], values[2])


@pytest.mark.parametrize("preconditioned", [0, 13])
def test_resumes_to_the_same_bits(preconditioned):
    gradients = make_gradients(torch.float32)
    start = make_start("kronecker_scaled", torch.float32)
    options = {"steps": 37, "preconditioned_steps": preconditioned, "batch": 17}
    states = run(gradients, start, **options)
    assert len(states) >= 4
    for state in states[:-1]:
        again = run(gradients, state, **options)
        assert again[-1].numbers == states[-1].numbers
        for name, tensor in states[-1].block.tensors().items():
            assert torch.equal(again[-1].block.tensors()[name], tensor)
    assert run(gradients, states[-1], **options) == []


def test_a_step_sees_one_piece_as_a_sample_of_all():
    """With equal pieces, minibatches and the full batch take the same steps."""
    part = make_gradients()[:20]
    gradients = torch.cat([part, part, part]) / 3**0.5
    whole, pieces = (
        run(gradients, make_start("kronecker"), steps=30, batch=batch)[-1].block
        for batch in (60, 20)
    )
    torch.testing.assert_close(whole.b, pieces.b)
    torch.testing.assert_close(whole.c, pieces.c)
