"""Costs of a second step, against dense inverses in float64, for every kind of block."""

import pytest
import torch

from fishleg.blocks.eigen import invert_factors
from fishleg.parameters import Partition
from fishleg.pruning import (
    Conditioned,
    condition,
    conditioning,
    greedy_saliency,
    group_saliency,
    prune_once,
    saliency,
    select_n_of_m,
)
from tests.fishleg.exact import ExactEstimator, exact, group
from tests.fishleg.test_block_conformance import CASES
from tests.reference import constrained_minimiser, random_spd

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conditioned(dense: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """((Q^-1)_rr)^-1, for r the flat positions kept."""
    inside = kept.flatten()
    return torch.linalg.inv(torch.linalg.inv(dense)[inside][:, inside])


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    torch.manual_seed(0)
    block, dense = request.param()
    return block, dense, draw(*block.shape) > 0.4


def test_the_diagonal_of_every_block_is_that_of_the_inverse_of_the_survivors_curvature(case):
    block, dense, kept = case
    found = Conditioned(block, kept).diagonal()
    torch.testing.assert_close(found[kept], conditioned(dense, kept).diagonal(), **EXACT)


def test_the_submatrix_of_every_block_is_that_of_the_inverse_of_the_survivors_curvature(case):
    block, dense, kept = case
    wanted = conditioned(dense, kept)
    order = torch.stack([torch.randperm(len(wanted))[:2] for _ in range(4)]).reshape(2, 2, 2)
    index = kept.flatten().nonzero().flatten()[order]
    found = Conditioned(block, kept).submatrix(index)
    expected = wanted[order[..., :, None], order[..., None, :]]
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_support_is_conditioned_within(case):
    block, dense, kept = case
    support = kept | (draw(*block.shape, seed=6) > 0.5)
    inside = support.flatten()
    wanted = conditioned(dense[inside][:, inside], kept.flatten()[inside])
    found = Conditioned(block, kept, support).diagonal()
    torch.testing.assert_close(found[kept], wanted.diagonal(), **EXACT)


def test_without_earlier_zeros_every_bit_is_the_block_s(case):
    block, _, kept = case
    every = torch.ones_like(kept)
    for one in (Conditioned(block, every), Conditioned(block, kept, kept)):
        assert torch.equal(one.diagonal(), block.diagonal())
        index = torch.tensor([[0, 3], [1, 2]])
        assert torch.equal(one.submatrix(index), block.submatrix(index))


def test_the_saliency_of_a_second_step_is_the_least_cost_by_brute_force():
    hessian, weights = random_spd(12, seed=0), draw(3, 4)
    masks = {"a": draw(3, 4, seed=7) > 0.5}
    weights[~masks["a"]] = 0.0
    scores = saliency(exact(hessian, 3, 4), {"a": weights}, masks)["a"].flatten()
    for i in range(12):
        gone = ~masks["a"].flatten() | (torch.arange(12) == i)
        move = constrained_minimiser(hessian, weights.flatten(), gone)
        assert float(0.5 * move @ hessian @ move) == pytest.approx(float(scores[i]), rel=1e-9)


def test_the_saliency_of_sets_in_a_second_step_is_the_least_cost_by_brute_force():
    hessian, weights = random_spd(12, seed=0), draw(3, 4)
    masks = {"a": draw(3, 4, seed=7) > 0.5}
    weights[~masks["a"]] = 0.0
    index = torch.tensor([[0, 5, 11], [1, 2, 3], [4, 9, 10]])
    scores = group_saliency(condition(exact(hessian, 3, 4), "a", masks), weights, index)
    for q, score in zip(index, scores, strict=True):
        gone = ~masks["a"].flatten()
        gone[q] = True
        move = constrained_minimiser(hessian, weights.flatten(), gone)
        assert float(0.5 * move @ hessian @ move) == pytest.approx(float(score), rel=1e-9)


def test_n_of_m_of_a_second_step_takes_the_cheapest_sets():
    hessian, weights = random_spd(16, seed=1), draw(2, 8, seed=2)
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[0, 0] = kept[1, 5] = False
    weights[~kept] = 0.0
    estimator = exact(hessian, 2, 8)
    found = select_n_of_m(
        group("a", 2, 8), condition(estimator, "a", {"a": kept}), weights, 2, 4
    ).flatten()
    for begin in range(0, 16, 4):
        costs = {}
        for first in range(4):
            for second in range(first + 1, 4):
                gone = ~kept.flatten()
                gone[[begin + first, begin + second]] = True
                move = constrained_minimiser(hessian, weights.flatten(), gone)
                costs[first, second] = float(move @ hessian @ move)
        best = min(costs, key=costs.get)
        assert (~found[begin : begin + 4]).nonzero().flatten().tolist() == list(best)


def test_greedy_costs_of_a_second_step_count_the_zeros_of_all_rows():
    hessian, weights = random_spd(12, seed=3), draw(3, 4, seed=4)
    kept = draw(3, 4, seed=7) > 0.5
    weights[~kept] = 0.0
    estimator = exact(hessian, 3, 4)
    found = greedy_saliency(estimator, {"a": weights}, {"a": kept})["a"]
    for row in range(3):
        gone = ~kept.flatten()
        order = found[row].masked_fill(~kept[row], torch.inf).argsort()[: int(kept[row].sum())]
        largest = before = 0.0
        for column in order.tolist():
            gone[4 * row + column] = True
            move = constrained_minimiser(hessian, weights.flatten(), gone)
            total = float(0.5 * move @ hessian @ move)
            largest, before = max(largest, total - before), total
            assert float(found[row, column]) == pytest.approx(largest, rel=1e-8)


def test_a_second_step_of_the_surgeon_removes_the_weight_that_costs_least():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False).double()
    hessian = random_spd(12, seed=8)
    partition = Partition((group("a", 3, 4),))
    model = torch.nn.ModuleDict({"a": model})
    estimator = ExactEstimator(partition, {"a": torch.linalg.inv(hessian)})
    first = prune_once(model, estimator, sparsity=0.5, tolerance=1e-12)
    weights = model["a"].weight.detach().clone()
    costs = {}
    for i in first.masks["a"].flatten().nonzero().flatten().tolist():
        gone = ~first.masks["a"].flatten()
        gone[i] = True
        move = constrained_minimiser(hessian, weights.flatten(), gone)
        costs[i] = float(0.5 * move @ hessian @ move)
    second = prune_once(model, estimator, sparsity=7 / 12, masks=first.masks, tolerance=1e-12)
    (removed,) = (first.masks["a"] & ~second.masks["a"]).flatten().nonzero().flatten().tolist()
    assert removed == min(costs, key=costs.get)
    assert second.saliency == pytest.approx(costs[removed], rel=1e-9)
    assert second.predicted == pytest.approx(second.saliency, rel=1e-6)


