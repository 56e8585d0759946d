"""Wrong types are refused when an object is made, and every public object has a short repr."""

import inspect
import re

import pytest
import torch
from torch import nn

import fishleg
from fishleg.errors import WrongType

MODEL = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
PARTITION = fishleg.partition_parameters(MODEL)
SAMPLES = fishleg.Calibration(inputs=torch.randn(6, 4))


def source(**changes):
    arguments = {
        "model": MODEL,
        "likelihood": fishleg.Categorical(),
        "partition": PARTITION,
        "calibration": SAMPLES,
    }
    return fishleg.GradientSource(**{**arguments, **changes})


REFUSED = [
    *((one, {"damping": "1e-4"}) for one in fishleg.ESTIMATORS.values()),
    *((one, {"partition": MODEL}) for one in fishleg.ESTIMATORS.values()),
    *((one, {"memory_limit": "2 GB"}) for one in fishleg.ESTIMATORS.values()),
    (fishleg.KFAC, {"dense_size": "big"}),
    (fishleg.EKFAC, {"dense_size": 1.5}),
    (fishleg.MFAC, {"gradients": "64"}),
    (fishleg.MFAC, {"seed": None}),
    (fishleg.ESTIMATORS["obs"], {"block_size": 8.0}),
    (fishleg.LayerHessian, {"relative_damping": "1 %"}),
    (source, {"model": "resnet20"}),
    (source, {"partition": MODEL}),
    (source, {"likelihood": nn.CrossEntropyLoss()}),
    (source, {"likelihood": fishleg.Categorical}),
    (source, {"draws": "2"}),
    (source, {"seed": 1.5}),
    (source, {"batch_size": True}),
    (source, {"calling": print}),
    (source, {"rank_group": 2}),
    (fishleg.Gaussian, {"variance": "1"}),
    (fishleg.Categorical, {"class_dim": "last"}),
    (fishleg.Categorical, {"ignore_index": 0.5}),
    (fishleg.Calling, {"call": "forward"}),
    (fishleg.Calling, {"output": 0.5}),
    (fishleg.RankGroup, {"rank": "0"}),
    (fishleg.partition_parameters, {"model": MODEL.state_dict()}),
    (fishleg.partition_parameters, {"model": MODEL, "keep": "0"}),
    (fishleg.partition_parameters, {"model": MODEL, "prunable": [0]}),
]


@pytest.mark.parametrize(("make", "arguments"), REFUSED)
def test_a_wrong_type_is_refused_in_one_sentence(make, arguments):
    if inspect.isclass(make) and issubclass(make, fishleg.AbstractEstimator):
        arguments = {"partition": PARTITION, "damping": 1e-3, **arguments}
    with pytest.raises(WrongType) as refusal:
        make(**arguments)
    message = str(refusal.value)
    assert "expected" in message
    assert "got" in message
    assert len(re.findall(r"[.?!](?:\s|$)", message)) == 1, message


def test_a_name_in_place_of_a_list_of_names_is_told_how_to_write_it():
    with pytest.raises(WrongType, match=re.escape("write ['0']")):
        fishleg.partition_parameters(MODEL, keep="0")


def instances():
    """Return an object of each public class, by its name."""
    fitted = fishleg.fit(MODEL, torch.randn(6, 4), likelihood="cross_entropy")
    report = fishleg.prune_once(
        nn.Sequential(*MODEL), fitted.estimator, sparsity=0.5, compensation="none"
    )
    made = [
        *(one(PARTITION, damping=1e-3) for one in fishleg.ESTIMATORS.values()),
        PARTITION,
        PARTITION.groups[0],
        SAMPLES,
        fishleg.StreamedCalibration([torch.randn(3, 4)]),
        source(),
        fitted,
        report,
        report.layers[0],
        fishleg.Bernoulli(),
        fishleg.Gaussian(),
        fishleg.Categorical(class_dim=1),
        fishleg.Calling(output="logits"),
        fishleg.RankGroup(),
        fishleg.FitProgress(done=1, total=2, metrics={}),
        fishleg.UnknownName("method", "x", ["y"]),
        *(
            kind("a message")
            for kind in (getattr(fishleg, name) for name in fishleg.__all__)
            if inspect.isclass(kind)
            and issubclass(kind, fishleg.FishLegError)
            and kind not in {fishleg.UnknownName, fishleg.InvalidOption}
        ),
        fishleg.InvalidOption("damping", "expected > 0, got 0"),
        fishleg.EigenOptions(),
        fishleg.FishLegOptions(),
        fishleg.FlsOptions(),
    ]
    return {type(one).__name__: one for one in made}


def test_every_public_class_has_a_short_repr():
    made = instances()
    classes = [
        one for one in (getattr(fishleg, name) for name in fishleg.__all__) if inspect.isclass(one)
    ]
    concrete = {one.__name__ for one in classes if not inspect.isabstract(one)} - {"Likelihood"}
    assert concrete <= set(made)
    for name in concrete:
        shown = repr(made[name])
        assert shown.startswith(name), shown
        assert len(shown) <= 160, shown
        assert " at 0x" not in shown, shown
        assert "\n" not in shown, shown
