"""Greedy removal, against a search through all choices on rows of a few weights, in float64."""

from functools import partial

import pytest
import torch

from fishleg.calibration import Calibration
from fishleg.errors import NotPositiveDefinite, UnknownName
from fishleg.estimators import ESTIMATORS, KFAC, DiagonalFisher, FishLeg, LayerHessian
from fishleg.pruning import dense_masks, greedy_saliency, prune_once, removal_count
from fishleg.pruning.layerwise import GreedyRemoval
from tests.fishleg.networks import mixed_source, source_of
from tests.reference import constrained_minimiser, random_spd

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ROWS, COLUMNS = 3, 6


def loss(hessian: torch.Tensor, weights: torch.Tensor, removed: list[int] | torch.Tensor) -> float:
    """The least 1/2 d^T H d of any d that removes the weights `removed` of one row."""
    gone = torch.zeros(len(weights), dtype=torch.bool)
    gone[removed] = True
    move = constrained_minimiser(hessian, weights, gone)
    return float(0.5 * move @ hessian @ move)


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.randn(
        ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return random_spd(COLUMNS, seed=3), weights


def removal_of(hessian: torch.Tensor, weights: torch.Tensor) -> GreedyRemoval:
    return GreedyRemoval(weights, torch.linalg.inv(hessian).repeat(len(weights), 1, 1))


def test_each_removal_is_the_one_of_least_loss(rows):
    hessian, weights = rows
    removal = removal_of(hessian, weights)
    gone: list[list[int]] = [[] for _ in range(ROWS)]
    before = [0.0] * ROWS
    for _ in range(COLUMNS):
        waiting = removal.weights != 0
        costs = removal.costs().masked_fill(~waiting, torch.inf)
        for row in range(ROWS):
            tried = {
                one: loss(hessian, weights[row], [*gone[row], one]) - before[row]
                for one in range(COLUMNS)
                if one not in gone[row]
            }
            for one, increase in tried.items():
                assert float(costs[row, one]) == pytest.approx(increase, rel=1e-9)
            assert int(costs[row].argmin()) == min(tried, key=tried.get)
            gone[row].append(int(costs[row].argmin()))
            before[row] += tried[gone[row][-1]]
        removal.remove(costs.argmin(dim=1))
        for row in range(ROWS):
            mask = torch.zeros(COLUMNS, dtype=torch.bool)
            mask[gone[row]] = True
            move = constrained_minimiser(hessian, weights[row], mask)
            torch.testing.assert_close(removal.weights[row], weights[row] + move, **EXACT)


def test_costs_rise_along_each_rows_order(rows):
    hessian, weights = rows
    every = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    found = removal_of(hessian, weights).run(every)
    for row in range(ROWS):
        gone: list[int] = []
        largest = 0.0
        for position in found[row].argsort().tolist():
            increase = loss(hessian, weights[row], [*gone, position]) - loss(
                hessian, weights[row], gone
            )
            largest = max(largest, increase)
            assert float(found[row, position]) == pytest.approx(largest, rel=1e-9)
            gone.append(position)
        assert (found[row].sort().values.diff() > 0).all()


def test_what_must_stay_stays(rows):
    hessian, weights = rows
    removable = (torch.arange(COLUMNS) < COLUMNS - 1).repeat(ROWS, 1)
    removable[0, 2] = False
    removal = removal_of(hessian, weights)
    found = removal.run(removable)
    assert (found[~removable] == 0).all()
    assert ((removal.weights != 0) == ~removable).all()


def test_an_exhausted_inverse_is_an_error():
    removal = GreedyRemoval(torch.ones(1, 2), torch.tensor([[[1.0, 1.0], [1.0, 1.0]]]))
    with pytest.raises(NotPositiveDefinite, match="rounding"):
        removal.run(torch.ones(1, 2, dtype=torch.bool))


# ------------------------------------------------------------------------------- the surgeon


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 2, groups=2), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).double()
    inputs = torch.randn(40, 2, 3, 3, dtype=torch.float64)
    return model, source_of(model, Calibration(inputs=inputs))


