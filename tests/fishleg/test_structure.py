"""What uses a parameter is read off the graph of each batch, not off one trial."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError
from fishleg.estimators import KFAC
from fishleg.gradients.graph import count_uses
from fishleg.gradients.source import GradientSource
from tests.fishleg.networks import CLASSES, shake, source_of
from tests.fishleg.test_gradients import EXACT, by_loop, flat


class Gated(nn.Module):
    """A layer, and behind a gate its weight once more.

    Args:
        by: "product" computes what is behind the gate always, "branch" where the gate is not 0,
            "flag" where it was told to, and "sample" where the first sample's first entry is
            positive.
    """

    def __init__(self, by):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(4, CLASSES)
        self.by, self.open = by, False

    def forward(self, x):
        hidden = self.layer(x).tanh()
        again = {
            "product": lambda: True,
            "branch": lambda: bool(self.gate != 0),
            "flag": lambda: self.open,
            "sample": lambda: bool(x[0, 0] > 0),
        }
        if again[self.by]():
            gate = self.gate if self.by in ("product", "branch") else 1.0
            hidden = hidden + gate * functional.linear(x, self.layer.weight).sin()
        return self.head(hidden)


def gated_source(by: str, **options) -> GradientSource:
    torch.manual_seed(0)
    model = shake(Gated(by))
    with torch.no_grad():
        model.gate.zero_()
    data = Calibration(inputs=torch.randn(11, 4).double(), targets=torch.arange(11) % CLASSES)
    return source_of(model, data, labels="empirical", batch_size=4, **options)


def open_gate(model: Gated) -> None:
    model.open = True
    with torch.no_grad():
        model.gate.fill_(1.5)


def signalled(source: GradientSource) -> dict[str, torch.Tensor]:
    """Return all gradients that layer signals tell of, by group."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in source.layers():
        for name, signals in batch.items():
            if signals is not None:
                g = signals.output_gradients.mT @ signals.activations.unsqueeze(1)
                found.setdefault(name, []).append(g.flatten(2, 3).flatten(0, 1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def factored(source: GradientSource) -> torch.Tensor:
    """Return all gradients over all groups, from `factored`."""
    rows = []
    for batch in source.factored():
        parts = []
        for one in batch.values():
            if not isinstance(one, torch.Tensor):
                one = one.output_gradients[:, 0, 0].mT @ one.activations[:, 0]
            parts.append(one.flatten(1))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("by", ["product", "branch", "flag", "sample"])
def test_a_gate_that_opens_later_does_not_change_what_is_right(by):
    source = gated_source(by)
    torch.testing.assert_close(flat(source), by_loop(source), **EXACT)
    open_gate(source.model)
    expected = by_loop(source)
    torch.testing.assert_close(flat(source), expected, **EXACT)
    torch.testing.assert_close(factored(source), expected, **EXACT)
    torch.testing.assert_close(flat(source.over(source.calibration, seed=1)), expected, **EXACT)
    rest = torch.cat([batch["layer"] for batch in source.after(1).stream(["layer"])])
    torch.testing.assert_close(rest, source.hold(["layer"])["layer"][len(rest) * -1 :], **EXACT)


@pytest.mark.parametrize("by", ["product", "branch"])
def test_layer_signals_are_none_once_the_layer_tells_less_than_its_gradient(by):
    source = gated_source(by)
    assert (source.conv_groups("layer") is None) == (by == "product")
    open_gate(source.model)
    assert source.conv_groups("layer") is None
    held = source.hold(["head"])
    found = signalled(source)
    assert found.keys() == {"head"}
    torch.testing.assert_close(found["head"], held["head"], **EXACT)


@pytest.mark.parametrize("by", ["flag", "sample"])
def test_signals_that_become_less_than_the_gradient_are_refused_and_the_next_fit_is_right(by):
    source = gated_source(by)
    estimator = KFAC(source.partition, damping=0.1)
    if by == "flag":
        estimator.fit(source)
        source.model.open = True
    if by == "sample":
        source.calibration.inputs[0, 0] = -1.0
        assert (source.calibration.inputs[:, 0] > 0).any()
    with pytest.raises(FishLegError, match="layer.weight: in samples .* Fit again"):
        estimator.fit(source)
    estimator.fit(source)
    assert signalled(source).keys() == {"head"}


def test_a_call_whose_output_is_dropped_is_no_use():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x):
            self.layer(x)
            return functional.linear(x, self.layer.weight, self.layer.bias)

    torch.manual_seed(0)
    data = Calibration(inputs=torch.randn(5, 4).double(), targets=torch.arange(5) % CLASSES)
    source = source_of(shake(Dropped()), data, labels="empirical")
    torch.testing.assert_close(flat(source), by_loop(source), **EXACT)
    assert {name for name, _ in source.report()} == {"layer.weight", "layer.bias"}


def test_a_hook_that_returns_another_output_stays_right():
    torch.manual_seed(0)
    model = shake(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)))
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    data = Calibration(inputs=torch.randn(5, 4).double(), targets=torch.arange(5) % CLASSES)
    source = source_of(model, data, labels="empirical")
    torch.testing.assert_close(flat(source), by_loop(source), **EXACT)


def test_uses_are_counted_through_views_and_casts():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        once = layer(x)
        twice = once + 0 * (x @ layer.weight.t())  # converted once for both
    assert count_uses(once).of(layer.weight) == 1
    assert count_uses(twice).of(layer.weight) == 2
    assert count_uses(layer(layer(x))).of(layer.weight) == 2
    assert count_uses(layer.weight.t()).of(layer.weight) == 1
    assert count_uses(x * layer.bias).of(layer.weight) == 0


def test_a_custom_function_may_use_what_it_is_given_twice():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g @ weight, g.T @ x

    layer = nn.Linear(4, 4)
    assert count_uses(Product.apply(torch.randn(2, 4), layer.weight)).of(layer.weight) > 1


def test_outputs_that_are_random_in_evaluation_mode_are_told_from_samples_that_interact():
    model = nn.Sequential(nn.Linear(4, CLASSES))
    model.register_forward_hook(lambda m, args, out: functional.dropout(out, 0.5, training=True))
    source = source_of(model, Calibration(inputs=torch.randn(6, 4)))
    with pytest.raises(FishLegError, match="random in evaluation"):
        next(source.stream())


def test_statistics_over_the_batch_are_samples_that_interact():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    source = source_of(Centred(4, CLASSES), Calibration(inputs=torch.randn(6, 4)))
    with pytest.raises(FishLegError, match="samples of a batch interact"):
        next(source.stream())
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(FishLegError, match="interact in 1, batch norm without.*comes alone"):
        next(source_of(norm, Calibration(inputs=torch.randn(6, 4))).stream())
