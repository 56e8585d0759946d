"""Every stage on one page: parameters, inputs, outputs, resources, entry point.

Light on purpose: pydantic and the standard library only, so that `validate` and `plan` need no
torch. Stages import this module for type checking only; what a parameter's name stands for reaches
them through the parameter class (see `stages.reference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from pipeline.stage import (
    Catalogue,
    Entry,
    Estimate,
    ExternalFile,
    Input,
    Notes,
    Output,
    Params,
    Registry,
    Resources,
    Results,
    Stage,
)
from stages.data.place import (
    CIFAR100,
    FASHION_MNIST,
    TINY_IMAGENET,
    complete_folder,
    data_folder,
    tree_folder,
)
from stages.lineage import Role

# -------------------------------------------------------------------------------- roles

Seed = Annotated[int, Role.SEED]

# -------------------------------------------------------------------------------- registries

MODELS = Registry(
    kind="model",
    options="model_args",
    entries={
        "digits_resnet": Entry(
            target="stages.models.digits_resnet:digits_resnet",
            facts={"parameters": 15_774, "width": 12},
            summary="small residual network for 8x8 images (width, hidden)",
        ),
        "mlpnet": Entry(
            target="stages.models.mlpnet:mlpnet",
            facts={"parameters": 32_360},
            summary="784-40-20-10 without biases",
        ),
        "resnet20": Entry(
            target="stages.models.resnet_cifar:resnet20",
            facts={"parameters": 272_474, "width": 16},
            summary="ResNet20 in its CIFAR form (width)",
        ),
        "resnet18": Entry(
            target="stages.models.resnet_cifar:resnet18",
            facts={"parameters": 11_173_962, "width": 64},
            summary="ResNet18 in its CIFAR form (width)",
        ),
    },
    open=True,
    prefixes={
        "torchvision/": Entry(
            target="stages.models.torchvision_models:build",
            summary="any classification network of torchvision.models, untrained",
        )
    },
)

DATASETS = Registry(
    kind="data set",
    options="dataset_args",
    entries={
        "digits": Entry(
            target="stages.data.digits:load",
            digest="f5435893a45e623f98701bc29e4e265a4b719b60dff40da8bd69186b20b8c3af",
            facts={"bytes": 129_384, "classes": 10, "channels": 1},
            summary="1,797 handwritten digits, 8x8, shipped with scikit-learn",
        ),
        "mnist": Entry(
            target="stages.data.mnist:load_mnist",
            digest="c0beabf8ccf1f8fd41dc89d2096bf47b5d00f0755a62da5479bb5671e99d5235",
            facts={"bytes": 55_440_000, "classes": 10, "channels": 1},
            summary="70,000 handwritten digits, 28x28",
        ),
        "fashion_mnist": Entry(
            target="stages.data.mnist:load_fashion_mnist",
            folder=lambda name: data_folder() / FASHION_MNIST,
            facts={"bytes": 55_440_000, "classes": 10, "channels": 1},
            summary="70,000 pieces of clothing, 28x28",
        ),
        "cifar10": Entry(
            target="stages.data.cifar:load_cifar10",
            digest="f7b9ea97c677c098573e0042390d4c0fe9326cdea8950afe890e9182e1ed1f15",
            facts={"bytes": 184_800_000, "classes": 10, "channels": 3},
            summary="60,000 images of 10 classes, 32x32",
        ),
        "cifar100": Entry(
            target="stages.data.cifar:load_cifar100",
            folder=lambda name: complete_folder(data_folder(), CIFAR100),
            facts={"bytes": 184_800_000, "classes": 100, "channels": 3},
            summary="60,000 images of 100 classes, 32x32",
        ),
        "tiny_imagenet": Entry(
            target="stages.data.image_folder:load_tiny_imagenet",
            folder=lambda name: data_folder() / TINY_IMAGENET,
            facts={"bytes": 1_352_560_000, "classes": 200, "channels": 3},
            summary="110,000 images of 200 classes, 64x64",
        ),
    },
    open=True,
    prefixes={
        "folder:": Entry(
            target="stages.data.image_folder:load",
            facts={"channels": 3},
            folder=lambda name: tree_folder(data_folder(), name.removeprefix("folder:")),
            summary="a tree of images, PATH/{train,val,test}/CLASS/*; options image_size (pixels), "
            "background (grey level behind transparent pixels), upright (turned by EXIF)",
        )
    },
    data=True,
    verified_by="verify",
)

METHODS = Registry(
    kind="curvature method",
    entries={
        "fishleg": Entry(
            target="fishleg.estimators:FishLeg",
            summary="inverse Fisher learned directly, refined while pruning",
        ),
        "obs": Entry(
            target="fishleg.estimators:BlockWoodbury",
            summary="inverse of dense diagonal blocks of the Fisher (WoodFisher, oBERT)",
        ),
        "mfac": Entry(
            target="fishleg.estimators:MFAC",
            summary="low-rank inverse of a few gradients, layer by layer (M-FAC)",
        ),
        "kfac": Entry(
            target="fishleg.estimators:KFAC",
            summary="Kronecker factors, damped exactly in their eigenbasis",
        ),
        "ekfac": Entry(
            target="fishleg.estimators:EKFAC",
            summary="curvature measured in the eigenbasis of K-FAC (EK-FAC)",
        ),
        "layer": Entry(
            target="fishleg.estimators:LayerHessian",
            summary="Hessian of each layer's output error, of its inputs alone (OBC, SparseGPT)",
        ),
        "diagonal": Entry(
            target="fishleg.estimators:DiagonalFisher",
            summary="the Fisher's diagonal",
        ),
        "magnitude": Entry(
            target="fishleg.estimators:Identity",
            summary="the identity: saliency is the weight's square",
        ),
    },
    open=True,
)

# -------------------------------------------------------------------------------- parameters


class DataParams(Params):
    """Which data, and how they are read."""

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
        default=None, min_length=1, description="likewise; each above 0"
    )

    @model_validator(mode="after")
    def _one_number_for_each_channel(self) -> DataParams:
        entry = DATASETS.find(self.dataset)
        channels = entry.facts.get("channels") if entry is not None else None
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and channels is not None and len(numbers) not in (1, channels):
                raise ValueError(
                    f"{name}: got {len(numbers)} numbers, and the images of {self.dataset} have "
                    f"{channels} channel{'s' * (channels != 1)}; give one for each, or one for all"
                )
        return self


class ModelParams(Params):
    """Which network, and which of its weights may be pruned."""

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


class CalibrationParams(Params):
    """Per-sample gradients that curvature is estimated from."""

    samples: int = Field(
        default=1000, ge=1, description="calibration samples, drawn from the training split"
    )
    labels: Literal["sampled", "matched", "enumerated", "empirical"] = Field(
        default="matched",
        description="drawn from the model; drawn with the same moments and less noise; all "
        "classes by their probability; or the data's own",
    )
    draws: int = Field(
        default=1, ge=1, description="labels drawn for each sample (sampled, matched)"
    )
    batch_size: int = Field(default=125, ge=1, description="samples in a gradient batch")
    seed: Seed = Field(default=0, ge=0, description="of the samples and the labels drawn")


class FishLegParams(Params):
    """Options of the method fishleg."""

    structure: Literal[
        "eigen",
        "kronecker",
        "kronecker_scaled",
        "tensor",
        "tensor_scaled",
        "block",
        "diagonal",
        "full",
    ] = Field(default="kronecker", description="form of the inverse's blocks")
    solver: Literal["auto", "alternating", "adam"] = Field(
        default="auto", description="exact half-steps where there are any, else Adam"
    )
    objective: Literal["expected", "probe"] = Field(
        default="expected", description="closed form over samples, or random probes (adam)"
    )
    warm_start: Literal["kfac", "moments", "diagonal", "identity"] = Field(
        default="moments", description="where the fit begins"
    )
    shrinkage: float = Field(
        default=0.5, ge=0, le=1, description="of measured curvature towards its factors' (eigen)"
    )
    sweeps: int = Field(default=5, ge=1, description="pairs of half-steps in a fit (alternating)")
    refine_sweeps: int = Field(
        default=2, ge=1, description="pairs of half-steps that take new masks in (alternating)"
    )
    mask_fit: Literal["damped", "exact"] = Field(
        default="damped", description="what masked half-steps minimise"
    )
    cg_iterations: int = Field(default=4, ge=1, description="in an exact masked half-step")
    block_size: int = Field(default=64, ge=1, description="weights in a block (structure block)")
    steps: int = Field(default=200, ge=1, description="of Adam in a fit (adam)")
    refine_steps: int = Field(default=80, ge=1, description="of Adam that take new masks in (adam)")
    preconditioned_steps: int = Field(
        default=0, ge=0, description="of Adam's first steps, how many are preconditioned (adam)"
    )
    learning_rate: float = Field(default=0.02, gt=0, description="relative (adam)")
    probes: int = Field(default=16, ge=1, description="a step (objective probe)")
    memory_bytes: Annotated[int, Role.NEUTRAL] = Field(
        default=2 << 30, ge=1 << 20, description="for gradients held at once; more passes if less"
    )


class ObsParams(Params):
    """Options of the method obs."""

    block_size: int = Field(default=64, ge=1, description="weights in a diagonal block")


class MfacParams(Params):
    """Options of the method mfac."""

    gradients: int = Field(
        default=256, ge=1, description="vectors kept, each of samples / gradients gradients"
    )


class LayerParams(Params):
    """Options of the method layer."""

    relative_damping: float = Field(
        default=0.01,
        ge=0,
        description="added to the Hessian's diagonal beside damping, in units of its mean",
    )


class EstimatorParams(CalibrationParams):
    """How curvature is estimated. Each method reads its own options and no other's."""

    method: Annotated[str, METHODS] = Field(description="name of the curvature method")
    damping: float = Field(default=1e-4, gt=0, description="gamma, added to the Fisher's diagonal")
    fishleg: FishLegParams = Field(
        default=FishLegParams(), description="options of the method fishleg"
    )
    obs: ObsParams = Field(default=ObsParams(), description="options of the method obs")
    mfac: MfacParams = Field(default=MfacParams(), description="options of the method mfac")
    layer: LayerParams = Field(default=LayerParams(), description="options of the method layer")
    options: dict[str, Any] = Field(
        default={},
        description="further keyword arguments of the method: memory_limit (bytes), or those of "
        "a method of your own",
    )

    @model_validator(mode="after")
    def _forget_other_methods(self) -> EstimatorParams:
        """Reset the options of other methods: what is not used must not enter the key."""
        own = {
            "fishleg": FishLegParams(),
            "obs": ObsParams(),
            "mfac": MfacParams(),
            "layer": LayerParams(),
        }
        for name, default in own.items():
            if self.method != name:
                object.__setattr__(self, name, default)
        return self


