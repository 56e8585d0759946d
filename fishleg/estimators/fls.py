"""The FishLeg surgeon as published: Q learned by Adam on fresh batches, for all groups at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import cos, inf, pi
from typing import Any, Unpack

import torch
from torch import Tensor

from fishleg.blocks import BLOCKS, AbstractBlock
from fishleg.blocks.structures import count_numbers
from fishleg.estimators.base import AbstractEstimator, Callback, FitProgress, tensors_below
from fishleg.estimators.first_blocks import FirstBlocks
from fishleg.estimators.group_fit import block_structure, cast_block
from fishleg.fresh import FreshBatches, step_seed
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint
from fishleg.options import FlsChanges, FlsOptions, Structure
from fishleg.parameters import Partition
from fishleg.precision import in_full
from fishleg.rng import SampleGenerator
from fishleg.solvers.batch_objective import BatchObjective
from fishleg.solvers.descent import Descent, Tensors, scale_block


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The state of one group.

    Attributes:
        descent: of lambda.
        best: the block of the least held-out objective.
        value: that objective; infinite before the first look.
        looks: looks since then.
    """

    descent: Descent
    best: AbstractBlock
    value: float = inf
    looks: int = 0


class FLS(AbstractEstimator):
    """Learns Q by Adam on the FishLeg objective, with fresh batches and labels in each step.

    As in McGowan et al., arXiv 2412.02328: lambda, the factors of Q, descends
    J = E_u[ 1/2 (Qu)^T F_g (Qu) - u^T Q u ] with the damping inside; an old lambda is carried to
    new masks and weights (`refine`, `learn`), under which J is that of M o Q o M. The samples of a
    step are drawn by its number alone, so a resumed fit reaches the bits of an undisturbed one; the
    labels are drawn afresh in each step. Held-out samples stop the fit, group by group: a group's
    block is the one of least held-out J (or L). The start is brought to its best scale on the first
    batch. docs/theory.md lists the departures from the paper.

    Time: a pass of gradients over `batch` samples a step, and, for the n rows of a batch and p
    probes, about 6 p r c (r + c) + 8 n p r c FLOPs a group (probe), or 6 n r c (r + c) (expected,
    log_det); and 4 (r^3 + c^3) for the products with lambda.
    Memory: 6 s bytes for each of a block's numbers, see `structures.count_numbers`, and 8 n s r c
    for the largest group; beside them 8 (r^2 / h + h c^2) a group to start from `kfac`.

    Args:
        partition: the groups.
        damping: gamma > 0.
        memory_limit: see `AbstractEstimator`.
        options: of the fit; None for the defaults.
        changes: fields of `FlsOptions` that differ from `options`.

    Attributes:
        options: see `FlsOptions`.
        report: group name -> its `structure`, the `objective` on the held-out samples (or None),
            and the `steps` until then.
    """

    name = "fls"
    remedy = "a structure with smaller factors, or a smaller batch"

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        memory_limit: int | None = None,
        options: FlsOptions | None = None,
        **changes: Unpack[FlsChanges],
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.options = replace(options or FlsOptions(), **changes)
        self.report: dict[str, dict[str, Any]] = {}
        self._learned: dict[str, Learned] = {}
        self._step = 0  # of the present fit or refinement, or of `learn`
        self._drawn = 0  # batches since the fit began
        self._starts: FirstBlocks | None = None  # while their statistics are summed

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user: of all estimates, and groups that did not learn."""
        idle = [name for name, entry in self.report.items() if entry["steps"] == 0]
        found = list(super().warnings)
        if idle:
            found.append(
                f"No step lowered the held-out objective of {', '.join(idle)}: Q is its start. "
                "Lower learning_rate, or take more samples or steps."
            )
        return tuple(found)

    # -- fitting

    @in_full
    def fit(
        self, source: GradientSource, callback: Callback | None = None, *, resume: bool = False
    ) -> None:
        """Learn Q from `source`; see `AbstractEstimator.fit`.

        The callback is called after every step; `objective` is the held-out objective summed over
        the groups, after each look. `resume` resumes an interrupted `refine`, too.
        """
        self.check_memory(source)
        if not resume:
            self._learned, self._starts = {}, None
        if not self._learned:
            self.masks = None
            self._start(source, callback)
        self._run(source, callback)

    @in_full
    def refine(
        self,
        source: GradientSource,
        masks: Mapping[str, Tensor],
        callback: Callback | None = None,
    ) -> None:
        """Continue from the present Q with the weights in `source` and the survivors `masks`.

        The objective becomes that of M o Q o M (with `log_det`, that of the masked gradients).
        Products are meaningful between survivors only.
        """
        self._carry(masks)
        self._run(source, callback)

    @in_full
    def learn(self, source: GradientSource, masks: Mapping[str, Tensor] | None = None) -> None:
        """Take one step of Adam on all samples of `source`, at the full learning rate.

        For training that provides the batches: Q rides on them. A call with other masks than
        before carries lambda and Adam's moments to the new survivors.

        Args:
            source: of a batch's gradients, with freshly drawn labels; see `step_seed`.
            masks: group name -> bool (rows, columns), the survivors; None for the full Fisher.
        """
        if not self._learned:
            self._carry(masks)
        self.masks = None if masks is None else {name: one.clone() for name, one in masks.items()}
        self._descend(source, self.options.learning_rate)
        self._step, self._drawn = self._step + 1, self._drawn + 1
        self._blocks = {name: one.descent.block() for name, one in self._learned.items()}

    def _carry(self, masks: Mapping[str, Tensor] | None) -> None:
        """Begin new descents at the present blocks, for these survivors."""
        blocks = self.blocks()
        self.masks = None if masks is None else {name: one.clone() for name, one in masks.items()}
        self._step = 0
        self._learned = {
            name: Learned(descent=Descent.begin(block), best=block)
            for name, block in blocks.items()
        }

    def _run(self, source: GradientSource, callback: Callback | None) -> None:
        """Take the remaining steps, and keep each group's best block."""
        options = self.options
        total = options.refine_steps if self.masks is not None else options.steps
        batches = self._batches(source)
        held_out = batches.held_out()
        unseen = None if held_out is None else source.over(held_out, seed=source.seed)
        if self._step == 0:
            for name in self._learned:  # a group whose objective is never finite keeps this
                self._tell(name, None)
            if unseen is not None:
                self._look(unseen)
        for step in range(self._step, total):
            rate = options.learning_rate * (0.5 + 0.5 * cos(pi * step / total))
            self._descend(self._fresh(source, batches), rate)
            self._step, self._drawn = step + 1, self._drawn + 1
            metrics = {}
            if unseen is not None and (
                self._step % options.check_every == 0 or self._step == total
            ):
                self._look(unseen)
                metrics = {"objective": sum(one.value for one in self._learned.values())}
            if callback is not None:
                callback(FitProgress(done=self._step, total=total, metrics=metrics))
            if not self._learning():
                break
        for name, one in self._learned.items():
            last = one.best if unseen is not None else one.descent.block()
            self._blocks[name] = last
            if unseen is None:
                self._tell(name, None)
        self._learned = {}

    def _batches(self, source: GradientSource) -> FreshBatches:
        count = round(self.options.held_out * len(source.calibration))
        return FreshBatches(
            source.calibration, self.options.batch, self.options.seed, min(count, _MOST_HELD_OUT)
        )

    def _fresh(self, source: GradientSource, batches: FreshBatches) -> GradientSource:
        """Return the gradients of the next batch: no refinement sees those of another one."""
        return source.over(batches.batch(self._drawn), seed=step_seed(source.seed, self._drawn))

    def _learning(self) -> list[str]:
        """Return the groups whose held-out objective still falls."""
        patience = self.options.patience
        return [name for name, one in self._learned.items() if one.looks < patience]

    # -- a step

    def _descend(self, source: GradientSource, rate: float) -> None:
        """Take one step in each group that still learns, shared by the rank group."""
        names = self._learning()
        slopes: dict[str, Tensors] = {}
        for batch in source.shared().stream(names):
            for name in names:
                gradients = batch[name]
                weight = len(gradients) / source.rows
                loss = partial(self._loss, name, gradients * weight**-0.5)
                found = self._learned[name].descent.slopes(loss)
                before = slopes.get(name, {})
                slopes[name] = {
                    key: before.get(key, 0.0) + weight * slope for key, slope in found.items()
                }
        source.rank_group.sum(slope for found in slopes.values() for slope in found.values())
        for name, found in slopes.items():
            one = self._learned[name]
            self._learned[name] = replace(one, descent=one.descent.step(found, rate, self._step))

    def _loss(self, name: str, gradients: Tensor, block: AbstractBlock) -> Tensor:
        """Return the objective of a group's block on scaled gradients (n, rows, columns)."""
        numbers = torch.arange(self.options.probes, device=gradients.device)
        place = self.partition.names.index(name)
        generator = SampleGenerator(step_seed(self.options.seed, self._drawn), numbers, place)
        return self._objective.loss(block, gradients, generator, self._mask(name))

    @property
    def _objective(self) -> BatchObjective:
        return BatchObjective(self.options, self.damping)

    def _mask(self, name: str) -> Tensor | None:
        return None if self.masks is None else self.masks.get(name)

    # -- held-out samples

    def _look(self, unseen: GradientSource) -> None:
        """Measure the groups that still learn on the held-out samples, and keep the best blocks."""
        names = self._learning()
        blocks = {name: self._learned[name].descent.block() for name in names}
        with torch.no_grad():
            sums = self._measure(unseen, blocks)
            for name, block in blocks.items():
                one = self._learned[name]
                value, _ = self._objective.value(block, sums[name], self._mask(name))
                if value < one.value:
                    one = replace(one, best=block, value=value, looks=0)
                    self._tell(name, value)
                else:
                    one = replace(one, looks=one.looks + 1)
                self._learned[name] = one

    def _measure(
        self, source: GradientSource, blocks: Mapping[str, AbstractBlock]
    ) -> dict[str, Tensor]:
        """Return the sums over samples of each block, float64 (2,); see `BatchObjective.value`."""
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in blocks}
        for batch in source.shared().stream(list(blocks)):
            for name, block in blocks.items():
                gradients = batch[name]
                weight = len(gradients) / source.rows
                found = self._objective.terms(block, gradients, weight, self._mask(name))
                sums[name] += found.cpu()
        source.rank_group.sum(sums.values())
        return sums

    def _tell(self, name: str, value: float | None) -> None:
        structure = self._structure(name)
        self.report[name] = {"structure": structure, "objective": value, "steps": self._step}

    # -- the start

    def _start(self, source: GradientSource, callback: Callback | None) -> None:
        """Begin the descents of all groups, each at its best scale on the first batch."""

        def report(rows: int) -> None:
            if callback is not None:
                callback(FitProgress(done=0, total=self.options.steps, metrics={}))

        self._step = self._drawn = 0
        self._starts = self._starts or FirstBlocks(self.options.warm_start)
        structures = {name: self._structure(name) for name in self.partition.names}
        self._starts.sum(source, structures, report)
        self._blocks, self.report = {}, {}
        first = self._fresh(source, self._batches(source))
        starts = {}
        for name in self.partition.names:
            group = self.partition[name]
            weight = source.model.get_parameter(group.weight)
            like = weight.new_empty(0, dtype=source.dtype(name))
            block = self._starts.block(group, structures[name], self.damping, like)
            starts[name] = cast_block(block, like)
        self._starts = None
        with torch.no_grad():
            measured = self._measure(first, starts)
            for name, block in starts.items():
                block = scale_block(block, self._objective.value(block, measured[name])[1])
                self._learned[name] = Learned(descent=Descent.begin(block), best=block)

    def _structure(self, name: str) -> Structure:
        return block_structure(self.options.structure, self.partition[name])

    # -- memory

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that learning group `name` needs."""
        group, structure, each = (
            self.partition[name],
            self._structure(name),
            source.element_size(name),
        )
        numbers = count_numbers(structure, group, block_size=group.size)
        h = source.conv_groups(name) or 1
        starts = 8 * (group.rows**2 // h + h * group.columns**2)
        rows = min(self.options.batch * source.rows_per_sample, source.rows_at_once)
        return Footprint(
            held=each * numbers,
            sums=6 * each * numbers + (starts if self.options.warm_start == "kfac" else 0),
            work=8 * each * rows * group.size,
        )

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return the blocks, each group's descent, options and report."""
        state = self._common_state()
        for name, one in self._learned.items():
            parts = one.descent.tensors()
            parts |= {f"best.{key}": tensor for key, tensor in one.best.tensors().items()}
            state["tensors"] |= {f"learned/{name}/{k}": t.contiguous() for k, t in parts.items()}
        if self._starts is not None:
            state["meta"]["starts"] = self._starts.places()
            tensors = self._starts.tensors()
            state["tensors"] |= {f"starts/{key}": one for key, one in tensors.items()}
        state["meta"] |= {
            "options": asdict(self.options),
            "report": {name: dict(entry) for name, entry in self.report.items()},
            "step": self._step,
            "drawn": self._drawn,
            "learned": {
                name: {
                    "block": type(one.best).__name__,
                    "value": None if one.value == inf else one.value,
                    "looks": one.looks,
                }
                for name, one in self._learned.items()
            },
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned, damping and options included."""
        self._load_common_state(state)
        meta, tensors = state["meta"], state["tensors"]
        self.options = FlsOptions(**meta["options"])
        self.report = dict(meta["report"])
        self._step, self._drawn = meta["step"], meta["drawn"]
        self._learned, self._starts = {}, None
        if places := meta.get("starts"):
            kind, sums = self.options.warm_start, tensors_below("starts/", tensors)
            self._starts = FirstBlocks.restore(kind, places, sums)
        for name, entry in meta["learned"].items():
            form, shape = BLOCKS[entry["block"]], self.partition[name].shape
            parts = tensors_below(f"learned/{name}/", tensors)
            self._learned[name] = Learned(
                descent=Descent.restore(form, shape, parts),
                best=form.restore(tensors_below("best.", parts), shape),
                value=inf if entry["value"] is None else entry["value"],
                looks=entry["looks"],
            )


_MOST_HELD_OUT = 500  # samples: more cost time, and tell no more
