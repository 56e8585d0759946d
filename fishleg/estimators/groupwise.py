"""The base of estimators that fit a block to each group's held gradients, in packs of groups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any, ClassVar

from torch import Tensor

from fishleg.blocks import BLOCKS
from fishleg.estimators.base import AbstractEstimator, Callback, FitProgress, tensors_below
from fishleg.estimators.exchange import block_cost, exchange_blocks
from fishleg.estimators.group_fit import AbstractGroupFit
from fishleg.estimators.pieces import gather_pieces
from fishleg.gradients.memory import held_bytes, pack_groups, pass_bytes
from fishleg.gradients.running_sums import Progress, Sums
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint
from fishleg.moments import layer_moments
from fishleg.options import GroupwiseOptions
from fishleg.options.earlier import present_method
from fishleg.parameters import Partition
from fishleg.precision import in_full
from fishleg.solvers.adam import AdamSolver
from fishleg.solvers.base import AbstractSolver, SolverState


class AbstractGroupwiseEstimator(AbstractEstimator):
    """An estimator whose groups are fitted independently, and refined under masks.

    Groups are fitted one after the other, in packs whose gradients are held together: a pack
    costs one pass of the data. A rank group divides the groups: each process fits packs of its own,
    on all samples, and they exchange the blocks after each pack. So a state saved by one process
    lacks at most one pack of each other process.

    Args:
        partition: the groups.
        damping: gamma > 0.
        memory_limit: see `AbstractEstimator`.
        options: of the fit.

    Attributes:
        carries_blocks: whether a refinement starts from the present blocks.
        options: the estimator's own.
        report: group name -> the report of its fit, JSON-able: `structure`, `solver`, `objective`,
            the other entries of `SolverState.numbers`.
    """

    carries_blocks: ClassVar[bool]

    def __init__(
        self,
        partition: Partition,
        *,
        damping: float,
        memory_limit: int | None,
        options: GroupwiseOptions,
    ):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self.options = options
        self.report: dict[str, dict[str, Any]] = {}
        self._pending: list[str] = []
        self._partial: tuple[str, SolverState] | None = None

    @abstractmethod
    def _fit_of(self, name: str) -> AbstractGroupFit:
        """Return the fit of group `name`."""

    @property
    def _budget(self) -> int:
        """Bytes for the gradients that are held at once."""
        return self.options.memory_bytes

    # -- fitting

    @in_full
    def fit(
        self, source: GradientSource, callback: Callback | None = None, *, resume: bool = False
    ) -> None:
        """Estimate Q from `source`; see `AbstractEstimator.fit`.

        The callback is called after every half-step (or few steps of Adam), and while gradients are
        gathered; `objective` is the sum of J over the groups so far. `resume` resumes an
        interrupted `refine`, too. A pack's gradients are gathered again: storing them takes longer.
        """
        self.check_memory(source)
        if not (resume and (self._pending or self._blocks)):
            self._begin(masks=None)
            self._blocks = {}
        self._run(source, callback)

    @in_full
    def refine(
        self,
        source: GradientSource,
        masks: Mapping[str, Tensor],
        callback: Callback | None = None,
    ) -> None:
        """Continue from the present Q with the weights in `source` and the survivors `masks`.

        Afterwards Q is the inverse of the Fisher restricted to the survivors, as far as known:
        products are meaningful between survivors only.
        """
        self.blocks()
        self._begin(masks={name: mask.clone() for name, mask in masks.items()})
        self._run(source, callback)

    def _begin(self, masks: dict[str, Tensor] | None) -> None:
        self.masks = masks
        self.report = {}
        self._partial = None
        self._pending = [
            name for name in self.partition.names if masks is None or _survives(masks.get(name))
        ]

    def _run(self, source: GradientSource, callback: Callback | None) -> None:
        """Fit the pending groups, pack by pack."""
        budget = self._budget
        solvers = {name: self._solver(name, source) for name in self.partition.names}
        mine = source.alone().thorough()
        for packs in zip_longest(*self._deal(source, budget), fillvalue=()):
            due = [[name for name in pack if name in self._pending] for pack in packs]
            pack, names = packs[source.rank_group.rank], due[source.rank_group.rank]
            if names:

                def gathering(rows: int) -> None:
                    if callback is not None:
                        callback(replace(self._progress(solvers), metrics={}))

                held = held_bytes(source, pack[0]) <= budget
                pieces = gather_pieces(mine, pack, solvers, names, held, gathering)
                starts = self._starts(mine, names, pieces, gathering)
                for name in names:
                    self._solve(name, solvers, pieces.pop(name), starts[name], callback)
            if source.rank_group.size > 1 and any(due):
                self._exchange(source, due)
                if callback is not None:
                    callback(self._progress(solvers))

    def _deal(self, source: GradientSource, budget: int) -> list[list[list[str]]]:
        """Return the packs of each process of the source's rank group.

        All groups are cut, so that a resumed fit streams the same packs, bit-identical.
        """
        names = self.partition.names
        owners = source.rank_group.assign(
            {name: block_cost(self.partition[name]) for name in names}
        )
        return [
            pack_groups(source, [name for name in names if owners[name] == rank], budget)
            for rank in range(source.rank_group.size)
        ]

    def _exchange(self, source: GradientSource, due: Sequence[Sequence[str]]) -> None:
        """Exchange the groups that each process of the rank group has just fitted."""
        owners = {name: rank for rank, names in enumerate(due) for name in names}
        mine = {name: self._blocks[name] for name in due[source.rank_group.rank]}
        blocks = self._blocks | exchange_blocks(source, mine, owners)
        self._blocks = {name: blocks[name] for name in self.partition.names if name in blocks}
        for rank, names in enumerate(due):
            report = {name: self.report.get(name) for name in names}
            self.report |= source.rank_group.broadcast({}, report, owner=rank)[1]
        self._pending = [name for name in self._pending if name not in owners]

    def _solve(
        self,
        name: str,
        solvers: Mapping[str, AbstractSolver],
        pieces: Iterable[Tensor],
        state: SolverState,
        callback: Callback | None,
    ) -> None:
        """Fit one group from `state` on, with a call of the callback for every state."""
        for present in solvers[name].run(pieces, state):
            self._partial = (name, present)
            self.report[name] = {
                "structure": self._fit_of(name).structure,
                "solver": type(solvers[name]).__name__,
                **present.numbers,
            }
            if present.done == solvers[name].units:
                self._blocks[name] = present.block
                self._pending.remove(name)
                self._partial = None
            if callback is not None:
                callback(self._progress(solvers))

    def _progress(self, solvers: Mapping[str, AbstractSolver]) -> FitProgress:
        units = {name: solver.units for name, solver in solvers.items()}
        done = sum(units[name] for name in units if name not in self._pending)
        if self._partial is not None:
            done += self._partial[1].done
        objective = sum(entry["objective"] for entry in self.report.values())
        return FitProgress(done=done, total=sum(units.values()), metrics={"objective": objective})

    # -- each group

    def _solver(self, name: str, source: GradientSource) -> AbstractSolver:
        masks = self.masks or {}
        return self._fit_of(name).solver(
            source.rows, refines=self.masks is not None, mask=masks.get(name)
        )

    def _starts(
        self,
        source: GradientSource,
        names: Sequence[str],
        pieces: Mapping[str, Iterable[Tensor]],
        progress: Progress,
    ) -> dict[str, SolverState]:
        """Return the state from which each group's solver starts or resumes."""
        carried = self._blocks if self.carries_blocks else {}
        starts = {name: SolverState(block=block) for name, block in carried.items()}
        if self._partial is not None:
            starts[self._partial[0]] = self._partial[1]
        fresh = [name for name in names if name not in starts]
        wanted = [name for name in fresh if self.masks is None and self._fit_of(name).from_layer]
        factors: Sums = layer_moments(source, wanted, progress=progress) if wanted else {}
        for name in fresh:
            weight = source.model.get_parameter(self.partition[name].weight)
            like = weight.new_empty(0, dtype=source.dtype(name))
            starts[name] = self._fit_of(name).start(pieces[name], factors.get(name), like)
        return starts

    # -- memory

    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` needs, except its gradients in a pack."""
        return self._fit_of(name).footprint(
            source.element_size(name),
            source.conv_groups(name),
            source.rows_at_once,
            uses_adam=isinstance(self._solver(name, source), AdamSolver),
        )

    def peak_bytes(self, source: GradientSource) -> int:
        """Return about the bytes that a fit needs at its peak: all blocks, and one pack.

        Beside the model and the samples, as in `AbstractEstimator`.
        """
        budget = self.options.memory_bytes
        footprints = {name: self.footprint(source, name) for name in self.partition.names}
        packs = [
            sum(footprints[name].sums for name in pack)
            + sum(size for size in (held_bytes(source, name) for name in pack) if size <= budget)
            for pack in self._deal(source, budget)[source.rank_group.rank]
        ]
        work = max(one.work for one in footprints.values())
        held = sum(one.held for one in footprints.values())
        return held + max(packs, default=0) + work + pass_bytes(source)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return factors, masks, the running group's solver state, options and report."""
        state = self._common_state()
        state["meta"] |= {
            "options": asdict(self.options),
            "report": {name: dict(entry) for name, entry in self.report.items()},
            "pending": list(self._pending),
            "partial": None,
        }
        if self._partial is not None:
            name, now = self._partial
            state["meta"]["partial"] = {
                "group": name,
                "block": type(now.block).__name__,
                "done": now.done,
                "numbers": now.numbers,
            }
            parts = {"block": now.block.tensors(), "extra": now.extra}
            for part, tensors in parts.items():
                state["tensors"] |= {f"{part}/{key}": t.contiguous() for key, t in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned, damping and options included."""
        meta, tensors = state["meta"], state["tensors"]
        method, options = present_method(meta["estimator"], meta["options"])
        self._load_common_state({"tensors": tensors, "meta": {**meta, "estimator": method}})
        self.options = type(self.options)(**options)
        self.report = dict(meta["report"])
        self._pending = list(meta["pending"])
        self._partial = None
        if partial := meta["partial"]:
            shape = self.partition[partial["group"]].shape
            now = SolverState(
                block=BLOCKS[partial["block"]].restore(tensors_below("block/", tensors), shape),
                done=partial["done"],
                extra=tensors_below("extra/", tensors),
                numbers=dict(partial["numbers"]),
            )
            self._partial = (partial["group"], now)


def _survives(mask: Tensor | None) -> bool:
    """Tell whether a weight of a group survives."""
    return mask is None or bool(mask.any())
