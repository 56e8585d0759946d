import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.gradients.layers import is_supported
from fishleg.gradients.memory import held_bytes, pack_groups
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical, Gaussian
from fishleg.parameters import partition_parameters
from tests.fishleg.networks import (
    CLASSES,
    Attention,
    Mixed,
    Tied,
    mixed_source,
    reference_groups,
    shake,
    source_of,
)
from tests.reference import dense_fisher, gaussian_hessian, sample_gradients

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def flat(source: GradientSource) -> torch.Tensor:
    """Return all gradient rows over all groups, in the reference's order."""
    held = source.hold(source.partition.names)
    return torch.cat([held[name].flatten(1) for name in source.partition.names], dim=1)


def by_loop(source: GradientSource) -> torch.Tensor:
    """Return the empirical gradients one sample at a time, scaled."""
    data = source.calibration
    rows = sample_gradients(
        source.model,
        source.likelihood.nll,
        data.inputs,
        data.targets,
        reference_groups(source.partition),
    )
    return rows / len(data) ** 0.5


def assert_matches_loop(
    model: nn.Module, inputs: torch.Tensor, *, general: set[str] | None = None
) -> None:
    """Check gradients against the loop, and (if given) which parameters take the general path."""
    targets = torch.arange(len(inputs)) % CLASSES
    source = source_of(
        model, Calibration(inputs=inputs, targets=targets), labels="empirical", batch_size=4
    )
    torch.testing.assert_close(flat(source), by_loop(source), **EXACT)
    if general is not None:
        assert {name for name, _ in source.report()} == general


