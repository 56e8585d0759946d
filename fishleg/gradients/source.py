"""Per-sample gradients of the negative log-likelihood, streamed over a calibration set.

F = (1/N) sum_n E_y[ g g^T ] with g = d/dw nll(f(x_n), y), and the label y drawn from the model; or
all labels enumerated with their probabilities; or (the empirical Fisher) the data's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial

import torch
from torch import Tensor

from fishleg.calibration import Batch, Samples
from fishleg.errors import FishLegError
from fishleg.gradients.layers import LayerSignals
from fishleg.gradients.lazy import Lazy
from fishleg.gradients.paths import find_paths
from fishleg.gradients.persample import Pass, fast_gradients, run_passes
from fishleg.gradients.rank_group import ALONE
from fishleg.gradients.samples import LabelledSamples
from fishleg.gradients.signals import (
    check_signals,
    is_outer_product,
    lazy_signals,
    signalling_module,
)
from fishleg.precision import compute_dtype


class GradientSource(LabelledSamples):
    """Streams scaled per-sample gradients: F = sum_n vec(G_n) vec(G_n)^T exactly, group by group.

    The weights 1/(N K) of K drawn labels, p_c/N of enumerated ones, 1/N of empirical ones enter
    as square roots. Rows are ordered by sample, then by label; they are the same in every pass,
    for any batch size, up to rounding. Gradients are in float32 at least, for any dtype
    of the weights; see `precision`. The graph and a trial at the first use choose the path of each
    parameter's gradients (see `persample`); in a batch where something else uses the parameter,
    too, its gradients take the general path. Weights may change between passes.

    Args:
        model: maps (n, ...) to outputs (n, ...), each sample for itself.
        likelihood: the meaning of the outputs.
        partition: the groups; see `partition_parameters`.
        calibration: the samples.
        labels: "sampled" from the model, "matched" (with the moments of sampled ones, and less
            noise), "enumerated" (all, weighted: exact), or "empirical".
        draws: K >= 1, labels drawn a sample (1 unless they are sampled or matched).
        seed: of the drawn labels; with a sample's number and the draw it fixes the label.
        batch_size: gradient rows computed at once, >= 1.
        calling: how the model is called, and which of its outputs counts.
        rank_group: processes that have the same source, and may share the passes; see `shared`.

    Raises:
        UnknownName: `labels` is none of these, or the partition is of another model.
        ShapeMismatch: a parameter has another shape than in the partition.
        FishLegError: the partition has no group, or samples are given otherwise than as such.
        ValueError: `draws` or `batch_size` is out of range.
    """

    # -- gradients

    def stream(self, groups: Sequence[str] | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield group name -> gradients (n, rows, columns), in one pass over the data.

        The mapping computes a group's gradients whenever they are asked for: take each once. Cost
        of a pass: one forward, one backward without weight gradients (a forward's FLOPs), and a
        forward's FLOPs for the gradients; 4 self.rows rows columns bytes are written (float32), of
        which one group and batch exist at a time. Parameters on the general path together cost one
        further forward and backward pass under vmap.

        Args:
            groups: names; default all.
        """
        names = self.partition.names if groups is None else tuple(groups)
        for one in self._passes(self._hooked(names)):
            yield self._lazy_gradients(names, one)

    def hold(self, groups: Sequence[str]) -> dict[str, Tensor]:
        """Return group name -> all gradients of a pass, (self.rows, rows, columns)."""
        if not groups:
            return {}
        held: dict[str, Tensor] = {}
        start = 0
        for gradients in self.stream(groups):
            for name, value in gradients.items():
                if name not in held:
                    held[name] = value.new_empty(self.rows, *value.shape[1:])
                held[name][start : start + len(value)] = value
            start += len(value)
        if not all(bool(value.sum().isfinite()) for value in held.values()):
            for _ in self.thorough().stream(groups):
                pass  # raises an error that names the sample, if one sample causes it
        return held

    def layers(
        self, groups: Sequence[str] | None = None
    ) -> Iterator[Mapping[str, LayerSignals | None]]:
        """Yield group name -> the signals of its layer, in one pass over the data.

        None for a group that is not the weight (and bias) of one linear or convolution layer on
        the fast path. The mapping computes a value each time it is asked for. Cost: as `stream`,
        without the gradients.

        Args:
            groups: names; default all.

        A FishLegError if the model uses a layer otherwise in some batch than in the first ones; the
        layer is on the general path from then on.
        """
        self._look_again()
        names = self.partition.names if groups is None else tuple(groups)
        modules = {name: self._module(name) for name in names}
        for one in self._passes({module for module in modules.values() if module is not None}):
            for name, module in modules.items():
                if module is not None:
                    check_signals(self.partition[name], one, self.fast)
            yield lazy_signals(self.model, self.partition, modules, one)

    def conv_groups(self, name: str) -> int | None:
        """Return the convolution groups h of the layer of group `name`, 1 for a linear layer.

        None where `layers` gives None: the group is not the weight of one layer on the fast path.
        """
        self._look_again()
        module = self._module(name)
        return None if module is None else getattr(self.model.get_submodule(module), "groups", 1)

    def element_size(self, name: str) -> int:
        """Return the bytes of one number of group `name`: s in the formulas of memory."""
        return self.dtype(name).itemsize

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the gradients of group `name`, and so of its curvature."""
        return compute_dtype(self.model.get_parameter(self.partition[name].weight).dtype)

    def factored(
        self, groups: Sequence[str] | None = None
    ) -> Iterator[Mapping[str, Tensor | LayerSignals]]:
        """Yield group name -> gradients, or the factors they are products of, in one pass.

        The gradient of a linear layer at one position has rank one, G_n = delta_n x_n^T, and is not
        formed: its group gives signals with one convolution group and one position. All others give
        gradients as in `stream`. Cost: as `stream`, without the products that are not formed.

        Args:
            groups: names; default all.
        """
        for evidence, _ in self.factored_with_signals(groups):
            yield evidence

    def factored_with_signals(
        self, groups: Sequence[str] | None = None
    ) -> Iterator[tuple[Mapping[str, Tensor | LayerSignals], Mapping[str, LayerSignals | None]]]:
        """Yield what `factored` and `layers` yield, from one pass.

        Args:
            groups: names; default all.
        """
        names = self.partition.names if groups is None else tuple(groups)
        modules = {name: self._module(name) for name in names}
        for one in self._passes(self._hooked(names)):
            gradients = self._lazy_gradients(names, one)
            signals: Mapping[str, LayerSignals | None]
            signals = lazy_signals(self.model, self.partition, modules, one)
            outer = {
                name
                for name, module in modules.items()
                if is_outer_product(self.model, self.partition[name], module, one)
            }
            yield Lazy(names, partial(_pick, signals, gradients, outer)), signals

    def over(self, calibration: Samples, *, seed: int) -> GradientSource:
        """Return the same source over other samples, with the same paths.

        Args:
            calibration: the samples.
            seed: of their labels.
        """
        _ = self.fast  # chosen now, so that all copies share them
        other = copy(self)
        other.calibration, other.seed = calibration, seed
        return other

    def shared(self) -> GradientSource:
        """Return a source that streams this process's part of the samples, scaled as in the whole.

        A sum over the part, and then over the rank group, is the sum over all samples.

        Raises:
            FishLegError: there are fewer samples than processes.
        """
        if self.rank_group.size == 1:
            return self
        if len(self.calibration) < self.rank_group.size:
            raise FishLegError(
                f"Expected a calibration sample for each of the {self.rank_group.size} processes, "
                f"got {len(self.calibration)}; take more samples, or fewer workers."
            )
        _ = self.fast  # chosen on the same samples by all
        other = copy(self)
        other._among = self.rank_group.part(len(self.calibration))
        return other

    def alone(self) -> GradientSource:
        """Return the same source for this process alone, outside its rank group."""
        other = copy(self)
        other.rank_group = ALONE
        return other

    def thorough(self) -> GradientSource:
        """Return the same source, which checks every number of a pass and names a faulty sample.

        Otherwise only outputs, losses and gradients on the general path are checked.
        """
        other = copy(self)
        other._thorough = True
        return other

    def after(self, rounds: int) -> GradientSource:
        """Return a source whose passes skip the first `rounds` batches.

        Args:
            rounds: 0 ... the batches of a pass, as `stream` yields them.
        """
        _ = self.fast  # chosen on the same samples
        other = copy(self)
        samples, other._skipped = divmod(rounds, self._rounds_a_batch)
        first, end, _ = self._among.indices(len(self.calibration))
        other._among = slice(min(first + samples * self.samples_at_once, end), end)
        return other

    def report(self) -> list[tuple[str, str]]:
        """Return (parameter, remark) for each that is off the fast path or without curvature."""
        refused = self.general.refused
        way = "general path: torch.func.vmap"
        if refused is not None:
            way = f"loop over samples, since torch.func.vmap cannot ({refused})"
        found = [(tensor, way) for tensor in self.tensors if tensor not in self.fast]
        if self.singly is not None:
            why = f"one sample at a time, since the model decides by them ({self.singly})"
            found.append(("all", why))
        return found + [(name, f"no curvature: {why}") for name, why in self.partition.uncovered]

    # -- paths

    @property
    def tensors(self) -> list[str]:
        """State-dict names of all parameters that the groups cover."""
        return [tensor for group in self.partition.groups for tensor in group.tensors]

    @cached_property
    def fast(self) -> dict[str, str]:
        """Parameter name -> hooked module, of those on the fast path; shared by all copies."""
        self._seen = self._versions()
        batch = self._some_samples()
        return find_paths(self.network, self.general, self.tensors, batch, self._run)

    def _versions(self) -> list[tuple[int, int]]:
        parameters = map(self.model.get_parameter, self.tensors)
        return [(parameter.data_ptr(), parameter._version) for parameter in parameters]

    def _look_again(self) -> None:
        """After a change of weights, keep on the fast path only groups that the graph allows."""
        fast, now = self.fast, self._versions()
        if fast and now != self._seen:
            one = next(self._run(self._some_samples(), set(fast.values())))
            for name in fast.keys() - one.fast:
                del fast[name]
        self._seen = now

    def _module(self, name: str) -> str | None:
        """Return the linear or convolution module whose weight group `name` is, or None."""
        return signalling_module(self.model, self.partition[name], self.fast)

    def _hooked(self, groups: Sequence[str]) -> set[str]:
        """Return the modules whose hooks give gradients of the groups."""
        tensors = [tensor for name in groups for tensor in self.partition[name].tensors]
        return {self.fast[tensor] for tensor in tensors if tensor in self.fast}

    def _run(self, batch: Batch, hooked: set[str]) -> Iterator[Pass]:
        def scaled_label(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            targets, weights = self.label(outputs, batch)
            return targets, (weights / len(self.calibration)).sqrt()

        return run_passes(
            self.network,
            batch,
            hooked,
            scaled_label,
            draws_at_once=self.batch_size,
            thorough=self._thorough,
        )

    def _passes(self, hooked: set[str]) -> Iterator[Pass]:
        """Yield all samples and labels, at most `batch_size` rows at a time."""
        skipped = self._skipped
        for batch in self._batches(self.samples_at_once):
            for one in self._run(batch, hooked):
                if skipped:
                    skipped -= 1
                    continue
                yield one

    def _lazy_gradients(self, names: Sequence[str], one: Pass) -> Mapping[str, Tensor]:
        tensors = [tensor for name in names for tensor in self.partition[name].tensors]
        paths = {name: module for name, module in self.fast.items() if name in one.fast}
        general = [tensor for tensor in tensors if tensor not in paths]
        slow = self.general.gradients(self.network, general, one)

        def make(name: str) -> Tensor:
            group = self.partition[name]
            fast: dict[str, Tensor] = {}
            for module in {paths[tensor] for tensor in group.tensors if tensor not in slow}:
                fast |= fast_gradients(self.model, one, module)
            # A module's bias may be on the fast path and its (tied) weight not.
            return group.gather(fast | slow).flatten(0, 1)

        return Lazy(names, make)


def _pick(
    signals: Mapping[str, LayerSignals | None],
    gradients: Mapping[str, Tensor],
    outer: Collection[str],
    name: str,
) -> Tensor | LayerSignals:
    found = signals[name] if name in outer else None
    return gradients[name] if found is None else found
