"""The base of estimators without iterations: they sum over the gradients, then invert."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.estimators.base import AbstractEstimator, Callback, FitProgress, tensors_below
from fishleg.estimators.exchange import block_cost, exchange_blocks
from fishleg.gradients.running_sums import Progress, RunningSums, Sums
from fishleg.gradients.source import GradientSource
from fishleg.options import NoOptions, Options
from fishleg.parameters import Partition
from fishleg.precision import in_full


class Sum(Protocol):
    """Completes the pass of running sums, which then hold the result."""

    def __call__(self, *, running: RunningSums, progress: Progress) -> object:
        """Sum up; `progress` is given the gradient rows done so far."""


@dataclass(frozen=True)
class DataPass:
    """One pass over the data: its sums, and the function of (group name, its sums) to a block."""

    sum: Sum
    make: Callable[[str, list[Tensor]], AbstractBlock]


class AbstractOnePassEstimator(AbstractEstimator):
    """An estimator that sums over the gradients: `refine` estimates again.

    An interrupted fit resumes within its pass over the data, or its inversions: the state of a
    running fit has the blocks so far and the sums of the pass. (In a rank group of another size the
    pass starts over.) Memory: each process of a rank group holds the sums twice.

    Attributes:
        restricts: `refine` estimates on the Fisher restricted to the survivors, and sets `masks`.
            Removed weights then have zero gradients: they are decoupled from the survivors, and
            each has the entry 1 / damping. Otherwise `refine` estimates on the full Fisher.
        averages: `learn` is possible: no pass needs the blocks of an earlier one, so running means
            of the sums over batches have all that Q is made of.
        options: the estimator's own.
    """

    restricts: ClassVar[bool] = True
    averages: ClassVar[bool] = False
    options: Options = NoOptions()

    def __init__(self, partition: Partition, *, damping: float, memory_limit: int | None = None):
        super().__init__(partition, damping=damping, memory_limit=memory_limit)
        self._passes_done: int | None = None  # None: no fit is under way
        self._running = RunningSums()  # of the present pass
        self._means: list[Sums] = []  # of batches, for each pass
        self._updates = 0

    @abstractmethod
    def _passes(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> Sequence[DataPass]:
        """Return the passes in order, on the survivors `masks` if given.

        A later one may use, once it runs, the blocks of those before.
        """

    def _without_data(self, source: GradientSource) -> dict[str, AbstractBlock]:
        """Return the blocks of groups that no pass makes."""
        return {}

    @in_full
    def fit(
        self, source: GradientSource, callback: Callback | None = None, *, resume: bool = False
    ) -> None:
        """Estimate Q on the full Fisher; see `AbstractEstimator.fit`.

        `resume` resumes an interrupted `refine`, too.
        """
        self.check_memory(source)
        if not resume or self._passes_done is None:
            self._begin(None)
        self._run(source, callback)

    @in_full
    def refine(
        self,
        source: GradientSource,
        masks: Mapping[str, Tensor],
        callback: Callback | None = None,
    ) -> None:
        """Estimate Q again, on the survivors if the estimator `restricts`."""
        self.check_memory(source)
        self._begin(dict(masks) if self.restricts else None)
        self._run(source, callback)

    @in_full
    def learn(self, source: GradientSource, masks: Mapping[str, Tensor] | None = None) -> None:
        """Take a batch into running means of the sums; see `AbstractEstimator.learn`.

        A plain mean of the first batches, later one that forgets: weight 0.05 for the newest. Under
        masks that remove more the means continue.
        """
        if not self.averages:
            super().learn(source, masks)
        self.masks = dict(masks) if self.restricts and masks is not None else None
        weight = max(_NEWEST, 1 / (self._updates + 1))
        for number, one in enumerate(self._passes(source, self.masks)):
            running = RunningSums()
            one.sum(running=running, progress=_ignore)
            if number == len(self._means):
                self._means.append({})
            means = self._means[number]
            for name, sums in running.sums.items():
                before = means.get(name, sums)
                pairs = zip(before, sums, strict=True)
                means[name] = [mean.lerp(new, weight) for mean, new in pairs]
        self._updates += 1

    @in_full
    def settle(self, source: GradientSource) -> None:
        """Make Q of the running means, if there are any."""
        if not self._updates:
            return super().settle(source)
        self._blocks = {}
        for one, means in zip(self._passes(source, self.masks), self._means, strict=True):
            self._running = RunningSums(sums={name: list(sums) for name, sums in means.items()})
            self._make(source, one, _ignore)
        self._running = RunningSums()
        self._blocks = {name: self._blocks[name] for name in self.partition.names}

    def _begin(self, masks: dict[str, Tensor] | None) -> None:
        self.masks = masks
        self._means, self._updates = [], 0
        self._blocks = {}
        self._passes_done, self._running = 0, RunningSums()

    def _run(self, source: GradientSource, callback: Callback | None) -> None:
        """Complete the fit."""
        passes = self._passes(source, self.masks)
        total = max(1, len(passes)) * source.rows

        def report(rows: int) -> None:
            if callback is not None:
                done = (self._passes_done or 0) * source.rows + rows
                callback(FitProgress(done=done, total=total, metrics={}))

        for number, one in enumerate(passes[self._passes_done :], start=self._passes_done or 0):
            one.sum(running=self._running, progress=report)
            self._make(source, one, report)
            self._passes_done, self._running = number + 1, RunningSums()
        blocks = self._blocks | self._without_data(source)
        self._blocks = {name: blocks[name] for name in self.partition.names}
        report(total - len(passes) * source.rows)
        self._passes_done = None

    def _make(self, source: GradientSource, one: DataPass, report: Progress) -> None:
        """Make the blocks of a pass; the processes of a rank group divide and exchange them.

        The sums of each group are freed once its block is made.
        """
        sums, rank_group = self._running.sums, source.rank_group
        owners = rank_group.assign({name: block_cost(self.partition[name]) for name in sums})
        mine: dict[str, AbstractBlock] = {}
        for name in list(sums):
            if owners[name] == rank_group.rank:
                mine[name] = self._cast(source, name, one.make(name, sums[name]))
            del sums[name]
            if (
                rank_group.size == 1
            ):  # in a rank group the state is as it was until all have made theirs
                self._blocks[name] = mine[name]
                report(source.rows)
        self._blocks |= exchange_blocks(source, mine, owners)

    def _cast(self, source: GradientSource, name: str, block: AbstractBlock) -> AbstractBlock:
        """Return the block of group `name` in the dtype of its gradients, contiguous."""
        group, dtype = self.partition[name], source.dtype(name)
        tensors = {key: tensor.to(dtype).contiguous() for key, tensor in block.tensors().items()}
        return type(block).restore(tensors, group.shape)

    def peak_bytes(self, source: GradientSource) -> int:
        """Return about the peak bytes of a fit; see `AbstractEstimator.peak_bytes`."""
        alone = super().peak_bytes(source)
        if source.rank_group.size == 1:
            return alone
        return alone + sum(self.footprint(source, name).sums for name in self.partition.names)

    def state_dict(self) -> dict[str, Any]:
        """Return the blocks, the masks, the sums of a running fit, and the options."""
        state = self._common_state()
        state["meta"]["options"] = asdict(self.options)
        state["meta"]["updates"] = self._updates
        state["tensors"] |= {
            f"means/{number}/{index}/{name}": mean
            for number, means in enumerate(self._means)
            for name, parts in means.items()
            for index, mean in enumerate(parts)
        }
        if self._passes_done is not None:
            places = self._running.places()
            state["meta"]["under_way"] = {"passes_done": self._passes_done, **places}
            tensors = self._running.tensors()
            state["tensors"] |= {f"sums/{name}": one for name, one in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned, damping and options included."""
        self._load_common_state(state)
        self.options = type(self.options)(**state["meta"]["options"])
        self._passes_done, self._running = None, RunningSums()
        self._updates = state["meta"].get("updates", 0)
        self._means = _restored_means(tensors_below("means/", state["tensors"]))
        if under_way := state["meta"].get("under_way"):
            tensors = tensors_below("sums/", state["tensors"])
            self._passes_done = under_way["passes_done"]
            self._running = RunningSums.restore(under_way, tensors)


_NEWEST = 0.05  # weight of the newest batch in running means


def _ignore(rows: int) -> None:
    """Report no progress."""


def _restored_means(tensors: Mapping[str, Tensor]) -> list[Sums]:
    """Return the running means of each pass, from tensors by the name "PASS/INDEX/GROUP"."""
    means: list[Sums] = []
    for key in sorted(tensors, key=lambda key: [int(part) for part in key.split("/", 2)[:2]]):
        number, _, name = key.split("/", 2)
        while len(means) <= int(number):
            means.append({})
        means[int(number)].setdefault(name, []).append(tensors[key].clone())
    return means
