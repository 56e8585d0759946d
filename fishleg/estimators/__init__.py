"""Curvature estimators behind one interface."""

from fishleg.estimators.base import AbstractEstimator, Callback, FitProgress
from fishleg.estimators.diagonal import DiagonalFisher
from fishleg.estimators.ekfac import EKFAC
from fishleg.estimators.fishleg import FishLeg
from fishleg.estimators.identity import Identity
from fishleg.estimators.kfac import KFAC
from fishleg.estimators.layer import LayerHessian
from fishleg.estimators.mfac import MFAC
from fishleg.estimators.woodbury import BlockWoodbury

ESTIMATORS: dict[str, type[AbstractEstimator]] = {
    estimator.name: estimator
    for estimator in (
        FishLeg,
        BlockWoodbury,
        MFAC,
        KFAC,
        EKFAC,
        LayerHessian,
        DiagonalFisher,
        Identity,
    )
}

__all__ = [
    "ESTIMATORS",
    "AbstractEstimator",
    "BlockWoodbury",
    "Callback",
    "DiagonalFisher",
    "EKFAC",
    "FishLeg",
    "FitProgress",
    "Identity",
    "KFAC",
    "LayerHessian",
    "MFAC",
]
