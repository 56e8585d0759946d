"""Axes that stages share: seeds, and the method behind an input."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.stage import Params
from stages.lineage import Role

Seed = Annotated[int, Role.SEED]


class MethodAxes(Params):
    """Axes that tell cells apart, and repeat a fact of their inputs."""

    method: Annotated[str | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' curvature method"
    )
    damping: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' damping"
    )
    sparsity: Annotated[float | None, Role.AXIS] = Field(
        default=None, description="axis: the inputs' sparsity"
    )
