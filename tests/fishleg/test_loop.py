"""Per-sample gradients where `torch.func.vmap` cannot go: a loop over samples, slower and right."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError
from fishleg.estimators import KFAC
from fishleg.fisher import fisher_vector_product
from tests.fishleg.networks import CLASSES, reference_groups, shake, source_of
from tests.fishleg.test_gradients import EXACT, assert_matches_loop, by_loop, flat
from tests.reference import dense_fisher, flat_vector


class Chain(nn.Module):
    """Modules, and a function of them and the input."""

    def __init__(self, run, *modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.run = run

    def forward(self, x):
        return self.run(x, *self.parts)


def last(x, recurrent, head):
    return head(recurrent(x)[0][:, -1])


def packed(x, recurrent, head):
    lengths = torch.tensor([4] * len(x))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return head(recurrent(packed)[1][-1])


def experts(x, first, second, head):
    """Rows of positive first entry go to one layer, the others to another."""
    out = torch.zeros_like(x)
    for chosen, expert in ((x[:, 0] > 0, first), (x[:, 0] <= 0, second)):
        rows = chosen.nonzero()[:, 0]
        out = out.index_add(0, rows, expert(x[rows]))
    return head(out)


def tokens(x, embedding, head):
    return head(embedding(x).mean(1).tanh())


def recomputed(x, layer, head):
    return head(checkpoint(lambda h: layer(h).tanh(), x, use_reentrant=False))


class Doubled(torch.autograd.Function):
    """A function that vmap has no rule for."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


SEQUENCES, VECTORS = (5, 4, 3), (7, 3)
CASES = {
    "gru": (last, [nn.GRU(3, 4, batch_first=True), nn.Linear(4, CLASSES)], SEQUENCES),
    "rnn": (last, [nn.RNN(3, 4, 2, batch_first=True), nn.Linear(4, CLASSES)], SEQUENCES),
    "lstm": (last, [nn.LSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)], SEQUENCES),
    "both ways": (
        last,
        [nn.GRU(3, 2, batch_first=True, bidirectional=True), nn.Linear(4, CLASSES)],
        SEQUENCES,
    ),
    "packed": (packed, [nn.GRU(3, 4, batch_first=True), nn.Linear(4, CLASSES)], SEQUENCES),
    "experts": (experts, [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, CLASSES)], VECTORS),
    "checkpoint": (recomputed, [nn.Linear(3, 3), nn.Linear(3, CLASSES)], VECTORS),
    "sparse": (tokens, [nn.Embedding(6, 3, sparse=True), nn.Linear(3, CLASSES)], None),
    "bag": (
        lambda x, bag, head: head(bag(x).tanh()),
        [nn.EmbeddingBag(6, 3, mode="mean"), nn.Linear(3, CLASSES)],
        None,
    ),
    "function": (
        lambda x, layer, head: head(Doubled.apply(x @ layer.weight).tanh()),
        [nn.Linear(3, 3), nn.Linear(3, CLASSES)],
        VECTORS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_loop_over_samples(case):
    run, modules, shape = CASES[case]
    torch.manual_seed(0)
    inputs = torch.randint(6, (7, 4)) if shape is None else torch.randn(shape).double()
    assert_matches_loop(shake(Chain(run, *modules)), inputs)


def branching() -> Chain:
    """A network that looks at all its samples to decide which layer they go through."""
    return shake(Chain(lambda x, a, b: a(x) if x.sum() > 0 else b(x).tanh(), *two_heads()))


def two_heads() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)


def test_a_network_that_decides_by_the_batch_is_given_one_sample_at_a_time():
    torch.manual_seed(0)
    model, inputs = branching(), torch.randn(9, 3).double()
    source = source_of(
        model, Calibration(inputs=inputs, targets=torch.arange(9) % CLASSES), labels="empirical"
    )
    torch.testing.assert_close(flat(source), by_loop(source), **EXACT)
    groups = reference_groups(source.partition)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = dense_fisher(model, inputs, groups) @ flat_vector(v, groups)
    product = flat_vector(fisher_vector_product(source, v), groups)
    torch.testing.assert_close(product, expected, **EXACT)
    assert "one sample at a time" in dict(source.report())["all"]


def test_the_loop_is_said_once_and_stands_in_the_report(caplog):
    run, modules, _ = CASES["gru"]
    source = source_of(shake(Chain(run, *modules)), Calibration(inputs=torch.randn(9, 4, 3)))
    source.model.float()
    with caplog.at_level(logging.WARNING):
        for batch_size in (2, 4):
            other = source.over(source.calibration, seed=1)
            other.batch_size = batch_size
            flat(other)
    assert len(caplog.records) == 1
    report = dict(source.report())
    assert report["parts.0.weight_ih_l0"].startswith("loop over samples, since torch.func.vmap")
    assert "parts.1.weight" not in report  # the head has a hook


def test_an_estimator_fits_a_recurrent_network():
    run, modules, _ = CASES["gru"]
    source = source_of(
        shake(Chain(run, *modules)), Calibration(inputs=torch.randn(6, 4, 3).double())
    )
    estimator = KFAC(source.partition, damping=0.1)
    estimator.fit(source)
    assert all(value.isfinite().all() for value in estimator.diagonal().values())


def test_an_error_of_the_models_own_comes_through():
    def fails(x, layer, head):
        if len(x) < 2:
            raise KeyError("no vocabulary")
        return head(layer(x) + x @ layer.weight)

    source = source_of(
        Chain(fails, nn.Linear(3, 3), nn.Linear(3, CLASSES)), Calibration(inputs=torch.randn(4, 3))
    )
    with pytest.raises(FishLegError, match="no vocabulary"):
        next(source.stream())


def test_a_reentrant_checkpoint_is_refused_in_plain_words():
    def reentrant(x, layer, head):
        hidden = checkpoint(layer, x.requires_grad_(), use_reentrant=True)
        return head(hidden)

    model = Chain(reentrant, nn.Linear(3, 3), nn.Linear(3, CLASSES))
    source = source_of(model, Calibration(inputs=torch.randn(4, 3)))
    with pytest.raises(FishLegError, match="use_reentrant=False"):
        next(source.stream())
