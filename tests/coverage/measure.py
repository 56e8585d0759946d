"""Measures one network: curvature beside a loop over samples, pruning, saving and loading."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from fishleg import (
    Calibration,
    Categorical,
    DiagonalFisher,
    GradientSource,
    Partition,
    fisher_vector_product,
    partition_parameters,
    prune_once,
)
from stages.tensor_files import load_into, load_tensors, save_tensors

CLASSES = 3
TOLERANCE = 1e-8  # of the norm, in float64
_DAMPING = 1e-3


@dataclass(frozen=True)
class Coverage:
    """What was found of one network.

    Attributes:
        name: of the layer or network.
        gradients: how per-sample gradients are made, with the number of tensors each way.
        curvature: "equal", or by how much of its norm something differs from the loop.
        prunable: weights that are prunable, and their share of all parameters.
        unprunable: reason -> how many weights of two or more dimensions are not, by that reason.
        roundtrip: "equal", or what of pruning, saving and loading went wrong.
    """

    name: str
    gradients: str
    curvature: str
    prunable: str
    unprunable: str
    roundtrip: str

    def line(self) -> str:
        """Return the network's line of the table."""
        cells = (
            f"`{self.name}`", self.gradients, self.curvature, self.prunable, self.unprunable,
            self.roundtrip,
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


HEADER = """\
| | per-sample gradients | curvature against the loop | prunable | not prunable, and why | pruned, saved, loaded |
|---|---|---|---|---|---|
"""  # noqa: E501 - a line of a table


def measure(name: str, build: Callable[[], nn.Module], inputs: Tensor) -> Coverage:
    """Measure the network that `build` makes, the same at each call but for its weights.

    Args:
        name: for the table.
        build: makes it; outputs (n, CLASSES).
        inputs: a few samples, float64 or token numbers.
    """
    model = _shaken(build())
    partition = partition_parameters(model)
    source = GradientSource(
        model,
        Categorical(),
        partition,
        Calibration(inputs=inputs, targets=torch.arange(len(inputs)) % CLASSES),
        labels="empirical",
        batch_size=len(inputs),
    )
    rows = _loop(source)
    gap, fisher_diagonal = _compare(source, rows)
    gap = max(gap, _compare_product(source, rows))
    del rows
    estimator = DiagonalFisher(partition, damping=_DAMPING)
    estimator.fit(source)
    for group, found in estimator.diagonal().items():
        expected = 1 / (fisher_diagonal[group] + _DAMPING)
        gap = max(gap, float((found - expected).norm() / expected.norm()))
    return Coverage(
        name=name,
        gradients=_ways(source),
        curvature="equal" if gap <= TOLERANCE else f"differs by {gap:.1e}",
        prunable=_prunable(model, partition),
        unprunable=_unprunable(partition),
        roundtrip=_roundtrip(model, build, estimator, inputs),
    )


def _shaken(model: nn.Module) -> nn.Module:
    """Return the network in float64, evaluating, no parameter or statistic at its default."""
    model = model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand(tensor.shape, dtype=tensor.dtype)
    return model


Rows = list[dict[str, Tensor]]
"""Of each sample, parameter name -> gradient."""


def _loop(source: GradientSource) -> Rows:
    """Return each sample's gradient of its loss, by autograd on the sample alone."""
    names, parameters = zip(*source.model.named_parameters(), strict=True)
    rows = []
    data = source.calibration
    for x, y in zip(data.inputs, data.targets, strict=True):
        loss = nn.functional.cross_entropy(source.model(x[None]), y[None])
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rows.append({n: g.to_dense() for n, g in zip(names, found, strict=True)})
    return rows


def _compare(source: GradientSource, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    """Return the largest gap of a group's gradients, and the loop's diagonal of the Fisher."""
    diagonal = {}
    gap = 0.0
    largest = max(float(g.norm()) for row in rows for g in row.values())
    for gradients in source.stream():
        for name, found in gradients.items():
            group = source.partition[name]
            expected = torch.stack([group.gather(row) for row in rows]) / len(rows) ** 0.5
            diagonal[name] = expected.square().sum(0)
            # a gradient that is 0 but for rounding (a key's bias) is compared with the largest
            size = max(float(expected.norm()), 1e-3 * largest)
            gap = max(gap, float((found - expected).norm()) / size)
    return gap, diagonal


def _compare_product(source: GradientSource, rows: Rows) -> float:
    """Return the gap of F v, with the data's labels, from the loop's sum of g (g . v)."""
    torch.manual_seed(1)
    wanted = [tensor for group in source.partition.groups for tensor in group.tensors]
    v = {name: torch.randn_like(source.model.get_parameter(name)) for name in wanted}
    found = fisher_vector_product(source, v, form="empirical")
    dots = [sum((row[name] * v[name]).sum() for name in wanted) for row in rows]
    gap = total = 0.0
    for name in wanted:
        expected = sum(dot * row[name] for dot, row in zip(dots, rows, strict=True)) / len(rows)
        gap += float((found[name] - expected).norm()) ** 2
        total += float(expected.norm()) ** 2
    return (gap / total) ** 0.5


def _ways(source: GradientSource) -> str:
    """Return how many tensors' gradients are made which way."""
    off_fast = {
        name: what.partition(":")[0].partition(",")[0]
        for name, what in source.report()
        if not what.startswith("no curvature")
    }
    tensors = [tensor for group in source.partition.groups for tensor in group.tensors]
    ways = Counter(off_fast.get(tensor, "fast path") for tensor in tensors)
    return ", ".join(f"{way} {count}" for way, count in ways.most_common())


def _prunable(model: nn.Module, partition: Partition) -> str:
    count = sum(prod(group.weight_shape) for group in partition.prunable)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{count:,} of {total:,}"


def _unprunable(partition: Partition) -> str:
    reasons = Counter(reason for _, reason in partition.unprunable)
    return "; ".join(f"{count} x {reason}" for reason, count in reasons.items())


def _roundtrip(
    model: nn.Module, build: Callable[[], nn.Module], estimator: DiagonalFisher, inputs: Tensor
) -> str:
    """Prune half of the weights, save the network, load it into a fresh one, compare outputs."""
    if not estimator.partition.prunable:
        return "nothing to prune"
    pruned = copy.deepcopy(model)
    report = prune_once(pruned, estimator, sparsity=0.5)
    total = sum(prod(group.weight_shape) for group in estimator.partition.prunable)
    if report.removed != int(total / 2 + 0.5):
        return f"{report.removed} of {total} weights are 0"
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder, "model.safetensors"), pruned.state_dict())
        loaded = build().double().eval()
        load_into(loaded, load_tensors(Path(folder, "model.safetensors")))
    with torch.no_grad():
        same = torch.equal(loaded(inputs), pruned(inputs))
    return "equal" if same else "outputs differ"