class Flat(nn.Module):
    """A layer, its output brought to (n, CLASSES) by a fixed nonlinear map."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        features = self.layer(x).flatten(1).sin()
        index = 1 + torch.arange(features.shape[1])
        weights = torch.stack([((c + 1.0) * index).cos() for c in range(CLASSES)], dim=1)
        return features @ weights.to(features.dtype)


class Rescaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(2 * x)


# -------------------------------------------------------------------------- single layers


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 8),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
def test_convolutions(groups, inputs, outputs, size, kernel, stride, padding, dilation, bias):
    if any(dilation * (k - 1) + 1 > s + 2 * padding for k, s in zip(kernel, size, strict=True)):
        return
    torch.manual_seed(0)
    layer = nn.Conv2d(
        groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups, bias
    )
    assert_matches_loop(
        shake(Flat(layer)),
        torch.randn(3, groups * inputs, *size, dtype=torch.float64),
        general=set(),
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.integers(1, 3), max_size=2), outputs=st.integers(1, 4), bias=st.booleans()
)
def test_linear_layers_with_any_positions(positions, outputs, bias):
    torch.manual_seed(0)
    layer = nn.Linear(3, outputs, bias)
    inputs = torch.randn(4, *positions, 3, dtype=torch.float64)
    assert_matches_loop(shake(Flat(layer)), inputs, general=set())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 3)),
        (nn.BatchNorm2d(4), (4, 3, 2)),
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm(4), (3, 4)),
        (nn.LayerNorm((3, 4)), (2, 3, 4)),
        (nn.LayerNorm(4, bias=False), (3, 4)),
        (nn.GroupNorm(2, 4), (4, 3, 2)),
        (nn.GroupNorm(2, 4), (4,)),
    ],
    ids=str,
)
def test_norms(layer, shape):
    model = shake(Flat(layer))
    assert_matches_loop(model, torch.randn(5, *shape, dtype=torch.float64), general=set())


@pytest.mark.parametrize(
    "layer",
    [
        Rescaled(5, 4),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(2, 4, 3),
        nn.ConvTranspose2d(2, 4, 3),
    ],
    ids=str,
)
def test_layers_without_a_kernel_of_their_own_take_the_general_path(layer):
    shape = (4, 2, 5) if isinstance(layer, nn.Conv1d) else (4, 2, 5, 5)
    inputs = torch.randn(shape, dtype=torch.float64)
    assert_matches_loop(shake(Flat(layer)), inputs, general={"layer.weight", "layer.bias"})
    assert not is_supported(layer)


# ---------------------------------------------------------------------------------- models


def test_mixed_network():
    torch.manual_seed(1)
    model = shake(Mixed())
    assert_matches_loop(
        model, torch.randn(6, 2, 5, 5, dtype=torch.float64), general={"mix", "gain"}
    )


def test_tied_repeated_and_functional_modules():
    torch.manual_seed(1)
    assert_matches_loop(
        shake(Tied()),
        torch.randn(6, 4, dtype=torch.float64),
        general={
            "first.weight",
            "twice.weight",
            "twice.bias",
            "functional.weight",
            "functional.bias",
        },
    )


def test_attention():
    torch.manual_seed(1)
    model = shake(Attention(batch_first=True))
    assert_matches_loop(
        model,
        torch.randint(7, (6, 5)),
        general={"embed.weight", "position"}
        | {f"encoder.self_attn.in_proj_{leaf}" for leaf in ("weight", "bias")}
        | {f"encoder.self_attn.out_proj.{leaf}" for leaf in ("weight", "bias")},
    )


def test_samples_in_the_second_dimension_are_noticed():
    torch.manual_seed(1)
    model = shake(Attention(batch_first=False))
    # As many samples as tokens: the shapes alone do not tell.
    assert_matches_loop(model, torch.randint(7, (5, 5)))


def test_a_gradient_that_is_zero_but_for_rounding_is_no_error():
    class Shifted(Mixed):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) + self.shift  # the softmax does not see it

    torch.manual_seed(1)
    assert_matches_loop(shake(Shifted()), torch.randn(6, 2, 5, 5, dtype=torch.float64))


def test_a_parameter_that_is_not_used_has_zero_gradients():
    model = shake(Mixed())
    model.spare = nn.Linear(2, 2, dtype=torch.float64)
    assert_matches_loop(model, torch.randn(3, 2, 5, 5, dtype=torch.float64))


def test_float32():
    source = mixed_source(dtype=torch.float32, labels="empirical")
    assert flat(source).dtype == torch.float32
    torch.testing.assert_close(flat(source), by_loop(source), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ the labels


def test_enumerated_rows_make_the_exact_fisher():
    source = mixed_source(labels="enumerated", batch_size=7)
    rows = flat(source)
    assert len(rows) == source.rows == 6 * CLASSES
    groups = reference_groups(source.partition)
    expected = dense_fisher(source.model, source.calibration.inputs, groups)
    torch.testing.assert_close(rows.T @ rows, expected, **EXACT)


def test_gaussian_enumeration_is_exact_too():
    model = shake(nn.Linear(3, 2))
    inputs = torch.randn(5, 3, dtype=torch.float64)
    source = GradientSource(
        model,
        Gaussian(0.5),
        partition_parameters(model),
        Calibration(inputs=inputs),
        labels="enumerated",
    )
    rows = flat(source)
    expected = dense_fisher(
        model, inputs, [("weight", "bias")], lambda outputs: gaussian_hessian(outputs, 0.5)
    )
    torch.testing.assert_close(rows.T @ rows, expected, **EXACT)


@pytest.mark.parametrize("labels", ["sampled", "matched", "enumerated"])
def test_rows_do_not_depend_on_the_batching(labels):
    options = {"labels": labels, "draws": 1 if labels == "enumerated" else 3}
    whole = flat(mixed_source(batch_size=1000, **options))
    for batch_size in (1, 2, 7):
        parts = flat(mixed_source(batch_size=batch_size, **options))
        torch.testing.assert_close(parts, whole, **EXACT)


def test_sampled_labels_follow_seed_and_sample_number():
    source = mixed_source()
    again = mixed_source()
    assert torch.equal(flat(source), flat(again))
    assert not torch.equal(flat(source), flat(mixed_source(seed=1)))
    data = source.calibration
    for order in (torch.tensor([4, 0, 5]), torch.tensor([1])):
        part = Calibration(inputs=data.inputs[order], indices=order)
        rows = flat(source_of(source.model, part))
        expected = flat(source)[order] * (len(data) / len(part)) ** 0.5
        torch.testing.assert_close(rows, expected, **EXACT)


def test_a_likelihood_of_the_users_own():
    class Own:
        def nll(self, outputs, targets):
            return Categorical().nll(outputs, targets)

        def sample(self, outputs, generator):
            return Categorical().sample(outputs, generator)

        def fisher_product(self, outputs, v):
            return Categorical().fisher_product(outputs, v)

    source = mixed_source()
    own = GradientSource(source.model, Own(), source.partition, source.calibration)
    assert torch.equal(flat(own), flat(source))
    own.labels = "enumerated"
    with pytest.raises(FishLegError, match="cannot enumerate"):
        next(own.stream())


# ---------------------------------------------------------------------------- the interface


def test_the_transform_lets_data_stay_bytes():
    source = mixed_source()
    raw = torch.randint(256, (6, 2, 5, 5), dtype=torch.uint8)
    seen = []

    def transform(batch):
        seen.append(batch.dtype)
        return batch.double() / 255

    packed = source_of(source.model, Calibration(inputs=raw, transform=transform))
    plain = source_of(source.model, Calibration(inputs=raw.double() / 255))
    assert torch.equal(flat(packed), flat(plain))
    assert set(seen) == {torch.uint8}


def test_the_model_is_left_as_it_was():
    source = mixed_source()
    source.model.train()
    source.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    for _ in source.stream():
        assert source.model.training
        assert not source.model.norm.training
        assert not source.model.conv._forward_hooks
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in source.model.parameters())


def test_gradients_do_not_need_the_callers_grad_mode():
    expected = flat(mixed_source())
    with torch.no_grad():
        assert torch.equal(flat(mixed_source()), expected)


def test_streams_of_some_groups():
    source = mixed_source(batch_size=4)
    held = source.hold(source.partition.names)
    for name in source.partition.names:
        streamed = torch.cat([batch[name] for batch in source.stream([name])])
        assert streamed.shape == (source.rows, *source.partition[name].shape)
        torch.testing.assert_close(streamed, held[name], **EXACT)
    batch = next(source.stream(["head"]))
    assert list(batch) == ["head"]
    with pytest.raises(KeyError):
        batch["conv"]


def test_packs_fit_the_budget_in_order():
    source = mixed_source()
    size = {name: value.nbytes for name, value in source.hold(source.partition.names).items()}
    budget = size["grouped"]
    packs = pack_groups(source, source.partition.names, budget)
    assert [name for pack in packs for name in pack] == list(source.partition.names)
    assert all(sum(size[name] for name in pack) <= budget for pack in packs)
    assert all(held_bytes(source, name) <= budget for name in source.partition.names)
    assert held_bytes(source, "grouped") > budget - 1
    assert ["grouped"] in pack_groups(source, source.partition.names, budget - 1)


@pytest.mark.parametrize("labels", ["sampled", "matched", "enumerated"])
def test_layer_signals_make_the_gradients(labels):
    source = mixed_source(labels=labels, batch_size=5)
    held = source.hold(source.partition.names)
    start = 0
    for batch in source.layers():
        for name, signals in batch.items():
            assert (signals is None) == (name not in ("conv", "grouped", "head"))
            if signals is None:
                continue
            products = signals.output_gradients.mT @ signals.activations.unsqueeze(1)
            gradients = products.flatten(2, 3).flatten(0, 1)
            rows = len(gradients)
            torch.testing.assert_close(gradients, held[name][start : start + rows], **EXACT)
        start += rows
    assert start == source.rows


def test_layers_of_a_grouped_convolution_come_apart():
    signals = next(mixed_source(batch_size=6).layers(["grouped"]))["grouped"]
    positions, heads = 4, 2
    assert signals.activations.shape == (6, heads, positions, 19)
    assert signals.output_gradients.shape == (6, 1, heads, positions, 3)
    assert (signals.activations[..., -1] == 1).all()


def test_what_has_no_curvature_is_reported():
    model = Mixed()
    partition = partition_parameters(model, skip=["mix"])
    source = GradientSource(
        model, Categorical(), partition, Calibration(inputs=torch.randn(2, 2, 5, 5))
    )
    assert dict(source.report()) == {
        "gain": "general path: torch.func.vmap",
        "mix": "no curvature: skipped on request",
    }


# ---------------------------------------------------------------------------------- errors


def test_samples_that_interact_are_an_error():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(5, track_running_stats=False), nn.Flatten()
    )
    source = source_of(shake(model), Calibration(inputs=torch.randn(6, 5, 3).double()))
    with pytest.raises(FishLegError, match=r"interact in 1, batch norm without"):
        next(source.stream())


def test_a_network_that_treats_a_batch_otherwise_than_its_samples_is_an_error():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(CLASSES, CLASSES)

        def forward(self, x):
            x = self.layer(x)
            return self.layer(x) if x.shape[0] < 16 else x

    source = source_of(Fickle(), Calibration(inputs=torch.randn(20, CLASSES)), batch_size=16)
    with pytest.raises(FishLegError, match="interact.*batch_size=1"):
        list(source.stream())


def test_outputs_must_be_one_tensor_of_samples():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    for model, message in (
        (Pair(2, 2), "tuple"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), r"\(8,\)"),
    ):
        with pytest.raises(ShapeMismatch, match=message):
            next(source_of(model, Calibration(inputs=torch.randn(4, 2))).stream())


def test_arguments_are_checked():
    model = Mixed()
    calibration = Calibration(inputs=torch.randn(2, 2, 5, 5))
    with pytest.raises(UnknownName, match="did you mean 'sampled'"):
        source_of(model, calibration, labels="sample")
    with pytest.raises(ValueError, match="draws"):
        source_of(model, calibration, labels="enumerated", draws=2)
    with pytest.raises(ValueError, match="batch_size"):
        source_of(model, calibration, batch_size=0)
    with pytest.raises(FishLegError, match="targets"):
        next(source_of(model, calibration, labels="empirical").stream())
    partition = partition_parameters(model)
    with pytest.raises(UnknownName, match="mix"):
        GradientSource(Tied(), Categorical(), partition, calibration)
    model.mix = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(ShapeMismatch, match="mix"):
        GradientSource(model, Categorical(), partition, calibration)


def test_calibration_sets_are_checked():
    with pytest.raises(ShapeMismatch, match="at least one"):
        Calibration(inputs=torch.zeros(0, 3))
    with pytest.raises(ShapeMismatch, match="indices"):
        Calibration(inputs=torch.zeros(2, 3), indices=torch.arange(3))
