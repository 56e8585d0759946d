"""The steps to a model, and the settings in which two models differ.

Each stage that makes a model appends a `Step`: its type and all its parameters, separated by their
`Role`. So no parameter is forgotten. A comparison of models separates them by `settings`, and
averages over `seeds`.

Light: the catalogue, which declares the roles, imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.stage import ExternalFile, Params, StageError

ARROW = " > "
PATH = "path"
"""The setting that names the stages on the way."""
BEST_OF = "best of "
"""The beginning of a setting's value where a choice was made among several."""


class Role(Enum):
    """The role of a parameter in a comparison of models: `Annotated[int, Role.SEED]`.

    A parameter without a role is a setting: models that differ in it are told apart.
    """

    SEED = "a seed: models that differ in it alone are averaged"
    TARGET = "the sparsity that is asked for, which has its own place in every table"
    AXIS = "repeats a fact of the inputs, to tell cells apart"
    NEUTRAL = "changes no model"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage's part in the making of a model.

    Attributes:
        stage: the stage's type.
        params: its settings; an external file as the beginning of its sha256.
        seeds: its parameters that are seeds.
        target: its parameter that asks for a sparsity, if any.
        among: of a choice: setting -> the values of the candidates, where they differ.
        warnings: about its work, a sentence each.
    """

    stage: str
    params: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    target: Mapping[str, float | None] = field(default_factory=dict)
    among: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        stage: str,
        params: Params,
        *,
        further: Mapping[str, Any] | None = None,
        among: Mapping[str, Sequence[Any]] | None = None,
        warnings: Sequence[str] = (),
    ) -> Step:
        """Return the step of a stage.

        Args:
            stage: its type.
            params: its parameters, whose class declares their roles.
            further: settings beside the parameters.
            among: see `Step`.
            warnings: see `Step`.

        Cost: one read of each external file.
        """
        plain = _plain(params)
        return cls(
            stage=stage,
            params={**plain[None], **(further or {})},
            seeds=plain[Role.SEED],
            target=plain[Role.TARGET],
            among=among or {},
            warnings=tuple(warnings),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Step:
        """Return the step that `to_json` described."""
        return cls(**{**value, "warnings": tuple(value["warnings"])})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        return asdict(self)


Lineage = Sequence[Step]
"""The steps to a model, the first one first."""


def settings(lineage: Lineage) -> dict[str, Any]:
    """Return the settings of a model: all that tells it from others, but seeds and target.

    Returns:
        `path` with the stages' types; and each setting of each stage as `STAGE.PARAMETER`, with a
        number from the second stage of a type on: `finetune-2.lr`. Values are JSON. Where one of
        several candidates was chosen, the settings in which these differ are `best of` all of
        them.
    """
    chosen = {
        key: BEST_OF + ", ".join(shown(value) for value in values)
        for step in lineage
        for key, values in step.among.items()
    }
    return {PATH: path(lineage), **_values(lineage), **chosen}


def choices(lineage: Lineage) -> dict[str, dict[str, Any]]:
    """Return STAGE.PARAMETER -> `chosen` and `among`, of each setting that a choice compared.

    `among` has the values of the candidates. Seeds are no settings.
    """
    known = _values(lineage)
    return {
        key: {"chosen": known[key], "among": list(values)}
        for step in lineage
        for key, values in step.among.items()
        if key in known
    }


def _values(lineage: Lineage) -> dict[str, Any]:
    """Return STAGE.PARAMETER -> value of each setting, also where a choice was made."""
    last_target = max((i for i, step in enumerate(lineage) if step.target), default=-1)
    found: dict[str, Any] = {}
    for number, (name, step) in enumerate(_named(lineage)):
        asked = step.target if number != last_target else {}
        for key, value in _leaves({**step.params, **asked}):
            found[f"{name}.{key}"] = value
    return found


def seeds(lineage: Lineage) -> dict[str, int]:
    """Return `STAGE.PARAMETER` -> seed of each stage, without seeds that a choice compared."""
    chosen = {key for step in lineage for key in step.among}
    return {
        f"{name}.{key}": value
        for name, step in _named(lineage)
        for key, value in step.seeds.items()
        if f"{name}.{key}" not in chosen
    }


def path(lineage: Lineage) -> str:
    """Return the stages' types as one text."""
    return ARROW.join(step.stage for step in lineage)


def differences(lineages: Sequence[Lineage]) -> dict[str, list[Any]]:
    """Return setting, or seed -> the values of the models, where they differ."""
    known = [{**settings(one), **seeds(one)} for one in lineages]
    keys = dict.fromkeys(key for one in known for key in one)
    found = {
        key: list({json.dumps(one.get(key)): one.get(key) for one in known}.values())
        for key in keys
    }
    return {key: values for key, values in found.items() if len(values) > 1}


def teacher_of(own: Lineage, other: Lineage) -> Any:
    """Return the setting that identifies a model's teacher.

    That is the teacher's path where it is an earlier state of the model, else its settings.
    """
    return path(other) if list(own[: len(other)]) == list(other) else settings(other)


def shown(value: Any) -> str:
    """Return a setting's value for people.

    >>> [shown(value) for value in (1e-4, "global", True, None, [0.5, 0.8])]
    ['0.0001', 'global', 'true', 'none', '0.5/0.8']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "/".join(shown(one) for one in value)
    return "none" if value is None else str(value)


def _named(lineage: Lineage) -> list[tuple[str, Step]]:
    """Return each step with a unique name."""
    seen: dict[str, int] = {}
    named = []
    for step in lineage:
        seen[step.stage] = count = seen.get(step.stage, 0) + 1
        named.append((step.stage if count == 1 else f"{step.stage}-{count}", step))
    return named


def _leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(params: Params) -> dict[Role | None, dict[str, Any]]:
    """Return role -> its parameters, as JSON; settings are under None."""
    found: dict[Role | None, dict[str, Any]] = {None: {}, **{role: {} for role in Role}}
    dumped = params.model_dump(mode="json")
    for name, info in type(params).model_fields.items():
        role = next((mark for mark in info.metadata if isinstance(mark, Role)), None)
        value = getattr(params, name)
        if isinstance(value, Params):
            found[role][name] = _plain(value)[None]
        elif any(isinstance(mark, ExternalFile) for mark in info.metadata):
            found[role][name] = _digest(Path(value))
        else:
            found[role][name] = dumped[name]
    return found


def _digest(file: Path) -> str:
    """Return the beginning of a file's sha256, which does not depend on its path.

    Raises:
        StageError: it is missing, or cannot be read.
    """
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()[:12]
    except FileNotFoundError:
        raise StageError(f"{file.absolute()}: no such file.") from None
    except OSError as error:
        raise StageError(f"{file.absolute()}: {error.strerror}.") from None
