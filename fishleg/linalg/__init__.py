"""Linear algebra on tensors of any shape."""

from fishleg.linalg.conjugate_gradient import CGReport, Operator, conjugate_gradient
from fishleg.linalg.inverse import invert_damped

__all__ = ["CGReport", "Operator", "conjugate_gradient", "invert_damped"]
