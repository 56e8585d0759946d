"""Parameters of training and fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fishleg.options import Directions, DrawnLabels, Start, StepOptions, TrackingOptions
from pipeline.stage import Params
from stages.catalogue.declared import OptionParams, reset
from stages.catalogue.parameters.axes import MethodAxes, Seed
from stages.catalogue.parameters.data import DataParams, ModelParams


class FishLegOptimizerParams(OptionParams, TrackingOptions, StepOptions):
    """Options of the optimiser fishleg."""

    samples: Annotated[int | None, Field(ge=2)] = StepOptions.samples
    labels: ClassVar[DrawnLabels] = StepOptions.labels
    start: ClassVar[Start] = TrackingOptions.start
    decay: ClassVar[float] = TrackingOptions.decay
    directions: ClassVar[Directions] = TrackingOptions.directions
    probes: ClassVar[int] = TrackingOptions.probes
    seed: ClassVar[int] = TrackingOptions.seed


class TrainingParams(Params):
    """The recipe of the training loop."""

    epochs: int = Field(default=30, ge=0, description="passes over the training split")
    batch_size: int = Field(default=128, ge=1, description="samples in an optimiser step")
    optimizer: Literal["sgd", "adamw", "fishleg"] = Field(
        default="sgd",
        description="SGD with Nesterov momentum, AdamW, or the FishLeg natural gradient",
    )
    fishleg_optimizer: FishLegOptimizerParams = Field(
        default=FishLegOptimizerParams(), description="options of the optimiser fishleg"
    )
    lr: float = Field(default=0.1, gt=0, description="peak learning rate; a cosine takes it to 0")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD and FishLeg")
    weight_decay: float = Field(
        default=5e-4, ge=0, description="decay of matrices and kernels; biases and norms have none"
    )
    warmup_epochs: float = Field(default=1.0, ge=0, description="epochs of linear warm-up")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="probability spread over all classes"
    )
    augment: bool = Field(default=True, description="the data set's own random crops and flips")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="number type of both passes; auto: bfloat16 on a GPU that has it",
    )
    seed: Seed = Field(default=0, ge=0, description="seed of weights, batches, crops and dropout")

    @model_validator(mode="after")
    def _forget_other_optimizers(self) -> TrainingParams:
        if self.optimizer != "fishleg":
            reset(self, "fishleg_optimizer")
        return self


class PretrainParams(DataParams, ModelParams, TrainingParams):
    """Parameters of `pretrain`."""


class FinetuneParams(TrainingParams, MethodAxes):
    """Parameters of `finetune`."""

    distillation: float = Field(
        default=0.5, ge=0, le=1, description="weight of the teacher, where one is connected"
    )
    temperature: float = Field(default=2.0, gt=0, description="divides the logits that are matched")
