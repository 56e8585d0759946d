"""Refinement: a short run that moves the survivors back towards the dense network's outputs.

    least over the survivors:   D(w) = (1/N) sum_n KL( p_dense(. | x_n) || p_w(. | x_n) )

No label is read: the dense network's outputs are the targets, on calibration inputs, which may be
augmented. Removed weights stay 0. The Hessian of D where p_w = p_dense is the Fisher, so the Q of
the pruning step serves as a preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishleg.calibration import Calibration, each_batch, inputs_and_targets
from fishleg.calling import PLAIN, Calling
from fishleg.errors import FishLegError
from fishleg.estimators.base import AbstractEstimator
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import AbstractLikelihood, given_targets
from fishleg.loading import check_iterable
from fishleg.nests import tensors_of
from fishleg.network import WideModels
from fishleg.options import RefinementOptions
from fishleg.parameters import Partition
from fishleg.precision import is_narrow, widen
from fishleg.pruning.compensation import solve_on_survivors
from fishleg.pruning.masks import HeldMasks, weight_masks
from fishleg.pruning.norms import following_norms, normalising_by_batch, running_norms

_RATES = {"sgd": 0.01, "adam": 5e-3, "natural": 0.1, "gauss_newton": 1.0}
_PRECONDITIONED = {"natural", "gauss_newton"}
_WIDE = "wide/"  # before the names of weights in float32, in the state
_CHECK_EVERY = 20  # steps between looks at the divergence; each look waits for a GPU


class Refinement:
    """One run of refinement; its state is the model, the moments and the number of steps done.

    Weights in half precision are moved in float32: steps are smaller than their rounding. Both
    networks are computed in float32, too, where their code permits it (see `find_network`), and
    the model's weights are rounded after each step.

    Args:
        model: pruned, moved in place; on its own device.
        reference: the dense network, left alone.
        likelihood: the meaning of the outputs.
        partition: the model's groups.
        masks: group name -> bool (rows, columns), the survivors.
        steps: of the whole run, >= 1.
        options: see `RefinementOptions`.
        estimator: its Q preconditions "natural" and "gauss_newton".
        begin: D at the beginning, in nats, > 0, as `mean_divergence` measures it.
        calling: how both networks are called.

    Attributes:
        done: steps made.
        begin: D at the beginning, in nats.

    Raises:
        FishLegError: the method needs an estimator, and none is given; or no parameter can move.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        likelihood: AbstractLikelihood,
        partition: Partition,
        masks: Mapping[str, Tensor],
        *,
        steps: int,
        options: RefinementOptions,
        estimator: AbstractEstimator | None = None,
        begin: float = 1.0,
        calling: Calling = PLAIN,
    ):
        if options.method in _PRECONDITIONED and estimator is None:
            raise FishLegError(f"refinement {options.method!r} needs `estimator`, got None.")
        self.model = model
        self.reference = reference.eval()
        self.likelihood = likelihood
        self.partition = partition
        self.masks = dict(masks)
        self.steps = steps
        self.options = options
        self.estimator = estimator
        self.done = 0
        self.begin = begin
        self.calling = calling
        covered = {tensor for group in partition.groups for tensor in group.tensors}
        self._moved = {
            name: parameter for name, parameter in model.named_parameters() if name in covered
        }
        self._held = HeldMasks(model, weight_masks(partition, self.masks))
        if not self._moved:
            raise FishLegError(
                "refinement: expected parameters to move, got a partition without groups; give the "
                "model trainable ones (requires_grad_(True))."
            )
        # The optimiser moves the parameters, or float32 copies of those in half precision.
        self._wide = {
            name: nn.Parameter(one.detach().float()) if is_narrow(one.dtype) else one
            for name, one in self._moved.items()
        }
        self._narrow = [name for name, one in self._moved.items() if is_narrow(one.dtype)]
        self._models = WideModels(likelihood, calling)
        self._source: GradientSource | None = None  # of "gauss_newton", with the paths it chose
        self._optimizer = self._build_optimizer()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        options, moved = self.options, list(self._wide.values())
        if options.method == "adam":
            return torch.optim.Adam(moved, lr=self.peak_rate, betas=(options.momentum, 0.999))
        momentum = 0.0 if options.method == "gauss_newton" else options.momentum
        return torch.optim.SGD(moved, lr=self.peak_rate, momentum=momentum)

    @property
    def peak_rate(self) -> float:
        """The learning rate at its peak."""
        options = self.options
        begin = max(
            self.begin, 0.0
        )  # rounding may give a value below 0 for networks that hardly differ
        scale = min(1.0, math.sqrt(begin)) if options.method == "adam" else 1.0
        return scale * (options.learning_rate or _RATES[options.method])

    # -- steps

    def step(self, batch: Any) -> Tensor:
        """Take one step on a batch, and return D on it before the step.

        Args:
            batch: of the model's inputs, or a `Batch`, or (inputs, targets); see
                `fishleg.loading`. Of the targets only the ignored positions matter.

        Cost: a forward pass of the dense network, a forward and backward one of the model; beside
        it a product with Q ("natural"), or `cg_iterations` exact F-vector products on the batch.
        """
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.model.eval()
        inputs, _ = inputs_and_targets(batch)
        with self._models.computing(self.model, inputs):
            computed = dict(self.model.named_parameters())
            with torch.no_grad():
                for name in self._narrow:
                    computed[name].copy_(self._wide[name])
            with self._statistics():
                divergence = self.divergence(batch)
            self._optimizer.zero_grad()
            divergence.backward()
        for name in self._narrow:
            gradient = computed[name].grad
            self._wide[name].grad = None if gradient is None else widen(gradient)
            self._moved[name].grad = None
        if self.options.method in _PRECONDITIONED:
            self._precondition(batch, rate)
        self._optimizer.step()
        self._round()
        self.done += 1
        return divergence.detach()

    @torch.no_grad()
    def _round(self) -> None:
        """Write the moved values into the model, and 0 for the removed ones."""
        rounded = {name: self._wide[name].to(self._moved[name].dtype) for name in self._narrow}
        for name, value in rounded.items():
            self._moved[name].copy_(value)
        self._held.apply()
        for name, value in rounded.items():  # values that the masks reset hold in float32, too
            put_back = self._moved[name] != value
            if name in self._held.removed:
                put_back |= self._held.removed[name].to(value.device)
            self._wide[name].copy_(torch.where(put_back, self._moved[name], self._wide[name]))

    def divergence(self, batch: Any) -> Tensor:
        """Return the mean over the batch of T^2 KL(dense_T || model_T), a scalar, in nats."""
        inputs, targets = inputs_and_targets(batch)
        kind = tensors_of(inputs)[0].device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.options.bfloat16):
            with torch.no_grad():
                wanted = self._models.outputs_in_full(self.reference, inputs)
            outputs = self._models.outputs(self.model, inputs)
        temperature = self.options.temperature
        found = given_targets(self.likelihood, targets).divergence(
            wanted.float() / temperature, outputs.float() / temperature
        )
        return temperature**2 * found.mean()

    def _rate(self) -> float:
        peak = self.peak_rate
        if self.options.method == "gauss_newton":
            return peak
        warmup = self.steps / 20
        along = (self.done - warmup) / max(self.steps - warmup, 1)
        rising = (self.done + 1) / (warmup + 1)
        return peak * (rising if along < 0 else 0.5 * (1 + math.cos(math.pi * along)))

    @contextmanager
    def _statistics(self) -> Iterator[None]:
        """Let batch norms follow the batch, if wanted; all else stays in evaluation mode."""
        if self.options.statistics == "running":
            with following_norms(self.model):
                yield
            return
        norms = running_norms(self.model) if self.options.statistics == "batch" else []
        with normalising_by_batch(norms):
            yield

    @torch.no_grad()
    def _precondition(self, batch: Any, rate: float) -> None:
        """Replace each gradient by the step's direction."""
        found = {
            name: torch.zeros_like(one) if one.grad is None else one.grad
            for name, one in self._wide.items()
        }
        gradients = self.partition.gather(found)
        for name, mask in self.masks.items():
            gradients[name] = gradients[name] * mask
        if self.options.method == "natural":
            moves = self._natural(gradients, rate)
        else:
            moves = self._gauss_newton(gradients, batch)
        for name, move in self.partition.scatter(moves).items():
            self._wide[name].grad = move.to(self._wide[name].dtype)

    def _natural(self, gradients: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """Return m o Q (m o g), no longer than the trust region allows.

        With Q = F_g^-1 a step d = -rate u has 1/2 d^T F_g d = 1/2 rate^2 u^T g.
        """
        moves = self._estimator.matvec(gradients)
        for name, mask in self.masks.items():
            moves[name] = moves[name] * mask
        length = torch.stack([(moves[name] * gradients[name]).sum() for name in moves]).sum()
        longest = 2 * self.options.trust / rate**2
        scale = (longest / length.clamp(min=1e-30)).sqrt().clamp(max=1.0)
        return {name: scale * move for name, move in moves.items()}

    def _gauss_newton(self, gradients: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        inputs, targets = inputs_and_targets(batch)
        samples = Calibration(inputs=inputs, targets=targets)
        if self._source is None:
            self._source = GradientSource(
                self.model,
                self.likelihood,
                self.partition,
                samples,
                batch_size=len(samples),
                calling=self.calling,
            )
        source = self._source.over(samples, seed=0)
        survives = {
            name: self.masks.get(name, torch.ones_like(matrix, dtype=torch.bool))
            for name, matrix in gradients.items()
        }
        move, _ = solve_on_survivors(
            self._estimator,
            source,
            gradients,
            survives,
            tolerance=1e-3,
            max_iterations=self.options.cg_iterations,
        )
        return move

    @property
    def _estimator(self) -> AbstractEstimator:
        if self.estimator is None:  # the constructor has refused it
            raise FishLegError("no estimator")
        return self.estimator

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return `{"tensors": {name: Tensor}, "meta": {...}}`; the model is not in it."""
        moments = {
            f"{index}.{name}": value
            for index, state in self._optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        moments |= {f"{_WIDE}{name}": self._wide[name].detach() for name in self._narrow}
        return {"tensors": moments, "meta": {"done": self.done, "begin": self.begin}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state["tensors"].items():
            if key.startswith(_WIDE):
                self._wide[key.removeprefix(_WIDE)].data.copy_(value)
                continue
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.done, self.begin = state["meta"]["done"], state["meta"]["begin"]


def mean_divergence(
    model: nn.Module,
    reference: nn.Module,
    likelihood: AbstractLikelihood,
    batches: Iterable[Any],
    calling: Calling = PLAIN,
) -> float:
    """Return D over all inputs of `batches`, in nats, both networks in evaluation mode.

    Raises:
        FishLegError: there is no sample.

    Cost: a forward pass of each network.
    """
    model.eval()
    reference.eval()
    total, count = 0.0, 0
    models = WideModels(likelihood, calling)
    with torch.no_grad():
        for inputs, targets in each_batch(batches):
            wanted, outputs = (
                models.outputs_in_full(one, inputs).float() for one in (reference, model)
            )
            found = given_targets(likelihood, targets).divergence(wanted, outputs)
            total, count = total + found.double().sum().item(), count + len(found)
    if not count:
        raise FishLegError("batches: expected at least one sample, got none.")
    return total / count


def refine(
    refinement: Refinement, batches: Iterable[Any], every: int = _CHECK_EVERY
) -> Iterator[float]:
    """Continue a run to its last step; yield the mean divergence of every few steps.

    Args:
        refinement: the run, at any step.
        batches: as `Refinement.step` takes them; at least as many as steps are left.
        every: steps between looks.

    Yields:
        D, in nats, averaged over the steps since the last look.

    Raises:
        FishLegError: the divergence is not finite, or the batches have ended too early.
    """
    check_iterable(batches)
    stream, total, since = iter(batches), torch.zeros(()), 0
    while refinement.done < refinement.steps:
        batch = next(stream, None)
        if batch is None:
            raise FishLegError(
                f"The batches ended after step {refinement.done} of {refinement.steps}."
            )
        divergence = refinement.step(batch)
        total, since = total.to(divergence.device) + divergence, since + 1
        if refinement.done % every == 0 or refinement.done == refinement.steps:
            mean = total.item() / since
            if not math.isfinite(mean):
                raise FishLegError(
                    f"refinement: the divergence became {mean} by step {refinement.done} of "
                    f"{refinement.steps}; lower learning_rate (now "
                    f"{refinement.peak_rate:g})."
                )
            yield mean
            total, since = torch.zeros_like(total), 0
