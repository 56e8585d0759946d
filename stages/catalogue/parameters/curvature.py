"""Parameters of the curvature estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from fishleg.options import (
    ESTIMATOR_OPTIONS,
    CalibrationOptions,
    EigenOptions,
    EstimatorOptions,
    FishLegOptions,
    FlsOptions,
    InvalidOption,
    LayerOptions,
    MfacOptions,
    ObsOptions,
    WarmStart,
    mistakes_in,
    refuse_eigen,
)
from stages.catalogue.declared import OptionParams, refuse, reset
from stages.catalogue.parameters.axes import Seed
from stages.catalogue.registries import METHODS
from stages.lineage import Role


class EigenParams(OptionParams, EigenOptions):
    """Options of the method eigen."""

    memory_bytes: Annotated[int, Field(ge=1 << 20), Role.NEUTRAL] = EigenOptions.memory_bytes


class FishLegParams(OptionParams, FishLegOptions):
    """Options of the method fishleg."""

    memory_bytes: Annotated[int, Field(ge=1 << 20), Role.NEUTRAL] = FishLegOptions.memory_bytes
    seed: ClassVar[int] = FishLegOptions.seed

    @model_validator(mode="before")
    @classmethod
    def _without_eigen(cls, values: Any) -> Any:
        """Refuse the earlier structure eigen with the name of the method in its place."""
        if isinstance(values, Mapping):
            try:
                refuse_eigen(values.get("structure"))
            except InvalidOption as error:
                refuse([(error, (error.option,))])
        return values


class RefinedFishLegParams(FishLegParams):
    """Options of the method fishleg where new masks refine the estimate."""

    warm_start: WarmStart = Field(
        default="moments", description=FishLegParams.model_fields["warm_start"].description
    )


class FlsParams(OptionParams, FlsOptions):
    """Options of the method fls."""

    seed: ClassVar[int] = FlsOptions.seed


class ObsParams(OptionParams, ObsOptions):
    """Options of the method obs."""


class MfacParams(OptionParams, MfacOptions):
    """Options of the method mfac."""

    seed: ClassVar[int] = MfacOptions.seed


class LayerParams(OptionParams, LayerOptions):
    """Options of the method layer."""


class EstimatorParams(OptionParams, CalibrationOptions, EstimatorOptions):
    """Options of the estimation. Each method reads its own options only."""

    seed: Seed = CalibrationOptions.seed
    memory_limit: ClassVar[int | None] = EstimatorOptions.memory_limit
    method: Annotated[str, METHODS] = Field(description="name of the curvature method")
    eigen: EigenParams = Field(default=EigenParams(), description="options of the method eigen")
    fishleg: FishLegParams = Field(
        default=FishLegParams(), description="options of the method fishleg"
    )
    fls: FlsParams = Field(default=FlsParams(), description="options of the method fls")
    obs: ObsParams = Field(default=ObsParams(), description="options of the method obs")
    mfac: MfacParams = Field(default=MfacParams(), description="options of the method mfac")
    layer: LayerParams = Field(default=LayerParams(), description="options of the method layer")
    options: dict[str, Any] = Field(
        default={},
        description="further keyword arguments of the method: memory_limit (bytes), or those of "
        "a method of your own",
    )

    def method_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the method, without the partition and the damping."""
        own = getattr(self, self.method, None)  # None for a method without options here
        return {**(own.model_dump() if own else {}), **self.options}

    @model_validator(mode="after")
    def _forget_other_methods(self) -> EstimatorParams:
        reset(self, *{"eigen", "fishleg", "fls", "obs", "mfac", "layer"} - {self.method})
        return self

    @model_validator(mode="after")
    def _options_of_the_method(self) -> EstimatorParams:
        """Check the options of a built-in method; a method of your own checks its own."""
        if self.method in ESTIMATOR_OPTIONS:
            mistakes = [
                (error, ("options" if error.option in self.options else self.method, error.option))
                for error in mistakes_in(self.method, self.method_options())
            ]
            if mistakes:
                refuse(mistakes)
        return self


class CurvatureParams(EstimatorParams):
    """Parameters of `curvature`."""

    certificate_samples: Annotated[int, Role.NEUTRAL] = Field(
        default=250,
        ge=0,
        description="held-out training samples that the estimate is certified on; 0: none",
    )
