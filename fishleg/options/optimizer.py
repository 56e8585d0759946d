"""Options of the FishLeg optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fishleg.options.choices import Directions, DrawnLabels, Start, TrackedStructure
from fishleg.options.fields import Options, Range


@dataclass(frozen=True, kw_only=True)
class TrackingOptions(Options):
    """Options of the tracking of a group's Q.

    Attributes:
        damping: gamma, added to the Fisher's diagonal, in the Fisher's units.
        structure: form of the inverse's blocks. Matrices and kernels have this one, vectors (biases
            and normalisation) a diagonal one.
        start: `moments`: inverse second moments of the gradients' rows and columns; `kfac`: inverse
            K-FAC factors of linear and convolution layers, and moments for groups without one, and
            for convolutions in groups; `diagonal`: inverse diagonal of F; or `identity`: a multiple
            of the identity, as in the paper.
        decay: of the running moments, an update, in [0, 1).
        learning_rate: of the inverse's correction, relative; 0 learns none. It is the rate of Adam.
        directions: that J is averaged over: drawn like the gradients, or standard normal.
        probes: directions an update, where J has no cheap closed form.
        seed: of the probes.

    Raises:
        UnknownName: an option is none of its choices.
        InvalidOption: a value has another type, or is out of range.
    """

    damping: Annotated[float, Range(gt=0)] = 0.03
    structure: TrackedStructure = "kronecker"
    start: Start = "moments"
    decay: Annotated[float, Range(ge=0, lt=1)] = 0.7
    learning_rate: Annotated[float, Range(ge=0)] = 0.005
    directions: Directions = "gradients"
    probes: Annotated[int, Range(ge=1)] = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """Times of the updates of the inverse Fisher, and the length of steps.

    Attributes:
        trust: longest step, in nats a sample; None for no limit.
        update_every: steps between updates of the inverse.
        samples: of a batch that an update takes; None for all.
        labels: drawn from the model, or drawn with the same moments and less noise.
    """

    trust: Annotated[float | None, Range(gt=0, unit="nats a sample")] = 0.1
    update_every: Annotated[int, Range(ge=1)] = 10
    samples: Annotated[int | None, Range(ge=1)] = None
    labels: DrawnLabels = "matched"
