"""Parameters of choosing, measuring and comparing models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.stage import Params
from stages.catalogue.parameters.axes import MethodAxes, Seed
from stages.catalogue.parameters.data import ExpectationParams
from stages.lineage import Role


class SelectParams(MethodAxes):
    """Parameters of `select`."""

    metric: Literal["accuracy", "nll", "divergence"] = Field(
        default="accuracy",
        description="highest accuracy or lowest nll on the validation split; or, for networks that "
        "have seen it in training, the lowest divergence: mean KL(dense || pruned) on its images, "
        "each with a crop and a flip that training has not seen. It needs the input dense",
    )
    seed: Seed = Field(default=0, ge=0, description="axis: the inputs' seed")


class EvaluateParams(MethodAxes, ExpectationParams):
    """Parameters of `evaluate`; the expectation is of the dense networks, on `split`."""

    seed: Annotated[int | None, Role.SEED] = Field(
        default=None, description="axis: the inputs' seed"
    )
    split: Literal["test", "validation", "train"] = Field(
        default="test", description="split of the data that is measured"
    )
    batch_size: Annotated[int, Role.NEUTRAL] = Field(
        default=500, ge=1, description="samples at a time; no result changes"
    )


class Published(Params):
    """Results from the literature, shown beside the measured ones."""

    method: str = Field(description="name in table and figure")
    sparsity: list[float] = Field(description="fractions of the weights that are removed")
    accuracy: list[float] = Field(description="accuracies in percent, one for each sparsity")

    @model_validator(mode="after")
    def _same_length(self) -> Published:
        if len(self.sparsity) != len(self.accuracy):
            raise ValueError(
                f"{self.method}: {len(self.sparsity)} sparsities, {len(self.accuracy)} accuracies"
            )
        return self


class CompareParams(Params):
    """Parameters of `compare`."""

    title: str = Field(default="Accuracy against sparsity", description="title of table and figure")
    published: list[Published] = Field(default=[], description="rows from the literature")
