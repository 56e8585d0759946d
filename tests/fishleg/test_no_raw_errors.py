"""Hostile models and samples through every public function: what fails, fails in plain words.

An error is the library's own if it is a FishLegError, or a ValueError that the library raised
itself. What the model raised is its cause.
"""

import copy
import traceback
import warnings

import pytest
import torch
from torch import nn

import fishleg
from fishleg import Calibration, Categorical, GradientSource
from fishleg.errors import FishLegError
from fishleg.gradients.memory import pass_bytes
from fishleg.optim import FishLeg as FishLegOptimizer
from fishleg.pruning import (
    Refinement,
    RefinementOptions,
    dense_masks,
    mean_divergence,
    prune_once,
    reestimate_norms,
    refine,
)

CLASSES = 3
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % CLASSES
BATCHES = [X[:3], X[3:6], X[6:]]
"""The last one has one sample."""


class Model(nn.Module):
    """A linear layer, and what becomes of its outputs."""

    def __init__(self, after=lambda outputs: outputs, inputs=4, outputs=CLASSES):
        super().__init__()
        self.body = nn.Linear(inputs, outputs)
        self.after = after

    def forward(self, x):
        return self.after(self.body(x))


def failing(error):
    def after(outputs):
        raise error

    return lambda: Model(after)


def frozen():
    return Model().requires_grad_(False)


class Hollow(Model):
    """Some of its parameters have no entries."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has nothing to initialise
            self.hollow = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, CLASSES))

    def forward(self, x):
        return super().forward(x) + self.hollow(x)


def complex_numbers():
    layer = nn.Linear(4, CLASSES, dtype=torch.complex64)
    model = Model()
    model.body = nn.Sequential(_ToComplex(), layer)
    model.after = torch.abs
    return model


class _ToComplex(nn.Module):
    def forward(self, x):
        return x.to(torch.complex64)


def normed(**options):
    layers = nn.Linear(4, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, CLASSES)
    return nn.Sequential(*layers)


MODELS = {
    "frozen": frozen,
    "no parameters": nn.Flatten,
    "parameters of size 0": Hollow,
    "lazy": lambda: nn.LazyLinear(CLASSES),
    "on the meta device": lambda: Model().to("meta"),
    "cut off by detach": lambda: Model(torch.detach),
    "raises RuntimeError": failing(RuntimeError("the model's own words")),
    "raises StopIteration": failing(StopIteration("the model's own words")),
    "raises KeyError": failing(KeyError("the model's own words")),
    "takes other inputs": lambda: Model(inputs=5),
    "constant": lambda: Model(lambda outputs: 0 * outputs),
    "one number for a batch": lambda: Model(torch.sum),
    "one class": lambda: Model(outputs=1),
    "one number a sample": lambda: Model(lambda outputs: outputs[:, 0]),
    "two outputs": lambda: Model(lambda outputs: (outputs, outputs)),
    "no outputs": lambda: Model(lambda outputs: None),
    "whole numbers": lambda: Model(lambda outputs: outputs.argmax(1, keepdim=True)),
    "complex": complex_numbers,
    "not finite": lambda: Model(lambda outputs: outputs / 0),
    "batch norm": normed,
    "batch norm without statistics": lambda: normed(track_running_stats=False),
}


def source_of(model, targets=Y, **options):
    return GradientSource(
        model,
        Categorical(),
        fishleg.partition_parameters(model),
        Calibration(inputs=X, targets=targets),
        batch_size=3,  # so that the last batch has one sample
        **options,
    )


def fit(model, make=fishleg.DiagonalFisher):
    source = source_of(model)
    estimator = make(source.partition, damping=0.1)
    estimator.fit(source)
    return estimator, source


def hold(model, **options):
    source = source_of(model, **options)
    return source.hold(source.partition.names)


def look(model):
    source = source_of(model)
    list(map(dict, source.layers()))
    list(map(dict, source.factored()))
    return pass_bytes(source), source.report()


def multiply(model):
    source = source_of(model)
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return fishleg.fisher_vector_product(source, v)


def judge(model):
    return fishleg.certify(*fit(model))


def compare(model):
    source = source_of(model)
    after = {name: p + 1 for name, p in model.named_parameters()}
    return fishleg.pruning_certificate(source, after)


def prune(model):
    estimator, source = fit(model)
    return prune_once(model, estimator, sparsity=0.5, source=source, compensation="fisher")


def go_back(model, statistics="running"):
    partition = fishleg.partition_parameters(model)
    refinement = Refinement(
        model,
        copy.deepcopy(model),
        Categorical(),
        partition,
        dense_masks(partition),
        steps=len(BATCHES),
        options=RefinementOptions(statistics=statistics),
    )
    return list(refine(refinement, BATCHES))


def optimise(model):
    optimizer = FishLegOptimizer(model, Categorical())
    model.eval()  # the library is at work in `step` alone
    for batch in BATCHES:
        optimizer.observe(batch)
        optimizer.step()


USES = {
    "sampled": hold,
    "enumerated": lambda model: hold(model, labels="enumerated"),
    "empirical": lambda model: hold(model, labels="empirical"),
    "looked at": look,
    "F v": multiply,
    **{
        f"fit {name}": lambda model, make=make: fit(model, make)
        for name, make in fishleg.ESTIMATORS.items()
    },
    "certify": judge,
    "pruning_certificate": compare,
    "prune_once": prune,
    "reestimate_norms": lambda model: reestimate_norms(model, BATCHES),
    "mean_divergence": lambda model: mean_divergence(model, model, Categorical(), BATCHES),
    "refine": go_back,
    "refine by batch": lambda model: go_back(model, "batch"),
    "optimise": optimise,
}
WORKS = {"parameters of size 0", "constant", "batch norm"}
"""Models with which everything works, but for a norm that would divide by one sample's moments."""