class PruningParams(Params):
    """How weights are chosen and survivors moved."""

    selection: Literal["single", "greedy"] = Field(
        default="single",
        description="by what a weight costs alone, or after the others of its row that cost less; "
        "with any method",
    )
    distribution: Literal["global", "uniform"] = Field(
        default="global", description="least salient of the whole network, or of each layer"
    )
    compensation: Literal["none", "independent", "joint", "fisher"] = Field(
        default="joint",
        description="of survivors: none; sum of single-weight updates; exact within each block; "
        "across the network by Fisher products",
    )
    min_kept: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of each layer's weights that survives at the least, so that none is "
        "emptied; others go instead",
    )
    cg_iterations: int = Field(
        default=500, ge=1, description="of conjugate gradients, at most, in one compensation"
    )
    norms: Literal["kept", "reestimated"] = Field(
        default="kept",
        description="batch norms after a step: as they were, or measured anew on the calibration "
        "samples, without labels",
    )


class MethodAxes(Params):
    """Axes that tell cells apart, where what they name is known from the inputs already."""

    method: Annotated[str | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' curvature method"
    )
    damping: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' damping"
    )


class PretrainParams(DataParams, ModelParams, TrainingParams):
    """Of `pretrain`."""


class ExpectationParams(Params):
    """How accurate a dense network is known to be."""

    expect_accuracy: Annotated[float | None, Role.NEUTRAL] = Field(
        default=None,
        ge=0,
        le=100,
        description="in percent; a dense network that is more or less accurate is an error",
    )
    expect_margin: Annotated[float, Role.NEUTRAL] = Field(
        default=1.0, ge=0, description="points that expect_accuracy may be missed by"
    )

    @model_validator(mode="after")
    def _forget_margin(self) -> ExpectationParams:
        """Reset the margin of no expectation: what is not used must not enter the key."""
        if self.expect_accuracy is None:
            default = ExpectationParams.model_fields["expect_margin"].default
            object.__setattr__(self, "expect_margin", default)
        return self


