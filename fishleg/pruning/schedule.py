"""Schedules: the sparsity after each step of a gradual or several-step pruning."""

from __future__ import annotations


def cubic(initial: float, final: float, steps: int) -> list[float]:
    """Return the sparsities after steps 1 ... n, with large steps first and small ones last.

        s_t = final + (initial - final) (1 - t / n)^3          (Zhu and Gupta, 2017, equation 1)

    Args:
        initial: sparsity before the first step, in [0, final].
        final: sparsity after the last, in [initial, 1).
        steps: n >= 1.

    Returns:
        n sparsities that never fall; the last is exactly `final`. An argument out of range is a
        ValueError.
    """
    return _schedule(initial, final, steps, power=3)


def linear(initial: float, final: float, steps: int) -> list[float]:
    """Return the sparsities after steps 1 ... n, equal amounts a step.

        s_t = final + (initial - final) (1 - t / n)

    Arguments and result are those of `cubic`.
    """
    return _schedule(initial, final, steps, power=1)


def geometric(initial: float, final: float, steps: int) -> list[float]:
    """Return the sparsities after steps 1 ... n, equal fractions of the remaining weights.

        1 - s_t = (1 - initial) ((1 - final) / (1 - initial))^(t / n)

    Arguments and result are those of `cubic`.
    """
    _check(initial, final, steps)
    ratio = (1.0 - final) / (1.0 - initial)
    density = [(1.0 - initial) * ratio ** (step / steps) for step in range(1, steps)]
    return [min(max(1.0 - one, initial), final) for one in density] + [final]


def _schedule(initial: float, final: float, steps: int, power: int) -> list[float]:
    _check(initial, final, steps)
    left = [(1.0 - step / steps) ** power for step in range(1, steps)]
    # the bounds undo rounding: a falling sparsity would need removed weights to come back
    return [min(max(final + (initial - final) * part, initial), final) for part in left] + [final]


def _check(initial: float, final: float, steps: int) -> None:
    if not 0.0 <= initial <= final < 1.0:
        raise ValueError(f"Expected 0 <= initial <= final < 1, got {initial} and {final}.")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
