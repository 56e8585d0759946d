"""The one training loop: SGD, AdamW or FishLeg, cosine schedule, distillation, masks, resumable.

A run's whole state is the network, the optimiser's moments and a cursor (epoch, batch). Learning
rate, batches, crops and dropout are functions of the cursor, so a resumed run reaches the same bits
as an undisturbed one (equal device and thread count). In a rank group each process takes its part
of every batch and sums gradients and losses over the group, so that all take the step of the whole
batch. Only dropout differs from the one that a single process would draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishleg.gradients.rank_group import ALONE, RankGroup
from fishleg.likelihoods import Categorical
from fishleg.optim import FishLeg
from fishleg.pruning import HeldMasks
from pipeline.stage import Context, StageError
from stages.batch_norm import whole_batches
from stages.checkpoint import Checkpoint, State, share
from stages.data.batches import batches_per_epoch, training_batches
from stages.data.dataset import DataSet
from stages.determinism import derive_seed
from stages.distributed import require_equal
from stages.metrics import measure
from stages.tensor_files import load_into, with_prefix, without_prefix

if TYPE_CHECKING:
    from stages.catalogue import TrainingParams

_CHECK_EVERY = 20  # batches between looks at the loss; each look waits for a GPU
_PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network whose outputs are targets besides the labels.

    The loss is (1 - weight) CE(labels) + weight T^2 KL(teacher_T || student_T), with outputs
    divided by the temperature T (G. Hinton et al., arXiv 1503.02531).
    """

    network: nn.Module
    weight: float
    temperature: float