class ImportParams(DataParams, ModelParams, ExpectationParams):
    """Of `import_checkpoint`."""

    path: Annotated[str, ExternalFile()] = Field(
        description="a safetensors file under the network's own state-dict names"
    )
    zeros: Literal["keep", "free"] = Field(
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
        """Reset the split of no expectation: what is not used must not enter the key."""
        if self.expect_accuracy is None:
            default = ImportParams.model_fields["expect_split"].default
            object.__setattr__(self, "expect_split", default)
        return self


class CurvatureParams(EstimatorParams):
    """Of `curvature`."""

    certificate_samples: Annotated[int, Role.NEUTRAL] = Field(
        default=250,
        ge=0,
        description="held-out training samples that the estimate is certified on; 0: none",
    )


class OneshotParams(PruningParams, MethodAxes):
    """Of `prune_oneshot`: a sparsity, or a budget."""

    sparsity: Annotated[float | None, Role.TARGET] = Field(
        default=None, ge=0, lt=1, description="fraction of the prunable weights removed"
    )
    within: float | None = Field(
        default=None,
        ge=0,
        description="instead of a sparsity: the highest one that costs at most so many points of "
        "accuracy on the validation split, by bisection",
    )
    seed: Seed = Field(default=0, ge=0, description="axis: the inputs' seed")
    certificate_samples: Annotated[int, Role.NEUTRAL] = Field(
        default=250,
        ge=0,
        description="calibration samples on which predicted and measured change are compared; "
        "0: none",
    )

    @model_validator(mode="after")
    def _one_target(self) -> OneshotParams:
        return _with_one_target(self)


class StepwiseParams(PruningParams, EstimatorParams):
    """Of pruning in steps."""

    sparsity: Annotated[float, Role.TARGET] = Field(
        gt=0, lt=1, description="fraction removed after the last step"
    )
    initial_sparsity: float = Field(
        default=0.0, ge=0, lt=1, description="where the schedule begins"
    )
    steps: int = Field(default=8, ge=1, description="pruning steps")
    schedule: Literal["cubic", "linear", "geometric"] = Field(
        default="cubic",
        description="fast at first and slow at the end; equal steps; or equal fractions of what is "
        "left",
    )
    stops: list[float] = Field(
        default=[],
        description="sparsities after each step but the last, in place of a schedule",
    )
    carry: Literal["refine", "reestimate"] = Field(
        default="refine",
        description="between steps: take the new weights and masks into the estimate, or start "
        "it anew (methods without a state always do)",
    )
    seed: Seed = Field(default=0, ge=0, description="of samples, labels, batches and crops")

    @model_validator(mode="after")
    def _rising(self) -> StepwiseParams:
        rising = [0.0, *self.stops, self.sparsity]
        if any(not low < high for low, high in pairwise(rising)):
            raise ValueError(
                f"stops: expected to rise from above 0 to below sparsity, got {rising}"
            )
        return self


class GradualParams(StepwiseParams, TrainingParams):
    """Of `prune_gradual`."""

    epochs: int = Field(default=1, ge=0, description="of training after each step")
    batch_size: int = Field(default=128, ge=1, description="samples in an optimiser step")
    seed: Seed = Field(default=0, ge=0, description="of samples, labels, batches and crops")


class RefinementParams(Params):
    """Of the short runs that move survivors towards the dense model's outputs."""

    samples: int = Field(
        default=5000, ge=1, description="calibration samples, the curvature's among them; no labels"
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="fraction of these that is not seen, and tells how much of a refinement is "
        "kept: all, three quarters, ..., or nothing; 0: all",
    )
    steps: NonNegativeInt | list[NonNegativeInt] = Field(
        default=100,
        description="optimiser steps after each pruning step: one number, or one for each",
    )
    batch_size: int = Field(default=128, ge=1, description="samples in a step")
    lr: float | None = Field(
        default=None, gt=0, description="peak learning rate; null for the method's own"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd, adam and natural")
    trust: float = Field(default=1e-2, gt=0, description="longest step, in nats (natural)")
    cg_iterations: int = Field(default=10, ge=1, description="a step (gauss_newton)")
    temperature: float = Field(default=1.0, gt=0, description="of both outputs")
    statistics: Literal["running", "batch", "frozen"] = Field(
        default="running",
        description="batch norms divide by their running statistics, which follow the batches; by "
        "the batch's; or by the ones they had",
    )
    augment: bool = Field(default=True, description="the data set's own random crops and flips")
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of images with a rectangle from another; against over-fitting to few "
        "samples, where the steps are many (from some 400)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of forward and backward"
    )


class MultistepParams(StepwiseParams):
    """Of `prune_multistep`."""

    schedule: Literal["cubic", "linear", "geometric"] = Field(
        default="geometric",
        description="fast at first and slow at the end; equal steps; or equal fractions of what is "
        "left",
    )
    carry: Literal["refine", "reestimate"] = Field(
        default="reestimate",
        description="between steps: start the estimate anew, on the full Fisher with all zeros as "
        "constraints, or take the new weights and masks into it",
    )
    refine: Literal["none", "sgd", "adam", "natural", "gauss_newton"] = Field(
        default="adam",
        description="after each step, by KL(dense || pruned) on the calibration samples: not at "
        "all, or by one of these",
    )
    refinement: RefinementParams = Field(
        default=RefinementParams(), description="options of the refinement"
    )

    @model_validator(mode="after")
    def _one_number_for_each_step(self) -> MultistepParams:
        given, steps = self.refinement.steps, len(self.stops) + 1 if self.stops else self.steps
        if isinstance(given, list) and len(given) != steps:
            raise ValueError(
                f"refinement.steps: expected a number for each of {steps} pruning steps, got "
                f"{len(given)}"
            )
        return self

    def refinement_steps(self, step: int) -> int:
        """Return the optimiser steps after pruning step number `step`, from 0."""
        given = self.refinement.steps
        if self.refine == "none":
            return 0
        return given[step] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _forget_refinement(self) -> MultistepParams:
        """Reset the options when nothing is refined: what is not used must not enter the key."""
        if self.refine == "none":
            object.__setattr__(self, "refinement", RefinementParams())
        return self


class PickParams(MethodAxes):
    """Of `pick`: a sparsity, or a budget."""

    sparsity: Annotated[float | None, Role.TARGET] = Field(
        default=None, ge=0, lt=1, description="one of those that the pruning stopped at"
    )
    within: float | None = Field(
        default=None,
        ge=0,
        description="instead of a sparsity: the sparsest step that costs at most so many points of "
        "accuracy on the validation split",
    )
    seed: Seed = Field(default=0, ge=0, description="axis: the input's seed")

    @model_validator(mode="after")
    def _one_target(self) -> PickParams:
        return _with_one_target(self)


_Target = TypeVar("_Target", OneshotParams, PickParams)


def _with_one_target(params: _Target) -> _Target:
    if (params.sparsity is None) == (params.within is None):
        raise ValueError("give either `sparsity` or `within`")
    return params


class FinetuneParams(TrainingParams, MethodAxes):
    """Of `finetune`."""

    distillation: float = Field(
        default=0.5, ge=0, le=1, description="weight of the teacher, where one is connected"
    )
    temperature: float = Field(default=2.0, gt=0, description="of the teacher's outputs")
    sparsity: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the input's sparsity"
    )


