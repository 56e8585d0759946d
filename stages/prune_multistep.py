"""Stage `prune_multistep`: one-shot pruning in several steps, without labels.

It sees calibration samples alone, at most 5,000 by default. The model of every step is kept, so
that one run gives a model for each sparsity on its way; stage `pick` passes one of them on.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
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
    search_norms,
)
from pipeline.stage import Context, write_json
from stages.checkpoint import Checkpoint
from stages.data.batches import batches_per_epoch, training_batches
from stages.data.dataset import DataSet, Split
from stages.data.mixing import cutmix
from stages.determinism import compute_deterministically, derive_seed, generator
from stages.estimate import user_errors
from stages.metrics import low_accuracy, measure
from stages.model_folder import Model, save_model
from stages.pruning import finish, made_by
from stages.stepwise import StepwisePruning

if TYPE_CHECKING:
    from stages.catalogue import MultistepParams

_EVALUATED_AT_ONCE = 500


def prune_multistep(ctx: Context) -> None:
    """Prune input `model` along the schedule; write outputs `model` and `steps`.

    Each step updates the curvature, removes weights, moves the survivors and, unless `refine` is
    none, refines them towards the dense model's outputs. A checkpoint is taken within the fit of a
    step; within its refinement, after its weights are removed; or between two steps.
    """
    compute_deterministically(ctx.device)
    run = MultistepPruning(ctx)
    for step in range(run.resume(), len(run.sparsities)):
        if not run.unfinished:
            run.update_curvature(step)
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
        unrefined: the network's state before the present, or the last, refinement.
    """

    def __init__(self, ctx: Context):
        super().__init__(ctx)
        self.params: MultistepParams = ctx.params
        self.dense = copy.deepcopy(self.model.network)
        self.kept = ctx.folder / "kept"
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir(parents=True)
        self.folders["kept"] = self.kept
        found = measure(self.dense, self.dataset, self.dataset.validation)
        self.steps: list[dict[str, float]] = []
        self.before = {"validation_accuracy": found["accuracy"], "validation_nll": found["nll"]}
        self.unrefined: dict[str, Tensor] = {}
        self.earlier_s = 0.0
        self.began = time.monotonic()

    def refine(self, step: int) -> None:
        """Refine the survivors of a step, from the start or from a checkpoint."""
        steps = self.params.refinement_steps(step)
        if not steps:
            return
        refinement = self._refinement(steps)

        def checkpoint() -> None:
            unrefined = {"tensors": self.unrefined}
            self.checkpoint(step, refinement=refinement.state_dict(), unrefined=unrefined)

        if self.unfinished:
            refinement.load_state_dict(self.unfinished["refinement"])
            self.unfinished = {}
        elif self.ctx.checkpoint_due():
            checkpoint()
        before = sum(self.params.refinement_steps(earlier) for earlier in range(step))
        with user_errors():
            for divergence in refine(refinement, self._batches(step, refinement.done)):
                done = refinement.done
                self.ctx.log({"refinement/divergence": divergence}, step=before + done)
                self.ctx.progress(done, steps, f"refinement step, pruning step {step + 1}")
                if self.ctx.checkpoint_due():
                    checkpoint()
        report = self._search_line(refinement)
        self._report(step, report)
        if report.held_out and report.kept:
            self._search_norms(step)

    def _refinement(self, steps: int) -> Refinement:
        """Return the refinement of the present network, at its start."""
        begin = 1.0  # a resumed refinement brings its own
        if not self.unfinished:
            begin = self._divergence(self.calibration.train)
            state = self.model.network.state_dict()
            self.unrefined = {name: one.clone() for name, one in state.items()}
        return Refinement(
            self.model.network,
            self.dense,
            Categorical(),
            self.partition,
            group_masks(self.partition, self.model.masks),
            steps=steps,
            options=self._options(),
            estimator=self.estimator,
            begin=begin,
        )

    def _report(self, step: int, report: RefinementReport) -> None:
        for warning in report.warnings:
            self.warn(step, warning)
        if report.held_out:
            found = {
                "refinement/kept": report.kept,
                "refinement/held_out_divergence": report.divergence,
            }
            self.ctx.log(found, step=step + 1)

    def _search_line(self, refinement: Refinement) -> RefinementReport:
        """Return to the best point between start and end, if samples are held out to judge it."""
        if len(self.held_out):
            return search_line(
                self.model.network, self.unrefined, lambda _: self._divergence(self.held_out)
            )
        end = self._divergence(self.calibration.train)
        return RefinementReport(
            kept=1.0, begin=refinement.begin, end=end, divergence=end, held_out=False
        )

    def _search_norms(self, step: int) -> None:
        """Let the held-out samples choose the norms' statistics: augmented, clean, or between."""
        images = self.calibration.train.inputs
        clean = images.tensor_split(-(-len(images) // _EVALUATED_AT_ONCE))
        kept = search_norms(
            self.model.network,
            map(self.dataset.normalise, clean),
            lambda _: self._divergence(self.held_out),
        )
        self.ctx.log({"refinement/clean_norms_kept": kept}, step=step + 1)

    def keep(self, step: int) -> None:
        """Keep the model of `step`, and report its accuracy and the time so far."""
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
            made_by("prune_multistep", self.params, self.estimator, self.warnings),
            **self.recipe.facts(mode=mode, target=self.sparsities[step]),
            seed=self.params.seed,
        )

    def past(self) -> dict[str, Any]:
        """Return the facts about the steps so far that a checkpoint keeps, as JSON."""
        return {**super().past(), "seconds": self._seconds(), "steps": self.steps}

    def restore(self, last: Checkpoint) -> None:
        """Restore a checkpoint, with the models of the steps so far."""
        super().restore(last)
        shutil.copytree(last.folders["kept"], self.kept, dirs_exist_ok=True)
        self.earlier_s, self.steps = last.cursor["seconds"], last.cursor["steps"]
        if "unrefined" in self.unfinished:
            self.unrefined = last.tensors("unrefined", self.ctx.device)

    def _seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.began

    def _folder(self, step: int) -> Path:
        folder = self.kept / f"{step + 1:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _divergence(self, samples: Split) -> float:
        """Return D on some samples, not augmented."""
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
        """Yield model inputs from the calibration samples, beginning after `done` batches."""
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
        """Return the data set whose training split is the samples that refinement sees."""
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
