"""Outputs and targets that are numbers, one target an output."""

from __future__ import annotations

from torch import Tensor

from fishleg.errors import ShapeMismatch


def as_rows(values: Tensor) -> Tensor:
    """Return (n, d) of values (n, ...); (n,) counts as (n, 1)."""
    return values.reshape(len(values), -1)


def paired(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as rows (n, d).

    Raises:
        ShapeMismatch: their shapes differ, but for (n,) and (n, 1).
    """
    single = outputs.numel() == targets.numel() == len(outputs) == len(targets)
    if outputs.shape != targets.shape and not single:
        raise ShapeMismatch(
            f"targets: expected the outputs' shape {tuple(outputs.shape)}, "
            f"got {tuple(targets.shape)}."
        )
    return as_rows(outputs), as_rows(targets)
