"""Certificates: the quality of Q on held-out data, and of a pruning step.

For any estimator, group by group and beside the best diagonal Q. All numbers are plain floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.errors import CapacityExceeded
from fishleg.estimators.base import AbstractEstimator
from fishleg.fisher import fisher_vector_product
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import check_targets, given_targets
from fishleg.objective import curvature_and_trace, gradient_product, masked_product
from fishleg.options import Labels
from fishleg.parameters import parameters_like
from fishleg.precision import in_full, widen
from fishleg.rng import SampleGenerator

Numbers = dict[str, float]


@in_full
@torch.no_grad()
def certify(
    estimator: AbstractEstimator, source: GradientSource, *, probes: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Judge Q by the Fisher of `source`, which should hold data that Q was not fitted on.

    With F_g = F + gamma I (gamma the estimator's, F restricted to the estimator's survivors):
    - `objective`: J(Q) = 1/2 tr(Q F_g Q) - tr Q. Lower is better; its least value is
      -1/2 tr F_g^-1.
    - `diagonal_objective`: J of the best diagonal Q there is, 1 / (F_ii + gamma) of these very
      data, the least of all diagonal estimates.
    - `best_scale`: a* = tr Q / tr(Q F_g Q): 1 when the scale of Q is right, below 1 when Q is too
      large on these data.
    - `rescaled_objective`: J(a* Q).
    - `log_det_objective`: L(Q) = tr(F_g Q) - log det Q, in which relative errors of Q count; lower
      is better. Only where Q is of the full Fisher: under masks the determinant is of the
      survivors' part, which no block has in closed form.
    - `residual`: ||F_g Q u - u|| / ||u|| over Gaussian u. Q = 0 scores 1, so that a value above 1
      has no meaning by itself.

    Args:
        estimator: fitted.
        source: of scaled gradients, at the weights that Q is for.
        probes: u, p >= 1, for the residual of each group.
        seed: of the probes.

    Returns:
        {"groups": {name: the numbers}, "network": the same}. The network's J and L are sums over
        the groups. Its residual takes the whole F, whose parts between groups no block describes,
        by an exact F-vector product with a single probe.

    Raises:
        ValueError: `probes` is not positive.

    Cost: one pass of gradients with a product with Q each, and one exact F-vector product; memory
    for 3 p vectors of all parameters.
    """
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}.")
    blocks = estimator.blocks()
    audits = {}
    for index, (name, block) in enumerate(blocks.items()):
        weight = source.model.get_parameter(estimator.partition[name].weight)
        mask = None if estimator.masks is None else estimator.masks.get(name)
        numbers = torch.arange(probes, device=weight.device)
        u = SampleGenerator(seed, numbers, index).normal(*block.shape).to(source.dtype(name))
        audits[name] = _Audit(block, u if mask is None else u * mask, mask)
    for batch in source.thorough().stream(list(blocks)):
        for name, gradients in batch.items():
            audits[name].add(gradients)
    groups = {name: audit.numbers(estimator.damping) for name, audit in audits.items()}
    network = _summarise([audit.sums(estimator.damping) for audit in audits.values()])
    network["residual"] = _network_residual(estimator, source, audits)
    return {"groups": groups, "network": network}


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """The terms of J and L for a group.

    Attributes:
        curvature: tr(Q F_g Q).
        trace: tr Q.
        diagonal_objective: J of the best diagonal.
        log_det_objective: L, or None under a mask.
    """

    curvature: float
    trace: float
    diagonal_objective: float
    log_det_objective: float | None


