"""Per-sample gradients of the negative log-likelihood, streamed over a calibration set.

F = (1/N) sum_n E_y[ g g^T ] with g = d/dw nll(f(x_n), y), and the label y drawn from the model; or
all labels enumerated with their probabilities; or (the empirical Fisher) the data's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fishleg.calibration import Batch, Calibration, Samples, label
from fishleg.calling import PLAIN, Calling, model_device
from fishleg.capture import LayerSignals, has_signals, layer_signals, recording
from fishleg.checks import check_integer, check_type
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.jacobian import Jacobian
from fishleg.likelihoods import Likelihood, check_likelihood
from fishleg.nests import Nest
from fishleg.network import Network, find_network
from fishleg.options import Labels, check_labels
from fishleg.parameters import Partition
from fishleg.paths import Paths, check_samples, find_paths
from fishleg.persample import GeneralPath, Pass, fast_gradients, run_passes
from fishleg.precision import compute_dtype
from fishleg.team import ALONE, Team

__all__ = ["Calibration", "GradientSource", "Labels", "LayerSignals", "Lazy"]

_SAMPLES_TO_COMPARE = 16
_Value = TypeVar("_Value")


class Lazy(Mapping[str, _Value]):
    """A mapping whose values are made when asked for, each time again, and not kept.

    A consumer that takes the groups one by one never holds all gradients of a batch.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], _Value]):
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> _Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class GradientSource:
    """Streams scaled per-sample gradients: F = sum_n vec(G_n) vec(G_n)^T exactly, group by group.

    The weights 1/(N K) of K drawn labels, p_c/N of enumerated ones, 1/N of empirical ones enter
    as square roots. Rows are ordered by sample, then by label; they are the same in every pass,
    whatever the batch size, up to rounding. While a batch is computed the model is in evaluation
    mode; between batches every module's flag is as the caller left it, and the statistics of batch
    norms never move. Gradients are in float32 at least, whatever the dtype of the weights; see
    `precision`. Which path a parameter's gradients take (see `persample`) is found by the graph
    and a trial when first needed; a batch in which something else uses a parameter, too, takes the
    general path for it. Weights may change between passes.

    Args:
        model: maps (n, ...) to outputs (n, ...), each sample for itself.
        likelihood: what the outputs mean.
        partition: the groups; see `partition_parameters`.
        calibration: the samples.
        labels: "sampled" from the model, "matched" (with the moments of sampled ones, and less
            noise), "enumerated" (all, weighted: exact), or "empirical".
        draws: K >= 1, labels drawn a sample (1 unless they are sampled or matched).
        seed: of the drawn labels; with a sample's number and the draw it fixes the label.
        batch_size: gradient rows computed at once, >= 1.
        calling: how the model is called, and which of its outputs counts.
        team: processes that have the same source, and may share the passes; see `shared`.

    Raises:
        UnknownName: `labels` is none of these, or the partition is of another model.
        ShapeMismatch: a parameter has another shape than in the partition.
        FishLegError: the partition has no group, or samples are given otherwise than as such.
        ValueError: `draws` or `batch_size` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        partition: Partition,
        calibration: Samples,
        *,
        labels: Labels = "sampled",
        draws: int = 1,
        seed: int = 0,
        batch_size: int = 128,
        calling: Calling = PLAIN,
        team: Team = ALONE,
    ):
        check_type("model", model, nn.Module, "a torch.nn.Module")
        check_type("partition", partition, Partition, "a Partition of partition_parameters")
        check_type("calling", calling, Calling, "a Calling")
        check_type("team", team, Team, "a Team")
        check_likelihood(likelihood)
        for name, value in (("draws", draws), ("seed", seed), ("batch_size", batch_size)):
            check_integer(name, value)
        check_labels(labels, draws)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
        _check_partition(model, partition)
        if not hasattr(calibration, "batches"):
            raise FishLegError(
                f"calibration: expected a Calibration, got {type(calibration).__name__}; wrap it, "
                "`Calibration(inputs=...)`."
            )
        self.model = model
        self.likelihood = likelihood
        self.partition = partition
        self.calibration = calibration
        self.labels = labels
        self.draws = draws
        self.seed = seed
        self.batch_size = batch_size
        self.calling = calling
        self.team = team
        self.jacobian = Jacobian()
        self.general = GeneralPath()
        self._among = slice(None)
        self._skipped = 0
        self._thorough = False
        self._seen: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        return (
            f"GradientSource({type(self.model).__name__}, {type(self.likelihood).__name__}, "
            f"{len(self.calibration)} samples, labels={self.labels!r})"
        )

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield the samples on the model's device, in batches (default: `self.batch_size`).

        One by one where the model looks at them to decide what to compute. The inputs are as
        `computing` wants them.
        """
        return self._batches(1 if self.singly is not None else batch_size or self.batch_size)

    def _batches(self, size: int) -> Iterator[Batch]:
        batches = self.calibration.batches(size, model_device(self.model), self._among)
        return map(self.network.prepare, batches)

    @cached_property
    def network(self) -> Network:
        """The model as it is computed: in float32 at least, wherever its code lets it."""
        device = model_device(self.model)
        return find_network(
            self.model,
            self.likelihood,
            self.calling,
            lambda: next(self.calibration.batches(1, device)),
        )

    def computing(self) -> AbstractContextManager[None]:
        """Let the model compute as curvature is computed; see `Network.computing`."""
        return self.network.computing()

    def outputs(self, batch: Batch) -> Tensor:
        """Return the model's outputs (n, ...) for a batch; errors as of `Calling.outputs`."""
        return self.network.outputs(batch)

    def run(self, parameters: Mapping[str, Tensor], inputs: Nest) -> Tensor:
        """Return the model's outputs with other values of some parameters, errors as they come."""
        return self.network.run(parameters, inputs)

    def label(
        self, outputs: Tensor, batch: Batch, labels: Labels | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return targets (D, n, ...) and weights (n, D), as `calibration.label` does.

        Args:
            outputs: the model's, (n, ...).
            batch: the samples.
            labels: a kind in place of the source's own.
        """
        kind = labels or self.labels
        return label(outputs, batch, self.likelihood, labels=kind, draws=self.draws, seed=self.seed)

    @cached_property
    def rows_per_sample(self) -> int:
        """Gradient rows a sample: labels drawn, or the number of enumerated ones."""
        if self.labels != "enumerated":
            return self.draws
        batch = next(self._batches(1))
        with self.computing(), torch.no_grad():
            return len(self.label(self.outputs(batch), batch)[0])

    @property
    def rows(self) -> int:
        """Gradient rows of one pass: samples times labels."""
        return len(self.calibration) * self.rows_per_sample

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
                pass  # raises an error at the sample that is to blame, if one is
        return held

    def held_bytes(self, name: str) -> int:
        """Return the bytes of all gradients of group `name`: s self.rows rows columns."""
        group = self.partition[name]
        return self.rows * group.rows * group.columns * self.element_size(name)

    @cached_property
    def pass_bytes(self) -> int:
        """About the bytes that one batch's passes hold, found by a forward pass of one sample.

        For each of the samples that are computed at once what autograd saves for the backward pass
        (twice, if parameters are on the general path), the gradients of the hooked modules'
        outputs, one a label, and twice the largest unfolded input; and the inputs and gradients
        of the batch before, which a loop over batches lets go only when the next one is there.
        """
        batch = self.network.prepare(next(self.calibration.batches(1, model_device(self.model))))
        modules = {name: self.model.get_submodule(name) for name in set(self.found.fast.values())}
        own: set[int] = set()
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                # the batch may be a part of all inputs, which are not counted
                saved[storage.data_ptr()] = min(tensor.nbytes, storage.nbytes())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with self.computing(), recording(modules) as calls:
            tensors = self.model.state_dict().values()
            own |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
            with hooks:
                outputs = self.outputs(batch)
        size = outputs.element_size()
        ends = {name: found[0].output_shape for name, found in calls.items()}
        inputs = sum(found[0].activation.numel() for found in calls.values())
        labels = min(self.rows_per_sample, self.batch_size)
        gradients = labels * sum(end.numel() for end in ends.values())
        unfolded = [
            ends[name][2:].numel() * module.weight[0].numel() * module.groups
            for name, module in modules.items()
            if isinstance(module, nn.Conv2d)
        ]
        general = any(tensor not in self.found.fast for tensor in self._tensors())
        each = sum(saved.values()) * (1 + general)
        each += size * (inputs + 2 * gradients + 2 * max(unfolded, default=0))
        return self._samples_at_once * each

    def fits(self, name: str, budget_bytes: int) -> bool:
        """Tell whether the held gradients of group `name` fit the budget."""
        return self.held_bytes(name) <= budget_bytes

    def cut(self, groups: Sequence[str], budget_bytes: int) -> list[list[str]]:
        """Pack groups, in order, so that the held gradients of each pack fit the budget.

        A group that does not fit is a pack by itself; `fits` tells.
        """
        packs: list[list[str]] = []
        room = 0
        for name in groups:
            size = self.held_bytes(name)
            if not packs or size > room:
                packs.append([])
                room = budget_bytes
            packs[-1].append(name)
            room -= size
        return packs

    def layers(
        self, groups: Sequence[str] | None = None
    ) -> Iterator[Mapping[str, LayerSignals | None]]:
        """Yield group name -> what its layer saw and got back, in one pass over the data.

        None for a group that is not the weight (and bias) of one linear or convolution layer on
        the fast path. The mapping computes its values whenever asked. Cost: as `stream`, without
        the gradients.

        Args:
            groups: names; default all.

        A FishLegError if a layer is used otherwise in some batch than in the first ones; it counts
        as being on the general path from then on.
        """
        self._look_again()
        names = self.partition.names if groups is None else tuple(groups)
        modules = {name: self._signalling_module(name) for name in names}
        for one in self._passes({module for module in modules.values() if module is not None}):
            for name, module in modules.items():
                if module is not None:
                    self._check_signals(name, one)
            yield self._lazy_signals(modules, one)

    def _check_signals(self, name: str, one: Pass) -> None:
        """Check that the layer of group `name` tells all of its gradient in a batch.

        Raises:
            FishLegError: it does not.
        """
        group = self.partition[name]
        if one.fast.issuperset(group.tensors):
            return
        for tensor in group.tensors:
            self.found.fast.pop(tensor, None)
        first, last = int(one.batch.indices[0]), int(one.batch.indices[-1])
        raise FishLegError(
            f"{group.weight}: in samples {first} to {last} something else than the one call of its "
            "layer uses it, and in the samples before it did not; what its layer sees and gets "
            "back is not all of its gradient there. Expected a model whose structure does not "
            "depend on the data. Fit once more, now that this is known: its gradients are taken by "
            "the general path then."
        )

    def heads(self, name: str) -> int | None:
        """Return the convolution groups h of the layer of group `name`, 1 for a linear layer.

        None where `layers` gives None: the group is not the weight of one layer on the fast path.
        """
        self._look_again()
        module = self._signalling_module(name)
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
        formed: its group gives signals with one head and one position. All others give gradients as
        in `stream`. Cost: as `stream`, without what is not formed.

        Args:
            groups: names; default all.
        """
        names = self.partition.names if groups is None else tuple(groups)
        modules = {name: self._signalling_module(name) for name in names}
        for one in self._passes(self._hooked(names)):
            signals = self._lazy_signals(modules, one)
            gradients = self._lazy_gradients(names, one)
            outer = {
                name
                for name, module in modules.items()
                if module is not None
                and one.fast.issuperset(self.partition[name].tensors)
                and isinstance(self.model.get_submodule(module), nn.Linear)
                and one.inputs[module].ndim == 2
            }
            yield Lazy(names, partial(_pick, signals, gradients, outer))

    def over(self, calibration: Samples, *, seed: int) -> GradientSource:
        """Return the same source over other samples; what was found out about paths is kept.

        Args:
            calibration: the samples.
            seed: of their labels.
        """
        _ = self.found  # found out now, so that every copy has them
        other = copy(self)
        other.calibration, other.seed = calibration, seed
        return other

    def shared(self) -> GradientSource:
        """Return a source that streams this process's part of the samples, scaled as in the whole.

        What is summed over it and then over the team is the sum over all samples.

        Raises:
            FishLegError: there are fewer samples than processes.
        """
        if self.team.size == 1:
            return self
        if len(self.calibration) < self.team.size:
            raise FishLegError(
                f"Expected a calibration sample for each of the {self.team.size} processes, got "
                f"{len(self.calibration)}; take more samples, or fewer workers."
            )
        _ = self.found  # found out on the same samples by all
        other = copy(self)
        other._among = self.team.part(len(self.calibration))
        return other

    def alone(self) -> GradientSource:
        """Return the same source without a team: its passes are this process's own."""
        other = copy(self)
        other.team = ALONE
        return other

    def thorough(self) -> GradientSource:
        """Return the same source checking every number of a pass, to name a sample that spoils it.

        Otherwise outputs, losses and what is on the general path are checked.
        """
        other = copy(self)
        other._thorough = True
        return other

    def after(self, rounds: int) -> GradientSource:
        """Return a source whose passes leave out the first `rounds` batches, and give the others.

        Args:
            rounds: 0 ... the batches of a pass, as `stream` yields them.
        """
        _ = self.found  # found out on the same samples
        other = copy(self)
        samples, other._skipped = divmod(rounds, self._rounds_a_batch)
        first, end, _ = self._among.indices(len(self.calibration))
        other._among = slice(min(first + samples * self._samples_at_once, end), end)
        return other

    @property
    def longest_part(self) -> int:
        """The most batches that a process of the team has in a shared pass."""
        samples = -(-len(self.calibration) // self.team.size)
        return -(-samples // self._samples_at_once) * self._rounds_a_batch

    @property
    def first_row(self) -> int:
        """The number of the first gradient row of a pass among those of all processes."""
        first = (self._among.start or 0) * self.rows_per_sample
        return first + self._skipped * self.batch_size

    @property
    def rows_at_once(self) -> int:
        """The most gradient rows that are computed at once: `batch_size`, or all where fewer."""
        return min(self.batch_size, self.rows)

    @property
    def _samples_at_once(self) -> int:
        if self.singly is not None:
            return 1
        return min(max(1, self.batch_size // self.rows_per_sample), len(self.calibration))

    @property
    def _rounds_a_batch(self) -> int:
        """How many parts the labels of a batch of samples are cut into: 1, unless one has many."""
        return -(-self._samples_at_once * self.rows_per_sample // self.batch_size)

    def report(self) -> list[tuple[str, str]]:
        """Return (parameter, what of it) for all that is off the fast path or without curvature."""
        refused = self.general.refused
        way = "general path: torch.func.vmap"
        if refused is not None:
            way = f"loop over samples, since torch.func.vmap cannot ({refused})"
        found = [(tensor, way) for tensor in self._tensors() if tensor not in self.found.fast]
        if self.singly is not None:
            found.append(
                (
                    "all",
                    f"one sample at a time, since the model decides by them ({self.singly})",
                )
            )
        return found + [(name, f"no curvature: {why}") for name, why in self.partition.uncovered]

    # -- inner workings

    def _tensors(self) -> list[str]:
        return [tensor for group in self.partition.groups for tensor in group.tensors]

    @cached_property
    def found(self) -> Paths:
        """What was found out about the model, shared by all copies of the source."""
        self._seen = self._versions()
        batch = self._some_samples()
        return find_paths(self.network, self.general, self._tensors(), batch, self._run)

    @cached_property
    def singly(self) -> str | None:
        """Why the model is given one sample at a time, or None."""
        batch = next(self._batches(min(_SAMPLES_TO_COMPARE, self.batch_size)))
        return check_samples(self.network, batch)

    def _some_samples(self) -> Batch:
        """Return the samples that show what the model is like."""
        return next(self.batches(min(_SAMPLES_TO_COMPARE, self.batch_size)))

    def _versions(self) -> list[tuple[int, int]]:
        parameters = map(self.model.get_parameter, self._tensors())
        return [(parameter.data_ptr(), parameter._version) for parameter in parameters]

    def _look_again(self) -> None:
        """Where weights have changed, leave the fast path to what the graph still has on it."""
        found, now = self.found, self._versions()
        if found.fast and now != self._seen:
            one = next(self._run(self._some_samples(), set(found.fast.values())))
            for name in found.fast.keys() - one.fast:
                del found.fast[name]
        self._seen = now

    def _hooked(self, groups: Sequence[str]) -> set[str]:
        """Return the modules whose hooks give gradients of the groups."""
        tensors = [tensor for name in groups for tensor in self.partition[name].tensors]
        return {self.found.fast[tensor] for tensor in tensors if tensor in self.found.fast}

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
        for batch in self._batches(self._samples_at_once):
            for one in self._run(batch, hooked):
                if skipped:
                    skipped -= 1
                    continue
                yield one

    def _lazy_gradients(self, names: Sequence[str], one: Pass) -> Mapping[str, Tensor]:
        tensors = [tensor for name in names for tensor in self.partition[name].tensors]
        paths = {name: module for name, module in self.found.fast.items() if name in one.fast}
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

    def _lazy_signals(
        self, modules: Mapping[str, str | None], one: Pass
    ) -> Mapping[str, LayerSignals | None]:
        def make(name: str) -> LayerSignals | None:
            module = modules[name]
            if module is None:
                return None
            return layer_signals(
                self.model.get_submodule(module),
                one.inputs[module],
                one.gradients[module],
                bias=self.partition[name].bias is not None,
            )

        return Lazy(list(modules), make)

    def _signalling_module(self, name: str) -> str | None:
        """Return the linear or convolution module whose weight (and bias) group `name` is."""
        group = self.partition[name]
        modules = {self.found.fast.get(tensor) for tensor in group.tensors}
        module = modules.pop()
        if modules or module is None or not group.weight.endswith("weight"):
            return None
        return module if has_signals(self.model.get_submodule(module)) else None


def _pick(
    signals: Mapping[str, LayerSignals | None],
    gradients: Mapping[str, Tensor],
    outer: Collection[str],
    name: str,
) -> Tensor | LayerSignals:
    found = signals[name] if name in outer else None
    return gradients[name] if found is None else found


def _check_partition(model: nn.Module, partition: Partition) -> None:
    """Check that a partition has groups, and that they are the model's.

    Raises:
        FishLegError: there is no group, or one has no values, or none of real numbers.
        UnknownName: the model has no such parameter.
        ShapeMismatch: a parameter has another shape.
    """
    if not partition.groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in partition.uncovered[:5])
        raise FishLegError(
            "partition: expected at least one parameter to take gradients by, got none "
            f"({why or 'the model has no parameters'}); give the model trainable parameters "
            "(requires_grad_(True)), and do not skip them all."
        )
    parameters = dict(model.named_parameters())
    for group in partition.groups:
        for name in group.tensors:
            if name not in parameters:
                raise UnknownName("parameter", name, parameters)
            parameter = parameters[name]
            if parameter.is_meta:
                raise FishLegError(
                    f"{name}: expected values, got none (device meta); load the model's weights."
                )
            if parameter.is_inference():
                raise FishLegError(
                    f"{name}: expected a parameter that takes gradients, got one that was made "
                    "under torch.inference_mode(); make or load the model outside it."
                )
            if not parameter.is_floating_point():
                raise FishLegError(
                    f"{name}: expected real numbers, got {parameter.dtype}; leave it out with "
                    f"partition_parameters(skip=[{name!r}])."
                )
        if tuple(parameters[group.weight].shape) != group.weight_shape:
            raise ShapeMismatch(
                f"{group.weight}: expected {group.weight_shape} as in the partition, "
                f"got {tuple(parameters[group.weight].shape)}."
            )
