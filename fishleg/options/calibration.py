"""Options of the calibration: the per-sample gradients that curvature is estimated from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args

from fishleg.errors import InvalidOption, UnknownName
from fishleg.options.choices import DrawnLabels, Labels
from fishleg.options.fields import Options, Range


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """The calibration samples, and their labels.

    Attributes:
        samples: calibration samples, drawn without replacement from the training split.
        labels: drawn from the model ("sampled"); drawn with the same moments and less noise
            ("matched"); all classes by their probability ("enumerated"); or the data's own
            ("empirical").
        draws: labels drawn for each sample, with sampled and matched labels.
        augment: crops and flips, where the data set has them: of each sample once, or in each step
            of the method fls.
        batch_size: samples in a gradient batch.
        seed: of the samples and the labels drawn.

    Raises:
        UnknownName: the labels are none of their choices.
        InvalidOption: a value has another type, is out of range, or does not fit the labels.
    """

    samples: Annotated[int, Range(ge=1)] = 1000
    labels: Labels = "matched"
    draws: Annotated[int, Range(ge=1)] = 1
    augment: bool = False
    batch_size: Annotated[int, Range(ge=1, unit="samples")] = 125
    seed: Annotated[int, Range(ge=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels, self.draws)


def check_labels(labels: Labels, draws: int) -> None:
    """Check the number of labels drawn for each sample, for a kind of labels.

    Raises:
        UnknownName: there is no such kind of labels.
        InvalidOption: a number of draws that is out of range, or several where none are drawn.
    """
    if labels not in get_args(Labels):
        raise UnknownName("labels", labels, get_args(Labels))
    drawn = get_args(DrawnLabels)
    if draws < 1 or (draws > 1 and labels not in drawn):
        raise InvalidOption(
            "draws", f"expected 1, or more with {' or '.join(drawn)} labels, got {draws}"
        )