class _Audit:
    """Gathers one group's numbers over a pass of the data.

    Args:
        block: Q.
        probes: u, (p, rows, columns), masked.
        mask: survivors, or None.
    """

    def __init__(self, block: AbstractBlock, probes: Tensor, mask: Tensor | None):
        self.block = block
        self.probes = probes
        self.mask = mask
        self.images = masked_product(block, probes, mask)
        self._products = torch.zeros_like(probes)
        self._quadratic = self._energy = 0.0
        self._fisher = torch.zeros_like(probes[0], dtype=torch.float64)

    def add(self, gradients: Tensor) -> None:
        """Add scaled gradients (n, rows, columns)."""
        image = masked_product(self.block, gradients, self.mask)
        self._quadratic += float(image.square().sum())
        self._energy += float((image * gradients).sum())
        self._products += gradient_product(gradients, self.images)
        self._fisher += gradients.square().sum(0)

    def sums(self, damping: float) -> _Sums:
        """Return the group's sums."""
        ridge, trace = curvature_and_trace(self.block, [], damping, self.mask)
        best = 1.0 / (self._fisher + damping)
        energy = self._energy + damping * float(trace)
        return _Sums(
            curvature=self._quadratic + float(ridge),
            trace=float(trace),
            diagonal_objective=-0.5
            * float((best if self.mask is None else best * self.mask).sum()),
            log_det_objective=None
            if self.mask is not None
            else energy - float(self.block.log_det()),
        )

    def numbers(self, damping: float) -> Numbers:
        """Return the group's certificate."""
        rest = self._products + damping * self.images
        residual = self.restrict(rest) - self.probes
        size = torch.linalg.vector_norm(residual) / torch.linalg.vector_norm(self.probes)
        return {**_summarise([self.sums(damping)]), "residual": float(size)}

    def restrict(self, v: Tensor) -> Tensor:
        """Return M o V."""
        return v if self.mask is None else v * self.mask


def _summarise(groups: list[_Sums]) -> Numbers:
    """Return J, J of the best diagonal, a*, J(a* Q) and L, of all groups together."""
    curvature = sum(group.curvature for group in groups)
    trace = sum(group.trace for group in groups)
    numbers = {
        "objective": 0.5 * curvature - trace,
        "diagonal_objective": sum(group.diagonal_objective for group in groups),
        "best_scale": trace / curvature,
        "rescaled_objective": -0.5 * trace**2 / curvature,
    }
    parts = [group.log_det_objective for group in groups]
    if None not in parts:
        numbers["log_det_objective"] = sum(part for part in parts if part is not None)
    return numbers


def _network_residual(
    estimator: AbstractEstimator, source: GradientSource, audits: Mapping[str, _Audit]
) -> float:
    """Return ||F_g Q u - u|| / ||u|| for the whole F and the first probe of every group."""
    partition = estimator.partition
    images = partition.scatter({name: audit.images[0] for name, audit in audits.items()})
    products = fisher_vector_product(source, images)
    above = below = 0.0
    for name, audit in audits.items():
        product = partition[name].gather(products) + estimator.damping * audit.images[0]
        above += float((audit.restrict(product) - audit.probes[0]).double().square().sum())
        below += float(audit.probes[0].double().square().sum())
    return (above / below) ** 0.5


@in_full
def pruning_certificate(source: GradientSource, after: Mapping[str, Tensor]) -> Numbers:
    """Compare the quadratic model's prediction for a change of the weights with its effect.

    The model of `source` stands at the weights before; d is the change. No damping enters.
    - `predicted_kl`: 1/2 d^T F d with the whole, exact F.
    - `predicted_kl_blocks`: the same with the parts of F between groups left out, from the
      gradients of `source`.
    - `measured_kl`: the mean of KL(before || after).
    - `predicted_loss_change`: g^T d + 1/2 d^T F d, g the gradient of the loss on the data's labels.
    - `measured_loss_change`: of the mean loss on them. Both only where the data have labels.

    Args:
        source: samples, and the model before.
        after: state-dict name -> the parameter's value after; others did not change.

    Returns:
        The numbers, in units of the loss (nats for a categorical likelihood).

    Errors are those of `parameters_like` and `Calling.outputs`.

    Cost: one exact F-vector product, a pass of gradients, and about three forwards and backwards.
    """
    parameters_like(source.model, after)
    first = {parameter: name for name, parameter in source.model.named_parameters()}
    after = {first[source.model.get_parameter(name)]: value for name, value in after.items()}
    before = parameters_like(source.model, after)
    change = {name: widen(value.detach()) - widen(before[name]) for name, value in after.items()}
    product = fisher_vector_product(source, change)
    half = 0.5 * sum(_sum(product[name] * change[name]) for name in change)
    predicted = {"predicted_kl": half, "predicted_kl_blocks": _block_kl(source, change)}
    measured = _measure(source, change, after)
    if "loss_slope" in measured:
        predicted["predicted_loss_change"] = measured.pop("loss_slope") + half
    return predicted | measured