class SelectParams(MethodAxes):
    """Of `select`."""

    metric: Literal["accuracy", "nll"] = Field(
        default="accuracy", description="highest accuracy or lowest nll on the validation split"
    )
    sparsity: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' sparsity"
    )
    seed: Seed = Field(default=0, ge=0, description="axis: the inputs' seed")


class EvaluateParams(MethodAxes, ExpectationParams):
    """Of `evaluate`; the expectation is of the dense networks, on `split`."""

    sparsity: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' sparsity"
    )
    seed: Annotated[int | None, Role.SEED] = Field(
        default=None, description="axis: the inputs' seed"
    )
    split: Literal["test", "validation", "train"] = Field(
        default="test", description="what is measured on"
    )
    batch_size: Annotated[int, Role.NEUTRAL] = Field(
        default=500, ge=1, description="samples at a time; no result changes"
    )


class Published(Params):
    """Numbers from the literature, shown beside ours."""

    method: str = Field(description="as it is shown")
    sparsity: list[float] = Field(description="fractions removed")
    accuracy: list[float] = Field(description="in percent, one for each sparsity")

    @model_validator(mode="after")
    def _same_length(self) -> Published:
        if len(self.sparsity) != len(self.accuracy):
            raise ValueError(
                f"{self.method}: {len(self.sparsity)} sparsities, {len(self.accuracy)} accuracies"
            )
        return self


