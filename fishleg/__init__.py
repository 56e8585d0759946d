"""The FishLeg surgeon: inverse Fisher estimation and second-order pruning for PyTorch.

`prune` does all at once, `fit` one step less. Beneath, in the order of use: cut the parameters into
groups, say where per-sample gradients come from, fit an estimator, certify it, prune. Needs torch,
and safetensors for files.
"""

from fishleg.calibration import Calibration
from fishleg.calling import Calling
from fishleg.certificate import certify, pruning_certificate
from fishleg.curvature import Curvature, fit
from fishleg.errors import (
    CapacityExceeded,
    FishLegError,
    NotFitted,
    NotPositiveDefinite,
    ShapeMismatch,
    UnknownName,
    WrongType,
)
from fishleg.estimators import (
    EKFAC,
    ESTIMATORS,
    KFAC,
    MFAC,
    AbstractEstimator,
    BlockWoodbury,
    DiagonalFisher,
    FishLeg,
    FitProgress,
    Identity,
    LayerHessian,
)
from fishleg.fisher import fisher_vector_product
from fishleg.gradients import GradientSource
from fishleg.likelihoods import AbstractLikelihood, Bernoulli, Categorical, Gaussian, Likelihood
from fishleg.one_call import prune
from fishleg.parameters import ParameterGroup, Partition, partition_parameters, used_weight
from fishleg.pruning import (
    LayerReport,
    PruneReport,
    apply_masks,
    count_masks,
    cubic,
    group_masks,
    keep_zeros,
    linear,
    prune_once,
    saliency,
    weight_masks,
    zero_masks,
)
from fishleg.streaming import StreamedCalibration
from fishleg.team import Team

__version__ = "0.1.0"

__all__ = [
    # in one call, and one step below
    "Curvature",
    "fit",
    "keep_zeros",
    "prune",
    # parameters
    "ParameterGroup",
    "Partition",
    "partition_parameters",
    "used_weight",
    # likelihoods and gradients
    "AbstractLikelihood",
    "Bernoulli",
    "Calibration",
    "Calling",
    "Categorical",
    "Gaussian",
    "GradientSource",
    "Likelihood",
    "StreamedCalibration",
    "Team",
    "fisher_vector_product",
    # estimators
    "ESTIMATORS",
    "AbstractEstimator",
    "BlockWoodbury",
    "DiagonalFisher",
    "EKFAC",
    "FishLeg",
    "FitProgress",
    "Identity",
    "KFAC",
    "LayerHessian",
    "MFAC",
    # certificates
    "certify",
    "pruning_certificate",
    # pruning
    "LayerReport",
    "PruneReport",
    "apply_masks",
    "count_masks",
    "cubic",
    "group_masks",
    "linear",
    "prune_once",
    "saliency",
    "weight_masks",
    "zero_masks",
    # errors
    "CapacityExceeded",
    "FishLegError",
    "NotFitted",
    "NotPositiveDefinite",
    "ShapeMismatch",
    "UnknownName",
    "WrongType",
]
