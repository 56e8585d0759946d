"""The shape of a spec file: keys, types, ranges and defaults, before names are looked up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.base import limits
from pipeline.base.text import cut
from pipeline.spec.cells import show
from pipeline.store import logs

_UNITS = {
    unit: base**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, base in ((f"{letter}B", 1000), (f"{letter}iB", 1024))
}
_SIZE = re.compile(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(_UNITS)})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


def _size(value: Any) -> Any:
    # `4GB` is 4_000_000_000, and `4GiB` is 2**32.
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if not match or len(match[1]) > 18:
            shown = repr(cut(value, 60))
            raise ValueError(f"expected bytes, or a size such as 4GB or 512MiB, got {shown}")
        return int(float(match[1]) * _UNITS[match[2]])
    return value


def _axis(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("expected at least one value")
    for one in values:
        if isinstance(one, list | dict):
            raise ValueError("expected plain values: strings, numbers, booleans or null")
        if isinstance(one, str):
            _require_plain(one)
    for one, count in Counter(map(show, values)).items():
        if count > 1:
            raise ValueError(f"{one} is listed more than once")
    return values


def _require_plain(value: str) -> None:
    # Only ASCII: equal-looking letters, such as in Latin and in Cyrillic, would name two cells.
    shown = repr(cut(value, 60))
    if not value or set(value) & set("[],= \t\n"):
        raise ValueError(f"{shown} cannot name a cell: no spaces, nor any of [ ] , =")
    if not value.isascii():
        raise ValueError(f"{ascii(cut(value, 60))} cannot name a cell: expected ASCII characters")
    if len(value) > limits.NAME_CHARACTERS:
        raise ValueError(
            f"{shown} cannot name a cell: expected at most {limits.NAME_CHARACTERS} characters, "
            f"got {len(value)}"
        )


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        shown = repr(cut(value, 60))
        raise ValueError(f"expected a name of letters, digits, '-' and '_', got {shown}")
    if len(value) > limits.NAME_CHARACTERS:
        raise ValueError(
            f"expected a name of at most {limits.NAME_CHARACTERS} characters, got {len(value)}"
        )
    return value


def _module(value: str) -> str:
    if not _MODULE.fullmatch(value):
        shown = ascii(cut(value, 60))
        raise ValueError(f"expected the name of a Python module, got {shown}")
    return value


def _experiment(value: str | None) -> str | None:
    if value is not None and len(value) > limits.EXPERIMENT_CHARACTERS:
        raise ValueError(
            f"expected a name of at most {limits.EXPERIMENT_CHARACTERS} characters, "
            f"got {len(value)}"
        )
    return value


def _whole_above_one(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError(f"expected a share of one GPU, or a whole number, got {value:g}")
    return value


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ResourcesShape(_Shape):
    """`resources:` of a stage; the stage type declares the defaults."""

    num_cpus: float | None = Field(default=None, ge=0)
    num_gpus: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] | None = None
    memory: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_size)] = None
    accelerator_type: str | None = None


class StageShape(_Shape):
    """One entry of `stages:`.

    With `keep: results`, `fls gc` may delete a cell's files once all cells that depend on it are
    complete. Its manifest, metrics and log stay, so it counts as complete; it runs again only for a
    downstream cell, or on request by `--only` or `--until`. Cells with tracked or promoted outputs,
    and cells without downstream cells, are kept whole.
    """

    uses: str
    matrix: dict[str, Annotated[list[Any], BeforeValidator(_axis)]] = {}
    inputs: dict[str, Annotated[list[str], BeforeValidator(_names), Field(min_length=1)]] = {}
    params: dict[str, Any] = {}
    resources: ResourcesShape = ResourcesShape()
    workers: int = Field(default=1, ge=1)
    retries: int = Field(default=2, ge=0)
    timeout_s: float | None = Field(default=None, gt=0)
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    log_bytes: Annotated[Annotated[int, Field(ge=1000)], BeforeValidator(_size)] = (
        logs.DEFAULT_BYTES
    )
    keep: Literal["all", "results"] = "all"
    # `register` is a method of every abstract base class.
    registered: Annotated[str, AfterValidator(_name)] | None = Field(default=None, alias="register")


class MlflowShape(_Shape):
    """`mlflow:`; the pipeline's name is the default experiment."""

    experiment: Annotated[str | None, AfterValidator(_experiment)] = None
    tracking_uri: str | None = None


class ClusterShape(_Shape):
    """`cluster:`; with autoscaling, a stage waits for resources that no node has."""

    autoscaling: bool = False


class FileShape(_Shape):
    """The whole file; stages are checked one by one, to find the mistakes of all."""

    name: Annotated[str, AfterValidator(_name)]
    plugins: Annotated[list[Annotated[str, AfterValidator(_module)]], Field(min_length=1)]
    storage: str = ".fls"
    mlflow: MlflowShape = MlflowShape()
    cluster: ClusterShape = ClusterShape()
    vars: dict[str, Any] = {}
    stages: Annotated[dict[Annotated[str, AfterValidator(_name)], Any], Field(min_length=1)]


# A place in a pipeline file, in words -> its shape.
PLACES: Mapping[str, type[BaseModel]] = {
    "a stage": StageShape,
    "a stage's `resources:`": ResourcesShape,
    "the whole file": FileShape,
    "`mlflow:`": MlflowShape,
    "`cluster:`": ClusterShape,
}
