import pytest
import torch
from torch import nn

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.parameters import partition_parameters
from fishleg.pruning import COMPENSATIONS, compensate, count_masks, cubic, prune_once, prune_to
from tests.fishleg.exact import ExactEstimator
from tests.reference import random_spd


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 4)
    ).eval()


@pytest.fixture
def source(model):
    inputs = torch.randn(10, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    return GradientSource(
        model, Categorical(), partition_parameters(model), Calibration(inputs=inputs)
    )


def estimate(model, masks=None):
    partition = partition_parameters(model)
    blocks = {
        g.name: random_spd(g.rows * g.columns, seed).float()
        for seed, g in enumerate(partition.groups)
    }
    return ExactEstimator(partition, blocks, masks=masks)


@pytest.mark.parametrize("distribution", ["global", "uniform"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_counts_are_exact_and_removed_weights_exactly_zero(
    model, source, compensation, distribution
):
    estimator = estimate(model)
    report = prune_once(
        model,
        estimator,
        sparsity=0.7,
        distribution=distribution,
        compensation=compensation,
        source=source,
    )
    prunable = 3 * 2 * 9 + 4 * 3
    assert (report.removed, report.prunable) == (46, prunable)  # floor(0.7 * 66 + 1/2)
    assert report.sparsity == 46 / prunable
    assert report.compensation == compensation
    assert report.saliency > 0
    assert count_masks(estimator.partition, report.masks) == (46, prunable)
    parameters = dict(model.named_parameters())
    zeros = int((parameters["0.weight"] == 0).sum() + (parameters["4.weight"] == 0).sum())
    assert zeros == 46
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_the_model_moves_by_what_compensate_says(model):
    estimator = estimate(model)
    partition = estimator.partition
    before = partition.gather({n: p.detach().clone() for n, p in model.named_parameters()})
    report = prune_once(model, estimator, sparsity=0.5)
    deltas, wanted = compensate(estimator, before, report.masks)
    after = partition.gather(dict(model.named_parameters()))
    for name in partition.names:
        torch.testing.assert_close(after[name].detach(), before[name] + deltas[name])
    assert report.solves == wanted.solves
    assert report.predicted == wanted.predicted
    assert torch.equal(before["1"], after["1"].detach())  # another block than those pruned
    assert not torch.equal(before["0"][:, -1], after["0"][:, -1].detach())  # the bias column


def test_several_steps_with_the_full_q(model):
    estimator, masks, removed = estimate(model), None, []
    for sparsity in cubic(0.0, 0.9, 4):
        report = prune_once(model, estimator, sparsity=sparsity, masks=masks)
        if masks is not None:
            assert all(not (report.masks[n] & ~masks[n]).any() for n in masks)
        masks = report.masks
        removed.append(report.removed)
        for group in estimator.partition.prunable:
            weight = dict(model.named_parameters())[group.weight].reshape(group.rows, -1)
            assert (weight[~masks[group.name][:, : group.weight_columns]] == 0).all()
    assert removed == sorted(removed)
    assert removed[-1] == 59  # floor(0.9 * 66 + 1/2)


def test_a_step_on_survivors_starts_from_the_support_of_the_estimate(model):
    first = prune_once(model, estimate(model), sparsity=0.3)
    on_survivors = estimate(model, masks=first.masks)
    report = prune_once(model, on_survivors, sparsity=0.6)
    assert report.removed == 40  # floor(0.6 * 66 + 1/2)
    assert all(not (report.masks[n] & ~first.masks[n]).any() for n in first.masks)


def test_the_same_step_twice_gives_the_same_masks_and_weights(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = prune_once(model, estimate(model), sparsity=0.8)
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    again = prune_once(model, estimate(model), sparsity=0.8)
    assert all(torch.equal(first.masks[name], again.masks[name]) for name in first.masks)
    assert all(torch.equal(moved[name], value) for name, value in model.state_dict().items())


def test_prune_to_takes_masks_chosen_elsewhere(model):
    estimator = estimate(model)
    masks = {g.name: torch.ones(g.shape, dtype=torch.bool) for g in estimator.partition.prunable}
    masks["4"][:, 1] = False
    report = prune_to(model, estimator, masks=masks)
    assert report.removed == 4
    assert (model[4].weight[:, 1] == 0).all()


def test_an_error_leaves_the_model_unchanged(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FishLegError, match="needs `source`"):
        prune_once(model, estimate(model), sparsity=0.5, compensation="fisher")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_sparsity_zero_changes_nothing(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    report = prune_once(model, estimate(model), sparsity=0.0)
    assert (report.removed, report.saliency, report.predicted) == (0, 0.0, 0.0)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