# -------------------------------------------------------------------------- large blocks, by rows


@pytest.fixture
def large(monkeypatch):
    """A K-FAC block of correlated inputs and outputs that is treated as a large one."""
    monkeypatch.setattr(conditioning, "_DENSE_SIZE", 0)
    torch.manual_seed(0)
    mixing = torch.eye(12) + 0.2 * torch.randn(12, 12)
    left = torch.randn(100, 12).matmul(mixing).double()
    right = torch.randn(60, 30).cumsum(1).double()
    return invert_factors(left.T[None] @ left / 100, right.T[None] @ right / 60, 1e-3)


@pytest.mark.parametrize("zeros", [0.3, 0.6, 0.9])
def test_rows_of_a_large_block_are_nearer_than_q(large, zeros):
    kept = draw(12, 30) > zeros
    exactly = conditioned(large.dense(), kept).diagonal()
    found = Conditioned(large, kept).diagonal()[kept]
    error, before = (
        float((one / exactly - 1).abs().mean()) for one in (found, large.diagonal()[kept])
    )
    assert error < 0.3
    assert error < before / 5


def test_rows_of_a_large_block_are_exact_where_no_other_row_has_zeros_or_has_weights(large):
    for others in (True, False):
        kept = torch.full((12, 30), others)
        kept[4] = draw(30) > 0.5
        found = Conditioned(large, kept).diagonal()[4][kept[4]]
        size = int(kept[4].sum())
        first = int(kept[:4].sum())
        wanted = conditioned(large.dense(), kept)[first : first + size, first : first + size]
        torch.testing.assert_close(found, wanted.diagonal(), rtol=1e-8, atol=1e-10)
        index = 4 * 30 + kept[4].nonzero().flatten()[:3]
        torch.testing.assert_close(
            Conditioned(large, kept).submatrix(index), wanted[:3, :3], rtol=1e-8, atol=1e-10
        )


def test_the_greedy_costs_of_a_large_block_begin_with_its_diagonal(large):
    kept = draw(12, 30) > 0.6
    weights = draw(12, 30, seed=9) * kept
    one = Conditioned(large, kept)
    order = conditioning.survivors_first(kept)
    rows = torch.arange(12)
    found = one.of_rows(rows, order).diagonal(dim1=1, dim2=2)
    inside = kept.gather(1, order)
    torch.testing.assert_close(found[inside], one.diagonal().gather(1, order)[inside], **EXACT)
    assert (weights[~kept] == 0).all()
