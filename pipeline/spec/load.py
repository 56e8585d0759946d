"""Loads a `pipeline.yaml`: returns a spec, or raises all its problems at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.base.errors import SpecError
from pipeline.base.search_path import look_here_too
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
    """Read and check a spec, and make its cells; an unreadable file is `BadInput`.

    The working directory is added to the end of Python's search path, for plugins and functions.

    Args:
        path: the YAML file.
        overrides: `--set` options, see `pipeline.spec.interpolate.override`.
        folder: origin of relative paths; None for the file's folder.
        admit: gets the plugins' names before their import, and may raise to refuse them.

    Raises:
        SpecError: the spec has mistakes; all of them, in file order.

    Cost: less than a second without the import of plugins, see `pipeline.base.limits`.
    """
    text = read_text(Path(path))
    refuse_secrets(text, str(path), overrides)
    look_here_too()
    document = yaml_loader.load(text, str(path))
    if not isinstance(document.value, dict):
        document.note(document.root, "expected a mapping with 'name', 'plugins' and 'stages'")
        raise SpecError(document.problems)
    given = document.value.get("storage"), document.value.get("mlflow")
    environment = override(document, overrides, os.environ)
    folder = Path(path).parent if folder is None else folder
    spec = Builder(document, Path(path), text, folder, admit).build()
    if document.problems:
        raise SpecError(document.problems)
    return dataclasses.replace(
        spec,
        resolved=_resolve(document.value, spec, *given),
        environment=redact(environment),
        overrides=tuple(overrides),
    )


def read_values(path: Path) -> FileShape:
    """Return the top level of a spec with its references replaced; imports nothing.

    Raises:
        SpecError: it is no YAML, or its top level has mistakes.
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
    """Return the text that repeats a spec; an address with a password stays as in the file.

    `storage` and `mlflow` are these entries of the file.
    """
    if has_credentials(spec.storage):
        storage = f"${{env.{STORAGE.name}}}" if STORAGE.read() else storage
    else:
        storage = spec.storage
    changed = {"storage": storage}
    if has_credentials(spec.mlflow.tracking_uri or ""):
        changed["mlflow"] = {**value["mlflow"], "tracking_uri": mlflow["tracking_uri"]}
    return resolved_text({**value, **changed}, spec.path.name)
