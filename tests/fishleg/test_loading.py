"""Calibration samples from loaders, generators, data sets and arrays, held or streamed."""

import logging
from collections import namedtuple

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fishleg import Calibration, StreamedCalibration, fisher_vector_product
from fishleg.errors import CapacityExceeded, FishLegError, ShapeMismatch
from fishleg.estimators import KFAC
from fishleg.loading import checksum
from fishleg.nests import tensors_of
from tests.fishleg.networks import CLASSES, Mixed, shake, source_of

N = 11
CPU = torch.device("cpu")
X = torch.randn(N, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % CLASSES
SAMPLES = TensorDataset(X, Y)


class Augmented(Dataset):
    """Samples that differ each time, as with random crops."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index] + torch.rand(1).double(), Y[index]


def loader(**options):
    return DataLoader(SAMPLES, batch_size=5, **options)


def model() -> Mixed:
    torch.manual_seed(0)
    return shake(Mixed())


def gradients(calibration, **options) -> list[torch.Tensor]:
    source = source_of(model(), calibration, batch_size=4, labels="empirical", **options)
    return list(source.hold(source.partition.names).values())


def batches(calibration, size=4, among=slice(None)):
    return list(calibration.batches(size, CPU, among))


ITERABLES = {
    "a loader with a ragged last batch of one": loader,
    "a generator": lambda: ((x, y) for x, y in loader()),
    "lists": lambda: [[X[:7], Y[:7]], [X[7:], Y[7:]]],
    "arrays": lambda: [(X[:2].numpy(), Y[:2].numpy()), (X[2:].numpy(), Y[2:].numpy())],
    "a data set": lambda: SAMPLES,
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_held_samples_are_those_of_the_iterable_in_its_order(kind):
    expected = gradients(Calibration(inputs=X, targets=Y))
    makers = [Calibration.from_batches]
    if not isinstance(ITERABLES[kind](), list):  # a list is taken for a nest
        makers.append(lambda batches: Calibration(inputs=batches))
    for make in makers:
        held = make(ITERABLES[kind]())
        assert len(held) == N
        for one, other in zip(gradients(held), expected, strict=True):
            assert torch.equal(one, other)


def test_a_list_of_batches_is_taken_for_a_nest_and_where_to_give_it_is_said():
    with pytest.raises(ShapeMismatch, match="A list of batches is taken by `Calibration.from_b"):
        Calibration(inputs=ITERABLES["lists"]())


@pytest.mark.parametrize("kind", [kind for kind in ITERABLES if kind != "a generator"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_streamed_samples_give_the_bits_of_held_ones(kind, labels):
    streamed = StreamedCalibration(ITERABLES[kind]())
    held = Calibration(inputs=X, targets=Y)
    assert len(streamed) == N and streamed.has_targets
    for size in (1, 3, 4, N, 20):
        for among in (slice(None), slice(0, 5), slice(5, 11), slice(4, 9), slice(11, 11)):
            found, expected = batches(streamed, size, among), batches(held, size, among)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert all(map(torch.equal, one, other))
    v = {name: torch.randn_like(p) for name, p in model().named_parameters()}
    results = []
    for calibration in (streamed, held):
        source = source_of(model(), calibration, batch_size=4, labels=labels)
        estimator = KFAC(source.partition, damping=0.1)
        estimator.fit(source)
        tensors = estimator.state_dict()["tensors"]
        results.append(tensors | fisher_vector_product(source, v))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


def test_what_shuffles_or_augments_shows_the_same_samples_in_each_pass_when_held():
    for changing in (loader(shuffle=True), DataLoader(Augmented(), batch_size=4)):
        held = Calibration.from_batches(changing)
        one, two = (torch.cat([batch.inputs for batch in batches(held)]) for _ in range(2))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "changing",
    [
        lambda: loader(shuffle=True),
        lambda: DataLoader(Augmented(), batch_size=4),
        lambda: DataLoader(Augmented(), batch_size=1),
        lambda: DataLoader(TensorDataset(X), batch_size=N, shuffle=True),
    ],
)
def test_what_shuffles_or_augments_is_refused_when_streamed(changing):
    torch.manual_seed(0)
    streamed = StreamedCalibration(changing())
    with pytest.raises(FishLegError, match="batch 0 differs from that.*`Calibration.from_batches"):
        source = source_of(model(), streamed)
        source.hold(source.partition.names)


def test_a_stream_that_ends_early_is_refused():
    rows = [X[:4], X[4:8], X[8:]]
    streamed = StreamedCalibration(rows)
    rows.pop()
    with pytest.raises(
        FishLegError, match="expected 11 as in the first pass, but .* ended earlier"
    ):
        batches(streamed)


def test_a_generator_cannot_be_streamed():
    with pytest.raises(FishLegError, match="got generator, which gives its samples once"):
        StreamedCalibration(batch for batch in loader())


def test_a_random_transform_is_refused_and_a_steady_one_is_not():
    steady = Calibration(inputs=X, transform=lambda x: x / 2)
    assert torch.equal(batches(steady)[0].inputs, X[:4] / 2)
    for shaky in (
        Calibration(inputs=X, transform=lambda x: x + torch.rand(1).double()),
        Calibration(inputs=X, transform=torch.nn.Dropout(0.5)),
        StreamedCalibration([X], transform=lambda x: x[torch.randperm(len(x))]),
    ):
        with pytest.raises(FishLegError, match=r"transform\(inputs\): expected the same"):
            batches(shaky)


# ------------------------------------------------------------------------ inputs and targets


Named = namedtuple("Named", "a b")


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        (X, X, None),
        ([X], X, None),
        ((X, Y), X, Y),
        ([{"x": X}, Y], {"x": X}, Y),
        (((X, X), Y), (X, X), Y),
        ({"x": X, "y": Y}, {"x": X, "y": Y}, None),
        (Named(X, Y), Named(X, Y), None),
        ((X, None), X, None),
    ],
)
def test_inputs_and_targets_are_told_apart_by_one_rule(batch, inputs, targets):
    held = Calibration.from_batches([batch, batch])
    streamed = StreamedCalibration([batch, batch])
    for calibration in (held, streamed):
        (found,) = batches(calibration, 2 * N)
        assert type(found.inputs) is type(inputs)
        for one, other in zip(tensors_of(found.inputs), tensors_of(inputs), strict=True):
            assert torch.equal(one, torch.cat([other, other]))
        assert (found.targets is None) == (targets is None)
        if targets is not None:
            assert torch.equal(found.targets, torch.cat([targets, targets]))


def test_split_says_which_are_the_targets():
    data = [{"x": X, "labels": Y}]
    split = lambda batch: (batch["x"], batch["labels"])  # noqa: E731
    for calibration in (
        Calibration.from_batches(data, split=split),
        StreamedCalibration(data, split=split),
    ):
        (found,) = batches(calibration, N)
        assert torch.equal(found.inputs, X) and torch.equal(found.targets, Y)


def test_what_a_function_of_the_user_raises_is_the_cause_of_one_that_says_where():
    for make in (Calibration.from_batches, StreamedCalibration):
        with pytest.raises(ShapeMismatch, match="batch 0: split raised KeyError: 'x'") as error:
            make([{"y": X}], split=lambda batch: (batch["x"], None))
        assert isinstance(error.value.__cause__, KeyError)
    calibration = Calibration(inputs=X, transform=lambda x: x["a"])
    with pytest.raises(FishLegError, match=r"transform\(inputs\) raised .* for float64\[11, 2, 5"):
        batches(calibration)


@pytest.mark.parametrize("indices", [torch.rand(N), -torch.arange(N), torch.zeros(N, 1).long()])
def test_samples_are_numbered_by_whole_numbers(indices):
    with pytest.raises(ShapeMismatch, match="indices: expected whole numbers"):
        Calibration(inputs=X, indices=indices)


@pytest.mark.parametrize("make", [Calibration.from_batches, StreamedCalibration])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one"),
        ([(X, X, Y)], "batch 0: .* 3 things.*`split=lambda batch"),
        ([X, (X, Y)], r"batch 1: expected samples as in the first batch"),
        ([X, X[:, :1]], r"batch 1: .*float64\[11, 1, 5, 5\].*pad them"),
        ([X, X.float()], r"batch 1: .*float32"),
        ([(X, Y[:3])], r"batch 0\[1\]: expected 11 samples"),
        ([(X, "cat")], "batch 0, targets: expected a tensor or an array.* got str"),
        ([(X, {"y": Y})], "batch 0, targets: expected one tensor"),
        ([("a", "b")], "batch 0, inputs: .* got str"),
        ([3], "batch 0, inputs: .* got int"),
    ],
)
def test_batches_that_are_no_samples_are_refused_with_their_place(make, data, message):
    with pytest.raises(ShapeMismatch, match=message):
        make(data)


# -------------------------------------------------------------------------------- memory


def test_samples_that_would_not_fit_are_refused_before_they_are_read():
    read = []

    class Long:
        def __len__(self):
            return 1000

        def __iter__(self):
            for _ in range(1000):
                read.append(1)
                yield X

    size = X.nbytes
    with pytest.raises(CapacityExceeded, match="4.4 MB.*`samples=`.*`StreamedCalibration`"):
        Calibration.from_batches(Long(), memory_bytes=1500 * size)
    assert len(read) == 1
    assert len(Calibration.from_batches(Long(), samples=25, memory_bytes=6 * size)) == 25
    assert len(read) == 1 + 3
    with pytest.raises(CapacityExceeded, match="33 of them"):
        Calibration.from_batches((X for _ in range(100)), memory_bytes=5 * size)


def test_the_memory_of_held_samples_is_stated_before(caplog):
    with caplog.at_level(logging.INFO, "fishleg"):
        Calibration.from_batches([X] * 1000, memory_bytes=1 << 40, samples=500 * N)
    assert "about 2.2 MB" in caplog.text


def test_samples_takes_the_first_ones():
    held = Calibration.from_batches(loader(), samples=7)
    assert torch.equal(held.inputs, X[:7]) and torch.equal(held.targets, Y[:7])
    with pytest.raises(ValueError, match="samples: expected at least 1"):
        Calibration.from_batches(loader(), samples=0)


def test_a_checksum_depends_on_each_byte_its_place_and_its_kind():
    base = torch.arange(20, dtype=torch.int32)
    seen = {checksum(base)}
    for other in (
        base.flip(0),
        base.roll(1),
        base.reshape(4, 5),
        base.float(),
        base[:-1],
        torch.cat([base, base[:1] * 0]),
        *(base + torch.eye(20, dtype=torch.int32)[i] for i in range(20)),
    ):
        seen.add(checksum(other))
    assert len(seen) == 27
    assert checksum(base) == checksum(base.clone())
    assert checksum((base, None)) == checksum([base])
    for dtype in (torch.bool, torch.bfloat16, torch.complex64, torch.uint8):
        assert checksum(torch.ones(3, dtype=dtype)[1:]) == checksum(torch.ones(2, dtype=dtype))


def test_several_inputs_can_be_streamed():
    array = numpy.linspace(0, 1, 2 * N).reshape(N, 2)
    streamed = StreamedCalibration(
        [{"a": array[:4], "b": array[:4]}, {"a": array[4:], "b": array[4:]}]
    )
    (batch,) = batches(streamed, N)
    assert torch.equal(batch.inputs["b"], torch.as_tensor(array))
