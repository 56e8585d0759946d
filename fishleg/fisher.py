"""Products of the whole Fisher matrix with a vector, without the matrix.

F v = (1/N) sum_n J_n^T (H_n (J_n v_n)): a forward-mode product J v, a product in the small output
space, and a reverse-mode product J^T u. There is no finite difference: in float32 its rounding
error would exceed the signal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fishleg.capture import evaluating, transformable
from fishleg.errors import ShapeMismatch, UnknownName
from fishleg.gradients import GradientSource
from fishleg.likelihoods import Likelihood, given_targets
from fishleg.nests import Nest

Form = Literal["exact", "sampled", "enumerated", "empirical"]


def fisher_vector_product(
    source: GradientSource, v: Mapping[str, Tensor], *, form: Form = "exact"
) -> dict[str, Tensor]:
    """Return F v, averaged over the calibration set, undamped, across all groups.

    Args:
        source: gives model, likelihood, samples, and (for sampled labels) draws and seed.
        v: state-dict name -> tensor of the parameter's shape and dtype. Parameters that are not
            named count as fixed: F is restricted to those that are.
        form: of the label expectation. "exact": by the likelihood's output Fisher H;
            "sampled": sum_k g_k (g_k . v) / K over drawn labels, g a single sample's gradient;
            "enumerated": the same over all labels, weighted by p_c, equal to "exact";
            "empirical": the same with the data's labels.

    Returns:
        F v under the names of `v`.

    Raises:
        UnknownName: a name is no parameter of the model, or `form` is none of the four.
        ShapeMismatch: a tensor has not its parameter's shape.

    Cost: about six forward passes (three for J v, three for J^T u) over the calibration set; twice
    the memory of an ordinary training step with `source.batch_size` samples.
    """
    if form not in get_args(Form):
        raise UnknownName("form", form, get_args(Form))
    known = dict(source.model.named_parameters())
    for name, value in v.items():
        if name not in known:
            raise UnknownName("parameter", name, known)
        if value.shape != known[name].shape:
            raise ShapeMismatch(
                f"{name}: expected {tuple(known[name].shape)}, got {tuple(value.shape)}."
            )
    parameters = {name: known[name].detach() for name in v}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for batch in source.batches():

        def run(values: dict[str, Tensor], inputs: Nest = batch.inputs) -> Tensor:
            return source.calling.run(source.model, inputs, values)

        with evaluating(source.model), transformable(), torch.no_grad():
            outputs, tangents = _push_forward(run, parameters, dict(v))
            if form == "exact":
                likelihood = given_targets(source.likelihood, batch.targets)
                images = likelihood.fisher_product(outputs, tangents).to(outputs.dtype)
            else:
                targets, weights = source.label(outputs, batch, form)
                images = _labelled_product(source.likelihood, outputs, tangents, targets, weights)
            pull_back = vjp(run, parameters)[1]
            for name, part in pull_back(images)[0].items():
                total[name] += part
    return {name: value / len(source.calibration) for name, value in total.items()}


def _push_forward(
    run: Callable[[dict[str, Tensor]], Tensor],
    parameters: dict[str, Tensor],
    tangents: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the outputs and J v."""
    with warnings.catch_warnings():
        # On first use torch 2.13 scripts some decompositions of its own, and warns of doing so.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is", DeprecationWarning)
        return jvp(run, (parameters,), (tangents,))[:2]


def _labelled_product(
    likelihood: Likelihood, outputs: Tensor, tangents: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """Return sum_d w_d u_d (u_d . J v) for each sample, u_d = d nll_d / d outputs.

    J^T of it is sum_d w_d g_d (g_d . v), since g_d = J^T u_d: the per-sample gradients need not be
    formed. Note what stands outside the bracket: g, and of one sample, not v or a batch mean.
    """
    images = torch.zeros_like(outputs)
    for target, weight in zip(targets, weights.unbind(1), strict=True):
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (u,) = torch.autograd.grad(likelihood.nll(leaf, target).sum(), leaf)
        dots = (u * tangents).reshape(len(u), -1).sum(1)
        images += (weight * dots).reshape(-1, *[1] * (u.ndim - 1)) * u
    return images
