"""Settling: the best point between two states of a model."""

import copy
from math import nan

import pytest
import torch
from torch import nn

from fishleg.pruning import RefinementReport, reestimate_norms, search_line, search_norms


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


def test_norms_move_to_the_best_point_between_their_statistics_and_those_of_the_batches() -> None:
    model, _ = states()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    again = copy.deepcopy(model)
    reestimate_norms(again, [inputs])
    wanted = torch.lerp(before["1.running_mean"], again[1].running_mean, 0.75)
    kept = search_norms(model, [inputs], lambda m: (m[1].running_mean - wanted).abs().max().item())
    assert kept == 0.75
    torch.testing.assert_close(model[1].running_mean, wanted)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[1].weight, before["1.weight"])


def test_norms_stay_where_their_statistics_are_the_best() -> None:
    model, _ = states()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def moved(model: nn.Module) -> float:
        return (model[1].running_var - before["1.running_var"]).abs().max().item()

    assert search_norms(model, [torch.randn(50, 3, dtype=torch.float64)], moved) == 0.0
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_model_without_norms_needs_no_search() -> None:
    def never(_: nn.Module) -> float:
        raise AssertionError

    assert search_norms(nn.Linear(3, 2), [torch.randn(5, 3)], never) == 0.0
