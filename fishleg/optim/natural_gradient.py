"""The FishLeg optimiser: natural-gradient steps, their inverse Fisher learned along the way.

    m <- beta m + (1 - beta) g,      w <- w - lr Q(lambda) m / (1 - beta^t),

and every few steps lambda takes one step of Adam on the FishLeg objective J, on a batch with
labels drawn from the model (Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural
networks", ICLR 2023). Gradients are averaged, not their images: the present Q acts on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fishleg.calibration import Calibration
from fishleg.calling import PLAIN, Calling
from fishleg.errors import FishLegError
from fishleg.gradients.layers import LayerSignals
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Likelihood
from fishleg.modes import evaluating
from fishleg.nests import Nest, as_nest, count_samples, take
from fishleg.objective import masked_product
from fishleg.optim.tracking import Evidence, TrackedInverse, update
from fishleg.options import (
    Directions,
    DrawnLabels,
    Start,
    StepOptions,
    TrackedStructure,
    TrackingOptions,
)
from fishleg.parameters import ParameterGroup, Partition, partition_parameters
from fishleg.precision import in_full, is_narrow, widen
from fishleg.pruning.masks import HeldMasks, group_masks, weight_masks

_ONE_PIECE = 1 << 30  # samples: more than any batch has
_TINY = 1e-30  # below any predicted divergence that matters


class FishLeg(torch.optim.Optimizer):
    """Natural gradient through Q ~ (F + gamma I)^-1, one learned block a parameter group.

    The loss must be the batch mean of `likelihood.nll` (terms such as weight decay apart): F is
    that of the likelihood, and steps have the right length only if g is its gradient.

        optimizer = FishLeg(model, Categorical(), lr=0.3)
        for inputs, targets in batches:
            optimizer.observe(inputs)
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    Steps are deterministic: labels and probes are keyed by (seed, number of the step, sample).
    `state_dict` is complete; a run resumed from it reaches the bits of an undisturbed one.
    The two `param_groups`, tensors of two or more dimensions and all others, differ in weight decay
    only; a third one holds parameters without curvature, which move by the running mean of
    its gradients (see `uncovered`). `lr`, `momentum` and `weight_decay` may be changed there.

    Args:
        model: its trainable parameters are moved; must act on each sample alone, but for batch
            norms, which use the observed batch's mean and variance in F.
        likelihood: the meaning of the outputs.
        lr: of the natural gradient; 1 is a full Newton step where Q is right.
        momentum: beta in [0, 1).
        damping: gamma > 0, in units of the Fisher.
        trust: longest step, as the divergence 1/2 lr^2 m^T Q m that Q predicts for it, in nats a
            sample; longer ones are shortened. None for no limit.
        weight_decay: w <- (1 - lr weight_decay) w, for tensors of two or more dimensions.
        update_every: steps between updates of Q, >= 1; steps 1, 2, 4, ... before the first
            interval is over update it, too, since F changes most at the beginning.
        samples: of the observed batch that an update takes; None for all.
        labels: "sampled" from the model, or "matched", with less noise.
        seed: of labels and probes.
        masks: weight name -> bool in the weight's shape; removed weights are set to 0 and stay
            there, the others move by m o Q (m o g).
        partition: the groups; by default all trainable parameters.
        fallback_lr: of uncovered parameters; None for `lr`.
        calling: how the model is called.
        structure: see `TrackingOptions`, here and below.
        start: Q at lambda = 0.
        decay: of the running moments.
        learning_rate: of lambda; 0 learns nothing.
        directions: that J is averaged over.
        probes: an update.

    Raises:
        ValueError: a number is out of range.
        UnknownName: an option is none of its choices, or a mask names no weight.
        FishLegError: no parameter is trainable.

    Cost: a step 2 rows columns (rows + columns) FLOPs a group; an update a forward and backward
    pass of the samples, and `fishleg.optim.tracking.update`. Memory: 5 rows^2 + 5 columns^2 numbers
    a Kronecker group (4 rows columns more with a scale), and one gradient average.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 0.3,
        momentum: float = 0.9,
        damping: float = TrackingOptions.damping,
        trust: float | None = StepOptions.trust,
        weight_decay: float = 0.0,
        update_every: int = StepOptions.update_every,
        samples: int | None = StepOptions.samples,
        labels: DrawnLabels = StepOptions.labels,
        seed: int = TrackingOptions.seed,
        masks: Mapping[str, Tensor] | None = None,
        partition: Partition | None = None,
        fallback_lr: float | None = None,
        calling: Calling = PLAIN,
        structure: TrackedStructure = TrackingOptions.structure,
        start: Start = TrackingOptions.start,
        decay: float = TrackingOptions.decay,
        learning_rate: float = TrackingOptions.learning_rate,
        directions: Directions = TrackingOptions.directions,
        probes: int = TrackingOptions.probes,
    ):
        StepOptions(trust=trust, update_every=update_every, samples=samples, labels=labels)
        self.model = model
        self.likelihood = likelihood
        if partition is None:
            partition = partition_parameters(model, prunable=list(masks or ()))
        self.partition = partition
        self.trust = trust
        self.update_every = update_every
        self.samples = samples
        self.labels = labels
        self.calling = calling
        self.options = TrackingOptions(
            damping=damping,
            structure=structure,
            start=start,
            decay=decay,
            learning_rate=learning_rate,
            directions=directions,
            probes=probes,
            seed=seed,
        )
        self._masks = group_masks(self.partition, masks) if masks else {}
        self._inputs: Nest | None = None
        self._source: GradientSource | None = None
        held = weight_masks(self.partition, self._masks) if self._masks else {}
        self._held = HeldMasks(model, held)
        self._uncovered = {name for name, _ in self.partition.uncovered}
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise FishLegError(
                "model: expected trainable parameters, got none; requires_grad_(True) thaws them."
            )
        super().__init__(
            self._cut_groups(lr if fallback_lr is None else fallback_lr),
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )
        for group in self.param_groups:
            if not 0 <= group["momentum"] < 1 or group["lr"] < 0 or group["weight_decay"] < 0:
                raise ValueError(
                    "Expected lr >= 0, 0 <= momentum < 1 and weight_decay >= 0, got "
                    f"{group['lr']}, {group['momentum']}, {group['weight_decay']}."
                )

    def _cut_groups(self, fallback_lr: float) -> list[dict[str, Any]]:
        """Return the `param_groups`: matrices and kernels; vectors; uncovered parameters."""
        covered = {n: p for n, p in self._trained.items() if n not in self._uncovered}
        others = [p for name, p in self._trained.items() if name in self._uncovered]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in covered.values() if p.ndim >= 2]},
            {"params": [p for p in covered.values() if p.ndim < 2], "weight_decay": 0.0},
            {"params": others, "lr": fallback_lr},
        ]
        return [group for group in groups if group["params"]]

    @property
    def uncovered(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of all without curvature; the trainable ones move by their gradients."""
        return self.partition.uncovered

    def observe(self, inputs: Nest) -> None:
        """Remember a batch of the model's inputs, for the next update of Q; call it every step.

        Args:
            inputs: (n, ...), a nest of tensors on the model's device; held until the next call,
                not copied.
        """
        self._inputs = as_nest(inputs, "inputs")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`, in float32 also where weights are in half precision.

        Args:
            state_dict: of an optimiser of the same model and options.
        """
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            for key, value in state.items():  # torch has rounded it to the dtype of the weights
                if isinstance(value, Tensor) and is_narrow(parameters[index].dtype):
                    device = parameters[index].device if value.is_floating_point() else value.device
                    self.state[parameters[index]][key] = value.to(device, copy=True)

    def inverse(self, name: str) -> TrackedInverse:
        """Return the tracked numbers of group `name`; empty before the first step."""
        weight = self.model.get_parameter(self.partition[name].weight)
        return TrackedInverse.restore(self.state[weight])

    @torch.no_grad()
    @in_full
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the present gradients, after an update of Q where one is due.

        Args:
            closure: makes the gradients again and returns the loss, or None.

        Returns:
            The value that the closure returned.

        A FishLegError if an update is due, and no batch has been observed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = int(self.state[next(iter(self._trained.values()))].get("step", 0))
        if _is_due(done, self.update_every):
            self._update(done)
        settings = {p: group for group in self.param_groups for p in group["params"]}
        averages = {name: self._average(p, settings[p]) for name, p in self._trained.items()}
        images: dict[str, Tensor] = {}
        for group in self.partition.groups:
            images |= self._image(group, averages)
        rates = {name: settings[p]["lr"] for name, p in self._trained.items()}
        shortening = self._shortening(
            [rates[name] ** 2 * (averages[name] * move).sum() for name, move in images.items()]
        )
        for name, parameter in self._trained.items():
            value = widen(parameter)  # the parameter itself, if it is wide enough
            value.mul_(1 - rates[name] * settings[parameter]["weight_decay"])
            if name in images:
                value.sub_(images[name] * (rates[name] * shortening))
            else:
                value.sub_(averages[name] * rates[name])
            if value is not parameter:
                parameter.copy_(value)
        self._held.apply()
        return loss

    def _shortening(self, lengths: list[Tensor]) -> Tensor:
        """Return the factor <= 1 that brings 1/2 lr^2 m^T Q m into the trust region.

        Args:
            lengths: lr^2 m^T Q m, a scalar each tensor.
        """
        length = torch.stack(lengths).sum() if lengths else torch.zeros(())
        if self.trust is None:
            return torch.ones_like(length)
        return (2 * self.trust / length.clamp(min=_TINY)).sqrt().clamp(max=1.0)

    def _average(self, parameter: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Add a gradient to its running mean, and return the mean without its bias to zero."""
        state, beta = self.state[parameter], settings["momentum"]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["average"] = torch.zeros_like(widen(parameter))
        state["step"] += 1
        if parameter.grad is None:
            state["average"].mul_(beta)
        else:
            state["average"].lerp_(widen(parameter.grad), 1 - beta)
        return state["average"] / (1 - beta ** int(state["step"]))

    def _image(self, group: ParameterGroup, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return m o Q (m o g) under the group's parameter names."""
        gradient, mask = group.gather(averages), self._masks.get(group.name)
        block = self.inverse(group.name).inverse()
        return group.scatter(masked_product(block, gradient, mask))

    # -- curvature

    def _update(self, done: int) -> None:
        """Bring every block of Q up to date, on the batch observed last.

        Raises:
            FishLegError: there is none.
        """
        if self._inputs is None:
            raise FishLegError(
                "FishLeg: Q is due for an update, but no batch has been observed; call "
                "optimizer.observe(inputs) before optimizer.step()."
            )
        inputs = take(self._inputs, slice(self.samples))
        age = _updates_before(done, self.update_every)
        with _batch_statistics(self.model, inputs, self.calling):
            found, signals = self._evidence(inputs, done)
            for group in self.partition.groups:
                after = update(
                    self.inverse(group.name),
                    group,
                    found[group.name],
                    self.options,
                    age=age,
                    mask=self._masks.get(group.name),
                    signals=signals[group.name] if self.options.start == "kfac" else None,
                )
                self.state[self.model.get_parameter(group.weight)].update(after.tensors())

    def _evidence(
        self, inputs: Nest, done: int
    ) -> tuple[Mapping[str, Evidence], Mapping[str, LayerSignals | None]]:
        """Return a batch's gradients, as one piece, and signals, with labels of this very step."""
        count = count_samples(inputs, "inputs")
        samples = Calibration(inputs=inputs, indices=torch.arange(count) + (done << 32))
        if self._source is None:
            self._source = GradientSource(
                self.model,
                self.likelihood,
                self.partition,
                samples,
                labels=self.labels,
                batch_size=_ONE_PIECE,
                calling=self.calling,
            )
        source = self._source.over(samples, seed=self.options.seed).thorough()
        if source.singly:  # no layer is on the fast path
            names = source.partition.names
            return source.hold(names), dict.fromkeys(names)
        return next(source.factored_with_signals())


def _is_due(done: int, every: int) -> bool:
    """Tell whether Q is updated after this number of steps: 0, 1, 2, 4, ... then every, ..."""
    return done % every == 0 or (done < every and done & (done - 1) == 0)


def _updates_before(done: int, every: int) -> int:
    """Return how many updates there were in the first `done` steps."""
    return sum(_is_due(step, every) for step in range(min(done, every))) + max(
        0, -(-done // every) - 1
    )


@contextmanager
def _batch_statistics(model: nn.Module, inputs: Nest, calling: Calling) -> Iterator[None]:
    """Let batch norms in training hold the mean and variance of `inputs` in the block.

    Their running statistics lag behind by tens of steps, and are meaningless at first; the
    gradient was taken with those of the batch.
    """
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.training]
    norms = [one for one in norms if one.running_mean is not None]
    kept = [(one.momentum, {k: x.clone() for k, x in one.named_buffers()}) for one in norms]
    if norms:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.training, norm.momentum = True, 1.0
            calling.outputs(model, inputs)
    try:
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