def fitted(kind, source):
    estimator = kind(source.partition, damping=0.01)
    estimator.fit(source)
    return estimator


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_the_surgeon_takes_the_greedy_order(network, distribution):
    model, source = network
    estimator = fitted(LayerHessian, source)
    weights = source.partition.gather(
        {name: value.detach().clone() for name, value in model.named_parameters()}
    )
    masks = dense_masks(source.partition)
    order = greedy_saliency(estimator, weights, masks)
    one_by_one = greedy_saliency(estimator, weights, masks, memory_bytes=1)
    report = prune_once(
        model,
        estimator,
        sparsity=0.6,
        selection="greedy",
        distribution=distribution,
        tolerance=1e-12,
    )
    assert report.removed == removal_count(report.prunable, 0.6)
    after = source.partition.gather(dict(model.named_parameters()))
    for name, matrix in weights.items():
        torch.testing.assert_close(one_by_one[name], order[name], **EXACT)
        block = estimator.block(name)
        for row, mask in enumerate(report.masks[name]):
            hessian = torch.linalg.inv(block.of_rows(torch.tensor([row]))[0])
            move = constrained_minimiser(hessian, matrix[row], ~mask)
            torch.testing.assert_close(after[name][row], matrix[row] + move, rtol=0, atol=1e-9)
            if not mask.all():  # what goes is the beginning of the row's order
                assert order[name][row][~mask].max() < order[name][row][mask].min()


def test_the_greedy_choice_costs_less_than_the_weights_own(network):
    model, source = network
    start = {name: value.clone() for name, value in model.state_dict().items()}
    estimator = fitted(LayerHessian, source)
    found = {}
    for selection in ("single", "greedy"):
        model.load_state_dict(start)
        options = {"selection": selection, "sparsity": 0.6, "tolerance": 1e-10}
        found[selection] = prune_once(model, estimator, **options).predicted
    assert found["greedy"] < found["single"]


def test_without_coupling_the_greedy_order_is_the_single_one(network):
    model, source = network
    estimator = fitted(DiagonalFisher, source)
    reports = [
        prune_once(model, estimator, sparsity=0.5, selection=selection, compensation="none")
        for selection in ("greedy", "single")
    ]
    for name, mask in reports[0].masks.items():
        assert torch.equal(mask, reports[1].masks[name])


@pytest.mark.parametrize("fit", ["dense", "constrained", "masked"])
def test_rows_that_q_couples_lose_their_weights_as_if_the_others_lost_no_more(network, fit):
    model, source = network
    masks = dense_masks(source.partition)
    if fit != "dense":
        masks["2"][0, 3:8] = masks["2"][2, 1] = False
        with torch.no_grad():
            model[2].weight.mul_(masks["2"][:, :-1])
    kind = partial(FishLeg, structure="full") if fit == "masked" else KFAC
    estimator = fitted(kind, source)
    if fit == "masked":
        estimator.refine(source, masks)
    weights = source.partition.gather(
        {name: value.detach().clone() for name, value in model.named_parameters()}
    )
    found = greedy_saliency(estimator, weights, masks, memory_bytes=2 * 17 * 17 * 8)["2"]
    matrix, kept = weights["2"], masks["2"].flatten()
    inside = kept if fit == "masked" else torch.ones_like(kept)
    hessian = torch.linalg.inv(estimator.block("2").dense()[inside][:, inside])
    for row in range(3):
        here = torch.zeros_like(matrix, dtype=torch.bool)
        here[row, :-1] = masks["2"][row, :-1]
        order = found.masked_fill(~here, torch.inf).flatten().argsort()[: int(here.sum())]
        gone = ~kept
        largest = before = 0.0
        for position in order.tolist():
            gone[position] = True
            total = loss(hessian, matrix.flatten()[inside], gone[inside])
            largest, before = max(largest, total - before), total
            assert float(found.flatten()[position]) == pytest.approx(largest, rel=1e-7)
    assert (found[:, :-1][~masks["2"][:, :-1]] == 0).all()


def test_an_unknown_selection_is_named(network):
    model, source = network
    with pytest.raises(UnknownName, match="selection"):
        prune_once(model, fitted(LayerHessian, source), sparsity=0.5, selection="gready")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_greedy_goes_with_every_estimator(name):
    """As the catalogue says of `selection`."""
    data = mixed_source()
    model = data.model
    estimator = ESTIMATORS[name](data.partition, damping=0.01)
    estimator.fit(data)
    prunable = [group.weight for group in data.partition.prunable]
    size = sum(model.get_parameter(weight).numel() for weight in prunable)
    prune_once(model, estimator, sparsity=0.5, selection="greedy")
    zeros = sum(int((model.get_parameter(weight) == 0).sum()) for weight in prunable)
    assert zeros == removal_count(size, 0.5)
