"""Parameters of the data and of the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from fishleg.options import Zeros
from pipeline.stage import ExternalFile, Params
from stages.catalogue.declared import reset
from stages.catalogue.parameters.axes import Seed
from stages.catalogue.registries import DATASETS, MODELS
from stages.catalogue.signatures import only_known
from stages.lineage import Role


class DataParams(Params):
    """A data set, and options of its reading."""

    dataset: Annotated[str, DATASETS] = Field(description="name of the data set")
    dataset_args: dict[str, Any] = Field(
        default={},
        description="options of the data set's loader; of folder: image_size, background, upright",
    )
    download: Annotated[bool, Role.NEUTRAL] = Field(
        default=False, description="fetch missing data into the data folder (FISHLEG_DATA)"
    )
    verify: bool = Field(
        default=True,
        description="refuse arrays whose sha256 is not the declared one; false for cut-down copies",
    )
    subset: int | None = Field(
        default=None, ge=2, description="samples kept of each split, evenly spaced; null for all"
    )
    mean: list[FiniteFloat] | None = Field(
        default=None,
        min_length=1,
        description="normalisation: a number for each channel, or one for all; null for the data "
        "set's own",
    )
    std: list[Annotated[FiniteFloat, Field(gt=0)]] | None = Field(
        default=None, min_length=1, description="normalisation, like mean; each above 0"
    )

    @field_validator("dataset_args")
    @classmethod
    def _loader_takes(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return only_known(DATASETS, info.data.get("dataset", ""), given, {"download"}, skipped=1)

    @model_validator(mode="after")
    def _one_number_for_each_channel(self) -> DataParams:
        entry = DATASETS.find(self.dataset)
        channels = entry.sizes.get("channels") if entry is not None else None
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and channels is not None and len(numbers) not in (1, channels):
                raise ValueError(
                    f"{name}: got {len(numbers)} numbers, and the images of {self.dataset} have "
                    f"{channels} channel{'s' * (channels != 1)}; give one for each, or one for all"
                )
        return self


class ModelParams(Params):
    """A network, and the choice of its prunable weights."""

    model: Annotated[str, MODELS] = Field(description="name of the network")
    model_args: dict[str, Any] = Field(
        default={}, description="options of the network's builder, such as width"
    )
    keep: list[str] = Field(
        default=[], description="patterns of weights that are never pruned: *.downsample.0.weight"
    )
    also_prune: list[str] = Field(
        default=[], description="patterns of further parameters to prune, of two or more dimensions"
    )

    @field_validator("model_args")
    @classmethod
    def _builder_takes(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return only_known(MODELS, info.data.get("model", ""), given, {"num_classes"})


class ExpectationParams(Params):
    """The known accuracy of a dense network."""

    expect_accuracy: Annotated[float | None, Role.NEUTRAL] = Field(
        default=None,
        ge=0,
        le=100,
        description="known accuracy in percent; a dense network with another accuracy is an error",
    )
    expect_margin: Annotated[float, Role.NEUTRAL] = Field(
        default=1.0, ge=0, description="points of difference from expect_accuracy that are allowed"
    )

    @model_validator(mode="after")
    def _forget_margin(self) -> ExpectationParams:
        if self.expect_accuracy is None:
            reset(self, "expect_margin")
        return self


class ImportParams(DataParams, ModelParams, ExpectationParams):
    """Parameters of `import_checkpoint`."""

    path: Annotated[str, ExternalFile()] = Field(
        description="a safetensors file under the network's own state-dict names"
    )
    zeros: Zeros = Field(
        default="keep",
        description="weights that the file has at exactly 0: of a layer with at least 1 % of them "
        "they are a mask, which all later stages keep; or they may be trained again",
    )
    expect_split: Annotated[Literal["test", "validation"], Role.NEUTRAL] = Field(
        default="test",
        description="split that expect_accuracy is of; the test split is read only where it is "
        "expected on it",
    )
    seed: Seed = Field(default=0, ge=0, description="axis: tells copies apart")

    @model_validator(mode="after")
    def _forget_split(self) -> ImportParams:
        if self.expect_accuracy is None:
            reset(self, "expect_split")
        return self
