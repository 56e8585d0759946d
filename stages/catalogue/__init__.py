"""The catalogue of the science: every stage with its parameters, inputs, outputs and entry point.

It imports pydantic, `fishleg.options` and the standard library alone, so that `validate` and `plan`
need no torch. Stages import this package for type checking only; `stages.reference` takes the
target of a parameter's name from the parameter class.
"""

from stages.catalogue.declarations import CATALOGUE
from stages.catalogue.estimates import estimate_curvature, estimate_import, estimate_training
from stages.catalogue.parameters.axes import MethodAxes
from stages.catalogue.parameters.curvature import (
    CurvatureParams,
    EigenParams,
    EstimatorParams,
    FishLegParams,
    LayerParams,
    MfacParams,
    ObsParams,
    RefinedFishLegParams,
)
from stages.catalogue.parameters.data import (
    DataParams,
    ExpectationParams,
    ImportParams,
    ModelParams,
)
from stages.catalogue.parameters.evaluation import (
    CompareParams,
    EvaluateParams,
    Published,
    SelectParams,
)
from stages.catalogue.parameters.pruning import (
    AdmmParams,
    GradualParams,
    MultistepParams,
    OneshotParams,
    PickParams,
    PruningParams,
    RefinementParams,
    StepwiseParams,
    TargetParams,
)
from stages.catalogue.parameters.training import (
    FinetuneParams,
    FishLegOptimizerParams,
    PretrainParams,
    TrainingParams,
)
from stages.catalogue.registries import DATASETS, METHODS, MODELS

__all__ = [
    "CATALOGUE",
    # registries
    "DATASETS",
    "METHODS",
    "MODELS",
    # estimates
    "estimate_curvature",
    "estimate_import",
    "estimate_training",
    # parameters
    "MethodAxes",
    "DataParams",
    "ModelParams",
    "ExpectationParams",
    "ImportParams",
    "FishLegOptimizerParams",
    "TrainingParams",
    "PretrainParams",
    "FinetuneParams",
    "EigenParams",
    "FishLegParams",
    "RefinedFishLegParams",
    "ObsParams",
    "MfacParams",
    "LayerParams",
    "EstimatorParams",
    "CurvatureParams",
    "AdmmParams",
    "PruningParams",
    "TargetParams",
    "OneshotParams",
    "StepwiseParams",
    "GradualParams",
    "RefinementParams",
    "MultistepParams",
    "PickParams",
    "SelectParams",
    "EvaluateParams",
    "Published",
    "CompareParams",
]
