"""The likelihood of a torch loss, of a name, or of the data's targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg.errors import FishLegError, ShapeMismatch, UnknownName, WrongType
from fishleg.likelihoods.base import Likelihood, check_likelihood
from fishleg.likelihoods.bernoulli import Bernoulli
from fishleg.likelihoods.categorical import Categorical
from fishleg.likelihoods.gaussian import Gaussian

LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}
"""Name of a loss, as in torch.nn.functional less its `_loss` -> the module of torch."""
_KNOWN = "nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()"


def choose_likelihood(given: Any, outputs: Tensor, targets: Tensor | None) -> Likelihood:
    """Return the likelihood of a model's outputs.

    - nn.CrossEntropyLoss: `Categorical`. The dimension of the classes is the one that the targets
      lack. `ignore_index` is kept where samples have several positions, or targets hold it;
      `label_smoothing` is ignored, since curvature takes its labels from the model.
    - nn.BCEWithLogitsLoss: `Bernoulli`. nn.MSELoss: `Gaussian` of variance 1.

    Args:
        given: a likelihood, a loss of torch, its name (see `LOSSES`), or None: cross-entropy where
            the targets are class numbers.
        outputs: the model's for some samples, (n, ...).
        targets: of all samples, or None.

    Raises:
        FishLegError: it is None, and the targets are no class numbers; or a loss weights its
            classes, which no likelihood here does.
        UnknownName: there is no loss of that name.
    """
    if given is None:
        if targets is None or targets.is_floating_point():
            got = "no targets" if targets is None else f"{targets.dtype} targets"
            raise FishLegError(
                f"likelihood: expected one, since the data have {got} and no class numbers; give a "
                f"loss, such as {_KNOWN}."
            )
        given = nn.CrossEntropyLoss()
    if isinstance(given, str):
        if given not in LOSSES:
            raise UnknownName("likelihood", given, LOSSES)
        given = LOSSES[given]()
    if isinstance(given, nn.modules.loss._Loss):
        return _of_loss(given, outputs, targets)
    check_likelihood(given)
    return given


def describe_likelihood(likelihood: Likelihood | None) -> dict[str, Any] | None:
    """Return a JSON-able description of a likelihood of this library; None for any other."""
    kinds = {Categorical: ("class_dim", "ignore_index"), Bernoulli: (), Gaussian: ("variance",)}
    kind: Any = type(likelihood)
    names = kinds.get(kind)
    if names is None:
        return None
    options = {name: getattr(likelihood, name) for name in names}
    return {"name": type(likelihood).__name__, "options": options}


def restore_likelihood(described: Mapping[str, Any] | None) -> Likelihood | None:
    """Return the likelihood that `describe_likelihood` described, or None."""
    if described is None:
        return None
    kinds = {kind.__name__: kind for kind in (Categorical, Bernoulli, Gaussian)}
    return kinds[described["name"]](**described["options"])


def _of_loss(loss: nn.Module, outputs: Tensor, targets: Tensor | None) -> Likelihood:
    """Return the likelihood of a loss of torch.

    Raises:
        FishLegError: it weights its classes.
        WrongType: there is no likelihood for it.
    """
    for name in ("weight", "pos_weight"):
        if getattr(loss, name, None) is not None:
            raise FishLegError(
                f"likelihood: expected {type(loss).__name__} without {name}, got {name}; give a "
                "likelihood of your own for a weighted loss."
            )
    if isinstance(loss, nn.CrossEntropyLoss):
        return _categorical(loss.ignore_index, outputs, targets)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return Bernoulli()
    if isinstance(loss, nn.MSELoss):
        return Gaussian()
    raise WrongType(
        f"likelihood: expected one of {_KNOWN}, or an object with the methods nll, sample and "
        f"fisher_product, got {type(loss).__name__}."
    )


def _categorical(ignore_index: int, outputs: Tensor, targets: Tensor | None) -> Categorical:
    """Return the likelihood of class numbers, or of class weights, for these outputs."""
    if targets is not None and targets.is_floating_point():
        return Categorical(class_dim=None if outputs.ndim <= 2 else 1)
    ignored = targets is not None and (outputs.ndim > 2 or bool((targets == ignore_index).any()))
    return Categorical(
        class_dim=None if outputs.ndim <= 2 else _class_dim(outputs, targets),
        ignore_index=ignore_index if ignored else None,
    )


def _class_dim(outputs: Tensor, targets: Tensor | None) -> int:
    """Return the dimension that counts classes, of outputs (n, ...) of three or more dimensions.

    Raises:
        ShapeMismatch: it is not known.
    """
    shape = outputs.shape[1:]
    found = {
        dim
        for dim in (1, outputs.ndim - 1)
        if targets is not None
        and targets.shape[1:] == torch.Size([*shape[: dim - 1], *shape[dim:]])
    }
    if len(found) != 1:
        got = "no targets" if targets is None else f"targets {tuple(targets.shape)}"
        raise ShapeMismatch(
            f"likelihood: expected targets that show which dimension of the outputs "
            f"{tuple(outputs.shape)} counts classes, got {got}; give it, "
            "likelihood=fishleg.Categorical(class_dim=1) or class_dim=-1."
        )
    return found.pop()
