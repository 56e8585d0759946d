"""Stage `prune_multistep`: one-shot pruning in several steps, without labels.

Only calibration samples are seen, at most 5,000 by default. The model after every step is kept, so
that one run gives a model for each sparsity it passes; stage `pick` passes one of them on.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fishleg.likelihoods import Categorical
from fishleg.pruning import (
    Refinement,
    RefinementOptions,
    RefinementReport,
    group_masks,
    mean_divergence,
    refine,
    search_line,
)
from pipeline.stage import Context, write_json
from stages.data.batches import batches_per_epoch, training_batches
from stages.data.dataset import DataSet, Split
from stages.data.mixing import cutmix
from stages.determinism import compute_deterministically, derive_seed, generator
from stages.estimate import user_errors
from stages.lineage import Step
from stages.metrics import low_accuracy, measure
from stages.model_folder import Model, save_model
from stages.pruning import finish
from stages.stepwise import StepwisePruning
from stages.tensor_files import load_into, load_tensors, save_tensors, with_prefix, without_prefix

if TYPE_CHECKING:
    from stages.catalogue import MultistepParams

_EVALUATED_AT_ONCE = 500


def prune_multistep(ctx: Context) -> None:
    """Prune input `model` along the schedule; write outputs `model` and `steps`.

    Each step brings the curvature up to date, removes weights, moves the others and, unless
    `refine` is none, refines them towards the dense model's outputs. A checkpoint stands within the
    fit of a step; within its refinement, its weights being removed already; or between two steps.
    """
    compute_deterministically(ctx.device)
    run = MultistepPruning(ctx)
    unfinished = ctx.last_checkpoint()
    first = 0 if unfinished is None else run.load(unfinished)
    for step in range(first, len(run.sparsities)):
        if not run.refining:
            run.update_curvature(step, partial(run.checkpoint, step, fitting=True))
            run.prune(step)
        run.refine(step)
        run.keep(step)
        if ctx.checkpoint_due():
            run.checkpoint(step + 1)
    shutil.copytree(run.kept, ctx.output("steps"), dirs_exist_ok=True)
    finish(ctx, run.present(len(run.sparsities) - 1), run.dataset)


class MultistepPruning(StepwisePruning):
    """Adds the refinement, and keeps the model of every step.

    Attributes:
        kept: folder with a model folder for each finished step, and `steps.json` about them.
        refining: the state of the refinement that a checkpoint stood in, until it goes on.
        unrefined: the network's state before the refinement at hand, or after the last one.
    """

    def __init__(self, ctx: Context):
        super().__init__(ctx)
        self.params: MultistepParams = ctx.params
        self.dense = copy.deepcopy(self.model.network)
        self.kept = ctx.folder / "kept"
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir(parents=True)
        found = measure(self.dense, self.dataset, self.dataset.validation)
        self.steps: list[dict[str, float]] = []
        self.before = {"validation_accuracy": found["accuracy"], "validation_nll": found["nll"]}
        self.refining: dict[str, Any] | None = None
        self.unrefined: dict[str, Tensor] = {}
        self.earlier_s = 0.0
        self.began = time.monotonic()

    def refine(self, step: int) -> None:
        """Refine the survivors, from the start or from a checkpoint, then search the line."""
        steps = self.params.refinement_steps(step)
        if not steps:
            return
        network = self.model.network
        begin = 1.0  # that of the checkpoint comes with it
        if self.refining is None:
            begin = self._divergence(self.calibration.train)
            self.unrefined = {name: one.clone() for name, one in network.state_dict().items()}
        refinement = Refinement(
            network,
            self.dense,
            Categorical(),
            self.partition,
            group_masks(self.partition, self.model.masks),
            steps=steps,
            options=self._options(),
            estimator=self.estimator,
            begin=begin,
        )
        if self.refining is not None:
            refinement.load_state_dict(self.refining)
            self.refining = None
        elif self.ctx.checkpoint_due():
            self.checkpoint(step, refinement)
        with user_errors():
            for divergence in refine(refinement, self._batches(step, refinement.done)):
                before = sum(self.params.refinement_steps(earlier) for earlier in range(step))
                self.ctx.log({"refinement/divergence": divergence}, step=before + refinement.done)
                self.ctx.progress(
                    refinement.done, steps, f"refinement step, pruning step {step + 1}"
                )
                if self.ctx.checkpoint_due():
                    self.checkpoint(step, refinement)
        report = self._search_line(refinement)
        for warning in report.warnings:
            self.warn(step, warning)
        if report.held_out:
            found = {
                "refinement/kept": report.kept,
                "refinement/held_out_divergence": report.divergence,
            }
            self.ctx.log(found, step=step + 1)

    def _search_line(self, refinement: Refinement) -> RefinementReport:
        """Go back to the best point of the way, if samples are held out to tell it by."""
        if len(self.held_out):
            return search_line(
                self.model.network, self.unrefined, lambda _: self._divergence(self.held_out)
            )
        end = self._divergence(self.calibration.train)
        return RefinementReport(
            kept=1.0, begin=refinement.begin, end=end, divergence=end, held_out=False
        )

    def keep(self, step: int) -> None:
        """Keep the model as it is after `step`, and report what it took so far."""
        model = self.present(step)
        found = measure(self.model.network, self.dataset, self.dataset.validation)
        alarming = low_accuracy(model.facts, found["accuracy"], "validation")
        save_model(self._folder(step), model, alarming)
        self.steps.append(
            {
                "target": self.sparsities[step],
                "sparsity": model.findings()["sparsity"],
                "validation_accuracy": found["accuracy"],
                "validation_nll": found["nll"],
            }
        )
        write_json(self.kept / "steps.json", {"dense": self.before, "steps": self.steps})
        numbers = {**self.steps[-1], "seconds": self._seconds()}
        self.ctx.log({f"step/{name}": value for name, value in numbers.items()}, step=step + 1)

    def present(self, step: int) -> Model:
        """Return the model with the facts of `step`."""
        mode = "multistep" if self.params.refine == "none" else "refined"
        return self.model.after(
            Step.of("prune_multistep", self.params, warnings=self.warnings),
            **self.recipe.facts(mode=mode, target=self.sparsities[step]),
            seed=self.params.seed,
        )

    def checkpoint(
        self, step: int, refinement: Refinement | None = None, *, fitting: bool = False
    ) -> None:
        """Write a checkpoint: before `step`, within its fit, or within its refinement."""
        tensors = with_prefix("network", self.model.network.state_dict())
        facts: dict[str, Any] = {"seconds": self._seconds(), "steps": self.steps, "refining": None}
        if refinement is not None:
            state = refinement.state_dict()
            tensors |= with_prefix("moments", state["tensors"])
            tensors |= with_prefix("unrefined", self.unrefined)
            facts["refining"] = state["meta"]
        with self.ctx.checkpoint() as folder:
            self.save(folder, step, fitting=fitting)
            shutil.copytree(self.kept, folder / "kept")
            save_tensors(folder / "multistep.safetensors", tensors)
            write_json(folder / "multistep.json", facts)

    def load(self, folder: Path) -> int:
        """Restore what `checkpoint` wrote, and return the number of its step."""
        step = super().load(folder)
        shutil.copytree(folder / "kept", self.kept, dirs_exist_ok=True)
        tensors = load_tensors(folder / "multistep.safetensors", self.ctx.device)
        facts = json.loads((folder / "multistep.json").read_text("utf-8"))
        load_into(self.model.network, without_prefix("network", tensors))
        self.earlier_s, self.steps = facts["seconds"], facts["steps"]
        if facts["refining"] is not None:
            moments = without_prefix("moments", tensors)
            self.unrefined = without_prefix("unrefined", tensors)
            self.refining = {"tensors": moments, "meta": facts["refining"]}
        return step

    def _seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.began

    def _folder(self, step: int) -> Path:
        folder = self.kept / f"{step + 1:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _divergence(self, samples: Split) -> float:
        """Return D on some samples as they are."""
        batches = map(self.dataset.normalise, samples.inputs.split(_EVALUATED_AT_ONCE))
        return mean_divergence(self.model.network, self.dense, Categorical(), batches)

    def _options(self) -> RefinementOptions:
        own, params = self.params.refinement, self.params
        return replace(
            RefinementOptions.taken_from(own),
            method="adam" if params.refine == "none" else params.refine,
            learning_rate=own.lr,
            bfloat16=own.precision == "bfloat16",
        )

    def _batches(self, step: int, done: int) -> Iterator[Tensor]:
        """Yield model inputs from the calibration samples, going on after `done` batches."""
        own = self.params.refinement
        data = self.calibration
        seed = derive_seed(self.params.seed, f"refinement {step}")
        each = batches_per_epoch(len(data.train), own.batch_size)
        epoch, start = divmod(done, each)
        while True:
            batches = training_batches(
                data,
                batch_size=own.batch_size,
                seed=seed,
                epoch=epoch,
                start=start,
                augment=own.augment,
            )
            for number, (inputs, _) in enumerate(batches, start=start):
                mixing = generator(seed, "cutmix", epoch, number)
                yield cutmix(inputs, own.cutmix, mixing) if own.cutmix else inputs
            epoch, start = epoch + 1, 0

    @cached_property
    def calibration(self) -> DataSet:
        """Return the data set with the samples that are refined on for its training split."""
        return replace(self.dataset, train=self._samples[0])

    @property
    def held_out(self) -> Split:
        """Return the samples that refinement does not see."""
        return self._samples[1]

    @cached_property
    def _samples(self) -> tuple[Split, Split]:
        own = self.params.refinement
        plan = replace(self.recipe.calibration, samples=own.samples)
        indices = plan.indices(self.dataset)
        seen = len(indices) - round(own.held_out * len(indices))
        parts = (indices[:seen], indices[seen:])
        first, last = (self.dataset.train.take(one).to(self.ctx.device) for one in parts)
        return first, last
