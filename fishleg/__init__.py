"""The FishLeg surgeon: inverse Fisher estimation and second-order pruning for PyTorch.

`prune` is one call, `fit` one level below. The classes beneath, in the order of use: cut the
parameters into groups, make a source of per-sample gradients, fit an estimator, certify it, prune.
Needs torch, and safetensors for files; torch is imported at the first use of a name, so that
`fishleg.options` works without it.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from fishleg.calibration import Calibration as Calibration
    from fishleg.calling import Calling as Calling
    from fishleg.certificate import certify as certify
    from fishleg.certificate import pruning_certificate as pruning_certificate
    from fishleg.curvature import Curvature as Curvature
    from fishleg.curvature import fit as fit
    from fishleg.errors import CapacityExceeded as CapacityExceeded
    from fishleg.errors import FishLegError as FishLegError
    from fishleg.errors import InvalidOption as InvalidOption
    from fishleg.errors import NotFitted as NotFitted
    from fishleg.errors import NotPositiveDefinite as NotPositiveDefinite
    from fishleg.errors import ShapeMismatch as ShapeMismatch
    from fishleg.errors import UnknownName as UnknownName
    from fishleg.errors import WrongType as WrongType
    from fishleg.estimators import EKFAC as EKFAC
    from fishleg.estimators import ESTIMATORS as ESTIMATORS
    from fishleg.estimators import FLS as FLS
    from fishleg.estimators import KFAC as KFAC
    from fishleg.estimators import MFAC as MFAC
    from fishleg.estimators import OBS as OBS
    from fishleg.estimators import AbstractEstimator as AbstractEstimator
    from fishleg.estimators import DiagonalFisher as DiagonalFisher
    from fishleg.estimators import Eigen as Eigen
    from fishleg.estimators import FishLeg as FishLeg
    from fishleg.estimators import FitProgress as FitProgress
    from fishleg.estimators import LayerHessian as LayerHessian
    from fishleg.estimators import Magnitude as Magnitude
    from fishleg.fisher import fisher_vector_product as fisher_vector_product
    from fishleg.gradients.rank_group import RankGroup as RankGroup
    from fishleg.gradients.source import GradientSource as GradientSource
    from fishleg.likelihoods import AbstractLikelihood as AbstractLikelihood
    from fishleg.likelihoods import Bernoulli as Bernoulli
    from fishleg.likelihoods import Categorical as Categorical
    from fishleg.likelihoods import Gaussian as Gaussian
    from fishleg.likelihoods import Likelihood as Likelihood
    from fishleg.one_call import prune as prune
    from fishleg.options import EigenOptions as EigenOptions
    from fishleg.options import FishLegOptions as FishLegOptions
    from fishleg.options import FlsOptions as FlsOptions
    from fishleg.parameters import ParameterGroup as ParameterGroup
    from fishleg.parameters import Partition as Partition
    from fishleg.parameters import partition_parameters as partition_parameters
    from fishleg.parameters import used_weight as used_weight
    from fishleg.pruning import LayerReport as LayerReport
    from fishleg.pruning import PruneReport as PruneReport
    from fishleg.pruning import apply_masks as apply_masks
    from fishleg.pruning import count_masks as count_masks
    from fishleg.pruning import cubic as cubic
    from fishleg.pruning import group_masks as group_masks
    from fishleg.pruning import keep_zeros as keep_zeros
    from fishleg.pruning import linear as linear
    from fishleg.pruning import prune_once as prune_once
    from fishleg.pruning import saliency as saliency
    from fishleg.pruning import weight_masks as weight_masks
    from fishleg.pruning import zero_masks as zero_masks
    from fishleg.streaming import StreamedCalibration as StreamedCalibration

_HOMES = {
    # in one call, and one step below
    "Curvature": "fishleg.curvature",
    "fit": "fishleg.curvature",
    "keep_zeros": "fishleg.pruning",
    "prune": "fishleg.one_call",
    # parameters
    "ParameterGroup": "fishleg.parameters",
    "Partition": "fishleg.parameters",
    "partition_parameters": "fishleg.parameters",
    "used_weight": "fishleg.parameters",
    # likelihoods and gradients
    "AbstractLikelihood": "fishleg.likelihoods",
    "Bernoulli": "fishleg.likelihoods",
    "Calibration": "fishleg.calibration",
    "Calling": "fishleg.calling",
    "Categorical": "fishleg.likelihoods",
    "Gaussian": "fishleg.likelihoods",
    "GradientSource": "fishleg.gradients.source",
    "Likelihood": "fishleg.likelihoods",
    "StreamedCalibration": "fishleg.streaming",
    "RankGroup": "fishleg.gradients.rank_group",
    "fisher_vector_product": "fishleg.fisher",
    # estimators
    "ESTIMATORS": "fishleg.estimators",
    "AbstractEstimator": "fishleg.estimators",
    "OBS": "fishleg.estimators",
    "DiagonalFisher": "fishleg.estimators",
    "EKFAC": "fishleg.estimators",
    "Eigen": "fishleg.estimators",
    "EigenOptions": "fishleg.options",
    "FishLeg": "fishleg.estimators",
    "FishLegOptions": "fishleg.options",
    "FLS": "fishleg.estimators",
    "FlsOptions": "fishleg.options",
    "FitProgress": "fishleg.estimators",
    "Magnitude": "fishleg.estimators",
    "KFAC": "fishleg.estimators",
    "LayerHessian": "fishleg.estimators",
    "MFAC": "fishleg.estimators",
    # certificates
    "certify": "fishleg.certificate",
    "pruning_certificate": "fishleg.certificate",
    # pruning
    "LayerReport": "fishleg.pruning",
    "PruneReport": "fishleg.pruning",
    "apply_masks": "fishleg.pruning",
    "count_masks": "fishleg.pruning",
    "cubic": "fishleg.pruning",
    "group_masks": "fishleg.pruning",
    "linear": "fishleg.pruning",
    "prune_once": "fishleg.pruning",
    "saliency": "fishleg.pruning",
    "weight_masks": "fishleg.pruning",
    "zero_masks": "fishleg.pruning",
    # errors
    "CapacityExceeded": "fishleg.errors",
    "FishLegError": "fishleg.errors",
    "InvalidOption": "fishleg.errors",
    "NotFitted": "fishleg.errors",
    "NotPositiveDefinite": "fishleg.errors",
    "ShapeMismatch": "fishleg.errors",
    "UnknownName": "fishleg.errors",
    "WrongType": "fishleg.errors",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # a checker is to refuse names that are not there

    def __getattr__(name: str) -> Any:
        """Return a public name or a submodule, imported at its first use.

        Raises:
            AttributeError: there is no such name.
        """
        if name == "__version__":
            found: Any = version("fishleg-surgeon")
        elif name in _HOMES:
            found = getattr(import_module(_HOMES[name]), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """Return all names, those not imported yet too."""
        return sorted({*globals(), *__all__, "__version__"})
