"""The one interface of all curvature estimators.

An estimator holds Q ~ (F + damping I)^-1 as one block a parameter group, and makes the blocks in
its own way; everything downstream (saliency, compensation, certificate) sees only this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fishleg.blocks import BLOCKS, AbstractBlock
from fishleg.calling import model_device
from fishleg.checks import check_type
from fishleg.errors import CapacityExceeded, FishLegError, NotFitted, UnknownName
from fishleg.gradients.memory import pass_bytes
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint, available_bytes, peak, show_bytes
from fishleg.options import Distribution, EstimatorOptions
from fishleg.parameters import Partition


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """The argument of a fit's callback.

    Attributes:
        done: units of work finished.
        total: units of work in all.
        metrics: name -> value, such as the objective.
    """

    done: int
    total: int
    metrics: Mapping[str, float]


Callback = Callable[[FitProgress], None]


class AbstractEstimator(ABC):
    """An estimate of the inverse damped Fisher, block by block.

    Attributes:
        partition: the groups it covers.
        damping: gamma > 0, absolute, in units of the Fisher.
        masks: group name -> bool (rows, columns), True for survivors, of the fit's support; None
            when Q was fitted on the full Fisher. Products are meaningful on the support only.
        memory_limit: bytes that a fit may need at its peak; None for the free memory at the start.
        remedy: the alternative that the error names when a fit does not fit the memory.
        distribution: how its saliencies compare, which pruning follows by default: "global", or
            "uniform" where the units differ from layer to layer; see `select`.

    In the formulas of time and memory: N gradient rows in a pass, P parameters, a group of
    r rows and c columns with h convolution groups, s bytes a number (4 for float32), and n gradient
    rows in a batch.
    """

    name: str
    remedy: ClassVar[str] = "the method diagonal"
    distribution: ClassVar[Distribution] = "global"

    def __init__(self, partition: Partition, *, damping: float, memory_limit: int | None = None):
        check_type("partition", partition, Partition, "a Partition of partition_parameters")
        EstimatorOptions(damping=damping, memory_limit=memory_limit)
        self.partition = partition
        self.damping = damping
        self.memory_limit = memory_limit
        self.masks: dict[str, Tensor] | None = None
        self._blocks: dict[str, AbstractBlock] = {}

    def __repr__(self) -> str:
        groups = len(self.partition.groups)
        fitted = "fitted" if self._blocks else "not fitted"
        return f"{type(self).__name__}(damping={self.damping:g}, {groups} groups, {fitted})"

    @abstractmethod
    def fit(
        self, source: GradientSource, callback: Callback | None = None, *, resume: bool = False
    ) -> None:
        """Estimate Q from `source`, on the full Fisher.

        Args:
            source: per-sample gradients at the weights to expand around.
            callback: is given the progress; may call `state_dict`, whose result can be saved.
            resume: continue from a loaded state of an unfinished fit, to the bits that the
                undisturbed fit reaches, instead of starting over.
        """

    @abstractmethod
    def refine(
        self,
        source: GradientSource,
        masks: Mapping[str, Tensor],
        callback: Callback | None = None,
    ) -> None:
        """Continue from the present state with new weights (in `source`) and survivors `masks`.

        An estimator without a state to continue from re-estimates, on the Fisher restricted to the
        survivors or on the full one, and sets `self.masks` accordingly.
        """

    def learn(self, source: GradientSource, masks: Mapping[str, Tensor] | None = None) -> None:
        """Update the estimate by one batch, as training provides them; `settle` makes Q of it.

        Args:
            source: of the gradients of a batch, at the present weights, with labels drawn afresh.
            masks: group name -> bool (rows, columns), the survivors so far; None for all.

        Raises:
            FishLegError: the method cannot be updated by batches.
        """
        raise FishLegError(
            f"{self.name}: expected a method that batches can update, such as fls, kfac, obs or "
            "diagonal; fit or refine this one."
        )

    def settle(self, source: GradientSource) -> None:
        """Make Q of the batches that `learn` was given.

        Args:
            source: at the present weights. Methods whose Q is up to date look for Q alone, and
                raise NotFitted where there is none.
        """
        self.blocks()

    def blocks(self) -> dict[str, AbstractBlock]:
        """Return group name -> block.

        Raises:
            NotFitted: before the first `fit`.
        """
        if not self._blocks:
            raise NotFitted(f"{self.name}: call fit before using the estimate.")
        return self._blocks

    def block(self, name: str) -> AbstractBlock:
        """Return the block of group `name`.

        Raises:
            UnknownName: there is no such group.
        """
        blocks = self.blocks()
        if name not in blocks:
            raise UnknownName("parameter group", name, blocks)
        return blocks[name]

    def matvec(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Q v for group name -> matrix (..., rows, columns)."""
        return {name: self.block(name).matvec(matrix) for name, matrix in v.items()}

    def diagonal(self) -> dict[str, Tensor]:
        """Return diag(Q) as group name -> (rows, columns)."""
        return {name: block.diagonal() for name, block in self.blocks().items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the fitted estimate, a sentence each.

        Prunable groups whose gradients vanish beside the damping: their weights are judged by
        magnitude alone.
        """
        blind = [group.name for group in self.partition.prunable if self._is_blind(group.name)]
        if not blind:
            return ()
        return (
            f"The curvature vanishes beside the damping of {self.damping:g} in {', '.join(blind)}: "
            "their weights are judged by magnitude alone. Lower the damping, or check whether the "
            "network uses them, and whether its outputs are saturated.",
        )

    def _is_blind(self, name: str) -> bool:
        """Tell whether diag(Q) is 1 / damping, up to rounding, on all survivors of a group."""
        if name not in self._blocks:
            return False
        diagonal = self._blocks[name].diagonal()[:, : self.partition[name].weight_columns]
        if self.masks is not None:
            diagonal = diagonal[self.masks[name].to(diagonal.device)[:, : diagonal.shape[1]]]
        return diagonal.numel() > 0 and bool(((diagonal * self.damping - 1).abs() <= 1e-6).all())

    # -- memory

    def memory_bytes(self) -> int:
        """Return the bytes that the fitted estimate holds."""
        return sum(block.memory_bytes() for block in self.blocks().values())

    @abstractmethod
    def footprint(self, source: GradientSource, name: str) -> Footprint:
        """Return the memory that fitting group `name` to `source` needs, from shapes alone."""

    def required_bytes(self, source: GradientSource) -> int:
        """Return the value of `memory_bytes` after a fit to `source`."""
        return sum(self.footprint(source, name).held for name in self.partition.names)

    def peak_bytes(self, source: GradientSource) -> int:
        """Return about the bytes that a fit needs at its peak, beside the model and the samples.

        The formulas of the class, and the passes of one batch; see `gradients.memory.pass_bytes`.
        """
        footprints = [self.footprint(source, name) for name in self.partition.names]
        return peak(footprints) + pass_bytes(source)

    def check_memory(self, source: GradientSource) -> None:
        """Check, before anything is allocated, that a fit to `source` fits the memory.

        Raises:
            FishLegError: the source is of another partition.
            CapacityExceeded: the peak exceeds `memory_limit`, or the free memory of the device.
        """
        groups = [(group.name, group.shape) for group in self.partition.groups]
        if groups != [(group.name, group.shape) for group in source.partition.groups]:
            raise FishLegError(
                f"{self.name}: expected gradients of its own groups, {list(self.partition.names)}, "
                f"got a source of {list(source.partition.names)}; make both from one partition."
            )
        limit = self.memory_limit
        if limit is None:
            limit = available_bytes(model_device(source.model))
        needed = self.peak_bytes(source)
        if limit is not None and needed > limit:
            held = show_bytes(self.required_bytes(source))
            raise CapacityExceeded(
                f"{self.name}: the fit needs about {show_bytes(needed)} ({held} of it for the "
                f"estimate), expected at most the {show_bytes(limit)} available; choose "
                f"{self.remedy}, a smaller batch_size, or raise memory_limit."
            )

    # -- state

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return `{"tensors": {name: Tensor}, "meta": JSON-able dict}`, complete for resuming."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            FishLegError: the state is another estimator's, or of another partition.
        """

    def _common_state(self) -> dict[str, Any]:
        """Return the part of `state_dict` that all estimators have: blocks, masks, damping."""
        tensors = {
            f"blocks/{name}/{key}": tensor.contiguous()
            for name, block in self._blocks.items()
            for key, tensor in block.tensors().items()
        }
        tensors |= {f"masks/{name}": mask for name, mask in (self.masks or {}).items()}
        meta = {
            "estimator": self.name,
            "damping": self.damping,
            "groups": list(self.partition.names),
            "blocks": {name: type(block).__name__ for name, block in self._blocks.items()},
            "masked": self.masks is not None,
        }
        return {"tensors": tensors, "meta": meta}

    def _load_common_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `_common_state` returned, damping included.

        Raises:
            FishLegError: the state is another estimator's, or of another partition.
        """
        meta, tensors = state["meta"], state["tensors"]
        if meta["estimator"] != self.name:
            raise FishLegError(
                f"The state is of estimator {meta['estimator']!r}; expected {self.name!r}."
            )
        if meta["groups"] != list(self.partition.names):
            raise FishLegError(
                f"The state covers the groups {meta['groups']}; expected those of the partition, "
                f"{list(self.partition.names)}."
            )
        self.damping = meta["damping"]
        self._blocks = {
            name: BLOCKS[kind].restore(
                tensors_below(f"blocks/{name}/", tensors), self.partition[name].shape
            )
            for name, kind in meta["blocks"].items()
        }
        self.masks = tensors_below("masks/", tensors) if meta["masked"] else None


def tensors_below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, under the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
