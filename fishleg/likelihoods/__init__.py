"""Likelihoods, the meaning of a model's outputs: losses, drawn labels, and the output Fisher.

For one sample with outputs f and loss l(f, y) = -log p(y | f), the output Fisher is
H(f) = E_{y ~ p(.|f)}[ l' l'^T ] with l' = dl/df; that of the parameters is F = E_x[ J^T H J ] with
J = df/dw. Outputs of fewer than 32 bits are taken in float32.
"""

from fishleg.likelihoods.base import (
    AbstractLikelihood,
    Likelihood,
    check_likelihood,
    check_targets,
    given_targets,
)
from fishleg.likelihoods.bernoulli import Bernoulli
from fishleg.likelihoods.categorical import Categorical
from fishleg.likelihoods.gaussian import Gaussian

__all__ = [
    "AbstractLikelihood",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "check_likelihood",
    "check_targets",
    "given_targets",
]
