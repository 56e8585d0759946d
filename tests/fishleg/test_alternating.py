"""Alternating half-steps: monotone, exact, masked, resumable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg.blocks import DiagonalBlock, KroneckerBlock
from fishleg.errors import ShapeMismatch
from fishleg.objective import expected_objective
from fishleg.solvers.alternating import AlternatingSolver
from fishleg.solvers.base import SolverState
from tests import reference

DAMPING = 1e-2
ROWS, COLUMNS, COUNT = 6, 9, 40
SLACK = 1e-9  # relative, for comparing objectives in float64


def make_gradients(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients with correlated, unevenly sized rows and columns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left = draw(ROWS, ROWS) * torch.logspace(0, -1, ROWS, dtype=torch.float64)
    right = draw(COLUMNS, COLUMNS) * torch.logspace(0, -1, COLUMNS, dtype=torch.float64)
    return (left @ draw(COUNT, ROWS, COLUMNS) @ right.T / (COUNT * COLUMNS) ** 0.5).to(dtype)


def make_mask(density: float, seed: int, *, holes: bool) -> Tensor:
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) < density
    mask[0, 0] = True
    if holes:
        mask[2] = False
        mask[:, [3, 5]] = False
    return mask


def identity_state(dtype: torch.dtype = torch.float64) -> SolverState:
    return SolverState(
        block=KroneckerBlock(torch.eye(ROWS, dtype=dtype), torch.eye(COLUMNS, dtype=dtype))
    )


def run(solver: AlternatingSolver, gradients: Tensor, state: SolverState | None = None):
    pieces = [solver.prepare(part) for part in gradients.split(17)]
    return list(solver.run(pieces, state or identity_state(gradients.dtype)))


def assert_falls(states: list[SolverState]) -> None:
    for state in states:
        before, after = state.numbers["before"], state.numbers["objective"]
        assert after <= before + SLACK * abs(before)
    for first, second in zip(states, states[1:], strict=False):
        after, before = first.numbers["objective"], second.numbers["before"]
        assert abs(after - before) <= SLACK * abs(before)


def assert_definite(block: KroneckerBlock) -> None:
    for factor in (block.b, block.c):
        assert torch.equal(factor, factor.T)
        assert torch.linalg.eigvalsh(factor)[0] > 0


def test_every_half_step_lowers_j():
    gradients = make_gradients()
    states = run(AlternatingSolver(DAMPING, sweeps=6), gradients)
    assert len(states) == 12
    assert_falls(states)
    fisher = reference.gradient_fisher(gradients)
    for state in states:
        q = reference.kronecker_matrix(state.block.b, state.block.c)
        told = state.numbers["objective"]
        assert told == pytest.approx(float(reference.objective(q, fisher, DAMPING)), rel=SLACK)


def test_half_steps_are_the_formulas():
    gradients = make_gradients()
    first, second = run(AlternatingSolver(DAMPING, sweeps=1), gradients)
    c = torch.eye(COLUMNS, dtype=torch.float64)
    moment = sum(g @ c @ c @ g.T for g in gradients)
    b = c.trace() * reference.damped_inverse(moment, DAMPING * float(c.square().sum()))
    torch.testing.assert_close(first.block.b, b, rtol=1e-10, atol=1e-10)
    moment = sum(g.T @ b @ b @ g for g in gradients)
    c = b.trace() * reference.damped_inverse(moment, DAMPING * float(b.square().sum()))
    q = reference.kronecker_matrix(b, c)
    found = reference.kronecker_matrix(second.block.b, second.block.c)
    torch.testing.assert_close(found, q, rtol=1e-10, atol=1e-10)


def test_factors_have_equal_norms_after_a_sweep():
    for state in run(AlternatingSolver(DAMPING, sweeps=2), make_gradients())[1::2]:
        norms = [torch.linalg.matrix_norm(factor) for factor in (state.block.b, state.block.c)]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-10, atol=0)


def test_finds_a_kronecker_inverse():
    """F = I (x) S makes F_g = I (x) (S + gamma I): one sweep from anywhere gets there."""
    columns = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(1)).double() / 5
    gradients = torch.zeros(20, ROWS, ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        gradients[:, row, row] = columns
    gradients = gradients.flatten(0, 1)
    state = run(AlternatingSolver(DAMPING, sweeps=1), gradients)[-1]
    inverse = reference.damped_inverse(reference.gradient_fisher(gradients), DAMPING)
    found = reference.kronecker_matrix(state.block.b, state.block.c)
    torch.testing.assert_close(found, inverse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("density", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_exact_masked_half_step_lowers_j_m(seed, density, holes):
    gradients, mask = make_gradients(seed), make_mask(density, seed, holes=holes)
    solver = AlternatingSolver(DAMPING, sweeps=4, mask=mask, mask_fit="exact", iterations=8)
    states = run(solver, gradients)
    assert_falls(states)
    fisher = reference.gradient_fisher(gradients)
    for state in states:
        q = reference.kronecker_matrix(state.block.b, state.block.c)
        wanted = float(reference.objective(q, fisher, DAMPING, mask))
        assert state.numbers["objective"] == pytest.approx(wanted, rel=1e-7)
        assert_definite(state.block)


def test_exact_half_step_is_the_minimiser_over_symmetric_factors():
    """Dense: the quadratic in the entries of B, solved as one linear system."""
    gradients, mask = make_gradients(), make_mask(0.8, 0, holes=False)
    solver = AlternatingSolver(1.0, sweeps=1, mask=mask, mask_fit="exact", iterations=200)
    first = run(solver, gradients)[0]
    assert first.numbers["shortened"] == 0
    pairs = [(i, k) for i in range(ROWS) for k in range(i + 1)]

    def value(entries: Tensor) -> Tensor:
        b = torch.zeros(ROWS, ROWS, dtype=torch.float64)
        for entry, (i, k) in zip(entries, pairs, strict=True):
            unit = torch.zeros_like(b)
            unit[i, k] = unit[k, i] = 1.0
            b = b + entry * unit
        return expected_objective(KroneckerBlock(b, first.block.c), gradients, 1.0, mask)

    zero = torch.zeros(len(pairs), dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(value, zero)
    slope = torch.autograd.functional.jacobian(value, zero)
    best = -torch.linalg.solve(curvature, slope)
    found = torch.stack([first.block.b[i, k] for i, k in pairs])
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)
    assert first.numbers["objective"] == pytest.approx(float(value(best)), rel=1e-8)


def test_exact_with_a_full_mask_is_the_closed_form():
    """It begins where one damped sweep has got to."""
    gradients = make_gradients()
    full = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    exact = run(AlternatingSolver(DAMPING, 2, full, mask_fit="exact"), gradients)[-1]
    plain = run(AlternatingSolver(DAMPING, 3), gradients)[-1]
    torch.testing.assert_close(exact.block.b, plain.block.b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(exact.block.c, plain.block.c, rtol=1e-8, atol=1e-8)
    assert exact.numbers["iterations"] <= 4  # one for each half-step


def test_exact_half_steps_begin_below_the_present_j_m():
    gradients, mask = make_gradients(), make_mask(0.5, 0, holes=False)
    fisher = reference.gradient_fisher(gradients)
    start = run(AlternatingSolver(DAMPING, 3), gradients)[-1]
    q = reference.kronecker_matrix(start.block.b, start.block.c)
    solver = AlternatingSolver(DAMPING, 1, mask, mask_fit="exact")
    first = run(solver, gradients, SolverState(block=start.block))[0]
    assert first.numbers["before"] <= float(reference.objective(q, fisher, DAMPING, mask))


def test_damped_is_the_unmasked_formula_on_masked_gradients():
    gradients, mask = make_gradients(), make_mask(0.5, 0, holes=False)
    damped = run(AlternatingSolver(DAMPING, 2, mask), gradients)
    plain = run(AlternatingSolver(DAMPING, 2), gradients * mask)
    assert_falls(damped)
    torch.testing.assert_close(damped[-1].block.b, plain[-1].block.b)
    torch.testing.assert_close(damped[-1].block.c, plain[-1].block.c)


@pytest.mark.parametrize("mask_fit", ["damped", "exact"])
def test_rows_and_columns_without_survivor_leave_the_factors(mask_fit):
    gradients, mask = make_gradients(), make_mask(0.6, 0, holes=True)
    state = run(AlternatingSolver(DAMPING, 1, mask, mask_fit=mask_fit), gradients)[-1]
    for factor, live in ((state.block.b, mask.any(1)), (state.block.c, mask.any(0))):
        assert not factor[live][:, ~live].any()
        mean = factor[live][:, live].diagonal().mean()
        isolated = factor[~live][:, ~live]
        torch.testing.assert_close(isolated, mean * torch.eye(len(isolated)).double())
    live_rows, live_columns = mask.any(1), mask.any(0)
    small = gradients[:, live_rows][:, :, live_columns]
    start = SolverState(
        block=KroneckerBlock(*(torch.eye(n, dtype=torch.float64) for n in small.shape[1:]))
    )
    solver = AlternatingSolver(DAMPING, 1, mask[live_rows][:, live_columns], mask_fit=mask_fit)
    alone = run(solver, small, start)[-1]
    torch.testing.assert_close(state.block.b[live_rows][:, live_rows], alone.block.b)


def test_a_step_that_loses_definiteness_is_shortened_and_told():
    gradients, mask = make_gradients(1), make_mask(0.25, 1, holes=False)
    solver = AlternatingSolver(1e-4, 4, mask, mask_fit="exact", iterations=30)
    states = run(solver, gradients)
    assert states[-1].numbers["shortened"] > 1
    assert_falls(states)
    for state in states:
        assert_definite(state.block)


@pytest.mark.parametrize("mask_fit", ["damped", "exact", None])
def test_resumes_to_the_same_bits(mask_fit):
    gradients = make_gradients(dtype=torch.float32)
    mask = None if mask_fit is None else make_mask(0.5, 0, holes=True)
    solver = AlternatingSolver(DAMPING, 2, mask, mask_fit=mask_fit or "damped")
    states = run(solver, gradients)
    for state in states[:-1]:
        again = run(solver, gradients, state)[-1]
        assert torch.equal(again.block.b, states[-1].block.b)
        assert torch.equal(again.block.c, states[-1].block.c)
        assert again.numbers == states[-1].numbers
    assert run(solver, gradients, states[-1]) == []


@pytest.mark.parametrize("mask_fit", ["damped", "exact"])
def test_streamed_pieces_give_the_same_bits(mask_fit):
    gradients, mask = make_gradients(), make_mask(0.5, 0, holes=False)
    solver = AlternatingSolver(DAMPING, 2, mask, mask_fit=mask_fit)

    class Stream:
        def __iter__(self):
            return (solver.prepare(part) for part in gradients.split(17))

    streamed = list(solver.run(Stream(), identity_state()))[-1]
    held = run(solver, gradients)[-1]
    assert torch.equal(streamed.block.b, held.block.b)
    assert torch.equal(streamed.block.c, held.block.c)


def test_float32_stays_close_to_float64_at_small_damping():
    single = run(AlternatingSolver(1e-6, 3), make_gradients(dtype=torch.float32))[-1]
    double = run(AlternatingSolver(1e-6, 3), make_gradients())[-1]
    assert single.block.b.dtype == torch.float32
    objectives = [state.numbers["objective"] for state in (single, double)]
    assert objectives[0] == pytest.approx(objectives[1], rel=5e-3)  # by 1e-3 with two threads


def test_refuses_other_blocks():
    solver = AlternatingSolver(DAMPING, 1)
    with pytest.raises(ShapeMismatch, match="DiagonalBlock; use Adam"):
        next(solver.run([], SolverState(block=DiagonalBlock(torch.ones(2, 2)))))


# -- the log-det objective


def log_det_loss(q: Tensor, fisher: Tensor) -> float:
    damped = fisher + DAMPING * torch.eye(len(fisher), dtype=fisher.dtype)
    return float((q * damped).sum() - torch.linalg.slogdet(q)[1])


def test_every_log_det_half_step_lowers_l():
    gradients = make_gradients()
    states = run(AlternatingSolver(DAMPING, sweeps=6, objective="log_det"), gradients)
    assert_falls(states)
    fisher = reference.gradient_fisher(gradients)
    for state in states:
        q = reference.kronecker_matrix(state.block.b, state.block.c)
        wanted = log_det_loss(q, fisher)
        assert state.numbers["objective"] == pytest.approx(wanted, rel=SLACK)


def test_log_det_half_steps_are_the_formulas():
    gradients = make_gradients()
    first, second = run(AlternatingSolver(DAMPING, sweeps=1, objective="log_det"), gradients)
    c = torch.eye(COLUMNS, dtype=torch.float64)
    moment = sum(g @ c @ g.T for g in gradients)
    b = COLUMNS * reference.damped_inverse(moment, DAMPING * float(c.trace()))
    torch.testing.assert_close(first.block.b, b, rtol=1e-10, atol=1e-10)
    moment = sum(g.T @ b @ g for g in gradients)
    c = ROWS * reference.damped_inverse(moment, DAMPING * float(b.trace()))
    found = reference.kronecker_matrix(second.block.b, second.block.c)
    torch.testing.assert_close(found, reference.kronecker_matrix(b, c), rtol=1e-10, atol=1e-10)


def test_log_det_half_steps_end_in_one_place_from_any_start():
    """L is geodesically convex in the factors: it has one minimum."""
    gradients = make_gradients()
    generator = torch.Generator().manual_seed(3)
    ends = []
    for _ in range(3):
        roots = [torch.randn(n, n, generator=generator).double() for n in (ROWS, COLUMNS)]
        start = KroneckerBlock(*(one @ one.T + torch.eye(len(one)).double() for one in roots))
        solver = AlternatingSolver(DAMPING, sweeps=60, objective="log_det")
        block = run(solver, gradients, SolverState(block=start))[-1].block
        ends.append(reference.kronecker_matrix(block.b, block.c))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pull", [0.4, 1.0])
def test_a_pull_mixes_the_kronecker_product_into_the_fisher(pull):
    gradients = make_gradients()
    draw = torch.Generator().manual_seed(4)
    row, column = (
        one @ one.T for one in (torch.randn(n, n, generator=draw).double() for n in (ROWS, COLUMNS))
    )
    extra = {"prior.b": row, "prior.c": column}
    start = SolverState(block=identity_state().block, extra=extra)
    solver = AlternatingSolver(DAMPING, sweeps=40, objective="log_det", pull=pull)
    states = run(solver, gradients, start)
    assert_falls(states)
    product = reference.kronecker_matrix(row, column)
    fisher = (1 - pull) * reference.gradient_fisher(gradients) + pull * product
    block = states[-1].block
    q = reference.kronecker_matrix(block.b, block.c).requires_grad_()
    assert states[-1].numbers["objective"] == pytest.approx(log_det_loss(q.detach(), fisher))
    # no other pair of factors near by is better
    for name in ("b", "c"):
        factor = getattr(block, name)
        noise = torch.randn(*factor.shape, generator=draw).double()
        for step in (1e-3, -1e-3):
            moved = {"b": block.b, "c": block.c, name: factor + step * (noise + noise.T)}
            worse = log_det_loss(reference.kronecker_matrix(moved["b"], moved["c"]), fisher)
            assert worse > states[-1].numbers["objective"]


def test_a_masked_log_det_fit_sees_masked_gradients():
    gradients, mask = make_gradients(), make_mask(0.6, 0, holes=False)
    solver = AlternatingSolver(DAMPING, sweeps=2, mask=mask, objective="log_det")
    found = run(solver, gradients)[-1].block
    plain = AlternatingSolver(DAMPING, sweeps=2, objective="log_det")
    wanted = run(plain, gradients * mask)[-1].block
    torch.testing.assert_close(found.b, wanted.b)
    torch.testing.assert_close(found.c, wanted.c)