class Training:
    """One run of training, from fresh or pruned weights.

    Args:
        network: trained in place, on its own device.
        dataset: trains on its training split, validates on its validation split.
        params: the recipe.
        masks: weight name -> bool in the weight's shape; weights outside are zero after each step.
        teacher: for distillation, or None.
        purpose: distinguishes the runs of one stage: each purpose has its own batches.
        rank_group: the processes that train together, each with equal arguments.

    Raises:
        StageError: a batch has fewer samples than there are processes.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: DataSet,
        params: TrainingParams,
        *,
        masks: Mapping[str, Tensor] | None = None,
        teacher: Teacher | None = None,
        purpose: str = "training",
        rank_group: RankGroup = ALONE,
    ):
        self.device = str(next(network.parameters()).device.type)
        self.network = network
        if self.device == "cuda":
            # torch's stubs lack this overload of `Module.to`.
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dataset = dataset.map_splits(lambda split: split.to(self.device))
        self.params = params
        self.teacher = teacher
        self.seed = derive_seed(params.seed, purpose)
        self.rank_group = rank_group
        if min(params.batch_size, len(dataset.train)) < rank_group.size:
            raise StageError(
                f"batch_size: expected at least a sample for each of the {rank_group.size} "
                f"workers, got {min(params.batch_size, len(dataset.train))}."
            )
        self.masks = HeldMasks(network, masks or {})
        self.optimizer = _optimizer(network, params, masks or {}, self.seed)
        self.batches = batches_per_epoch(len(dataset.train), params.batch_size)
        self.epoch = 0
        self.batch = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)

    # -- state

    def state_dict(self) -> State:
        """Return the optimiser's moments and the cursor; the network is not in it."""
        moments = {
            f"{index}.{name}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        return {
            "tensors": {**with_prefix("optimizer", moments), "loss_sum": self.loss_sum},
            "meta": {"epoch": self.epoch, "batch": self.batch},
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that `state_dict` returned, with its tensors on the CPU."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in without_prefix("optimizer", state["tensors"]).items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.loss_sum = state["tensors"]["loss_sum"].to(self.device)
        self.epoch, self.batch = state["meta"]["epoch"], state["meta"]["batch"]

    def resume(self, ctx: Context) -> None:
        """Resume from the cell's last checkpoint, if any; all ranks begin as the first."""
        last = Checkpoint.last(ctx)
        if last is not None:
            self._restore(last.states)
            ctx.say(f"resuming from epoch {self.epoch}, batch {self.batch}")
        if self.rank_group.size > 1:
            self._restore(
                {name: share(self.rank_group, one) for name, one in self._states().items()}
            )
            require_equal(self.rank_group, self._bits())

    def _states(self) -> dict[str, State]:
        network = {"tensors": self.network.state_dict()}
        return {"network": network, "training": self.state_dict()}

    def _restore(self, states: Mapping[str, State]) -> None:
        load_into(self.network, states["network"]["tensors"])
        self.load_state_dict(states["training"])

    def _bits(self) -> dict[str, Tensor]:
        """Return the tensors that must be equal in every process: weights, statistics, masks."""
        removed = {f"removed.{name}": one for name, one in self.masks.removed.items()}
        return {**self.network.state_dict(), **removed}

    # -- running

    def run(
        self,
        ctx: Context,
        *,
        first_step: int = 0,
        checkpoint: Callable[[], None] | None = None,
        after_step: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        """Train to the last epoch, with metrics, progress and checkpoints through `ctx`.

        Args:
            ctx: the stage's context.
            first_step: number of the first epoch in the metrics' series.
            checkpoint: writes a checkpoint; by default of network and training alone.
            after_step: is given the inputs and the number, from 0, of each batch after its step;
                it may leave no trace in the weights.

        A loss that is not finite is a StageError; the last checkpoint stays.
        """
        write = checkpoint or (lambda: Checkpoint(states=self._states()).write(ctx))
        shown = time.monotonic()
        while self.epoch < self.params.epochs:
            batches = training_batches(
                self.dataset,
                batch_size=self.params.batch_size,
                seed=self.seed,
                epoch=self.epoch,
                start=self.batch,
                augment=self.params.augment,
            )
            for inputs, labels in batches:
                self._step(inputs, labels)
                if after_step is not None:
                    after_step(inputs, self.epoch * self.batches + self.batch)
                self.batch += 1
                last = self.batch == self.batches
                if last:
                    self._finish_epoch(ctx, first_step)
                elif self.batch % _CHECK_EVERY == 0:
                    self._require_finite()
                if last or time.monotonic() - shown > _PROGRESS_EVERY_S:
                    shown = time.monotonic()
                    done = self.epoch + self.batch / self.batches
                    ctx.progress(first_step + done, first_step + self.params.epochs, "epoch")
                self._checkpoint_if_due(ctx, write)
        self.network.eval()

    def _checkpoint_if_due(self, ctx: Context, write: Callable[[], None]) -> None:
        """Let the first rank write a checkpoint, after a check of all ranks."""
        if self.rank_group.any(ctx.rank == 0 and ctx.checkpoint_due()):
            self._require_finite()
            require_equal(self.rank_group, self._bits())
            if ctx.rank == 0:
                write()

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        """Take one optimiser step; dropout draws from a seed of this batch."""
        rank = (self.rank_group.rank,) if self.rank_group.rank else ()
        torch.manual_seed(derive_seed(self.seed, "batch", self.epoch, self.batch, *rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.params, self.epoch * self.batches + self.batch, self.batches
            )
        self.network.train()
        if self.device == "cuda" and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if isinstance(self.optimizer, FishLeg):
            self.optimizer.observe(inputs)
        self.optimizer.zero_grad()
        self.loss_sum += self._descend(inputs, labels)
        self.optimizer.step()
        self.masks.apply()

    def _descend(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Put the gradients of the batch's mean loss into the parameters, and return the loss."""
        if self.rank_group.size == 1:
            loss = self._loss(inputs, labels)
            loss.backward()
            return loss.detach()
        part = self.rank_group.part(len(labels))
        share = len(labels[part]) / len(labels)
        with whole_batches(self.network, self.rank_group):
            loss = self._loss(inputs[part], labels[part]) * share
            loss.backward()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        summed = torch.cat([loss.detach().reshape(1), *(one.flatten() for one in gradients)])
        self.rank_group.sum([summed])
        loss, *parts = summed.split([1, *(one.numel() for one in gradients)])
        for gradient, one in zip(gradients, parts, strict=True):
            gradient.copy_(one.view_as(gradient))
        return loss.squeeze()

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self._half_precision()):
            outputs = self.network(inputs)
        outputs = outputs.float()
        smoothing = self.params.label_smoothing
        loss = functional.cross_entropy(outputs, labels, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with (
            torch.no_grad(),
            torch.autocast(self.device, torch.bfloat16, enabled=self._half_precision()),
        ):
            target = self.teacher.network(inputs)
        temperature = self.teacher.temperature
        divergence = functional.kl_div(
            functional.log_softmax(outputs / temperature, -1),
            functional.log_softmax(target.float() / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        weight = self.teacher.weight
        return (1 - weight) * loss + weight * temperature**2 * divergence

    def _half_precision(self) -> bool:
        if self.params.precision == "auto":
            return self.device == "cuda" and torch.cuda.is_bf16_supported()
        return self.params.precision == "bfloat16"

    def _finish_epoch(self, ctx: Context, first_step: int) -> None:
        """Report the finished epoch, and move the cursor to the next one."""
        self._require_finite()
        self.epoch, self.batch = self.epoch + 1, 0
        metrics = {"train/loss": self.loss_sum.item() / self.batches}
        self.loss_sum.zero_()
        if len(self.dataset.validation) and ctx.rank == 0:
            found = measure(self.network, self.dataset, self.dataset.validation)
            metrics |= {"validation/accuracy": found["accuracy"], "validation/nll": found["nll"]}
        ctx.log(metrics, step=first_step + self.epoch)

    def _require_finite(self) -> None:
        if not math.isfinite(self.loss_sum.item()):
            raise StageError(
                f"The training loss became {self.loss_sum.item()} in epoch {self.epoch + 1}, by "
                f"batch {self.batch} of {self.batches}. The last checkpoint before it stays. "
                f"Lower lr (now {self.params.lr}) or raise warmup_epochs."
            )


def learning_rate(params: TrainingParams, step: int, batches: int) -> float:
    """Return the rate of optimiser step `step`: linear warm-up, then a half cosine down to 0.

    Args:
        params: the recipe (`lr`, `epochs`, `warmup_epochs`).
        step: from 0.
        batches: optimiser steps in an epoch.
    """
    warmup = params.warmup_epochs * batches
    if step < warmup:
        return params.lr * (step + 1) / (warmup + 1)
    along = (step - warmup) / max(params.epochs * batches - warmup, 1)
    return params.lr * 0.5 * (1 + math.cos(math.pi * along))


def _optimizer(
    network: nn.Module, params: TrainingParams, masks: Mapping[str, Tensor], seed: int
) -> torch.optim.Optimizer:
    """Build the optimiser; weight decay acts on matrices and kernels, not on biases and norms."""
    if params.optimizer == "fishleg":
        return FishLeg(
            network,
            Categorical(),
            lr=params.lr,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            masks=masks,
            seed=seed,
            **params.fishleg_optimizer.model_dump(),
        )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if params.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=params.lr)
    return torch.optim.SGD(
        groups, lr=params.lr, momentum=params.momentum, nesterov=params.momentum > 0
    )
