import pytest
import torch

from fishleg.errors import NotPositiveDefinite
from fishleg.parameters import Partition
from fishleg.pruning import group_saliency, saliency
from tests.fishleg.exact import ExactBlock, ExactEstimator, exact, group
from tests.reference import constrained_minimiser, random_spd

EXACT = 1e-10  # float64


def test_four_numbers():
    # F_g = [[1, 1/2], [1/2, 1]] + 2 + 4, so Q = [[4/3, -2/3], [-2/3, 4/3]] + 1/2 + 1/4
    hessian = torch.block_diag(
        torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]])
    )
    scores = saliency(exact(hessian, 2, 2), {"a": torch.tensor([[1.0, 2.0], [0.5, 0.5]])})
    torch.testing.assert_close(scores["a"], torch.tensor([[3 / 8, 3 / 2], [1 / 4, 1 / 2]]))


def test_is_the_least_cost_by_brute_force():
    hessian = random_spd(12, seed=0)
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = saliency(exact(hessian, 3, 4), {"a": weights})["a"].flatten()
    for i in range(12):
        removed = torch.arange(12) == i
        move = constrained_minimiser(hessian, weights.flatten(), removed)
        assert abs(float(0.5 * move @ hessian @ move) - float(scores[i])) < EXACT


def test_of_groups_is_the_least_cost_by_brute_force():
    hessian = random_spd(12, seed=2)
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    block = ExactBlock(torch.linalg.inv(hessian), (3, 4))
    index = torch.tensor([[[0, 5, 11], [1, 2, 3]], [[4, 6, 8], [9, 10, 7]]])
    scores = group_saliency(block, weights, index)
    assert scores.shape == (2, 2)
    for q, score in zip(index.reshape(-1, 3), scores.flatten(), strict=True):
        removed = torch.zeros(12, dtype=torch.bool)
        removed[q] = True
        move = constrained_minimiser(hessian, weights.flatten(), removed)
        assert abs(float(0.5 * move @ hessian @ move) - float(score)) < EXACT


def test_of_a_single_weight_agrees_with_groups_of_one():
    block = ExactBlock(random_spd(6, seed=4), (2, 3))
    weights = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
    singles = group_saliency(block, weights, torch.arange(6).reshape(6, 1))
    estimator = ExactEstimator(Partition((group("a", 2, 3),)), {"a": block.matrix})
    scores = saliency(estimator, {"a": weights})["a"]
    torch.testing.assert_close(singles.reshape(2, 3), scores, rtol=0, atol=EXACT)


def test_a_zero_weight_off_the_support_costs_nothing():
    support = torch.tensor([[True, False]])
    estimator = exact(torch.eye(2), 1, 2, support)
    scores = saliency(estimator, {"a": torch.tensor([[2.0, 0.0]])})
    assert scores["a"].tolist() == [[2.0, 0.0]]


def test_a_set_off_the_support_is_an_error():
    block = ExactBlock(torch.diag(torch.tensor([1.0, 0.0])), (1, 2))
    with pytest.raises(NotPositiveDefinite, match="got 1 of 1 that are not"):
        group_saliency(block, torch.ones(1, 2), torch.tensor([[0, 1]]))