class CompareParams(Params):
    """Of `compare`."""

    title: str = Field(default="Accuracy against sparsity", description="of table and figure")
    published: list[Published] = Field(default=[], description="rows from the literature")


# -------------------------------------------------------------------------------- estimates

_FLOAT_BYTES = 4
_PROCESS_BYTES = 500 * 2**20  # Python with torch


def _parameters(params: Sequence[Params]) -> int | None:
    """Return the size of the network that `params`, or what is upstream of them, name."""
    named = next((one for one in params if isinstance(one, ModelParams)), None)
    entry = MODELS.find(named.model) if named is not None else None
    if named is None or entry is None or "parameters" not in entry.facts:
        return None
    width = named.model_args.get("width", entry.facts.get("width", 1))
    return int(entry.facts["parameters"] * (width / entry.facts.get("width", 1)) ** 2)


def _data_bytes(params: Sequence[Params]) -> int:
    """Return the size of the decoded data, 0 where it is not known."""
    named = next((one for one in params if isinstance(one, DataParams)), None)
    entry = DATASETS.find(named.dataset) if named is not None else None
    return 0 if entry is None else entry.facts.get("bytes", 0)


def estimate_import(params: ImportParams, upstream: Sequence[Params]) -> Estimate:
    """Forecast `import_checkpoint`: the data and the network, once each."""
    del upstream
    parameters = _parameters([params])
    if parameters is None:
        return Estimate()
    disk = parameters * _FLOAT_BYTES
    return Estimate(memory_bytes=_PROCESS_BYTES + _data_bytes([params]) + disk, disk_bytes=disk)


