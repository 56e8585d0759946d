"""What estimators share that need no iterations: they sum over the gradients, then invert."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.estimators.base import AbstractEstimator, Callback, FitProgress
from fishleg.estimators.exchange import block_cost, exchange_blocks
from fishleg.gradients import GradientSource
from fishleg.moments import Progress

_Sums = TypeVar("_Sums")


class AbstractOnePassEstimator(AbstractEstimator):
    """An estimator without state to assimilate: `refine` estimates afresh.

    Attributes:
        restricts: `refine` estimates on the Fisher restricted to the survivors, and sets `masks`.
            Removed weights then have zero gradients: they are decoupled from the survivors, and
            each has the entry 1 / damping. Otherwise `refine` estimates on the full Fisher.
        passes: passes over the data, for progress.
        options: names of the attributes that hold the estimator's own options.
    """

    restricts: ClassVar[bool] = True
    passes: ClassVar[int] = 1
    options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def _estimate(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None, progress: Progress
    ) -> dict[str, AbstractBlock]:
        """Return the blocks of all groups, on the survivors `masks` if given."""

    def fit(
        self, source: GradientSource, callback: Callback | None = None, *, resume: bool = False
    ) -> None:
        """Estimate Q on the full Fisher; see `AbstractEstimator.fit`. Starts afresh always."""
        self.check_memory(source)
        self._blocks = self._estimate(source, None, self._reporter(source, callback))
        self.masks = None

    def refine(
        self,
        source: GradientSource,
        masks: Mapping[str, Tensor],
        callback: Callback | None = None,
    ) -> None:
        """Estimate Q afresh, on the survivors if the estimator `restricts`."""
        if not self.restricts:
            return self.fit(source, callback)
        self._blocks = self._estimate(source, masks, self._reporter(source, callback))
        self.masks = dict(masks)

    def _reporter(self, source: GradientSource, callback: Callback | None) -> Progress:
        total = self.passes * source.rows

        def report(done: int) -> None:
            if callback is not None:
                callback(FitProgress(done=done, total=total, metrics={}))

        return report

    def _divide(
        self,
        source: GradientSource,
        sums: dict[str, _Sums],
        make: Callable[[str, _Sums], AbstractBlock],
    ) -> dict[str, AbstractBlock]:
        """Return the blocks that `make` makes of (group name, its sums), in the weights' dtype.

        Each process of a team makes some of them, and all get all. The sums are taken out of
        `sums`, so that each is freed once its block is made.
        """
        names, team = list(sums), source.team
        owners = team.deal({name: block_cost(self.partition[name]) for name in names})
        blocks: dict[str, AbstractBlock] = {}
        for name in names:
            found = sums.pop(name)
            if owners[name] == team.rank:
                blocks[name] = self._cast(source, name, make(name, found))
        return exchange_blocks(source, blocks, owners)

    def _cast(self, source: GradientSource, name: str, block: AbstractBlock) -> AbstractBlock:
        """Return the block of group `name` in the dtype of the group's weight, contiguous."""
        group = self.partition[name]
        dtype = source.model.get_parameter(group.weight).dtype
        tensors = {key: tensor.to(dtype).contiguous() for key, tensor in block.tensors().items()}
        return type(block).restore(tensors, group.shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the blocks' tensors and the masks, and their description."""
        state = self._common_state()
        state["meta"]["options"] = {option: getattr(self, option) for option in self.options}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, damping and options included."""
        self._load_common_state(state)
        for option in self.options:
            setattr(self, option, state["meta"]["options"][option])
