"""Settling: the best point between two states of a model."""

import copy
from math import nan

import pytest
import torch
from torch import nn

from fishleg.pruning import RefinementReport, search_line


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

    report = search_line(model, before, distance)
    assert report.kept == 0.5
    assert abs(report.begin - 1.9) < 1e-12
    assert abs(report.end - 2.1) < 1e-12
    assert abs(report.divergence - 0.1) < 1e-12
    assert report.warnings == ()
    after = model.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(after[name], before[name] + 2)
    assert after["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 4  # whole numbers


def test_the_ends_are_exact_and_the_first_of_equals_wins() -> None:
    model, before = states()
    end = copy.deepcopy(model.state_dict())
    assert search_line(model, before, lambda m: -m[0].weight.sum().item()).kept == 1.0
    assert all(torch.equal(one, end[name]) for name, one in model.state_dict().items())
    found = search_line(model, before, lambda _: 7.0)
    assert (found.kept, found.divergence) == (0.0, 7.0)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_refinement_of_which_nothing_is_kept_says_so() -> None:
    model, before = states()
    found = search_line(
        model, before, lambda m: m[0].weight.sum().item() - before["0.weight"].sum()
    )
    (warning,) = found.warnings
    assert "Nothing of the refinement is kept" in warning
    assert "0 nats before, 24 after" in warning


def test_a_refinement_that_ends_worse_than_it_began_says_so() -> None:
    found = RefinementReport(kept=1.0, begin=0.25, end=0.5, divergence=0.5, held_out=False)
    assert "ended further from the dense network" in found.warnings[0]
    better = RefinementReport(kept=1.0, begin=0.25, end=0.25, divergence=0.25, held_out=False)
    assert better.warnings == ()
    lost = RefinementReport(kept=1.0, begin=0.25, end=nan, divergence=nan, held_out=False)
    assert lost.warnings


def test_settling_needs_both_ends() -> None:
    model, before = states()
    with pytest.raises(ValueError, match="expected 0 and 1 among them"):
        search_line(model, before, lambda _: 1.0, fractions=(0.5, 1.0))
