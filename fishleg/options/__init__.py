"""All options of the library, declared and checked once; needs no torch."""

from fishleg.errors import InvalidOption, UnknownName
from fishleg.options.calibration import CalibrationOptions, check_labels
from fishleg.options.choices import (
    Compensation,
    Directions,
    Distribution,
    DrawnLabels,
    Labels,
    LearnedStructure,
    MaskFit,
    Objective,
    RefinementMethod,
    Schedule,
    Selection,
    SolverName,
    Start,
    Statistics,
    Structure,
    TrackedStructure,
    WarmStart,
    Zeros,
)
from fishleg.options.estimators import (
    CLOSED_FORM,
    ESTIMATOR_OPTIONS,
    EstimatorOptions,
    FishLegChanges,
    FishLegOptions,
    FlsChanges,
    FlsOptions,
    KfacOptions,
    LayerOptions,
    MfacOptions,
    NoOptions,
    ObsOptions,
    mistakes_in,
)
from fishleg.options.fields import Field, Options, Range, check, declared
from fishleg.options.optimizer import StepOptions, TrackingOptions
from fishleg.options.pruning import PruningOptions
from fishleg.options.refinement import RefinementOptions

__all__ = [
    # choices
    "Compensation",
    "Directions",
    "Distribution",
    "DrawnLabels",
    "Labels",
    "LearnedStructure",
    "MaskFit",
    "Objective",
    "RefinementMethod",
    "Schedule",
    "Selection",
    "SolverName",
    "Start",
    "Statistics",
    "Structure",
    "TrackedStructure",
    "WarmStart",
    "Zeros",
    # options
    "CalibrationOptions",
    "EstimatorOptions",
    "FishLegChanges",
    "FishLegOptions",
    "FlsChanges",
    "FlsOptions",
    "KfacOptions",
    "LayerOptions",
    "MfacOptions",
    "NoOptions",
    "ObsOptions",
    "PruningOptions",
    "RefinementOptions",
    "StepOptions",
    "TrackingOptions",
    "CLOSED_FORM",
    "ESTIMATOR_OPTIONS",
    # declarations and checks
    "Field",
    "InvalidOption",
    "Options",
    "Range",
    "UnknownName",
    "check",
    "check_labels",
    "declared",
    "mistakes_in",
]
