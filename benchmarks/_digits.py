"""The network of the paper's claims: residual, on the digits, small enough for its full Fisher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fishleg.gradients.source import GradientSource
from fishleg.options import Labels
from fishleg.parameters import Partition
from pipeline.stage import Artifact, Context, Params
from stages.calibration import CalibrationPlan
from stages.catalogue import PretrainParams
from stages.data.dataset import DataSet
from stages.data.source import load_data
from stages.metrics import measure
from stages.model_folder import Model, load_model
from stages.pretrain import pretrain

NETWORK: dict[str, Any] = {"width": 10, "hidden": 15, "epochs": 30}
"""4,525 parameters; the largest group, of 2,415, has a Fisher of 47 MB in float64."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The trained network, its data, and its folder.

    Attributes:
        folder: of the model, as stage `pretrain` wrote it.
        model: dense; do not change it, copy it.
        dataset: the digits.
        partition: the network's groups.
    """

    folder: Path
    model: Model
    dataset: DataSet
    partition: Partition

    def gradients(self, model: Model, *, samples: int, labels: Labels, seed: int) -> GradientSource:
        """Return the gradients of a model on `samples` calibration samples."""
        plan = CalibrationPlan(samples=samples, labels=labels, draws=1, batch_size=128, seed=seed)
        return plan.gradients(model, self.partition, self.dataset)

    def validate(self, model: Model) -> float:
        """Return the accuracy on the validation split, in percent."""
        return measure(model.network, self.dataset, self.dataset.validation)["accuracy"]

    def test(self, model: Model) -> float:
        """Return the accuracy on the test split, in percent."""
        return measure(model.network, self.dataset, self.dataset.test)["accuracy"]

    def context(self, params: Params, folder: Path) -> Context:
        """Return a context in which a stage runs on the network, without checkpoints."""
        model = Artifact(cell="pretrain", stage="pretrain", key="", axes={}, path=self.folder)
        return Context(
            params=params, folder=folder, inputs={"model": [model]}, checkpoint_every_s=math.inf
        )


def load_digits(params: dict[str, Any], folder: Path) -> Digits:
    """Return the network of `params` (as in `NETWORK`), trained in `folder` unless it is there.

    The training is deterministic: every cell has the same network, to the bit, on one machine.
    """
    kept = folder / "dense" / "outputs" / "model"
    if not (kept / "model.json").is_file():
        recipe = PretrainParams(
            dataset="digits",
            model="digits_resnet",
            model_args={"width": params["width"], "hidden": params["hidden"]},
            epochs=params["epochs"],
            batch_size=64,
        )
        pretrain(Context(params=recipe, folder=folder / "dense"))
    model = load_model(kept, "cpu")
    dataset, _ = load_data(model.facts.data)
    return Digits(
        folder=kept,
        model=model,
        dataset=dataset,
        partition=model.facts.partition(model.network),
    )
