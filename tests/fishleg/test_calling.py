import copy
from collections import UserDict, namedtuple

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fishleg import (
    Calibration,
    Calling,
    GradientSource,
    Magnitude,
    fisher_vector_product,
    pruning_certificate,
)
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.likelihoods import Categorical
from fishleg.nests import map_tensors
from fishleg.optim import FishLeg as FishLegOptimizer
from fishleg.parameters import partition_parameters
from fishleg.pruning import (
    Refinement,
    RefinementOptions,
    dense_masks,
    mean_divergence,
    reestimate_norms,
    refine,
)
from tests.fishleg.networks import CLASSES, shake
from tests.reference import dense_fisher, flat_vector

EXACT = {"rtol": 1e-10, "atol": 1e-10}
N = 5
Pair = namedtuple("Pair", "left right")


class Base(nn.Module):
    """Two inputs to one output; a bare parameter takes the general path."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, CLASSES)

    def mix(self, left, right):
        return self.head((self.left(left) + self.gain * self.right(right)).tanh())


class Keywords(Base):
    def forward(self, left=None, right=None, *, scale=1.0):
        return self.mix(left, right) * scale


class Positional(Base):
    def forward(self, left, right):
        return self.mix(left, right)


class OneDict(Base):
    def forward(self, batch):
        return self.mix(batch["left"], batch["right"])


class OneTuple(Base):
    def forward(self, pair, scale=1.0):
        return self.mix(pair[0], pair[1]) * scale


class Anything(Base):
    def forward(self, left=None, right=None, **others):
        assert set(others) <= {"unused"}
        return self.mix(left, right)


class Wrapper(nn.Module):
    """Takes anything, as nn.DataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


class OneNamed(Base):
    def forward(self, pair):
        return self.mix(pair.left, pair.right)


class Deep(Base):
    def forward(self, batch):
        return self.mix(batch["a"][0], batch["a"][1]["b"])


class Joined(Base):
    def forward(self, x):
        return self.mix(x[:, :3], x[:, 3:])


LEFT = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RIGHT = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WAYS = {
    "a dict as keywords": (Keywords, {"right": RIGHT, "left": LEFT}, Calling()),
    "a dict as one argument": (OneDict, {"left": LEFT, "right": RIGHT}, Calling()),
    "a dict with keys that only **kwargs takes": (
        Anything,
        {"left": LEFT, "right": RIGHT, "unused": LEFT},
        Calling(),
    ),
    "a mapping": (Keywords, UserDict(left=LEFT, right=RIGHT), Calling()),
    "a tuple as arguments": (Positional, (LEFT, RIGHT), Calling()),
    "a list as arguments": (Positional, [LEFT, RIGHT], Calling()),
    "a tuple as one argument": (OneTuple, (LEFT, RIGHT), Calling()),
    "a named tuple": (OneNamed, Pair(LEFT, RIGHT), Calling()),
    "a nest in a nest": (Deep, {"a": (LEFT, {"b": RIGHT})}, Calling()),
    "arrays": (Positional, (LEFT.numpy(), RIGHT.numpy()), Calling()),
    "as the user says": (
        Positional,
        {"b": RIGHT, "a": LEFT},
        Calling(call=lambda model, inputs: model(inputs["a"], inputs["b"])),
    ),
}


def source_over(model, inputs, calling=None, **options) -> GradientSource:
    return GradientSource(
        model,
        Categorical(),
        partition_parameters(model),
        Calibration(inputs=inputs),
        calling=calling or Calling(),
        **options,
    )


@pytest.mark.parametrize("way", WAYS)
def test_curvature_is_the_same_however_the_inputs_are_nested(way):
    make, inputs, calling = WAYS[way]
    torch.manual_seed(0)
    model = shake(make())
    source = source_over(model, inputs, calling, labels="enumerated", batch_size=2 * CLASSES)
    groups = [(group.weight, group.bias) for group in source.partition.groups]
    reference = shake(Joined())
    reference.load_state_dict(model.state_dict())
    fisher = dense_fisher(reference, torch.cat([LEFT, RIGHT], dim=1), groups)
    held = source.hold(source.partition.names)
    rows = torch.cat([held[name].flatten(1) for name in source.partition.names], dim=1)
    torch.testing.assert_close(rows.T @ rows, fisher, **EXACT)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    product = flat_vector(fisher_vector_product(source, v), groups)
    torch.testing.assert_close(product, fisher @ flat_vector(v, groups), **EXACT)


def test_a_wrapper_passes_inputs_as_its_model_takes_them():
    model = shake(Positional())
    wrapped = {
        "keywords": (Keywords, {"left": LEFT, "right": RIGHT}),
        "places": (Positional, (LEFT, RIGHT)),
    }
    for make, inputs in wrapped.values():
        inner = make().double()
        inner.load_state_dict(model.state_dict())
        outputs = Calling().outputs(Wrapper(inner), inputs)
        assert torch.equal(outputs, model(LEFT, RIGHT))


