"""Classes at several positions, positions that do not count, and one number a sample."""

import itertools
import math

import pytest
import torch
from torch import nn

from fishleg import (
    Bernoulli,
    Calibration,
    Categorical,
    Gaussian,
    GradientSource,
    certify,
    fisher_vector_product,
    partition_parameters,
    pruning_certificate,
)
from fishleg.errors import CapacityExceeded, FishLegError, ShapeMismatch
from fishleg.estimators import KFAC
from fishleg.pruning import mean_divergence
from fishleg.rng import SampleGenerator
from tests.fishleg.networks import reference_groups, shake
from tests.reference import (
    bernoulli_hessian,
    dense_fisher,
    flat_vector,
    gaussian_hessian,
    positions_hessian,
    sample_gradients,
    softmax_hessian,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
N, T, C = 3, 4, 3
PAD = -1
TARGETS = torch.tensor([[0, 2, 1, PAD], [PAD, PAD, 2, 0], [1, 1, 1, 1]])
DRAWS = 20_000
# Labels drawn a sample, and the relative error allowed: five times 1 / sqrt(N labels).
LABELS = 400
LABELS_ERROR = 0.15
FREQUENCY_ERROR = 5 * 0.5 / math.sqrt(DRAWS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TOKENS = random(N, T, C)
IMAGES = TOKENS.reshape(N, 2, 2, C).movedim(-1, 1)
"""The same numbers as pixels, (n, C, 2, 2)."""
ZERO = torch.where(TARGETS == PAD, 0, TARGETS.where(TARGETS > 0, 1))
"""Padding that has the number of a class, as in texts where it is a token."""
CASES = [
    (Categorical(ignore_index=0).given(ZERO), TOKENS, ZERO != 0),
    (
        Categorical(class_dim=1, ignore_index=0).given(ZERO.reshape(N, 2, 2)),
        IMAGES,
        ZERO != 0,
    ),
    (Categorical(), TOKENS, torch.ones(N, T, dtype=torch.bool)),
    (Categorical(class_dim=1), IMAGES, torch.ones(N, T, dtype=torch.bool)),
    (Categorical(class_dim=-3), IMAGES, torch.ones(N, T, dtype=torch.bool)),
    (Categorical(ignore_index=PAD).given(TARGETS), TOKENS, TARGETS != PAD),
    (
        Categorical(class_dim=1, ignore_index=PAD).given(TARGETS.reshape(N, 2, 2)),
        IMAGES,
        TARGETS != PAD,
    ),
]


def as_tokens(values: torch.Tensor) -> torch.Tensor:
    """Return (n, T C) of values in either layout."""
    return values.flatten(1) if values.ndim == 3 else values.movedim(1, -1).flatten(1)


def draw(outputs: torch.Tensor) -> torch.Tensor:
    """Return class numbers where all positions count."""
    return Categorical().sample(outputs, SampleGenerator(0, torch.arange(len(outputs))))


def numbers(likelihood: Categorical, targets: torch.Tensor) -> torch.Tensor:
    """Return drawn class numbers (n, T), negative where there is none."""
    if targets.is_floating_point():  # the number that is ignored is a class as well
        weights = as_tokens(targets).unflatten(1, (T, C))
        return weights.argmax(-1).where(weights.any(-1), PAD)
    return targets.flatten(1)


def hessians(outputs: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    rows = as_tokens(outputs).unflatten(1, (T, C))
    return [positions_hessian(f, c.tolist()) for f, c in zip(rows, counts, strict=True)]


@pytest.mark.parametrize(("likelihood", "outputs", "counts"), CASES)
def test_the_output_fisher_has_a_block_for_each_position_that_counts(likelihood, outputs, counts):
    v = random(*outputs.shape, seed=1)
    found = likelihood.fisher_product(outputs, v)
    assert found.shape == outputs.shape
    for h, x, y in zip(hessians(outputs, counts), as_tokens(v), as_tokens(found), strict=True):
        torch.testing.assert_close(y, h @ x)


@pytest.mark.parametrize(("likelihood", "outputs", "counts"), CASES)
def test_enumerated_labels_give_the_output_fisher_exactly(likelihood, outputs, counts):
    targets, weights = likelihood.enumerate(outputs)
    torch.testing.assert_close(weights.sum(1), counts.sum(1).double())
    total = torch.zeros(N, T * C, T * C, dtype=torch.float64)
    leaf = outputs.clone().requires_grad_()
    for target, weight in zip(targets, weights.unbind(1), strict=True):
        g = as_tokens(torch.autograd.grad(likelihood.nll(leaf, target).sum(), leaf)[0])
        total += weight[:, None, None] * g[:, :, None] * g[:, None, :]
    for found, h in zip(total, hessians(outputs, counts), strict=True):
        torch.testing.assert_close(found, h)


def test_matched_labels_have_exactly_the_moments_of_sampled_ones_at_all_positions(monkeypatch):
    outputs, targets = TOKENS[:, 1:3, :2], TARGETS[:, 1:3]
    likelihood = Categorical(ignore_index=PAD).given(targets)
    generator = SampleGenerator(0, torch.arange(N))
    leaf = outputs.clone().requires_grad_()
    mean = torch.zeros(N, 4, dtype=torch.float64)
    covariance = torch.zeros(N, 4, 4, dtype=torch.float64)
    for signs in itertools.product([0.25, 0.75], repeat=4):
        uniform = torch.tensor(signs, dtype=torch.float64).reshape(2, 2).expand(N, 2, 2)
        monkeypatch.setattr(generator, "uniform", lambda *shape, uniform=uniform: uniform)
        loss = likelihood.nll(leaf, likelihood.match(outputs, generator))
        g = torch.autograd.grad(loss.sum(), leaf)[0].flatten(1)
        mean += g / 16
        covariance += g[:, :, None] * g[:, None, :] / 16
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    for found, f, row in zip(covariance, outputs, targets, strict=True):
        torch.testing.assert_close(found, positions_hessian(f, (row != PAD).tolist()))


@pytest.mark.parametrize(("likelihood", "outputs", "counts"), CASES)
def test_drawn_labels_have_the_frequencies_of_each_position(likelihood, outputs, counts):
    targets = numbers(likelihood, likelihood.sample(outputs, SampleGenerator(0, torch.arange(N))))
    assert torch.equal(targets >= 0, counts)
    assert torch.equal(targets[counts], draw(TOKENS)[counts])
    many = Categorical().sample(
        TOKENS[:1].expand(DRAWS, T, C), SampleGenerator(0, torch.arange(DRAWS))
    )
    for position, f in enumerate(TOKENS[0]):
        frequencies = many[:, position].bincount(minlength=C) / DRAWS
        assert (frequencies - f.softmax(0)).abs().max() < FREQUENCY_ERROR
    both = (many[:, 0] == 0) & (many[:, 1] == 0)
    independent = TOKENS[0, 0].softmax(0)[0] * TOKENS[0, 1].softmax(0)[0]
    assert abs(both.double().mean() - independent) < FREQUENCY_ERROR


@pytest.mark.parametrize(("likelihood", "outputs", "counts"), CASES)
def test_losses_and_divergences_are_sums_over_the_positions_that_count(likelihood, outputs, counts):
    p, q = (as_tokens(x).unflatten(1, (T, C)).softmax(-1) for x in (outputs, outputs.flip(0)))
    expected = ((p * (p / q).log()).sum(-1) * counts).sum(1)
    torch.testing.assert_close(likelihood.divergence(outputs, outputs.flip(0)), expected)
    targets = likelihood.sample(outputs, SampleGenerator(0, torch.arange(N)))
    chosen = numbers(likelihood, targets).clamp(min=0)[..., None]
    losses = -(p.log().gather(2, chosen).squeeze(2) * counts).sum(1)
    torch.testing.assert_close(likelihood.nll(outputs, targets), losses)
    weights = nn.functional.one_hot(chosen.squeeze(2), C).double() * counts[..., None]
    weights = weights if outputs.ndim == 3 else weights.reshape(N, 2, 2, C).movedim(-1, 1)
    torch.testing.assert_close(likelihood.nll(outputs, weights), losses)


# ------------------------------------------------------------------------------ networks


class Tokens(nn.Module):
    """Maps (n, T, 2) to logits of tokens (n, T, C)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 3)
        self.along = nn.Parameter(torch.randn(T, T) / 2)
        self.head = nn.Linear(3, C)

    def forward(self, x):
        return self.head((self.along @ self.mix(x)).tanh())


class Pixels(nn.Module):
    """Maps (n, 2, 2, 2) to logits of pixels (n, C, 2, 2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.head = nn.Conv2d(3, C, 1)

    def forward(self, x):
        return self.head(self.conv(x).tanh())


def tokens_source(**options) -> GradientSource:
    torch.manual_seed(0)
    model = shake(Tokens())
    calibration = Calibration(inputs=random(N, T, 2), targets=TARGETS.clone())
    likelihood = Categorical(ignore_index=PAD)
    return GradientSource(model, likelihood, partition_parameters(model), calibration, **options)


def pixels_source(**options) -> GradientSource:
    torch.manual_seed(0)
    model = shake(Pixels())
    calibration = Calibration(inputs=random(N, 2, 2, 2), targets=TARGETS.reshape(N, 2, 2))
    likelihood = Categorical(class_dim=1, ignore_index=PAD)
    return GradientSource(model, likelihood, partition_parameters(model), calibration, **options)


def dense(source: GradientSource) -> torch.Tensor:
    """Return the dense Fisher, each sample with its own positions that count."""

    def hessian_for(counts):
        def hessian(outputs):  # the classes come first for pixels
            if isinstance(source.model, Tokens):
                return positions_hessian(outputs.reshape(T, C), counts)
            order = torch.arange(T * C).reshape(C, T).T.flatten()
            block = positions_hessian(outputs[order].reshape(T, C), counts)
            back = order.argsort()
            return block[back][:, back]

        return hessian

    groups, inputs = reference_groups(source.partition), source.calibration.inputs
    parts = [
        dense_fisher(source.model, x[None], groups, hessian_for((row != PAD).tolist()))
        for x, row in zip(inputs, TARGETS, strict=True)
    ]
    return sum(parts) / N


@pytest.mark.parametrize("make", [tokens_source, pixels_source])
def test_curvature_over_positions_is_the_dense_one(make):
    source = make(labels="enumerated", batch_size=2 * T * C)
    fisher = dense(source)
    held = source.hold(source.partition.names)
    rows = torch.cat([held[name].flatten(1) for name in source.partition.names], dim=1)
    torch.testing.assert_close(rows.T @ rows, fisher, **EXACT)
    groups = reference_groups(source.partition)
    v = {name: random(*p.shape) for name, p in source.model.named_parameters()}
    for form in ("exact", "enumerated"):
        product = flat_vector(fisher_vector_product(source, v, form=form), groups)
        torch.testing.assert_close(product, fisher @ flat_vector(v, groups), **EXACT)


@pytest.mark.parametrize("labels", ["sampled", "matched"])
def test_drawn_labels_leave_out_what_the_targets_ignore(labels):
    source = tokens_source(labels=labels, draws=LABELS, batch_size=1000)
    held = source.hold(["head"])["head"].flatten(1)
    index = [name for name, _ in reference_groups(source.partition)].index("head.weight")
    groups = reference_groups(source.partition)
    sizes = [source.partition[name].size for name in source.partition.names]
    start = sum(sizes[:index])
    part = slice(start, start + sizes[index])
    expected = dense(source)[part, part]
    assert groups[index] == ("head.weight", "head.bias")
    assert (held.T @ held - expected).norm() < LABELS_ERROR * expected.norm()


@pytest.mark.parametrize("make", [tokens_source, pixels_source])
def test_empirical_labels_are_the_datas_over_positions(make):
    source = make(labels="empirical")
    data, groups = source.calibration, reference_groups(source.partition)
    nll = lambda outputs, targets: nn.functional.cross_entropy(  # noqa: E731
        outputs if outputs.ndim == 4 else outputs.mT, targets, ignore_index=PAD, reduction="sum"
    )[None]
    expected = sample_gradients(source.model, nll, data.inputs, data.targets, groups) / N**0.5
    held = source.hold(source.partition.names)
    rows = torch.cat([held[name].flatten(1) for name in source.partition.names], dim=1)
    torch.testing.assert_close(rows, expected, **EXACT)


@pytest.mark.parametrize("labels", ["sampled", "matched", "enumerated"])
def test_padding_may_have_the_number_of_a_class(labels):
    """A drawn label of that number counts; a position that is padding does not."""
    recoded, plain = (tokens_source(labels=labels, batch_size=2 * T * C) for _ in range(2))
    recoded.likelihood = Categorical(ignore_index=0)
    recoded.calibration.targets.copy_(torch.where(TARGETS == PAD, 0, 1))
    plain.calibration.targets.copy_(torch.where(TARGETS == PAD, PAD, 1))
    found, expected = (source.hold(source.partition.names) for source in (recoded, plain))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def test_certificates_count_the_positions_that_count():
    source = tokens_source(labels="enumerated", batch_size=2 * T * C)
    estimator = KFAC(source.partition, damping=0.1)
    estimator.fit(source)
    assert math.isfinite(certify(estimator, source)["network"]["objective"])
    step = 1e-4
    after = {name: p + step for name, p in source.model.named_parameters()}
    found = pruning_certificate(source, after)
    groups = reference_groups(source.partition)
    d = flat_vector({name: torch.full_like(p, step) for name, p in after.items()}, groups)
    assert found["predicted_kl"] == pytest.approx(float(0.5 * d @ dense(source) @ d))
    assert found["measured_kl"] == pytest.approx(found["predicted_kl"], rel=1e-2)


def test_what_does_not_go_together_is_said():
    source = tokens_source()
    with pytest.raises(FishLegError, match="ignore_index=-1: which positions count.*give the cal"):
        next(source.over(Calibration(inputs=random(N, T, 2)), seed=0).stream())
    with pytest.raises(FishLegError, match=r"bind them first, `likelihood.given\(targets\)`"):
        Categorical(ignore_index=PAD).divergence(TOKENS, TOKENS)
    stray = TARGETS.clone()
    stray[1, 2] = 7
    with pytest.raises(FishLegError, match=r"\[0, 3\), got 7 \(sample 1 of .* position \(2,\)"):
        Categorical(ignore_index=PAD).check_targets(TOKENS, stray)
    with pytest.raises(ShapeMismatch, match="class_dim=1 for images"):
        Categorical().nll(IMAGES, TARGETS.reshape(N, 2, 2))
    with pytest.raises(
        ShapeMismatch, match=r"shape \(3, 4\) for outputs \(3, 4, 3\), got \(3, 3\)"
    ):
        Categorical().nll(TOKENS, TARGETS[:, :3])
    with pytest.raises(ShapeMismatch, match="as integers, or weights"):
        Categorical().nll(TOKENS, TARGETS.double())
    with pytest.raises(ShapeMismatch, match="no dimension 3"):
        Categorical(class_dim=3).nll(TOKENS, TARGETS)
    with pytest.raises(ValueError, match="class_dim: expected 1, 2"):
        Categorical(class_dim=0)
    with pytest.raises(CapacityExceeded, match="use labels 'matched'"):
        Categorical(class_dim=1).enumerate(torch.zeros(1, 50, 512, 512))


# ------------------------------------------------------------------------- one number a sample


class Scalar(nn.Module):
    """Maps (n, 2) to (n,), or to (n, 1)."""

    def __init__(self, squeeze: bool):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)
        self.squeeze = squeeze

    def forward(self, x):
        outputs = self.head(self.inner(x).tanh())
        return outputs.squeeze(1) if self.squeeze else outputs


@pytest.mark.parametrize(
    ("likelihood", "hessian"),
    [(Gaussian(0.5), lambda f: gaussian_hessian(f, 0.5)), (Bernoulli(), bernoulli_hessian)],
)
@pytest.mark.parametrize("target_shape", [(N,), (N, 1)])
def test_one_number_a_sample_is_a_column(likelihood, hessian, target_shape):
    torch.manual_seed(0)
    model = shake(Scalar(squeeze=True))
    data = Calibration(inputs=random(N, 2), targets=torch.tensor([1, 0, 1]).reshape(target_shape))
    partition = partition_parameters(model)
    source = GradientSource(model, likelihood, partition, data, labels="enumerated")
    groups = reference_groups(partition)
    fisher = dense_fisher(model, data.inputs, groups, hessian)
    v = {name: random(*p.shape) for name, p in model.named_parameters()}
    expected = fisher @ flat_vector(v, groups)
    held = source.hold(partition.names)
    rows = torch.cat([held[name].flatten(1) for name in partition.names], dim=1)
    torch.testing.assert_close(rows.T @ rows, fisher, **EXACT)
    for form in ("exact", "enumerated"):
        product = flat_vector(fisher_vector_product(source, v, form=form), groups)
        torch.testing.assert_close(product, expected, **EXACT)
    column = Scalar(squeeze=False).double()
    column.load_state_dict(model.state_dict())
    for labels in ("sampled", "matched", "empirical"):
        of_both = [
            GradientSource(one, likelihood, partition, data, labels=labels).hold(["inner"])["inner"]
            for one in (model, column)
        ]
        torch.testing.assert_close(*of_both, **EXACT)
    after = {name: p + 1e-3 for name, p in model.named_parameters()}
    found = pruning_certificate(source, after)
    assert found["measured_kl"] == pytest.approx(found["predicted_kl"], rel=1e-2)
    assert mean_divergence(model, model, likelihood, [data.inputs]) == 0.0


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(), Gaussian(0.25)])
def test_half_precision_outputs_are_taken_in_float32(likelihood):
    half = random(N, T, C).bfloat16()
    generator = lambda: SampleGenerator(0, torch.arange(N))  # noqa: E731
    v = random(N, T, C, seed=1).float()
    target = likelihood.match(half, generator())
    torch.testing.assert_close(target, likelihood.match(half.float(), generator()), rtol=0, atol=0)
    for found, expected in (
        (likelihood.nll(half, target), likelihood.nll(half.float(), target)),
        (likelihood.fisher_product(half, v), likelihood.fisher_product(half.float(), v)),
        (likelihood.divergence(half, -half), likelihood.divergence(half.float(), -half.float())),
        (likelihood.enumerate(half)[1], likelihood.enumerate(half.float())[1]),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_a_softmax_over_one_position_is_the_plain_one():
    single, plain = TOKENS[:, :1], TOKENS[:, 0]
    for f, h in zip(plain, hessians(TOKENS, torch.ones(N, T)), strict=True):
        torch.testing.assert_close(h[:C, :C], softmax_hessian(f))
    found = Categorical().fisher_product(single, single)[:, 0]
    torch.testing.assert_close(found, Categorical().fisher_product(plain, plain))
