"""The toy's stages: `start` gives a number, the others take numbers and give a number or rows."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.stage import (
    Catalogue,
    Entry,
    Estimate,
    ExternalFile,
    Input,
    Output,
    Params,
    Registry,
    Results,
    Stage,
)

OPERATIONS = Registry(
    kind="operation",
    entries={
        "plus": Entry(target="toy.operations:plus"),
        "times": Entry(target="toy.operations:times"),
        "plus_table": Entry(target="toy.operations:plus", digest="ab" * 32),
    },
    open=True,
)


class StartParams(Params):
    """Of `start`."""

    value: int = Field(description="the number")
    seed: int = Field(0, ge=0, description="added to the number")


class AddParams(Params):
    """Of `add`."""

    amount: float = Field(1, description="what is added")
    seed: int = Field(0, ge=0, description="ignored, but an axis")


class ApplyParams(Params):
    """Of `apply`."""

    operation: Annotated[str, OPERATIONS] = Field(description="what is done")
    operand: int = Field(2, description="with what")
    seed: int = Field(0, ge=0, description="ignored, but an axis")


class ReadParams(Params):
    """Of `read`."""

    path: Annotated[str, ExternalFile()] = Field(description="a file that holds a number")


class SlowParams(Params):
    """Of `slow`."""

    steps: int = Field(20, ge=1, description="how many steps")
    delay_s: float = Field(0.01, ge=0, description="seconds a step")
    checkpoint_every: int = Field(5, ge=1, description="steps between checkpoints")
    seed: int = Field(0, ge=0, description="where it starts")


class RanksParams(Params):
    """Of `ranks`."""

    steps: int = Field(6, ge=1, description="how many steps")
    delay_s: float = Field(0, ge=0, description="seconds a step")
    checkpoint_every: int = Field(2, ge=1, description="steps between checkpoints")
    fails: Literal["never", "user"] = Field("never", description="rank 1 raises a StageError")
    imports: str | None = Field(None, description="a module that rank 1 alone imports at the end")
    path: Annotated[str, ExternalFile()] | None = Field(None, description="a file that it reads")


class FailParams(Params):
    """Of `fail`."""

    how: Literal["user", "bug", "outage", "exit", "nothing"] = Field(
        "user", description="a StageError, a bug, a lost connection, the process's death, no output"
    )
    until: int = Field(1_000_000, description="attempts that fail before one succeeds")
    counter: str = Field("", description="a file that counts the attempts")


class TellParams(Params):
    """Of `tell`."""

    metrics: dict[str, float] = Field({}, description="final values that it reports")
    steps: dict[str, list[float]] = Field({}, description="series that it reports")
    options: dict[str, Any] = Field({}, description="ignored")
    files: dict[str, str] = Field({}, description="texts of further files of its result")


class NoParams(Params):
    """Of stages without parameters."""


NUMBER = Input(kind="number")
GIVES_NUMBER = {"number": Output(kind="number")}

CATALOGUE = Catalogue(
    stages=[
        Stage(
            name="start",
            entry="toy.stages:start",
            params=StartParams,
            outputs=GIVES_NUMBER,
            estimate=lambda params, upstream: Estimate(memory_bytes=params.value, disk_bytes=64),
            summary="gives a number",
        ),
        Stage(
            name="add",
            entry="toy.stages:add",
            params=AddParams,
            inputs={"number": NUMBER},
            outputs=GIVES_NUMBER,
            summary="adds to a number",
        ),
        Stage(
            name="apply",
            entry="toy.stages:apply",
            params=ApplyParams,
            inputs={"number": NUMBER},
            outputs=GIVES_NUMBER,
            summary="does a named operation",
        ),
        Stage(
            name="read",
            entry="toy.stages:read",
            params=ReadParams,
            outputs=GIVES_NUMBER,
            summary="reads a number from a file of the user's",
        ),
        Stage(
            name="slow",
            entry="toy.slow:slow",
            params=SlowParams,
            inputs={"number": Input(kind="number", optional=True)},
            outputs=GIVES_NUMBER,
            summary="takes its time, with checkpoints; the number depends on every step",
        ),
        Stage(
            name="ranks",
            entry="toy.ranks:ranks",
            params=RanksParams,
            outputs=GIVES_NUMBER,
            parallel=True,
            summary="may run in several processes",
        ),
        Stage(
            name="fail",
            entry="toy.slow:fail",
            params=FailParams,
            inputs={"number": Input(kind="number", optional=True)},
            outputs=GIVES_NUMBER,
            summary="fails",
        ),
        Stage(
            name="tell",
            entry="toy.stages:tell",
            params=TellParams,
            outputs={"told": Output(kind="told", track=True)},
            summary="reports what it is told to, under any name",
        ),
        Stage(
            name="total",
            entry="toy.stages:total",
            params=NoParams,
            inputs={"numbers": Input(kind="number", many=True)},
            outputs={"results": Output(kind="results", track=True)},
            summary="gathers numbers into rows, and records each",
        ),
        Stage(
            name="report",
            entry="toy.stages:report",
            params=NoParams,
            inputs={"results": Input(kind="results", many=True)},
            outputs={"report": Output(kind="report", track=True, promote=True)},
            summary="gathers rows into a table",
        ),
    ],
    packages=["toy"],
    results=Results(
        kind="results", columns=["cell", "model_cell", "key", "number", "run_id"], report="report"
    ),
    exporter="toy.exporter:export",
    exports="number",
    loader="toy.exporter:load",
    registries=[OPERATIONS],
)