def test_arrays_that_cannot_be_written_to_are_taken_as_they_are():
    array = numpy.arange(6.0).reshape(3, 2)
    array.flags.writeable = False
    batch = next(Calibration(inputs=array).batches(3, torch.device("cpu")))
    assert batch.inputs.tolist() == array.tolist()


class Spoiling(nn.Module):
    """Writes into its input, as a first layer nn.ReLU(inplace=True) does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(x.mul_(2).relu_())


def test_a_model_or_transform_that_writes_into_its_input_leaves_the_samples_alone():
    inputs = LEFT.clone()
    model = shake(Spoiling())
    held = source_over(model, inputs).hold(["head"])
    again = source_over(model, inputs).hold(["head"])
    assert torch.equal(held["head"], again["head"])
    calibration = Calibration(inputs=inputs, transform=lambda x: x.sub_(1))
    list(calibration.batches(2, torch.device("cpu")))
    assert torch.equal(inputs, LEFT)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"a": LEFT, "b": [RIGHT, RIGHT[:2]]},
            r"inputs\['b'\]\[1\]: expected 5 samples .* \(2, 2\)",
        ),
        ({"a": LEFT, "b": None}, r"inputs\['b'\]: expected a tensor or an array.* got NoneType"),
        ((LEFT, "text"), r"inputs\[1\]: .* got str"),
        ([1.0, 2.0], r"inputs\[0\]: .* got float"),
        ({}, "at least one tensor"),
        (torch.zeros(()), "samples in the first dimension"),
        (torch.zeros(0, 3), "at least one sample"),
        (torch.eye(3).to_sparse(), "expected a dense tensor, got a sparse_coo one"),
        (numpy.array(["a", "b"]), "array of numbers"),
        (numpy.array([[1], [1, 2]], dtype=object), "array of numbers"),
    ],
)
def test_what_is_no_nest_of_samples_is_refused_with_its_place(inputs, message):
    with pytest.raises(ShapeMismatch, match=message):
        Calibration(inputs=inputs)


def test_a_transform_keeps_the_samples():
    calibration = Calibration(inputs={"a": LEFT}, transform=lambda nest: nest["a"].T)
    with pytest.raises(ShapeMismatch, match=r"transform\(inputs\): expected 5 samples"):
        next(calibration.batches(N, torch.device("cpu")))


# ------------------------------------------------------------------------------ outputs


class Many(nn.Module):
    """Gives a result in a form of the test's choice."""

    def __init__(self, form):
        super().__init__()
        self.head = nn.Linear(3, CLASSES)
        self.aside = nn.Linear(3, CLASSES)
        self.form = form

    def forward(self, x):
        return self.form(self.head(x), self.aside(x))


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda head, aside: (aside, head), 1),
        (lambda head, aside: {"logits": head, "aux": aside}, "logits"),
        (lambda head, aside: Pair(head, aside), "left"),
        (lambda head, aside: Pair(head, aside), 0),
        (lambda head, aside: (aside, (aside, head)), lambda result: result[1][1]),
        (lambda head, aside: head, "logits"),
    ],
)
def test_the_output_that_counts_is_the_one_that_was_named(form, output):
    model = shake(Many(form))
    plain = shake(Many(lambda head, aside: head))
    plain.load_state_dict(model.state_dict())
    v = {"head.weight": torch.randn(CLASSES, 3, dtype=torch.float64)}
    found = fisher_vector_product(source_over(model, LEFT, Calling(output=output)), v)
    expected = fisher_vector_product(source_over(plain, LEFT), v)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    ("form", "output", "message"),
    [
        (lambda head, aside: (head, aside), None, "tuple with 0, 1; choose one with `Calling"),
        (lambda head, aside: {"logits": head}, None, "dict with 'logits'"),
        (lambda head, aside: {"logits": head}, "logit", "did you mean 'logits'"),
        (lambda head, aside: (head, aside), 2, "Unknown output '2'.*Known: 0, 1"),
        (lambda head, aside: None, None, "expected a tensor, got NoneType"),
        (lambda head, aside: head.sum(), None, r"expected a tensor of 5 samples, got \(\)"),
        (lambda head, aside: (head, "x"), 1, "got str"),
    ],
)
def test_an_output_that_is_not_there_is_refused_with_those_that_are(form, output, message):
    source = source_over(shake(Many(form)), LEFT, Calling(output=output))
    with pytest.raises((ShapeMismatch, UnknownName), match=message):
        next(source.stream())


def test_an_error_of_the_model_is_the_cause_of_one_that_says_how_it_was_called():
    inputs = map_tensors(torch.Tensor.float, {"left": LEFT})
    source = source_over(shake(Positional()), inputs)
    with pytest.raises(
        FishLegError, match=r"TypeError.*left=float32\[5, 3\].*`Calling\(call"
    ) as error:
        next(source.stream())
    assert isinstance(error.value.__cause__, TypeError)


