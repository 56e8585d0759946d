"""Samples drawn by seed: the same ones, whatever form the data come in."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import fishleg
from fishleg.drawing import draw_numbers, draw_samples
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName, WrongType
from fishleg.likelihoods.choice import choose_likelihood, describe_likelihood, restore_likelihood

N = 50
X, Y = torch.arange(N * 3.0).reshape(N, 3), torch.arange(N) % 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def batches(size, *tensors):
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


FORMS = {
    "pair": (X, Y),
    "data set": TensorDataset(X, Y),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=7),
    "shuffled loader": DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
    "streaming loader": DataLoader(Stream(), batch_size=9),
    "list of batches": batches(8, X, Y),
    "single samples": batches(1, X, Y),
    "one batch": batches(N, X, Y),
    "numpy": (X.numpy(), Y.numpy()),
}


@pytest.mark.parametrize("count", [1, 10, N - 1, N, 1000, None])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_the_data_gives_the_same_samples(form, count):
    drawn = draw_samples(FORMS[form], count, seed=5)
    numbers = draw_numbers(N, count, seed=5)
    assert len(drawn) == min(count or N, N)
    assert torch.equal(drawn.indices, numbers)
    assert torch.equal(drawn.inputs, X[numbers])
    assert torch.equal(drawn.targets, Y[numbers])


def test_a_generator_is_read_once():
    drawn = draw_samples((batch for batch in FORMS["list of batches"]), 10, seed=5)
    assert torch.equal(drawn.inputs, X[draw_numbers(N, 10, seed=5)])


def test_inputs_may_come_alone_and_in_nests():
    numbers = draw_numbers(N, 10, seed=0)
    assert torch.equal(draw_samples(X, 10, 0).inputs, X[numbers])
    assert draw_samples(X, 10, 0).targets is None
    assert torch.equal(draw_samples([X[:20], X[20:]], 10, 0).inputs, X[numbers])
    nest = {"a": X, "b": (Y, X[:, 0])}
    for data in (
        nest,
        [{"a": X[:9], "b": (Y[:9], X[:9, 0])}, {"a": X[9:], "b": (Y[9:], X[9:, 0])}],
    ):
        drawn = draw_samples(data, 10, 0).inputs
        assert torch.equal(drawn["a"], X[numbers])
        assert torch.equal(drawn["b"][0], Y[numbers])
    two = draw_samples(((X, X), Y), 10, 0)
    assert torch.equal(two.inputs[1], X[numbers])
    assert torch.equal(two.targets, Y[numbers])


def test_a_sampler_that_leaves_samples_out_is_obeyed():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, sampler=SubsetRandomSampler(range(20)))
    drawn = draw_samples(loader, 30, seed=0)
    assert sorted(drawn.inputs[:, 0].tolist()) == X[:20, 0].tolist()


def test_a_seed_and_a_number_fix_a_draw_and_a_smaller_one_is_its_beginning():
    draws = [draw_numbers(1000, 100, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0][:40], draw_numbers(1000, 40, 0))
    assert len(draws[0].unique()) == 100
    assert 350 < float(draws[0].double().mean()) < 650  # 499.5 +- 29


def test_samples_that_are_chosen_already_are_taken_as_they_are():
    for given in (fishleg.Calibration(inputs=X), fishleg.StreamedCalibration([X])):
        assert draw_samples(given, 3, 0) is given


def test_held_samples_are_copies_of_a_pool_that_a_loader_reuses():
    def reused():
        buffer = torch.empty(5, 3)
        for part in X.split(5):
            yield buffer.copy_(part)

    drawn = draw_samples(reused(), 10, seed=0)
    assert torch.equal(drawn.inputs, X[draw_numbers(N, 10, seed=0)])


@pytest.mark.parametrize("data", [3, None, "data", nn.Linear(2, 2)], ids=repr)
def test_what_is_no_data_is_refused(data):
    with pytest.raises(WrongType, match="data: expected"):
        draw_samples(data, 10, 0)


@pytest.mark.parametrize(
    "data", [[], X[:0], TensorDataset(X[:0]), iter([])], ids=lambda data: type(data).__name__
)
def test_no_sample_is_an_error(data):
    with pytest.raises(ShapeMismatch, match="at least one sample"):
        draw_samples(data, 10, 0)


# ------------------------------------------------------------------------------------- likelihoods

LOGITS = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("given", "outputs", "targets", "expected"),
    [
        (None, LOGITS, Y[:6], "Categorical()"),
        ("cross_entropy", LOGITS, None, "Categorical()"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, Y[:6], "Categorical()"),
        (
            None,
            torch.randn(6, 4, 5),
            torch.zeros(6, 5).long(),
            "Categorical(class_dim=1, ignore_index=-100)",
        ),
        (
            None,
            torch.randn(6, 5, 4),
            torch.zeros(6, 5).long(),
            "Categorical(class_dim=2, ignore_index=-100)",
        ),
        (
            None,
            torch.randn(6, 4, 2, 3),
            torch.zeros(6, 2, 3).long(),
            "Categorical(class_dim=1, ignore_index=-100)",
        ),
        (
            nn.CrossEntropyLoss(ignore_index=0),
            torch.randn(6, 5, 4),
            torch.arange(5).expand(6, 5),
            "Categorical(class_dim=2, ignore_index=0)",
        ),
        (nn.CrossEntropyLoss(), LOGITS, LOGITS.softmax(1), "Categorical()"),
        (nn.BCEWithLogitsLoss(), LOGITS, None, "Bernoulli()"),
        ("bce_with_logits", LOGITS, None, "Bernoulli()"),
        (nn.MSELoss(), LOGITS, LOGITS, "Gaussian(variance=1)"),
        ("mse", LOGITS, LOGITS, "Gaussian(variance=1)"),
        (fishleg.Gaussian(0.5), LOGITS, LOGITS, "Gaussian(variance=0.5)"),
    ],
)
def test_a_loss_a_name_or_the_targets_tell_the_likelihood(given, outputs, targets, expected):
    chosen = choose_likelihood(given, outputs, targets)
    assert repr(chosen) == expected
    assert repr(restore_likelihood(describe_likelihood(chosen))) == expected


@pytest.mark.parametrize(
    ("given", "outputs", "targets", "kind", "message"),
    [
        (None, LOGITS, None, FishLegError, "the data have no targets"),
        (None, LOGITS, LOGITS, FishLegError, "give a loss"),
        ("crossentropy", LOGITS, Y[:6], UnknownName, "did you mean 'cross_entropy'"),
        (nn.L1Loss(), LOGITS, LOGITS, WrongType, "got L1Loss"),
        (nn.CrossEntropyLoss(weight=torch.ones(4)), LOGITS, Y[:6], FishLegError, "weight"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), LOGITS, None, FishLegError, "pos_weight"),
        (None, torch.randn(6, 4, 4), torch.zeros(6, 4).long(), ShapeMismatch, "class_dim=1"),
        (nn.CrossEntropyLoss(), torch.randn(6, 4, 5), None, ShapeMismatch, "class_dim=1"),
        (nn.CrossEntropyLoss, LOGITS, Y[:6], WrongType, "likelihood: expected"),
        (0.5, LOGITS, Y[:6], WrongType, "likelihood: expected"),
    ],
)
def test_what_tells_no_likelihood_is_refused(given, outputs, targets, kind, message):
    with pytest.raises(kind, match=message):
        choose_likelihood(given, outputs, targets)


def test_targets_that_do_not_go_with_the_outputs_are_refused_before_the_fit():
    model = nn.Linear(3, 4)
    with pytest.raises(ShapeMismatch, match="targets: expected class numbers"):
        fishleg.fit(model, (X, torch.ones(N, 4).long()))
    with pytest.raises(FishLegError):
        fishleg.fit(model, (X, torch.arange(N)))
