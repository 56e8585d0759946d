import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg.errors import NotPositiveDefinite, ShapeMismatch
from fishleg.linalg import conjugate_gradient

EXACT = 1e-10  # float64


def spd(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, dtype=dtype, generator=generator)
    return root @ root.mT + torch.eye(n, dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000), precondition=st.booleans())
def test_matches_a_dense_solve_and_recovers_a_known_x(n, seed, precondition):
    matrix = spd(n, seed)
    known = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    rhs = matrix @ known
    x, report = conjugate_gradient(
        lambda v: matrix @ v,
        rhs,
        preconditioner=(lambda r: r / matrix.diagonal()) if precondition else None,
        tolerance=1e-13,
        max_iterations=10 * n,
    )
    assert report.converged
    torch.testing.assert_close(x, known, rtol=0, atol=EXACT)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, rhs), rtol=0, atol=EXACT)


def test_a_perfect_preconditioner_needs_one_iteration():
    matrix = spd(8, 0)
    inverse = torch.linalg.inv(matrix)
    _, report = conjugate_gradient(
        lambda v: matrix @ v,
        torch.ones(8, dtype=torch.float64),
        preconditioner=lambda r: inverse @ r,
    )
    assert report.iterations == 1
    assert report.converged


def test_solves_over_matrices_without_flattening():
    left, right = spd(3, 1), spd(4, 2)
    rhs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, _ = conjugate_gradient(lambda v: left @ v @ right, rhs, tolerance=1e-14)
    expected = torch.linalg.solve(left, rhs) @ torch.linalg.inv(right)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


def test_stays_on_the_support_of_a_singular_operator():
    matrix = spd(6, 4)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rhs = mask * torch.arange(1.0, 7.0, dtype=torch.float64)
    x, report = conjugate_gradient(lambda v: mask * (matrix @ (mask * v)), rhs, tolerance=1e-13)
    keep = mask.bool()
    assert report.converged
    assert (x[~keep] == 0).all()
    expected = torch.linalg.solve(matrix[keep][:, keep], rhs[keep])
    torch.testing.assert_close(x[keep], expected, rtol=0, atol=EXACT)


def test_a_good_start_needs_no_iteration_and_is_not_modified():
    matrix, start = spd(5, 5), torch.ones(5, dtype=torch.float64)
    kept = start.clone()
    x, report = conjugate_gradient(lambda v: matrix @ v, matrix @ start, initial=start)
    assert report.iterations == 0
    assert torch.equal(x, kept)
    x.add_(1)
    assert torch.equal(start, kept)


def test_a_zero_right_hand_side_gives_zero_whatever_the_start():
    x, report = conjugate_gradient(
        lambda v: 2 * v, torch.zeros(3), initial=torch.ones(3), max_iterations=0
    )
    assert torch.equal(x, torch.zeros(3))
    assert report.converged


def test_every_iterate_lowers_the_quadratic_and_an_early_stop_is_reported():
    matrix = spd(20, 6)
    rhs = torch.ones(20, dtype=torch.float64)
    values = []
    for count in range(8):
        x, report = conjugate_gradient(
            lambda v: matrix @ v, rhs, tolerance=1e-15, max_iterations=count
        )
        assert report.iterations == count
        assert not report.converged
        values.append(float(0.5 * x @ matrix @ x - rhs @ x))
    assert all(after < before for before, after in zip(values, values[1:], strict=False))


def test_an_indefinite_operator_is_an_error_that_says_what_to_do():
    signs = torch.tensor([1.0, -1.0])
    with pytest.raises(NotPositiveDefinite, match="p\\^T A p > 0.*raise the damping"):
        conjugate_gradient(lambda v: signs * v, torch.tensor([1.0, 2.0]))


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(ShapeMismatch, match="expected \\(3,\\), got \\(2,\\)"):
        conjugate_gradient(lambda v: v, torch.ones(3), initial=torch.ones(2))


def hard(n: int, condition: float) -> torch.Tensor:
    """A symmetric positive definite matrix of a given condition number, in float64."""
    basis = torch.linalg.qr(
        torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ).Q
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    return (basis * spectrum) @ basis.T


def test_the_residual_is_that_of_x_where_the_recurrence_has_drifted():
    wide = hard(200, 1e5)
    near, rhs = wide.float(), torch.ones(200)
    x, report = conjugate_gradient(
        lambda v: near @ v, rhs, tolerance=1e-7, max_iterations=5000, wide=None
    )
    true = float((near.double() @ x.double() - rhs).norm() / rhs.norm())
    assert report.residual == pytest.approx(true, rel=0.5)
    assert report.converged == (true <= 1e-7)


def test_rounds_with_a_residual_in_float64_reach_what_float32_alone_does_not():
    wide = hard(200, 1e5)
    near, rhs = wide.float(), torch.ones(200)
    found = {
        name: conjugate_gradient(
            lambda v: near @ v, rhs, tolerance=1e-7, max_iterations=5000, wide=operator
        )
        for name, operator in {"float32": None, "float64": lambda v: wide @ v}.items()
    }
    x, report = found["float64"]
    assert x.dtype == torch.float64
    assert report.converged
    assert float((wide @ x - rhs).norm() / rhs.norm()) <= 1e-7
    assert not found["float32"][1].converged
    exactly = torch.linalg.solve(wide, rhs.double())
    torch.testing.assert_close(x, exactly, rtol=0, atol=1e-2 * float(exactly.abs().max()))


def test_iterations_of_all_rounds_are_limited():
    wide = hard(200, 1e6)
    near = wide.float()
    _, report = conjugate_gradient(
        lambda v: near @ v,
        torch.ones(200),
        tolerance=1e-12,
        max_iterations=300,
        wide=lambda v: wide @ v,
    )
    assert report.iterations <= 300
    assert not report.converged
