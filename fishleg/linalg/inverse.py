"""Inverses of damped matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fishleg.errors import NotPositiveDefinite


def invert_damped(matrices: Tensor, damping: float) -> Tensor:
    """Return (matrices + damping I)^-1 by Cholesky, (..., b, b), symmetric to the last bit.

    Args:
        matrices: (..., b, b), symmetric positive semi-definite; give float64 where you can: the
            relative error is about the condition number times the rounding unit.
        damping: gamma > 0.

    Raises:
        NotPositiveDefinite: the factorisation breaks down in spite of the damping.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    factor, info = torch.linalg.cholesky_ex(matrices + damping * eye)
    if bool(info.any()):
        raise NotPositiveDefinite(
            f"{int(info.count_nonzero())} of {info.numel()} curvature blocks are not positive "
            f"definite with damping {damping:g}; expected a positive semi-definite Fisher. "
            "Raise the damping, or look for gradients that are not finite."
        )
    inverse = torch.cholesky_inverse(factor)
    return (inverse + inverse.mT) / 2