def estimate_training(params: TrainingParams, upstream: Sequence[Params]) -> Estimate:
    """Forecast a training: weights, gradients and moments; two checkpoints and the result.

    The factors of FishLeg depend on the shapes of the layers, which are not known here.
    """
    lineage = [params, *upstream]
    parameters = _parameters(lineage)
    if parameters is None or params.optimizer == "fishleg":
        return Estimate()
    moments = 2 if params.optimizer == "adamw" else 1
    state = parameters * _FLOAT_BYTES * (2 + moments)
    return Estimate(
        memory_bytes=_PROCESS_BYTES + 2 * _data_bytes(lineage) + state,
        disk_bytes=parameters * _FLOAT_BYTES * (1 + 2 * (1 + moments)),
    )


def estimate_curvature(params: CurvatureParams, upstream: Sequence[Params]) -> Estimate:
    """Forecast `curvature`: the estimate itself, and the gradients that are held for it.

    Factors depend on the shapes of the layers, which are not known here; they are left out.
    """
    parameters = _parameters(upstream)
    if parameters is None:
        return Estimate()
    vector = parameters * _FLOAT_BYTES
    memory = _PROCESS_BYTES + _data_bytes(upstream) + vector
    if params.method == "obs":
        return Estimate(
            memory_bytes=memory + 2 * vector * params.obs.block_size,
            disk_bytes=vector * params.obs.block_size,
        )
    if params.method == "mfac":
        count = min(params.mfac.gradients, params.samples * params.draws)
        return Estimate(memory_bytes=memory + vector * count, disk_bytes=vector * count)
    if params.method == "fishleg":
        held = min(params.fishleg.memory_bytes, vector * params.samples * params.draws)
        return Estimate(memory_bytes=memory + held)
    if params.method in {"diagonal", "magnitude"}:
        return Estimate(memory_bytes=memory + vector, disk_bytes=vector)
    return Estimate()


# -------------------------------------------------------------------------------- stages

_MODEL = Input(kind="model", summary="the model to work on")
_GIVES_MODEL = {"model": Output(kind="model", summary="weights, masks and facts")}

