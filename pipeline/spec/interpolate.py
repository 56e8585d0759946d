"""`${vars.x}` and `${env.NAME}` in a spec, and `--set`.

A reference that is a whole value has the variable's type; inside text the variable must be a
scalar. An environment variable that is a whole value is read as a YAML scalar. Specs are recorded,
so secrets are refused, see `pipeline.base.secrets`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.base import limits
from pipeline.base.errors import Position, Problem, SpecError, nearest
from pipeline.base.secrets import holds_secret, is_secret
from pipeline.base.text import CONTROLS, cut
from pipeline.spec.yaml_loader import Budget, Document, Path, load, read_scalar

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
# These may take a URL with a password from the environment; output redacts it.
_ADDRESSES = {("storage",), ("mlflow", "tracking_uri")}
_ENVIRONMENT = re.compile(r"env\.([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


class _Unresolved(Exception):
    """A reference that cannot be resolved; without a text, it is already reported."""


def interpolate(document: Document, environment: Mapping[str, str]) -> dict[str, str]:
    """Replace all references in `document`; unresolved ones become its problems.

    Returns:
        The environment variables of these references, with their values.
    """
    resolver = _Resolver(document, environment)
    document.value = resolver.value(document.value, ())
    return resolver.used


def override(
    document: Document, options: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """Set variables, `interpolate`, then set parameters and axes.

    Args:
        document: the spec; mistakes in the options become its problems.
        options: `--set` options: `vars.x=value`, `stage.parameter=value` or `stage.axis=[values]`,
            with values in YAML.
        environment: environment variables.

    Returns:
        As `interpolate`.
    """
    settings = list(_parse(document, options))
    for position, path, value in settings:
        if path[0] == "vars":
            _set_variable(document, position, path, value)
    used = interpolate(document, environment)
    for position, path, value in settings:
        if path[0] != "vars":
            used |= _set_parameter(document, position, path, value, environment)
    return used


class _Resolver:
    def __init__(self, document: Document, environment: Mapping[str, str]):
        self.document = document
        self.environment = environment
        self.used: dict[str, str] = {}
        self.open: list[str] = []
        self.budget = Budget()
        self.characters = 0
        self.depth = 0
        self.failures = 0
        self.place: Path = ()  # path of the value whose references are being replaced

    def value(self, value: Any, path: Path) -> Any:
        """Return the `value` at `path` with its references replaced."""
        self.budget.take(self.document.position(path), self.depth)
        self.depth += 1
        try:
            return self.replaced(value, path)
        except _Unresolved as error:
            self.failures += 1
            self.document.note(self.document.position(path), str(error))
            return None
        finally:
            self.depth -= 1

    def replaced(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self.value(child, (*path, key)) for key, child in value.items()}
        if isinstance(value, list):
            return [self.value(child, (*path, index)) for index, child in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if not self.open:
            self.place = path
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return self.reference(whole[1], True)
        text = self.text(value)
        self.characters += len(text)
        if self.characters > limits.SPEC_CHARACTERS:
            message = (
                f"expected at most {limits.SPEC_CHARACTERS:,} characters of text with ${{...}}"
            )
            position = self.document.position(path)
            raise SpecError([Problem(position, f"{message}, got more")])
        return text

    def text(self, text: str) -> str:
        if "${" in _REFERENCE.sub("", text):
            raise _Unresolved(f"'${{' without its '}}' in {cut(text, 60)!r}")
        return _REFERENCE.sub(lambda match: self.embedded(match[1]), text)

    def embedded(self, expression: str) -> str:
        value = self.reference(expression, False)
        if isinstance(value, dict | list):
            kind = "mapping" if isinstance(value, dict) else "list"
            raise _Unresolved(f"${{{expression}}} is a {kind}, which cannot stand inside text")
        return value if isinstance(value, str) else json.dumps(value)

    def reference(self, expression: str, whole: bool) -> Any:
        if expression.startswith("vars."):
            return self.variable(expression)
        match = _ENVIRONMENT.fullmatch(expression)
        if not match:
            raise _Unresolved(
                f"unknown reference ${{{cut(expression, 60)}}}: expected ${{vars.NAME}}, "
                "${env.NAME} or ${env.NAME:-default}"
            )
        name, default = match.groups()
        if is_secret(name):
            raise _Unresolved(
                f"{name} looks like a secret, and all values of this file are recorded; let the "
                "code that needs it read the environment itself"
            )
        text = self.environment.get(name, default)
        if text is None:
            raise _Unresolved(
                f"the environment variable {name} is not set; set it, or write "
                f"${{env.{name}:-default}}"
            )
        if holds_secret(text) and self.place not in _ADDRESSES:
            raise _Unresolved(
                f"the environment variable {name} holds a password or a token, and all values of "
                "this file are recorded; let the code that needs it read the environment itself"
            )
        if CONTROLS.search(text):
            raise _Unresolved(f"the environment variable {name} holds a control character")
        if "${" in text:
            raise _Unresolved(
                f"the environment variable {name} holds '${{', and references inside of it are "
                "not replaced; set it to their values"
            )
        self.used[name] = text
        return read_scalar(text) if whole else text

    def variable(self, expression: str) -> Any:
        name, *inner = expression.split(".")[1:]
        if name in self.open:
            ring = [*self.open[self.open.index(name) :], name]
            raise _Unresolved(f"variables form a cycle: {' -> '.join(f'vars.{x}' for x in ring)}")
        variables = self.document.value.get("vars")
        known = self.failures
        self.open.append(name)
        try:
            value = self.value(_entry(variables, name, "vars"), ("vars", name))
        finally:
            self.open.pop()
        if self.failures > known:
            raise _Unresolved  # reported where the variable is defined
        at = f"vars.{name}"
        for part in inner:
            value, at = _entry(value, part, at), f"{at}.{part}"
        return value


def _entry(folder: Any, name: str, where: str) -> Any:
    if not isinstance(folder, dict):
        raise _Unresolved(f"{where} has no entries, so there is no ${{{where}.{name}}}")
    if name not in folder:
        known = f"; known: {', '.join(folder)}" if folder else ""
        raise _Unresolved(f"unknown variable {where}.{name}{nearest(name, folder)}{known}")
    return folder[name]


def _parse(document: Document, options: Sequence[str]) -> Iterator[tuple[Position, Path, Any]]:
    """Yield position, path and value of each valid option."""
    for option in options:
        position = Position(f"--set {cut(option, 100)}")
        target, equals, text = option.partition("=")
        path = tuple(target.split("."))
        if not equals or len(path) < 2 or not all(path):
            message = "expected stage.parameter=value, stage.axis=[values] or vars.name=value"
            document.note(position, message)
            continue
        try:
            value = load(text, position.file)
        except SpecError as error:
            document.note(position, error.problems[0].message)
            continue
        for problem in value.problems:
            document.note(position, problem.message)
        yield position, path, value.value


def _set_variable(document: Document, position: Position, path: Path, value: Any) -> None:
    folder = document.value
    for depth, name in enumerate(path):
        if not isinstance(folder, dict) or name not in folder:
            known = folder if isinstance(folder, dict) else {}
            where = ".".join(map(str, path[: depth + 1]))
            hint = nearest(str(name), known)
            document.note(position, f"the file has no variable {where}{hint}")
            return
        folder = folder[name]
    document.replace(path, value, position)


def _set_parameter(
    document: Document, position: Position, path: Path, value: Any, environment: Mapping[str, str]
) -> dict[str, str]:
    stages = document.value.get("stages")
    name, *inner = path
    if not isinstance(stages, dict) or not isinstance(stages.get(name), dict):
        hint = nearest(str(name), stages if isinstance(stages, dict) else ())
        document.note(position, f"unknown stage {name!r}{hint}")
        return {}
    stage = stages[name]
    section = "params"
    axes = stage.get("matrix")
    if len(inner) == 1 and isinstance(axes, dict) and inner[0] in axes:
        section = "matrix"
        value = value if isinstance(value, list) else [value]
    target = ("stages", name, section, *inner)
    document.replace(target, None, position)
    resolver = _Resolver(document, environment)
    document.replace(target, resolver.value(value, target), position)
    return resolver.used
