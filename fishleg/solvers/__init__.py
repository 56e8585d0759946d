"""Solvers of the FishLeg objective, each for the block of one group."""

from fishleg.solvers.adam import AdamSolver
from fishleg.solvers.alternating import AlternatingSolver
from fishleg.solvers.base import AbstractSolver, SolverState
from fishleg.solvers.closed import ClosedFormSolver

__all__ = [
    "AbstractSolver",
    "AdamSolver",
    "AlternatingSolver",
    "ClosedFormSolver",
    "SolverState",
]
