"""Curvature of half-precision networks is as good as that of the same weights in float32."""

import copy

import pytest
import torch
from torch import nn

from fishleg.calibration import Calibration
from fishleg.estimators import KFAC, OBS, DiagonalFisher, FishLeg
from fishleg.fisher import fisher_vector_product
from fishleg.gradients.memory import held_bytes, pass_bytes
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.optim import FishLeg as FishLegOptimiser
from fishleg.precision import compute_dtype, recast
from fishleg.pruning import prune_once
from tests.fishleg.networks import CLASSES, Attention, Mixed, shake, source_of
from tests.fishleg.test_gradients import flat

HALF = [torch.bfloat16, torch.float16]


class Normed(nn.Module):
    """Matrices in one dtype, norms in float32; what each is given is converted to its own."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(4, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES, dtype=dtype)

    def forward(self, x):
        hidden = self.norm(self.first(x.to(self.first.weight.dtype)).to(self.norm.weight.dtype))
        return self.head(hidden.tanh().to(self.head.weight.dtype))


class Autocast(nn.Module):
    """A network under an autocast of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, CLASSES))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


class Stubborn(Autocast):
    """A network whose code converts to half precision, and so cannot be computed in float32."""

    def forward(self, x):
        return self.net(x.bfloat16())


def pair(model: nn.Module, inputs: torch.Tensor, dtype: torch.dtype, **options):
    """Return a source over a network, and over the same (rounded) weights in float32."""
    targets = torch.arange(len(inputs)) % CLASSES
    wide = copy.deepcopy(model).float()
    given = inputs.to(dtype) if inputs.is_floating_point() else inputs
    data = Calibration(inputs=given, targets=targets)
    same = inputs if not inputs.is_floating_point() else given.float()
    return source_of(model, data, **options), source_of(
        wide, Calibration(inputs=same, targets=targets), **options
    )


def case(kind: str, dtype: torch.dtype, **options):
    torch.manual_seed(0)
    if kind == "mixed":
        return pair(Normed(dtype), torch.randn(40, 4), torch.float32, **options)
    if kind == "attention":
        model = shake(Attention(batch_first=True), dtype=torch.float32).to(dtype)
        return pair(model, torch.randint(7, (20, 5)), dtype, **options)
    model = shake(Mixed(), dtype=torch.float32).to(dtype)
    return pair(model, torch.randn(40, 2, 5, 5), dtype, **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["half", "mixed", "attention"])
def test_gradients_and_products_are_those_of_float32(kind, dtype):
    narrow, wide = case(kind, dtype, labels="matched")
    found = flat(narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, flat(wide), rtol=0, atol=0)
    v = {name: torch.randn(p.shape) for name, p in wide.model.named_parameters()}
    products = fisher_vector_product(narrow, v)
    for name, expected in fisher_vector_product(wide, v).items():
        torch.testing.assert_close(products[name], expected, rtol=0, atol=0)
    assert {p.dtype for p in narrow.model.parameters()} >= {dtype}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("estimator", [DiagonalFisher, KFAC, OBS, FishLeg])
def test_a_pruned_network_is_that_of_float32_rounded_once(estimator, dtype):
    pruned = []
    for source in case("half", dtype):
        fitted = estimator(source.partition, damping=1e-3)
        fitted.fit(source)
        assert {t.dtype for b in fitted.blocks().values() for t in b.tensors().values()} == {
            torch.float32
        }
        prune_once(source.model, fitted, sparsity=0.5)
        pruned.append(source.model)
    narrow, wide = pruned
    for name, p in narrow.named_parameters():
        assert p.dtype == dtype
        assert torch.equal(p, wide.get_parameter(name).to(dtype)), name


def test_pruning_across_the_network_is_that_of_float32():
    pruned = []
    for source in case("half", torch.bfloat16):
        fitted = DiagonalFisher(source.partition, damping=1e-2)
        fitted.fit(source)
        prune_once(source.model, fitted, sparsity=0.5, compensation="fisher", source=source)
        pruned.append(source.model)
    narrow, wide = pruned
    for name, p in narrow.named_parameters():
        assert torch.equal(p, wide.get_parameter(name).bfloat16()), name


@pytest.mark.parametrize("model", [Autocast, Stubborn])
def test_what_a_network_rounds_by_itself_is_rounded_once(model, caplog):
    torch.manual_seed(0)
    network = model()
    if model is Stubborn:
        network.bfloat16()
    wide = Autocast()
    wide.load_state_dict(network.state_dict())
    inputs = torch.randn(200, 4)
    found = source_of(network, Calibration(inputs=inputs), labels="enumerated")
    expected = source_of(wide.net, Calibration(inputs=inputs), labels="enumerated")
    rows, exact = flat(found), flat(expected)
    assert rows.dtype == torch.float32
    trace, wanted = rows.square().sum(0), exact.square().sum(0)
    # activations have 8 bits; a diagonal that was summed in them would be off by tenths
    assert (trace - wanted).norm() < 0.01 * wanted.norm()
    assert ("cannot be computed in float32" in caplog.text) == (model is Stubborn)


def test_an_autocast_around_the_caller_changes_nothing():
    _, source = case("half", torch.bfloat16)
    expected = DiagonalFisher(source.partition, damping=1e-3)
    expected.fit(source)
    again = KFAC(source.partition, damping=1e-3)
    again.fit(source)
    with torch.autocast("cpu", torch.bfloat16):
        rows = flat(source)
        under = KFAC(source.partition, damping=1e-3)
        under.fit(source)
    torch.testing.assert_close(rows, flat(source), rtol=0, atol=0)
    for name, value in again.diagonal().items():
        torch.testing.assert_close(under.diagonal()[name], value, rtol=0, atol=0)


def test_rounding_is_not_taken_for_samples_that_interact():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Flatten(), nn.Linear(96, CLASSES))
    source = source_of(
        model.bfloat16(), Calibration(inputs=torch.randn(20, 3, 32).bfloat16()), batch_size=16
    )
    assert flat(source).isfinite().all()


def test_the_optimiser_keeps_its_state_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).bfloat16()
    optimizer = FishLegOptimiser(model, Categorical(), lr=0.1, update_every=1)
    inputs, targets = torch.randn(30, 4).bfloat16(), torch.arange(30) % CLASSES
    for _ in range(3):
        optimizer.observe(inputs)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs).float(), targets).backward()
        optimizer.step()
    again = FishLegOptimiser(model, Categorical(), lr=0.1, update_every=1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(again.state[parameter][key], value) for key, value in state.items())
    floats = [t for s in optimizer.state.values() for t in s.values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_are_what_they_were_after_they_were_computed_in_float32():
    model = nn.GRU(3, 4, batch_first=True).bfloat16()
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), recast(model):
        assert {p.dtype for p in model._flat_weights} == {torch.float32}
        raise RuntimeError("stop")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(a is b for a, b in zip(model._flat_weights, before.values(), strict=True))


def test_the_compute_dtype_is_float32_at_least():
    assert {compute_dtype(one) for one in (*HALF, torch.float32)} == {torch.float32}
    assert compute_dtype(torch.float64) == torch.float64
    assert compute_dtype(torch.int64) == torch.int64


def test_memory_is_counted_in_the_numbers_that_are_held():
    narrow, wide = case("half", torch.bfloat16)
    held = narrow.hold(narrow.partition.names)
    assert isinstance(narrow, GradientSource)
    assert {name: held_bytes(narrow, name) for name in held} == {
        name: value.nbytes for name, value in held.items()
    }
    assert pass_bytes(narrow) == pass_bytes(wide)
