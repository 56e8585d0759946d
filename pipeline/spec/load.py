"""Loads a `pipeline.yaml`: from its text to a spec, or to all its problems at once."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.base.errors import SpecError
from pipeline.base.secrets import has_credentials, redact
from pipeline.base.variables import STORAGE
from pipeline.spec import yaml_loader
from pipeline.spec.build import Builder
from pipeline.spec.interpolate import override
from pipeline.spec.params import issues_of
from pipeline.spec.resolved import resolved_text
from pipeline.spec.shape import PLACES, FileShape
from pipeline.spec.spec import Spec
from pipeline.spec.text import read_text, refuse_secrets


def load_spec(
    path: Path,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    admit: Callable[[Sequence[str]], None] = lambda plugins: None,
) -> Spec:
    """Read a spec, check all of it, and make its cells.

    The working directory is put on the path of Python's imports, behind what is installed, because
    plugins and the user's own functions are looked for there.

    Args:
        path: the YAML file.
        overrides: `--set` options, see `pipeline.spec.interpolate.override`.
        folder: where relative paths in it start, or None for that of the file.
        admit: is given its plugins before one of them is imported, and raises where that must not
            happen.

    Returns:
        The spec, free of mistakes.

    Raises:
        SpecError: it has mistakes; all of them, in file order.

    A file that cannot be read is `BadInput`. Whatever the file holds, checking it takes less than a
    second (the import of its plugins apart) and bounded memory, see `pipeline.base.limits`.
    """
    text = read_text(Path(path))
    refuse_secrets(text, str(path), overrides)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    document = yaml_loader.load(text, str(path))
    if not isinstance(document.value, dict):
        document.note(document.root, "expected a mapping with 'name', 'plugins' and 'stages'")
        raise SpecError(document.problems)
    given = document.value.get("storage"), document.value.get("mlflow")
    environment = override(document, overrides, os.environ)
    path = Path(path)
    folder = path.parent if folder is None else folder
    spec = Builder(document, path, text, folder, admit).build()
    if document.problems:
        raise SpecError(document.problems)
    return dataclasses.replace(
        spec,
        resolved=_resolve(document.value, spec, *given),
        environment=redact(environment),
        overrides=tuple(overrides),
    )


def read_values(path: Path) -> FileShape:
    """Return what a spec says, its references replaced; nothing that it names is imported.

    Raises:
        SpecError: it is no YAML, or the top level is not in order.
    """
    document = yaml_loader.load(read_text(path), str(path))
    if isinstance(document.value, dict):
        override(document, (), os.environ)
    try:
        shape = FileShape.model_validate(document.value)
    except ValidationError as error:
        for issue in issues_of(error, FileShape, document.value, PLACES):
            document.note(document.root, issue.message)
        raise SpecError(document.problems) from None
    if document.problems:
        raise SpecError(document.problems)
    return shape


def _resolve(value: Mapping[str, Any], spec: Spec, storage: Any, mlflow: Any) -> str:
    """Return the text that repeats a spec; an address with a password stays as the file gives it.

    Args:
        value: the spec as data.
        spec: the spec.
        storage: what the file gives as `storage:`.
        mlflow: what it gives as `mlflow:`.
    """
    if has_credentials(spec.storage):
        storage = f"${{env.{STORAGE.name}}}" if STORAGE.read() else storage
    else:
        storage = spec.storage
    changed = {"storage": storage}
    if has_credentials(spec.mlflow.tracking_uri or ""):
        changed["mlflow"] = {**value["mlflow"], "tracking_uri": mlflow["tracking_uri"]}
    return resolved_text({**value, **changed}, spec.path.name)
