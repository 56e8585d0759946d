import itertools
import math

import pytest
import torch

from fishleg.errors import ShapeMismatch
from fishleg.likelihoods import Bernoulli, Categorical, Gaussian
from fishleg.rng import SampleGenerator
from tests.reference import bernoulli_hessian, gaussian_hessian, softmax_hessian

N, D = 4, 3
DRAWS = 20_000
FREQUENCY_ERROR = 5 * 0.5 / math.sqrt(DRAWS)


@pytest.fixture
def outputs() -> torch.Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LIKELIHOODS = [Bernoulli(), Categorical(), Gaussian(), Gaussian(0.25)]


def hessian_of(likelihood, f: torch.Tensor) -> torch.Tensor:
    if isinstance(likelihood, Categorical):
        return softmax_hessian(f)
    if isinstance(likelihood, Bernoulli):
        return bernoulli_hessian(f)
    return gaussian_hessian(f, likelihood.variance)


def test_categorical_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert Categorical().nll(logits, torch.tensor([1])) == pytest.approx(math.log(4 / 3))


def test_bernoulli_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    expected = math.log(2) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4)
    assert Bernoulli().nll(logits, torch.tensor([[1.0, 0.5]])) == pytest.approx(expected)


def test_bernoulli_samples_have_the_model_frequencies():
    logits = torch.tensor([0.3, -1.0, 4.0], dtype=torch.float64)
    generator = SampleGenerator(0, torch.arange(DRAWS))
    labels = Bernoulli().sample(logits.expand(DRAWS, 3), generator)
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    assert (labels.mean(0) - logits.sigmoid()).abs().max() < FREQUENCY_ERROR


def test_matched_bernoulli_labels_have_the_moments_of_sampled_ones(outputs):
    """Whatever the sign, (p - y)^2 = p (1 - p); both signs come up."""
    p = outputs.sigmoid()
    y = Bernoulli().match(outputs, SampleGenerator(0, torch.arange(N)))
    torch.testing.assert_close((p - y).square(), p * (1 - p))
    assert set((p - y).sign().flatten().tolist()) == {-1.0, 1.0}


def test_bernoulli_divergence_is_the_sum_over_both_labels(outputs):
    p, q = outputs.sigmoid(), outputs.flip(0).sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    torch.testing.assert_close(Bernoulli().divergence(outputs, outputs.flip(0)), expected)


