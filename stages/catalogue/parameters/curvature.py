"""Parameters of the curvature estimate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.stage import Params
from stages.catalogue.parameters.axes import Seed
from stages.catalogue.registries import METHODS
from stages.lineage import Role


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


class CurvatureParams(EstimatorParams):
    """Of `curvature`."""

    certificate_samples: Annotated[int, Role.NEUTRAL] = Field(
        default=250,
        ge=0,
        description="held-out training samples that the estimate is certified on; 0: none",
    )