CATALOGUE = Catalogue(
    stages=[
        Stage(
            name="pretrain",
            entry="stages.pretrain:pretrain",
            params=PretrainParams,
            outputs=_GIVES_MODEL,
            estimate=estimate_training,
            parallel=True,
            summary="trains a network from scratch",
        ),
        Stage(
            name="import_checkpoint",
            entry="stages.import_checkpoint:import_checkpoint",
            params=ImportParams,
            outputs=_GIVES_MODEL,
            estimate=estimate_import,
            summary="takes a trained network from a safetensors file",
        ),
        Stage(
            name="curvature",
            entry="stages.curvature:curvature",
            params=CurvatureParams,
            inputs={"model": _MODEL},
            outputs={"curvature": Output(kind="curvature", summary="the fitted estimate")},
            estimate=estimate_curvature,
            parallel=True,
            summary="estimates the inverse Fisher of a model, with a certificate",
        ),
        Stage(
            name="prune_oneshot",
            entry="stages.prune_oneshot:prune_oneshot",
            params=OneshotParams,
            inputs={
                "model": _MODEL,
                "curvature": Input(kind="curvature", summary="estimated on that model"),
            },
            outputs=_GIVES_MODEL,
            summary="removes weights in one step, and moves the others",
        ),
        Stage(
            name="prune_multistep",
            entry="stages.prune_multistep:prune_multistep",
            params=MultistepParams,
            inputs={"model": _MODEL},
            outputs={
                **_GIVES_MODEL,
                "steps": Output(kind="steps", summary="the model after each step"),
            },
            summary="one-shot pruning in several steps, refined without labels",
        ),
        Stage(
            name="pick",
            entry="stages.pick:pick",
            params=PickParams,
            inputs={"steps": Input(kind="steps", summary="of a multi-step pruning")},
            outputs=_GIVES_MODEL,
            summary="passes on the step of a sparsity, or the sparsest within a budget",
        ),
        Stage(
            name="prune_gradual",
            entry="stages.prune_gradual:prune_gradual",
            params=GradualParams,
            inputs={"model": _MODEL},
            outputs=_GIVES_MODEL,
            summary="removes weights in steps, with training and fresh curvature between",
        ),
        Stage(
            name="finetune",
            entry="stages.finetune:finetune",
            params=FinetuneParams,
            inputs={
                "model": _MODEL,
                "teacher": Input(
                    kind="model", optional=True, summary="dense model whose outputs are matched"
                ),
            },
            outputs=_GIVES_MODEL,
            estimate=estimate_training,
            parallel=True,
            summary="trains the surviving weights",
        ),
        Stage(
            name="select",
            entry="stages.select:select",
            params=SelectParams,
            inputs={"candidates": Input(kind="model", many=True, summary="models to choose from")},
            outputs=_GIVES_MODEL,
            summary="passes on the candidate that is best on the validation split",
        ),
        Stage(
            name="evaluate",
            entry="stages.evaluate:evaluate",
            params=EvaluateParams,
            inputs={"models": Input(kind="model", many=True, summary="any number of models")},
            outputs={"results": Output(kind="results", track=True, summary="one row a model")},
            summary="measures models, one row and one tracked run each",
        ),
        Stage(
            name="compare",
            entry="stages.compare:compare",
            params=CompareParams,
            inputs={"results": Input(kind="results", many=True, summary="rows to compare")},
            outputs={
                "report": Output(
                    kind="report", track=True, promote=True, summary="table.md, .csv, figure.png"
                )
            },
            resources=Resources(num_cpus=1),
            summary="makes the table and the figure",
        ),
    ],
    packages=("stages", "fishleg"),
    results=Results(
        kind="results",
        columns=[
            "cell",
            "model_cell",
            "key",
            "method",
            "structure",
            "mode",
            "finetuned",
            "target",
            "sparsity",
            "seed",
            "accuracy",
            "nll",
            "ece",
            "nonzero",
            "prunable",
            "parameters",
            "damping",
            "split",
            "run_id",
        ],
        further=["settings", "seeds", "unprunable", "emptied", "warnings", "dense_accuracy"],
        before={"target": "sparsity"},
        report="report",
    ),
    exporter="stages.exporter:export",
    exports="model",
    loader="stages.exporter:load",
    inspector="stages.inspection:inspect",
    inspects=["pretrain", "import_checkpoint"],
    notes=[Notes(kind="model", file="model.json", entry="stages.notes:notes")],
    registries=[MODELS, DATASETS, METHODS],
)