# ------------------------------------------------------- whoever else calls a model


class Auxiliary(Base):
    """Two inputs by keyword, a batch norm, and the output that counts beside another one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, left, right):
        hidden = self.norm(self.left(left) + self.gain * self.right(right)).tanh()
        return {"aside": hidden, "logits": self.head(hidden)}


class Plain(Auxiliary):
    def forward(self, x):
        return super().forward(x[:, :3], x[:, 3:])["logits"]


NEST, ROWS = {"left": LEFT, "right": RIGHT}, torch.cat([LEFT, RIGHT], dim=1)
LOGITS = Calling(output="logits")


def twins() -> tuple[nn.Module, nn.Module]:
    """Return two equal networks, one of a nest and one of rows."""
    torch.manual_seed(0)
    one, other = shake(Auxiliary()), Plain().double()
    other.load_state_dict(one.state_dict())
    return one, other


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **EXACT)


def halves(inputs):
    return [map_tensors(lambda leaf, part=part: leaf[part], inputs) for part in PARTS]


PARTS = [slice(0, 3), slice(3, N)]


@pytest.mark.parametrize("method", ["adam", "gauss_newton"])
@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_refinement_takes_nests_and_is_told_which_output_counts(method, statistics):
    results = []
    for model, inputs, calling in zip(twins(), (NEST, ROWS), (LOGITS, Calling()), strict=True):
        dense = copy.deepcopy(model)
        estimator = Magnitude(partition_parameters(model), damping=0.1)
        estimator.fit(source_over(model, inputs, calling))
        with torch.no_grad():
            model.head.weight.mul_(0.5)
        refinement = Refinement(
            model,
            dense,
            Categorical(),
            estimator.partition,
            dense_masks(estimator.partition),
            steps=2,
            options=RefinementOptions(method=method, statistics=statistics),
            estimator=estimator,
            calling=calling,
        )
        divergences = list(refine(refinement, halves(inputs), every=1))
        divergences.append(mean_divergence(model, dense, Categorical(), [inputs], calling))
        results.append((model, divergences))
    assert_equal_states(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1])


def test_batch_norms_are_measured_on_nests():
    one, other = twins()
    reestimate_norms(one, halves(NEST), LOGITS)
    reestimate_norms(other, halves(ROWS))
    assert not torch.equal(one.norm.running_mean, twins()[0].norm.running_mean)
    assert_equal_states(one, other)


def test_the_optimiser_observes_nests():
    for model, inputs, calling in zip(
        found := twins(), (NEST, ROWS), (LOGITS, Calling()), strict=True
    ):
        optimizer = FishLegOptimizer(model, Categorical(), samples=4, calling=calling)
        for _ in range(3):
            optimizer.observe(inputs)
            optimizer.zero_grad()
            outputs = calling.outputs(model, inputs)
            nn.functional.cross_entropy(outputs, torch.arange(N) % CLASSES).backward()
            optimizer.step()
    assert_equal_states(*found)


def test_certificates_take_nests():
    found = []
    for model, inputs, calling in zip(twins(), (NEST, ROWS), (LOGITS, Calling()), strict=True):
        source = source_over(model, inputs, calling)
        after = {name: 1.1 * p for name, p in model.named_parameters()}
        found.append(pruning_certificate(source, after))
    assert found[0] == pytest.approx(found[1])


def test_a_loader_refines_and_measures():
    """Its batches are (inputs, targets), and a class number that is ignored does not count."""

    def tokens(targets):
        torch.manual_seed(0)
        model = shake(nn.Linear(2, CLASSES))
        dense = shake(nn.Linear(2, CLASSES), seed=1)
        partition = partition_parameters(model)
        masks = dense_masks(partition)
        inputs = torch.randn(6, 4, 2, dtype=torch.float64)
        likelihood = Categorical(ignore_index=-1)
        options = RefinementOptions(learning_rate=0.1)
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=3)
        run = Refinement(model, dense, likelihood, partition, masks, steps=2, options=options)
        last = list(refine(run, loader))[-1]
        p, q = (one(inputs[:, :2]).softmax(-1) for one in (dense, model))
        by_hand = (p * (p / q).log()).sum((1, 2)).mean().item()
        return last, mean_divergence(model, dense, likelihood, loader), by_hand, model

    none = torch.zeros(6, 4, dtype=torch.int64)
    padded = none.clone()
    padded[:, 2:] = -1
    whole, half = tokens(none), tokens(padded)
    assert whole[0] > half[0] > 0
    assert half[1] == pytest.approx(half[2], rel=1e-4) and whole[1] > 1.1 * whole[2]
    with pytest.raises(FishLegError, match="ignore_index=-1: which positions count"):
        mean_divergence(
            whole[3], whole[3], Categorical(ignore_index=-1), [torch.zeros(1, 4, 2).double()]
        )
