"""The report of one pruning step, and its table: layer, shape, sparsity, cost, reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from fishleg.linalg import CGReport
from fishleg.parameters import Partition
from fishleg.pruning.admm import AdmmReport
from fishleg.pruning.masks import Masks


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One weight of two or more dimensions, after a pruning step.

    Attributes:
        name: the group's, or the state-dict name of a weight without one, less its `.weight`.
        shape: of the weight.
        removed: number of weights removed so far.
        cost: sum of the single-weight saliencies of the weights removed here, in units of the
            loss (`LayerHessian`: of the layer's output error).
        reason: why the weight is not prunable; None for a prunable one.
    """

    name: str
    shape: tuple[int, ...]
    removed: int = 0
    cost: float = 0.0
    reason: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed so far, in [0, 1]."""
        return self.removed / self.size if self.size else 0.0


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """The result of one pruning step; `print` shows it as a table, layer by layer.

    Attributes:
        masks: group name -> bool (rows, columns), the survivors after the step.
        sparsity: fraction of the prunable weights removed so far, in [0, 1).
        removed: number of weights removed so far.
        prunable: number of prunable weights.
        compensation: the method that moved the survivors.
        saliency: sum of the single-weight saliencies of the removed weights, in units of the
            loss.
        predicted: 1/2 d^T F_g d of the whole move by the method's own curvature, damping included,
            in units of the loss; None for `none` and `independent`.
        solves: group name (or "network") -> how its conjugate gradients went.
        layers: every weight with two or more dimensions, prunable ones first, both kinds in
            state-dict order.
        unprunable: (state-dict name, reason) of each weight with two or more dimensions that was
            not prunable; see `Partition`.
        emptied: names of the groups that have no weight left.
        admm: how the selection `admm` went; None for others.
        zeros: group name -> weights that were exactly 0 before the step and counted as removed,
            where no masks were given.
        warnings: for the user, a sentence each: emptied groups, zeros that were found,
            a solve that stopped short, and those of the estimator.
    """

    masks: Masks
    sparsity: float
    removed: int
    prunable: int
    compensation: str
    saliency: float
    predicted: float | None
    solves: Mapping[str, CGReport]
    layers: tuple[LayerReport, ...] = ()
    unprunable: tuple[tuple[str, str], ...] = ()
    emptied: tuple[str, ...] = ()
    admm: AdmmReport | None = None
    zeros: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"PruneReport({self.removed} of {self.prunable} weights removed)"

    def __str__(self) -> str:
        rows = [("layer", "shape", "sparsity", "cost", "prunable"), *map(_row, self.layers)]
        share = f"{100 * self.sparsity:.2f} %"
        rows.append(("all prunable", str(self.prunable), share, f"{self.saliency:.2e}", ""))
        return "\n".join([*_align(rows), *(f"Warning: {one}" for one in self.warnings)])


def report_layers(
    model: nn.Module, partition: Partition, masks: Masks, costs: Mapping[str, float]
) -> tuple[LayerReport, ...]:
    """Return a report of every weight with two or more dimensions.

    Args:
        model: the module that `partition` was made from.
        partition: its groups.
        masks: group name -> bool (rows, columns), the survivors.
        costs: group name -> cost of the step's removals there.
    """
    prunable = [
        LayerReport(
            name=group.name,
            shape=group.weight_shape,
            removed=int((~masks[group.name]).sum()),
            cost=costs[group.name],
        )
        for group in partition.prunable
    ]
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    others = [
        LayerReport(name=name.removesuffix(".weight"), shape=shapes[name], reason=reason)
        for name, reason in partition.unprunable
    ]
    return (*prunable, *others)


def _row(layer: LayerReport) -> tuple[str, ...]:
    shape = " x ".join(map(str, layer.shape))
    if layer.reason is not None:
        return layer.name, shape, "-", "-", f"no: {layer.reason}"
    return layer.name, shape, f"{100 * layer.sparsity:.2f} %", f"{layer.cost:.2e}", "yes"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of columns, numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for name, shape, share, cost, note in rows:
        cells = (
            name.ljust(widths[0]),
            shape.rjust(widths[1]),
            share.rjust(widths[2]),
            cost.rjust(widths[3]),
            note,
        )
        lines.append("  ".join(cells).rstrip())
    return lines
