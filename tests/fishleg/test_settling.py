"""Settling: the best point between two states of a model."""

import copy

import torch
from torch import nn

from fishleg.pruning import settle


def states() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(4)
    return model, before


def test_the_best_fraction_is_taken_and_everything_moves_to_it() -> None:
    model, before = states()
    weight = before["0.weight"]

    def distance(model: nn.Module) -> float:
        return (model[0].weight - (weight + 1.9)).abs().max().item()

    fraction, divergence = settle(model, before, distance)
    assert fraction == 0.5
    assert abs(divergence - 0.1) < 1e-12
    after = model.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(after[name], before[name] + 2)
    assert after["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 4  # whole numbers


def test_the_ends_are_exact_and_the_first_of_equals_wins() -> None:
    model, before = states()
    end = copy.deepcopy(model.state_dict())
    assert settle(model, before, lambda m: -m[0].weight.sum().item())[0] == 1.0
    assert all(torch.equal(one, end[name]) for name, one in model.state_dict().items())
    assert settle(model, before, lambda _: 7.0) == (0.0, 7.0)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
