"""The names that an option may take, each set declared once."""

from __future__ import annotations

from typing import Literal

Structure = Literal[
    "kronecker", "kronecker_scaled", "tensor", "tensor_scaled", "block", "diagonal", "full"
]
SolverName = Literal["auto", "alternating", "adam"]
Objective = Literal["expected", "probe", "log_det"]
WarmStart = Literal["kfac", "moments", "diagonal", "identity"]
EigenBasis = Literal["kfac", "moments", "log_det"]
MaskFit = Literal["damped", "exact"]
Labels = Literal["sampled", "matched", "enumerated", "empirical"]
DrawnLabels = Literal["sampled", "matched"]
Selection = Literal["single", "greedy", "admm"]
Distribution = Literal["global", "uniform"]
Compensation = Literal["none", "independent", "joint", "fisher"]
Schedule = Literal["cubic", "linear", "geometric"]
Zeros = Literal["keep", "free"]
RefinementMethod = Literal["sgd", "adam", "natural", "gauss_newton"]
Statistics = Literal["running", "batch", "frozen"]
LearnedStructure = Literal["kronecker", "kronecker_scaled", "tensor", "tensor_scaled"]
FlsStart = Literal["identity", "kfac", "moments", "diagonal"]
TrackedStructure = Literal["kronecker", "kronecker_scaled", "diagonal"]
Start = Literal["moments", "kfac", "diagonal", "identity"]
Directions = Literal["gradients", "normal"]
