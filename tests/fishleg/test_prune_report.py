"""The report of a pruning step is a table, and a score of one's own decides what goes."""

import copy

import pytest
import torch
from torch import nn

import fishleg
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName, WrongType
from fishleg.parameters import partition_parameters
from fishleg.pruning import prune_once, saliency


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.frozen(self.body(self.words(x)).relu()).mean(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def estimator(network):
    partition = partition_parameters(network, keep=["head.weight"])
    tokens = torch.arange(40).reshape(8, 5) % 7
    source = fishleg.GradientSource(
        network, fishleg.Categorical(), partition, fishleg.Calibration(inputs=tokens)
    )
    fitted = fishleg.KFAC(partition, damping=1e-3)
    fitted.fit(source)
    return fitted


def test_the_table_has_each_weight_with_its_sparsity_and_cost_or_the_reason(network, estimator):
    report = prune_once(network, estimator, sparsity=0.5)
    table = str(report)
    assert "body" in table
    assert "6 x 4" in table
    assert "50.00 %" in table
    assert "no: frozen: requires_grad is False" in table
    assert "no: kept dense on request" in table
    assert {layer.name for layer in report.layers} == {"words", "body", "frozen", "head"}
    body = next(layer for layer in report.layers if layer.name == "body")
    assert (body.removed, body.size, body.sparsity, body.reason) == (12, 24, 0.5, None)


def test_the_costs_of_the_layers_sum_to_that_of_the_step(network, estimator):
    report = prune_once(network, estimator, sparsity=0.5)
    assert sum(layer.cost for layer in report.layers) == report.saliency > 0


def test_a_warning_stands_below_the_table(network, estimator):
    with torch.no_grad():
        network.body.weight[:2] = 0
    assert "Warning: 8 weights were exactly 0" in str(prune_once(network, estimator, sparsity=0.5))


def test_the_library_own_score_as_a_function_gives_its_masks(network, estimator):
    by_name = prune_once(copy.deepcopy(network), estimator, sparsity=0.5)
    by_function = prune_once(network, estimator, sparsity=0.5, selection=saliency)
    assert torch.equal(by_name.masks["body"], by_function.masks["body"])


def test_a_score_of_ones_own_decides_what_goes(network, estimator):
    def last_rows_first(estimator, weights):
        return {
            name: -torch.arange(w.numel(), dtype=w.dtype).reshape(w.shape)
            for name, w in weights.items()
        }

    report = prune_once(network, estimator, sparsity=0.5, selection=last_rows_first)
    mask = report.masks["body"][:, :4]
    assert mask[:3].all()
    assert not mask[3:].any()


def test_a_score_may_write_into_the_weights_that_it_is_given(network, estimator):
    def careless(estimator, weights):
        return {name: w.abs_() for name, w in weights.items()}

    before = network.body.weight.detach().clone()
    prune_once(network, estimator, sparsity=0.0, selection=careless)
    assert torch.equal(network.body.weight, before)


@pytest.mark.parametrize("scores", [None, {}, {"body": torch.ones(2)}, {"body": 1.0}], ids=repr)
def test_scores_of_another_shape_are_refused(network, estimator, scores):
    before = network.body.weight.detach().clone()
    with pytest.raises(ShapeMismatch, match=r"score: expected scores \(6, 5\) of group body"):
        prune_once(network, estimator, sparsity=0.5, selection=lambda e, w: scores)
    assert torch.equal(network.body.weight, before)


def test_a_selection_is_a_name_or_a_function(network, estimator):
    with pytest.raises(UnknownName, match="did you mean 'greedy'"):
        prune_once(network, estimator, sparsity=0.5, selection="gredy")
    with pytest.raises(WrongType, match="a name or a function"):
        prune_once(network, estimator, sparsity=0.5, selection=3)


# ------------------------------------------------------------------------------------- keep_zeros

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


def train(network, optimizer, steps=5):
    tokens = torch.arange(40).reshape(8, 5) % 7
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(tokens), torch.arange(8) % 3).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_survive_a_training_loop(network, name):
    optimizer = OPTIMIZERS[name](network.parameters())
    train(network, optimizer)  # so that the optimiser's state moves them
    with torch.no_grad():
        network.body.weight[0] = 0
        network.head.weight[0, 1] = 0
    removed = {"body": network.body.weight == 0, "head": network.head.weight == 0}
    before = network.body.weight.detach().clone()
    fishleg.keep_zeros(optimizer, network)
    train(network, optimizer)
    for layer, gone in removed.items():
        weight = getattr(network, layer).weight
        assert (weight[gone] == 0).all()
        assert (weight[~gone] != 0).all()
    assert not torch.equal(network.body.weight, before)


def test_zeros_train_again_once_the_handle_is_removed(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    with torch.no_grad():
        network.head.weight[0] = 0
    handle = fishleg.keep_zeros(optimizer, network)
    train(network, optimizer)
    assert (network.head.weight[0] == 0).all()
    handle.remove()
    train(network, optimizer)
    assert (network.head.weight[0] != 0).any()


def test_zeros_of_weights_that_are_prunable_on_request_are_kept_on_request(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with torch.no_grad():
        network.words.weight[0] = 0
    fishleg.keep_zeros(optimizer, network, also_prune=["words.weight"])
    train(network, optimizer)
    assert (network.words.weight[0] == 0).all()


def test_a_call_that_would_keep_nothing_is_an_error(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(FishLegError, match="expected zeros among the prunable weights"):
        fishleg.keep_zeros(optimizer, network)
    with torch.no_grad():
        network.head.weight[0] = 0
    with pytest.raises(FishLegError, match="moves no weight with zeros"):
        fishleg.keep_zeros(torch.optim.SGD(Network().parameters(), lr=0.1), network)
    with pytest.raises(WrongType, match="optimizer: expected"):
        fishleg.keep_zeros(network, optimizer)
