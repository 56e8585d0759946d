"""Numbers that are not finite are an error with the sample's number and the tensor's name."""

import pytest
import torch
from torch import nn

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError
from fishleg.estimators import KFAC, OBS, FishLeg
from fishleg.moments import accumulate, squares
from tests.fishleg.networks import CLASSES, source_of


class Root(nn.Module):
    """A layer, and the root of what it gives: of 0 it is 0, and its slope is infinite."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head((self.layer(x) @ self.mix).abs().sqrt())


def calibration(inputs: torch.Tensor) -> Calibration:
    return Calibration(inputs=inputs, indices=torch.arange(len(inputs)) + 100)


@pytest.mark.parametrize("estimator", [KFAC, OBS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_named(estimator, value):
    torch.manual_seed(0)
    inputs = torch.randn(9, 4)
    inputs[7, 2] = value
    source = source_of(nn.Sequential(nn.Linear(4, CLASSES)), calibration(inputs), batch_size=4)
    with pytest.raises(
        FishLegError, match="outputs of sample 107.*(nan|inf).*inputs are not finite"
    ):
        estimator(source.partition, damping=0.1).fit(source)


def test_a_gradient_that_is_not_finite_is_named_where_the_loss_is():
    torch.manual_seed(0)
    inputs = torch.randn(9, 4)
    inputs[7] = 0.0
    source = source_of(Root(), calibration(inputs), batch_size=4)
    with pytest.raises(FishLegError, match="gradient of mix of sample 107: .*inputs are finite"):
        list(source.stream(["mix"]))
    for fit in (
        KFAC(source.partition, damping=0.1).fit,
        FishLeg(source.partition, damping=0.1).fit,
        lambda source: source.hold(["layer"]),
        lambda source: accumulate(source, squares, groups=["layer"]),
        lambda source: list(source.thorough().layers()),
    ):
        with pytest.raises(FishLegError, match="(layer|mix) of sample 107"):
            fit(source)


def test_an_input_that_the_outputs_do_not_show_is_named():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.layer(x)[:, 0])

    inputs = torch.randn(5, 3, 4)
    inputs[2, 1, 1] = float("nan")
    source = source_of(Padded(), calibration(inputs))
    with pytest.raises(FishLegError, match="of layer(.weight)? of sample 102"):
        KFAC(source.partition, damping=0.1).fit(source)


def test_a_weight_that_is_not_finite_is_to_blame_itself():
    model = nn.Sequential(nn.Linear(4, CLASSES))
    model[0].weight.data[0, 0] = float("nan")
    source = source_of(model, calibration(torch.randn(3, 4)))
    with pytest.raises(FishLegError, match="0.weight of the model is not finite"):
        list(source.stream())


def test_a_class_that_is_ruled_out_is_no_error():
    class Masked(nn.Linear):
        def forward(self, x):
            ruled_out = torch.tensor([False] * (CLASSES - 1) + [True])
            return super().forward(x).masked_fill(ruled_out, -torch.inf)

    source = source_of(Masked(4, CLASSES), calibration(torch.randn(3, 4)))
    assert all(one.isfinite().all() for one in source.hold(source.partition.names).values())
