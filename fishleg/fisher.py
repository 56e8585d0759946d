"""Products of the whole Fisher matrix with a vector, without the matrix.

F v = (1/N) sum_n J_n^T (H_n (J_n v)): a product J v, a product in the small output space, and a
product J^T u; see `fishleg.jacobian`. There is no finite difference: in float32 its rounding error
would exceed the signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from fishleg.calibration import Batch
from fishleg.errors import FishLegError, UnknownName
from fishleg.finite import check_finite, ruled_in
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Likelihood, given_targets
from fishleg.modes import transformable
from fishleg.parameters import parameters_like
from fishleg.precision import in_full, widen

Form = Literal["exact", "sampled", "enumerated", "empirical"]


@in_full
def fisher_vector_product(
    source: GradientSource, v: Mapping[str, Tensor], *, form: Form = "exact"
) -> dict[str, Tensor]:
    """Return F v, averaged over the calibration set, undamped, across all groups.

    Args:
        source: gives model, likelihood, samples, and (for sampled labels) draws and seed.
        v: state-dict name -> tensor of the parameter's shape, taken in the dtype that the model is
            computed in, and on its device.
            Parameters that are not named count as fixed: F is restricted to the named ones.
        form: of the label expectation. "exact": by the likelihood's output Fisher H;
            "sampled": sum_k g_k (g_k . v) / K over drawn labels, g a single sample's gradient;
            "enumerated": the same over all labels, weighted by p_c, equal to "exact";
            "empirical": the same with the data's labels.

    Returns:
        F v under the names of `v`, in float32 at least.

    Raises:
        UnknownName: `form` is none of the four.

    Other errors are those of `parameters_like`, `Calling.outputs` and `Jacobian.sandwich`.

    Cost: about six forward passes (three for J v, three for J^T u) over the calibration set; twice
    the memory of an ordinary training step with `source.batch_size` samples. More where the model
    supports no forward-mode derivative; one warning says so.
    """
    if form not in get_args(Form):
        raise UnknownName("form", form, get_args(Form))
    if not v:
        return {}
    parameters = source.network.copies(parameters_like(source.model, v))
    v = {name: value.to(parameters[name]) for name, value in v.items()}
    total = {name: torch.zeros_like(widen(value)) for name, value in parameters.items()}
    for batch in source.batches():

        def image(outputs: Tensor, tangents: Tensor, batch: Batch = batch) -> Tensor:
            if form == "exact":
                likelihood = given_targets(source.likelihood, batch.targets)
                return likelihood.fisher_product(outputs, tangents).to(outputs.dtype)
            targets, weights = source.label(outputs, batch, form)
            return _labelled_product(source.likelihood, outputs, tangents, targets, weights)

        with source.computing(), transformable(), torch.no_grad():
            found = source.jacobian.sandwich(
                source.run, parameters, batch.inputs, v, image, partial(source.outputs, batch)
            )
        for name, part in found.items():
            total[name] += part
    _check_finite(source, total)
    return {name: value / len(source.calibration) for name, value in total.items()}


def _check_finite(source: GradientSource, product: Mapping[str, Tensor]) -> None:
    """Check a product, and find the sample that causes an error.

    Raises:
        FishLegError: it is not finite; or as `check_finite`, where the outputs are not.
    """
    wrong = [name for name, value in product.items() if not bool(value.isfinite().all())]
    if not wrong:
        return
    for batch in source.batches():
        with source.computing(), torch.no_grad():
            outputs = source.outputs(batch)
        check_finite({"The outputs": ruled_in(outputs)}, batch, source.model)
    raise FishLegError(
        f"F v: expected finite numbers, got others for {', '.join(wrong[:5])}, though the outputs "
        "of all samples are finite. Look for a v that is not, or a derivative that divides by 0."
    )


def _labelled_product(
    likelihood: Likelihood, outputs: Tensor, tangents: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """Return sum_d w_d u_d (u_d . J v) for each sample, u_d = d nll_d / d outputs.

    J^T of it is sum_d w_d g_d (g_d . v), since g_d = J^T u_d: the per-sample gradients need not be
    formed. Outside the bracket stands g of one sample, not v or a batch mean.
    """
    images = torch.zeros_like(outputs)
    for target, weight in zip(targets, weights.unbind(1), strict=True):
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (u,) = torch.autograd.grad(likelihood.nll(leaf, target).sum(), leaf)
        dots = (u * tangents).reshape(len(u), -1).sum(1)
        images += (weight * dots).reshape(-1, *[1] * (u.ndim - 1)) * u
    return images