def test_gaussian_loss_by_hand():
    loss = Gaussian(4.0).nll(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))
    assert loss == pytest.approx(4 / 8 + math.log(2 * math.pi * 4))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_fisher_product_is_the_dense_one(likelihood, outputs):
    v = torch.randn_like(outputs)
    expected = torch.stack([hessian_of(likelihood, f) @ x for f, x in zip(outputs, v, strict=True)])
    torch.testing.assert_close(likelihood.fisher_product(outputs, v), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_enumerated_gradients_give_the_output_fisher(likelihood, outputs):
    targets, weights = likelihood.enumerate(outputs)
    assert targets.shape[:2] == (D, N)
    torch.testing.assert_close(weights.sum(1), torch.ones(N, dtype=torch.float64))
    leaf = outputs.clone().requires_grad_()
    total = torch.zeros(N, D, D, dtype=torch.float64)
    for target, weight in zip(targets, weights.unbind(1), strict=True):
        (g,) = torch.autograd.grad(likelihood.nll(leaf, target).sum(), leaf)
        total += weight[:, None, None] * g[:, :, None] * g[:, None, :]
    for found, f in zip(total, outputs, strict=True):
        torch.testing.assert_close(found, hessian_of(likelihood, f))


def test_categorical_samples_have_the_model_frequencies():
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    labels = Categorical().sample(logits.expand(DRAWS, 3), SampleGenerator(0, torch.arange(DRAWS)))
    frequencies = labels.bincount(minlength=3) / DRAWS
    assert (frequencies - logits.softmax(0)).abs().max() < FREQUENCY_ERROR


def test_categorical_never_draws_an_impossible_class():
    logits = torch.tensor([0.0, -math.inf, -200.0]).expand(1000, 3)
    assert (Categorical().sample(logits, SampleGenerator(0, torch.arange(1000))) == 0).all()


def test_a_class_that_is_ruled_out_is_as_if_it_were_not_there(outputs):
    ruled = torch.cat([outputs[:, :1], torch.full((N, 1), -math.inf), outputs[:, 1:]], dim=1)
    kept, generator = [0, 2, 3], lambda: SampleGenerator(0, torch.arange(N))  # noqa: E731
    v = torch.randn(N, D + 1, dtype=torch.float64)
    found = Categorical().fisher_product(ruled, v)
    torch.testing.assert_close(found[:, kept], Categorical().fisher_product(outputs, v[:, kept]))
    assert (found[:, 1] == 0).all()
    flipped = ruled.flip(0)
    torch.testing.assert_close(
        Categorical().divergence(ruled, flipped),
        Categorical().divergence(outputs, outputs.flip(0)),
    )
    leaf = ruled.clone().requires_grad_()
    matched = Categorical().match(ruled, generator())
    targets, weights = Categorical().enumerate(ruled)
    total = torch.zeros(N, D + 1, D + 1, dtype=torch.float64)
    for target, weight in [(matched, torch.ones(N)), *zip(targets, weights.unbind(1), strict=True)]:
        losses = Categorical().nll(leaf, target)
        (g,) = torch.autograd.grad(losses.sum(), leaf)
        assert losses.isfinite().all() and g.isfinite().all() and (g[:, 1] == 0).all()
        if target is not matched:
            total += weight[:, None, None] * g[:, :, None] * g[:, None, :]
    for found, f in zip(total, outputs, strict=True):
        torch.testing.assert_close(found[kept][:, kept], softmax_hessian(f))
    divergence = Categorical().divergence(ruled, leaf)
    assert torch.autograd.grad(divergence.sum(), leaf)[0].isfinite().all()


def test_weighted_classes_have_the_loss_that_torch_gives_them(outputs):
    for logits in (outputs, outputs.float()):
        weights = Categorical().match(logits, SampleGenerator(0, torch.arange(N)))
        expected = torch.nn.functional.cross_entropy(logits, weights, reduction="none")
        assert torch.equal(Categorical().nll(logits, weights), expected)


def test_matched_labels_have_exactly_the_moments_of_sampled_ones(outputs, monkeypatch):
    """Over all sign vectors, each equally likely, the mean gradient is 0 and its covariance H."""
    generator = SampleGenerator(0, torch.arange(N))
    leaf = outputs.clone().requires_grad_()
    mean, covariance = torch.zeros(N, D), torch.zeros(N, D, D, dtype=torch.float64)
    for signs in itertools.product([0.25, 0.75], repeat=D):
        uniform = torch.tensor(signs, dtype=torch.float64).expand(N, D)
        monkeypatch.setattr(generator, "uniform", lambda *shape, uniform=uniform: uniform)
        target = Categorical().match(outputs, generator)
        (g,) = torch.autograd.grad(Categorical().nll(leaf, target).sum(), leaf)
        mean = mean + g / 2**D
        covariance += g[:, :, None] * g[:, None, :] / 2**D
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    for found, f in zip(covariance, outputs, strict=True):
        torch.testing.assert_close(found, hessian_of(Categorical(), f))


def test_weighted_classes_and_class_numbers_mean_the_same(outputs):
    labels = torch.arange(N) % D
    weights = torch.nn.functional.one_hot(labels, D).to(outputs.dtype)
    found = Categorical().nll(outputs, weights)
    torch.testing.assert_close(found, Categorical().nll(outputs, labels))


def test_gaussian_samples_have_mean_and_variance():
    f = torch.full((DRAWS, 1), 2.0)
    y = Gaussian(9.0).sample(f, SampleGenerator(0, torch.arange(DRAWS)))
    assert y.dtype == f.dtype
    assert abs(y.mean() - 2) < 5 * 3 / math.sqrt(DRAWS)
    assert abs(y.var() - 9) < 5 * 9 * math.sqrt(2 / DRAWS)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_labels_do_not_depend_on_the_batching(likelihood, outputs):
    whole = likelihood.sample(outputs, SampleGenerator(0, torch.arange(N)))
    parts = [
        likelihood.sample(outputs[i : i + 1], SampleGenerator(0, torch.tensor([i])))
        for i in range(N)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_wrong_shapes_are_refused(outputs):
    with pytest.raises(ShapeMismatch, match="samples, classes.*one number a sample.*Bernoulli"):
        Categorical().sample(outputs[:, 0], SampleGenerator(0, torch.arange(N)))
    with pytest.raises(ShapeMismatch, match="at least two classes, got 1"):
        Categorical().nll(outputs[:, :1], torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match=r"\(4, 3\)"):
        Gaussian().nll(outputs, outputs[:, :1])


def test_variance_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        Gaussian(0.0)
