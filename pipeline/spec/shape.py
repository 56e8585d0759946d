"""The shape of a spec file, before its names mean anything: keys, types, ranges and defaults."""

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
    """Read `4GB` as 4_000_000_000 and `4GiB` as 2**32.

    Raises:
        ValueError: text that is no size.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if not match or len(match[1]) > 18:
            shown = repr(cut(value, 60))
            raise ValueError(f"expected bytes, or a size such as 4GB or 512MiB, got {shown}")
        return int(float(match[1]) * _UNITS[match[2]])
    return value


def _axis(value: Any) -> Any:
    """Check the values of an axis; one that stands alone is a list of one.

    Raises:
        ValueError: a value that cannot stand in a cell's name, or does twice.
    """
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
    """Check an axis value, which becomes part of a cell's name.

    Two texts that look the same, such as a letter in Latin and in Cyrillic, would name two cells
    that look alike; so they are of ASCII.

    Raises:
        ValueError: it is empty, too long, or has a character that a cell's name cannot have.
    """
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
    """Check a name.

    Raises:
        ValueError: it could not stand in a cell's name or in a `--set`.
    """
    if not _NAME.fullmatch(value):
        shown = repr(cut(value, 60))
        raise ValueError(f"expected a name of letters, digits, '-' and '_', got {shown}")
    if len(value) > limits.NAME_CHARACTERS:
        raise ValueError(
            f"expected a name of at most {limits.NAME_CHARACTERS} characters, got {len(value)}"
        )
    return value


def _module(value: str) -> str:
    """Check the name of a plugin.

    Raises:
        ValueError: it is no name of a Python module.
    """
    if not _MODULE.fullmatch(value):
        shown = ascii(cut(value, 60))
        raise ValueError(f"expected the name of a Python module, got {shown}")
    return value


def _optional_name(value: str | None) -> str | None:
    return value if value is None else _name(value)


def _experiment(value: str | None) -> str | None:
    """Check the name of an experiment.

    Raises:
        ValueError: MLflow's databases would not keep all of it.
    """
    if value is not None and len(value) > limits.EXPERIMENT_CHARACTERS:
        raise ValueError(
            f"expected a name of at most {limits.EXPERIMENT_CHARACTERS} characters, "
            f"got {len(value)}"
        )
    return value


def _whole_above_one(value: float) -> float:
    """Check a number of GPUs: a share of one, or some whole ones.

    Raises:
        ValueError: neither.
    """
    if value > 1 and not value.is_integer():
        raise ValueError(f"expected a share of one GPU, or a whole number, got {value:g}")
    return value


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ResourcesShape(_Shape):
    """`resources:` of a stage; what is left out is as the stage type declares it."""

    num_cpus: float | None = Field(default=None, ge=0)
    num_gpus: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] | None = None
    memory: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_size)] = None
    accelerator_type: str | None = None


class StageShape(_Shape):
    """One entry of `stages:`.

    `keep: results` says that the files of this stage only serve those that follow: once all cells
    that depend on one of its cells are complete, `fls gc` may delete that cell's files. Its
    manifest, metrics and log stay, so it counts as complete; it is run again only when something
    after it is to run, or when it is asked for by `--only` or `--until`. Outputs that are tracked
    or promoted are results, so a cell that has one is kept whole, and so is one that nothing takes
    from.
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
    # `register` itself is a method of every abstract class.
    registered: Annotated[str | None, AfterValidator(_optional_name)] = Field(
        default=None, alias="register"
    )


class MlflowShape(_Shape):
    """`mlflow:`; without an experiment, runs go to the one of the pipeline's name."""

    experiment: Annotated[str | None, AfterValidator(_experiment)] = None
    tracking_uri: str | None = None


class ClusterShape(_Shape):
    """`cluster:`; with autoscaling, what no node has is waited for instead of refused."""

    autoscaling: bool = False


class FileShape(_Shape):
    """The whole file; stages are read one by one, so that none hides the mistakes of others."""

    name: Annotated[str, AfterValidator(_name)]
    plugins: Annotated[list[Annotated[str, AfterValidator(_module)]], Field(min_length=1)]
    storage: str = ".fls"
    mlflow: MlflowShape = MlflowShape()
    cluster: ClusterShape = ClusterShape()
    vars: dict[str, Any] = {}
    stages: Annotated[dict[Annotated[str, AfterValidator(_name)], Any], Field(min_length=1)]


# A place in a pipeline file, in words -> the shape of what stands there.
PLACES: Mapping[str, type[BaseModel]] = {
    "a stage": StageShape,
    "a stage's `resources:`": ResourcesShape,
    "the whole file": FileShape,
    "`mlflow:`": MlflowShape,
    "`cluster:`": ClusterShape,
}
