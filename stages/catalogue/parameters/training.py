"""Parameters of training and fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.stage import Params
from stages.catalogue.parameters.axes import MethodAxes, Seed
from stages.catalogue.parameters.data import DataParams, ModelParams
from stages.lineage import Role


class FishLegOptimizerParams(Params):
    """Options of the optimiser fishleg."""

    damping: float = Field(default=0.03, gt=0, description="gamma, added to the Fisher's diagonal")
    trust: float | None = Field(
        default=0.1, gt=0, description="longest step, in nats a sample; null for no limit"
    )
    update_every: int = Field(default=10, ge=1, description="steps between updates of the inverse")
    samples: int | None = Field(
        default=None, ge=2, description="of a batch that an update takes; null for all"
    )
    structure: Literal["kronecker", "kronecker_scaled", "diagonal"] = Field(
        default="kronecker", description="form of the inverse's blocks"
    )
    learning_rate: float = Field(
        default=0.005, ge=0, description="of the inverse's correction, relative; 0 learns none"
    )


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
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD and FishLeg")
    weight_decay: float = Field(
        default=5e-4, ge=0, description="of matrices and kernels; not of biases and norms"
    )
    warmup_epochs: float = Field(default=1.0, ge=0, description="epochs of linear warm-up")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="probability spread over all classes"
    )
    augment: bool = Field(default=True, description="the data set's own random crops and flips")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of forward and backward; auto: bfloat16 on a GPU that has it"
    )
    seed: Seed = Field(default=0, ge=0, description="of weights, batches, crops and dropout")

    @model_validator(mode="after")
    def _forget_other_optimizers(self) -> TrainingParams:
        """Reset the options of other optimisers: what is not used must not enter the key."""
        if self.optimizer != "fishleg":
            object.__setattr__(self, "fishleg_optimizer", FishLegOptimizerParams())
        return self


class PretrainParams(DataParams, ModelParams, TrainingParams):
    """Of `pretrain`."""


class FinetuneParams(TrainingParams, MethodAxes):
    """Of `finetune`."""

    distillation: float = Field(
        default=0.5, ge=0, le=1, description="weight of the teacher, where one is connected"
    )
    temperature: float = Field(default=2.0, gt=0, description="of the teacher's outputs")
    sparsity: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the input's sparsity"
    )