def _block_kl(source: GradientSource, change: Mapping[str, Tensor]) -> float:
    """Return the sum over groups of 1/2 d^T F d = 1/2 sum_n <G_n, d>^2."""
    weights = {name: widen(p.detach()) for name, p in source.model.named_parameters()}
    still = {name: torch.zeros_like(value) for name, value in weights.items()}
    matrices = source.partition.gather({**still, **change})
    moved = [name for name, matrix in matrices.items() if bool(matrix.any())]
    half = 0.0
    for batch in source.stream(moved):
        for name, gradients in batch.items():
            dots = gradients.flatten(1) @ matrices[name].flatten()
            half += 0.5 * _sum(dots.square())
    return half


def _measure(
    source: GradientSource, change: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Numbers:
    """Return `measured_kl` and, on labelled data, `loss_slope` = g^T d and `measured_loss_change`.

    KL(before || after) is the mean over y from before of nll_after(y) - nll_before(y). The term
    <d nll_before / d f, change of f>, of expectation zero, is taken off: so the result is exact
    where labels are enumerated, and for a Gaussian even when they are drawn.
    """
    labels: Labels = "enumerated" if _enumerates(source) else "sampled"
    before = source.network.copies(parameters_like(source.model, after))
    after = {name: value.to(before[name]) for name, value in after.items()}
    nll = source.likelihood.nll
    sums = {"measured_kl": 0.0}
    if source.calibration.has_targets:
        sums |= {"loss_slope": 0.0, "measured_loss_change": 0.0}
    for batch in source.batches():
        # leaves of their own, since some parameters may be frozen
        leaves = {name: value.detach().requires_grad_() for name, value in before.items()}
        with source.computing():
            outputs = source.run(leaves, batch.inputs)
            with torch.no_grad():
                changed = source.run(after, batch.inputs)
        if batch.targets is not None:
            check_targets(source.likelihood, outputs, batch.targets)
            losses = nll(outputs, batch.targets)
            slopes = torch.autograd.grad(
                losses.sum(), list(leaves.values()), materialize_grads=True
            )
            pairs = zip(slopes, change.values(), strict=True)
            sums["loss_slope"] += sum(_sum(slope * d) for slope, d in pairs)
            sums["measured_loss_change"] += _sum(nll(changed, batch.targets) - losses.detach())
        targets, weights = source.label(outputs, batch, labels)
        leaf = outputs.detach().requires_grad_()
        for target, weight in zip(targets, weights.unbind(1), strict=True):
            losses = nll(leaf, target)
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
            linear = (slope * (changed - leaf.detach())).reshape(len(leaf), -1).sum(1)
            sums["measured_kl"] += _sum(weight * (nll(changed, target) - losses.detach() - linear))
    return {name: value / len(source.calibration) for name, value in sums.items()}


def _enumerates(source: GradientSource) -> bool:
    """Tell whether the likelihood can enumerate its labels, in the free memory."""
    batch = next(source.batches())
    with source.computing(), torch.no_grad():
        outputs = source.outputs(batch)
    likelihood = given_targets(source.likelihood, batch.targets)
    try:
        return getattr(likelihood, "enumerate", lambda outputs: None)(outputs) is not None
    except CapacityExceeded:
        return False


def _sum(values: Tensor) -> float:
    return float(values.double().sum())
