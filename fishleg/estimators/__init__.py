"""Curvature estimators behind one interface."""

from fishleg.estimators.base import AbstractEstimator, Callback, FitProgress
from fishleg.estimators.diagonal import DiagonalFisher
from fishleg.estimators.eigen import Eigen
from fishleg.estimators.ekfac import EKFAC
from fishleg.estimators.fishleg import FishLeg
from fishleg.estimators.fls import FLS
from fishleg.estimators.kfac import KFAC
from fishleg.estimators.layer import LayerHessian
from fishleg.estimators.magnitude import Magnitude
from fishleg.estimators.mfac import MFAC
from fishleg.estimators.obs import OBS

ESTIMATORS: dict[str, type[AbstractEstimator]] = {
    estimator.name: estimator
    for estimator in (
        Eigen,
        FishLeg,
        FLS,
        OBS,
        MFAC,
        KFAC,
        EKFAC,
        LayerHessian,
        DiagonalFisher,
        Magnitude,
    )
}

__all__ = [
    "ESTIMATORS",
    "AbstractEstimator",
    "OBS",
    "Callback",
    "DiagonalFisher",
    "EKFAC",
    "Eigen",
    "FLS",
    "FishLeg",
    "FitProgress",
    "Magnitude",
    "KFAC",
    "LayerHessian",
    "MFAC",
]
