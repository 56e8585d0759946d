"""Q of one group during training: a start that follows the Fisher, and a learned correction.

    B = (I + X) B_0 (I + X)^T,   C = (I + Y) C_0 (I + Y)^T,   A = exp(Z)

The start (B_0, C_0) is the damped inverse of running second moments of the gradients, or of running
K-FAC factors, computed at each update: it follows a Fisher that changes tenfold within a few steps,
as at the beginning of training. lambda = (X, Y, Z) starts at zero and descends the FishLeg
objective J by Adam, one step an update; it corrects the errors of the start (the independence of
rows and columns, the split of the damping between the factors, the scale). In trials Adam alone,
from a start on the first batch, was too slow: see docs/theory.md. The evidence of an update is the
result of `GradientSource.factored` for one batch.

J is E_u[ 1/2 (Qu)^T F_g (Qu) - u^T Q u ]. With u ~ N(0, I) the flat directions, where Q is large,
make up most of it. With u distributed as the gradients, E[u u^T] = F, directions count by their
frequency; F_g^-1 is a minimiser either way. Then u and F come from different halves of the batch,
since on its own samples F is too large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fishleg.blocks import AbstractBlock, DiagonalBlock, KroneckerBlock
from fishleg.blocks.structures import fit_structure
from fishleg.gradients.layers import LayerSignals
from fishleg.moments import as_factors, kronecker_products, signal_moments, squares
from fishleg.objective import (
    gradient_product,
    outer_directional,
    outer_product,
    outer_square,
    probe_terms,
    sign_combinations,
)
from fishleg.options import TrackedStructure, TrackingOptions
from fishleg.parameters import ParameterGroup
from fishleg.rng import SampleGenerator
from fishleg.solvers.descent import adam_change, assemble, compose, relative_slope
from fishleg.solvers.starts import diagonal_start, factored_start, identity_start

Evidence = Tensor | LayerSignals
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrackedInverse:
    """Q of one group, and the state that the next update needs; empty at the beginning.

    Attributes:
        block: Q.
        moments: running means of the gradients' second moments.
        free: lambda, tensor name -> correction.
        first: Adam's running mean of the slopes.
        second: Adam's running mean of their squares.
    """

    block: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    free: Tensors = field(default_factory=dict)
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Return all tensors, under names that `restore` knows."""
        return {f"{part}.{key}": x for part in _PARTS for key, x in getattr(self, part).items()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> TrackedInverse:
        """Undo `tensors`; names of other parts are ignored."""
        parts: dict[str, Tensors] = {part: {} for part in _PARTS}
        for key, x in tensors.items():
            part, _, name = key.partition(".")
            if part in parts:
                parts[part][name] = x
        return cls(**parts)

    def inverse(self) -> AbstractBlock:
        """Return Q."""
        kind = DiagonalBlock if "values" in self.block else KroneckerBlock
        return kind(**self.block)


_FIRST_PROBE = 1 << 62  # beyond the numbers that key labels
_PARTS = ("block", "moments", "free", "first", "second")


def update(
    before: TrackedInverse,
    group: ParameterGroup,
    evidence: Evidence,
    options: TrackingOptions,
    *,
    age: int,
    mask: Tensor | None = None,
    signals: LayerSignals | None = None,
) -> TrackedInverse:
    """Return Q after one update, on one batch.

    The start is brought to the best scale for the batch. Under a mask the correction descends J_M;
    the start is that of the whole F.

    Args:
        before: from the update before.
        group: the group.
        evidence: of the batch.
        options: see there.
        age: updates made before.
        mask: survivors, bool (rows, columns); None keeps all.
        signals: of the group's layer on the batch, for the start `kfac`; None without a layer.

    Cost: in FLOPs, 8 (rows^3 + columns^3) in float32 and 2 (rows^3 + columns^3) in float64, and
    the cost of `objective_terms`, forward and backward.
    """
    weight = max(1 - options.decay, 1 / (age + 1))  # a plain mean at first
    moments = {
        name: before.moments[name].lerp(new, weight) if age else new
        for name, new in _measure(evidence, signals, group, options).items()
    }
    start = _start(group, moments, evidence, options)
    free = before.free if age else _zeros(start.tensors())
    block = assemble(start, free)
    numbers = torch.arange(options.probes, device=next(iter(free.values())).device)
    generator = SampleGenerator(options.seed, numbers + _FIRST_PROBE, age)
    tensors = {name: x.detach().requires_grad_() for name, x in block.tensors().items()}
    with torch.enable_grad():
        moving = type(block)(**tensors)
        curvature, linear = objective_terms(moving, evidence, options, generator, mask)
        # J at the best scale a of Q, where it is -1/2 linear^2 / curvature; any scale is, if F = 0
        scale = torch.where(curvature > 0, linear / curvature, torch.ones_like(linear)).detach()
        loss = 0.5 * scale**2 * curvature - scale * linear
        slopes = torch.autograd.grad(loss, list(tensors.values()))
    first, second, moved = {}, {}, {}
    for (name, x), slope in zip(block.tensors().items(), slopes, strict=True):
        first[name], second[name], change = adam_change(
            name,
            relative_slope(name, x, slope),
            before.first[name] if age else torch.zeros_like(x),
            before.second[name] if age else torch.zeros_like(x),
            age,
        )
        moved[name] = compose(name, free[name], options.learning_rate * change)
    scaled = block.tensors()
    linear_in = next(iter(scaled))  # Q is linear in its first tensor
    scaled[linear_in] = scaled[linear_in] * scale
    parts = zip(_PARTS, (scaled, moments, moved, first, second), strict=True)
    # strides, which change bits, are not saved
    return TrackedInverse(
        **{part: {name: x.contiguous() for name, x in found.items()} for part, found in parts}
    )


# -- the start


def _measure(
    evidence: Evidence,
    signals: LayerSignals | None,
    group: ParameterGroup,
    options: TrackingOptions,
) -> Tensors:
    """Return the second moments that the start is made of."""
    if options.start == "identity":
        return {}
    if _structure(group, options) == "diagonal" or options.start == "diagonal":
        if isinstance(evidence, Tensor):
            return {"diagonal": squares(evidence)[0]}
        rows, columns = _factors(evidence)
        return {"diagonal": rows.square().mT @ columns.square()}
    if options.start == "kfac" and signals is not None and signals.activations.shape[1] == 1:
        samples, draws = signals.output_gradients.shape[:2]
        gamma, a = signal_moments(signals, samples * draws)
        return {"gamma": gamma[0], "a": a[0]}
    if isinstance(evidence, Tensor):
        row, column = kronecker_products(evidence)
    else:
        rows, columns = _factors(evidence)
        wide = rows * torch.linalg.vector_norm(columns, dim=1, keepdim=True)
        tall = columns * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        row, column = wide.mT @ wide, tall.mT @ tall
    return {"row": row, "column": column}


def _start(
    group: ParameterGroup, moments: Tensors, evidence: Evidence, options: TrackingOptions
) -> AbstractBlock:
    """Return the block at lambda = 0, in the evidence's dtype."""
    structure = _structure(group, options)
    like = evidence if isinstance(evidence, Tensor) else evidence.activations
    if options.start == "identity":
        start = identity_start(group.shape, options.damping, like)
    elif "diagonal" in moments:
        scaled = structure != "kronecker"
        start = diagonal_start(moments["diagonal"], options.damping, scaled=scaled)
    elif "gamma" in moments:
        start = factored_start(moments["gamma"].double(), moments["a"].double(), options.damping)
    else:
        row, column = as_factors(moments["row"].double(), moments["column"].double())
        start = factored_start(row[0], column[0], options.damping)
    block = fit_structure(start, structure, kernel=1, block_size=1)
    return type(block)(**{name: x.to(like.dtype) for name, x in block.tensors().items()})


def _structure(group: ParameterGroup, options: TrackingOptions) -> TrackedStructure:
    """Return the structure of a group's block."""
    return options.structure if len(group.weight_shape) > 1 else "diagonal"


# -- the objective


def objective_terms(
    block: AbstractBlock,
    evidence: Evidence,
    options: TrackingOptions,
    generator: SampleGenerator,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return E_u (Qu)^T F_g (Qu) and E_u u^T Q u, two scalars: J is half the first less the second.

    For Kronecker blocks without scale on gradients of rank one the expectation has a closed form,
    in which no gradient is formed; all else takes products with the generator's probes.

    Args:
        block: Q, differentiable in its tensors.
        evidence: scaled gradients (n, rows, columns), or the factors of gradients of rank one.
        options: `damping` and `directions`.
        generator: one sample a probe.
        mask: survivors, bool (rows, columns); None keeps all.

    Cost: closed, see `outer_square` and `outer_directional`; else, with p probes,
    2 p rows columns (rows + columns) and 4 n p rows columns FLOPs.
    """
    normal, damping = options.directions == "normal", options.damping
    given, curving = (evidence, evidence) if normal else _halves(evidence)
    if (
        isinstance(curving, LayerSignals)
        and isinstance(given, LayerSignals)
        and isinstance(block, KroneckerBlock)
        and block.scale is None
        and mask is None
    ):
        if not normal:
            return outer_directional(block, _factors(given), *_factors(curving), damping)
        square = outer_square(block, *_factors(curving))
        return square + damping * block.squared_norm(), block.trace()
    like = next(iter(block.tensors().values()))
    if normal:
        probes = generator.normal(*block.shape).to(like.dtype)
    else:
        probes = _combine(given, generator)
    curvature, linear = probe_terms(block, probes, _product(curving), damping, mask)
    return curvature / len(probes), linear / len(probes)


def _halves(evidence: Evidence) -> tuple[Evidence, Evidence]:
    """Return the two halves of a batch, each scaled as the whole; of one sample, twice.

    Rows of gradients are those of single samples, since there is one label each.
    """
    whole = evidence if isinstance(evidence, Tensor) else evidence.output_gradients
    cut = len(whole) // 2
    if not cut:
        return evidence, evidence
    halves: list[Evidence] = []
    for part in (slice(0, cut), slice(cut, len(whole))):
        scaled = whole[part] * (len(whole) / len(whole[part])) ** 0.5
        if isinstance(evidence, Tensor):
            halves.append(scaled)
        else:
            halves.append(LayerSignals(evidence.activations[part], scaled))
    return halves[0], halves[1]


def _combine(evidence: Evidence, generator: SampleGenerator) -> Tensor:
    """Return probes u = sum_n e_n g_n with random signs e; see `sign_combinations`."""
    if isinstance(evidence, Tensor):
        return sign_combinations(evidence, generator)
    signs = torch.where(generator.uniform(len(evidence.activations)) < 0.5, -1.0, 1.0)
    rows, columns = _factors(evidence)
    return (signs.to(rows.dtype).unsqueeze(-1) * rows).mT @ columns


def _product(evidence: Evidence) -> Callable[[Tensor], Tensor]:
    """Return V -> F vec(V)."""
    if isinstance(evidence, Tensor):
        return partial(gradient_product, evidence)
    return partial(outer_product, *_factors(evidence))


def _factors(evidence: LayerSignals) -> tuple[Tensor, Tensor]:
    """Return r (n, rows) and c (n, columns) of the gradients r c^T."""
    return evidence.output_gradients[:, 0, 0, 0], evidence.activations[:, 0, 0]


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(x) for name, x in tensors.items()}
