"""Automatic damping: a fraction of the network's own mean curvature."""

from __future__ import annotations

from math import isfinite

from fishleg.errors import FishLegError
from fishleg.estimators import AbstractEstimator, LayerHessian, Magnitude
from fishleg.gradients.source import GradientSource
from fishleg.moments import input_moments

RELATIVE_DAMPING = 0.3
"""Damping, in units of the mean curvature of the prunable weights."""
_LAYER_FLOOR = 1e-6  # beside `relative_damping`, which is the layer Hessian's own


def auto_damping(kind: type[AbstractEstimator], source: GradientSource) -> float:
    """Return a damping for an estimator, relative to the mean curvature of the network.

    It is 0.3 times the mean of the Fisher's diagonal over the prunable weights. A factor of the
    loss multiplies curvature and damping by its square, so that no mask changes. One number for
    the network keeps the layers comparable: docs/log.md has the measurements against a damping
    relative to each layer's own curvature, and one chosen by the objective on held-out samples.

    Args:
        kind: of the estimator. Magnitude takes any damping, here 1; the layer Hessian has a damping
            of its own relative to each layer, and gets 1e-6 of the mean of its diagonals.
        source: of scaled gradients, on the samples of the fit.

    Raises:
        FishLegError: no prunable weight has curvature, or it is not finite.

    Cost: one pass of the gradients (of the layers' inputs for the layer Hessian).
    """
    if issubclass(kind, Magnitude):
        return 1.0
    layers = issubclass(kind, LayerHessian)
    mean = _mean_input(source) if layers else mean_curvature(source)
    if not (isfinite(mean) and mean > 0):
        raise FishLegError(
            f"damping='auto': expected curvature in the prunable weights, got a mean of {mean:g} "
            "on these samples; give a number, or look whether the outputs are saturated."
        )
    return (_LAYER_FLOOR if layers else RELATIVE_DAMPING) * mean


def mean_curvature(source: GradientSource) -> float:
    """Return the mean of the Fisher's diagonal over the prunable groups, in units of the loss.

    Cost: one pass of the gradients.
    """
    groups = [group.name for group in source.partition.prunable]
    total = 0.0
    for batch in source.stream(groups) if groups else ():
        for gradients in batch.values():
            total += float(gradients.double().square().sum())
    return total / max(1, sum(source.partition[name].size for name in groups))


def _mean_input(source: GradientSource) -> float:
    """Return the mean of the diagonals of the layers' Hessians."""
    names = [group.name for group in source.partition.prunable]
    sums = input_moments(source, [name for name in names if source.conv_groups(name) is not None])
    means = [float(found[0].diagonal(dim1=1, dim2=2).mean()) for found in sums.values()]
    return sum(means) / max(1, len(means))
