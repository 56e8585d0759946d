"""F v of networks that forward mode, or a differentiable backward pass, is not to be had for."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fishleg import Calibration, fisher_vector_product
from fishleg.errors import FishLegError
from fishleg.modes import evaluating
from tests.fishleg.networks import CLASSES, reference_groups, shake, source_of
from tests.reference import dense_fisher, flat_vector

N = 4
FORWARD, DOUBLE, SINGLE = 0, 1, 2
"""How many ways have to be given up."""


class Sine(torch.autograd.Function):
    """sin(x), without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class OnceSine(Sine):
    """The same; its backward pass is not for differentiating, and torch does not always say so."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.beside = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.body(x)) + self.beside(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Embedded(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = parametrizations.weight_norm(nn.Linear(4, CLASSES))

    def forward(self, tokens):
        x = self.body(tokens)
        return self.head(x if x.ndim == 2 else x.tanh().sum(1))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def vectors() -> torch.Tensor:
    return torch.randn(N, 4, dtype=torch.float64)


def series() -> torch.Tensor:
    return torch.randn(N, 3, 4, dtype=torch.float64)


def tokens() -> torch.Tensor:
    return torch.randint(7, (N, 3))


NETWORKS = {
    "weight norm": (lambda: Normed(parametrizations.weight_norm), vectors, DOUBLE),
    "spectral norm": (lambda: Normed(parametrizations.spectral_norm), vectors, FORWARD),
    "orthogonal": (lambda: Normed(parametrizations.orthogonal), vectors, FORWARD),
    "checkpoint": (
        lambda: Custom(lambda x: checkpoint(torch.sin, x, use_reentrant=False)),
        vectors,
        DOUBLE,
    ),
    "custom function": (lambda: Custom(Sine.apply), vectors, DOUBLE),
    "once differentiable": (lambda: Custom(OnceSine.apply), vectors, SINGLE),
    "embedding bag": (lambda: Embedded(nn.EmbeddingBag(7, 4)), tokens, SINGLE),
    "sparse embedding": (lambda: Embedded(nn.Embedding(7, 4, sparse=True)), tokens, SINGLE),
    "lstm": (lambda: Recurrent(nn.LSTM), series, FORWARD),
    "gru": (lambda: Recurrent(nn.GRU), series, FORWARD),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_the_dense_ones_and_a_slower_way_is_said_once(name, caplog):
    make, draw, given_up = NETWORKS[name]
    torch.manual_seed(0)
    model = shake(make())
    inputs = draw()
    source = source_of(model, Calibration(inputs=inputs), batch_size=3)
    groups = reference_groups(source.partition)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = dense_fisher(model, inputs, groups) @ flat_vector(v, groups)
    with caplog.at_level(logging.WARNING, "fishleg"):
        for _ in range(2):
            found = flat_vector(fisher_vector_product(source, v), groups)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(caplog.records) == given_up
    assert all("slower" in record.getMessage() for record in caplog.records)
    assert all(p.grad is None for p in model.parameters())


def test_a_float32_lstm_has_products_as_well():
    torch.manual_seed(0)
    model = shake(Recurrent(nn.LSTM), dtype=torch.float32)
    inputs = series().float()
    source = source_of(model, Calibration(inputs=inputs))
    groups = reference_groups(source.partition)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    fisher = dense_fisher(copy.deepcopy(model).double(), inputs.double(), groups)
    exact = fisher @ flat_vector(v, groups).double()
    found = flat_vector(fisher_vector_product(source, v), groups)
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_recurrent_layers_do_without_cudnn_where_there_is_a_gpu(monkeypatch):
    """It raises an error at a backward pass in evaluation mode."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for model, enabled in ((Recurrent(nn.LSTM), False), (nn.Linear(2, 2), True)):
        with evaluating(model):
            assert torch.backends.cudnn.enabled == enabled
        assert torch.backends.cudnn.enabled


def test_a_network_without_any_derivative_is_refused_in_plain_words():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            raise ValueError("nothing is known of it")

    source = source_of(shake(Custom(Broken.apply)), Calibration(inputs=vectors()))
    v = {"body.weight": torch.ones(4, 4, dtype=torch.float64)}
    with pytest.raises(FishLegError, match="no derivative.*nothing is known.*use_reentrant=False"):
        fisher_vector_product(source, v)


def test_an_error_of_the_model_is_not_taken_for_a_missing_derivative(caplog):
    source = source_of(shake(Custom(torch.sin)), Calibration(inputs=vectors()[:, :3]))
    v = {"body.weight": torch.ones(4, 4, dtype=torch.float64)}
    with pytest.raises(FishLegError, match=r"Custom raised RuntimeError.*model\(float64\[4, 3\]\)"):
        fisher_vector_product(source, v)
    assert not caplog.records