def assert_own(error: Exception) -> None:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raised_here = "/fishleg/" in frame.filename and "/tests/" not in frame.filename
    assert isinstance(error, FishLegError) or (isinstance(error, ValueError) and raised_here)
    text = str(error)
    assert len(text) > 30 and "\n" not in text.strip()


@pytest.mark.parametrize("kind", MODELS)
def test_no_raw_error_whatever_the_model(kind):
    failed = {}
    for use, run in USES.items():
        model = MODELS[kind]()
        try:
            run(model)
        except Exception as error:
            assert_own(error)
            if kind.startswith("raises"):
                assert "the model's own words" in str(error.__cause__)
            failed[use] = str(error)
    if kind in WORKS:
        alone = {use for use, text in failed.items() if "one value a channel" in text}
        assert set(failed) == alone == ({"reestimate_norms", "refine by batch"} & set(failed))
        assert bool(alone) == (kind == "batch norm")
    else:
        assert failed


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Y + 1, r"expected class numbers in \[0, 3\), got 3 \(sample 2"),
        (Y - 1, "got -1"),
        (Y.float(), "as integers, or weights"),
        (Y[:, None], r"expected class numbers of shape \(3,\)"),
        (nn.functional.one_hot(Y, CLASSES), r"expected class numbers of shape \(3,\)"),
        (torch.full((7, CLASSES), torch.nan), "expected finite numbers, got nan"),
        (None, "Empirical labels need targets"),
    ],
)
def test_labels_that_are_none_of_the_models_are_refused(targets, message):
    for use in ("hold", "certificate"):
        model = Model()
        with pytest.raises(FishLegError, match=message) as found:
            if use == "hold":
                hold(model, targets=targets, labels="empirical")
            elif targets is None:
                hold(model, targets=None, labels="empirical")
            else:
                source = source_of(model, targets=targets)
                fishleg.pruning_certificate(source, dict(model.named_parameters()))
        assert_own(found.value)


def test_the_callers_grad_modes_do_not_matter_or_are_refused():
    made_outside = Model()
    with torch.inference_mode():
        samples = Calibration(inputs=X.clone(), targets=Y.clone())
        with pytest.raises(FishLegError, match=r"leave torch.inference_mode\(\)"):
            hold(made_outside)
        with pytest.raises(FishLegError, match="make or load the model outside it"):
            hold(Model())
        assert mean_divergence(Model(), Model(), Categorical(), BATCHES) > 0
    model = Model()
    partition = fishleg.partition_parameters(model)
    source = GradientSource(model, Categorical(), partition, samples, labels="empirical")
    expected = source_of(model, labels="empirical").hold(["body"])
    with torch.no_grad():
        assert torch.equal(source.hold(["body"])["body"], expected["body"])


def other_source():
    return source_of(nn.Linear(4, CLASSES))


MISTAKES = {
    "samples that are no Calibration": lambda e, s: GradientSource(
        s.model, Categorical(), s.partition, X
    ),
    "a source of another partition": lambda e, s: e.fit(other_source()),
    "a group that is not there": lambda e, s: e.block("head"),
    "a parameter that is not there": lambda e, s: fishleg.fisher_vector_product(
        s, {"head.weight": X}
    ),
    "a vector that is no tensor": lambda e, s: fishleg.fisher_vector_product(
        s, {"body.weight": 1.0}
    ),
    "a change of what is not there": lambda e, s: fishleg.pruning_certificate(s, {"head": X}),
    "no probes": lambda e, s: fishleg.certify(e, s, probes=0),
    "pruning another model": lambda e, s: prune_once(nn.Linear(4, CLASSES), e, sparsity=0.5),
    "sparsity in percent": lambda e, s: prune_once(s.model, e, sparsity=90),
    "sparsity not a number": lambda e, s: prune_once(s.model, e, sparsity=float("nan")),
    "masks of other groups": lambda e, s: fishleg.apply_masks(s.model, s.partition, {"head": X}),
    "masks of another model": lambda e, s: fishleg.apply_masks(
        nn.Linear(4, CLASSES), s.partition, dense_masks(s.partition)
    ),
    "no masks": lambda e, s: fishleg.count_masks(s.partition, {}),
    "weight masks of other shape": lambda e, s: fishleg.group_masks(
        s.partition, {"body.weight": X}
    ),
    "an estimate before its fit": lambda e, s: type(e)(e.partition, damping=0.1).diagonal(),
    "no damping": lambda e, s: type(e)(e.partition, damping=0.0),
    "divergence of nothing": lambda e, s: mean_divergence(s.model, s.model, s.likelihood, []),
    "a batch for batches": lambda e, s: mean_divergence(s.model, s.model, s.likelihood, X),
    "divergence of an empty batch": lambda e, s: mean_divergence(
        s.model, s.model, s.likelihood, [X[:0]]
    ),
    "norms of a batch": lambda e, s: reestimate_norms(normed(), X),
    "samples of a batch": lambda e, s: Calibration.from_batches(X),
    "samples of a number": lambda e, s: Calibration.from_batches(3),
    "a stream of a number": lambda e, s: fishleg.StreamedCalibration(3),
    "samples of a number, too": lambda e, s: Calibration(inputs=3),
    "a step without a batch": lambda e, s: FishLegOptimizer(s.model, s.likelihood).step(),
    "no steps": lambda e, s: fishleg.cubic(0.0, 0.9, 0),
    "a schedule that falls": lambda e, s: fishleg.linear(0.9, 0.1, 3),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_raw_error_whatever_the_arguments(mistake):
    estimator, source = fit(Model())
    with pytest.raises((FishLegError, ValueError)) as found:
        MISTAKES[mistake](estimator, source)
    assert_own(found.value)
