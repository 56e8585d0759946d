"""What the source of one module says: its normal form as a digest, its imports and its names.

The normal form is the syntax tree without what has no effect on what the module computes: layout,
comments, docstrings, annotations, imports for typing, `if TYPE_CHECKING` blocks, `pass`. It is the
same on every supported Python. (In a class body, `x: int = 1` differs from `x = 1`, since
dataclasses and pydantic tell them apart; which type it is has no effect here either.)
"""

from __future__ import annotations

import ast
import functools
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput

_TYPING = {"__future__", "collections.abc", "numpy.typing", "typing", "typing_extensions"}
_WITHOUT_EFFECT = {
    "annotation", "ctx", "kind", "returns", "simple", "type_comment", "type_ignores", "type_params",
}  # fmt: skip
_BODIES = {"body", "orelse", "finalbody"}


@dataclass(frozen=True)
class Import:
    """`import module` (name None) or `from module import name`, absolute."""

    module: str
    name: str | None = None


@dataclass
class Source:
    """What one module's source says.

    Attributes:
        digest: hex sha256 of the normalised syntax tree.
        imports: all imports, at any depth.
        bindings: name bound at the top level -> the import that binds it, or None for a definition.
        stars: modules of top-level `from module import *`.
    """

    digest: str
    imports: list[Import] = field(default_factory=list)
    bindings: dict[str, Import | None] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)


_sources: dict[tuple[str, bool, Path], tuple[tuple[int, ...], Source]] = {}


def read_source(file: Path, module: str, is_package: bool) -> Source:
    """Read what a module's source says; kept for the process as long as the file is unchanged.

    Args:
        file: the source.
        module: its full name, which relative imports start from.
        is_package: whether it is an `__init__`.

    What is no valid Python is `BadInput`.
    """
    stat = file.stat()
    signature = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
    cached = _sources.get((module, is_package, file))
    if cached and cached[0] == signature:
        return cached[1]
    source = parse_source(file.read_bytes(), file, module, is_package)
    _sources[module, is_package, file] = signature, source
    return source


@functools.lru_cache(maxsize=1024)
def parse_source(data: bytes, file: Path, module: str, is_package: bool) -> Source:
    """Return what source says, as it was read from a file.

    Args:
        data: the source.
        file: where it was read, for messages.
        module: as in `read_source`.
        is_package: as there.

    Raises:
        BadInput: no valid Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes: Python says so itself
            tree = ast.parse(data, filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        what = getattr(error, "msg", error)
        raise BadInput(f"{file}:{line}: no valid Python: {what}") from None
    return _Normaliser(module if is_package else module.rpartition(".")[0]).read(tree)


class _Normaliser:
    """Walks a syntax tree once: collects its normal form as text, its imports and its names.

    Args:
        package: the package that relative imports start from.
    """

    def __init__(self, package: str):
        self.package = package
        self.out: list[str] = []
        self.imports: list[Import] = []
        self.in_class = False

    def read(self, tree: ast.Module) -> Source:
        """Return what the tree says."""
        self.field("body", tree.body)
        text = "".join(self.out).encode("utf-8", "surrogatepass")
        source = Source(hashlib.sha256(text).hexdigest(), self.imports)
        self.bind(tree.body, source)
        return source

    # -- normal form: (Class field value ...), where fields that are None or empty are left out

    def node(self, node: ast.AST) -> None:
        """Append a node."""
        kind = type(node).__name__
        self.out.append(f"({kind}")
        if isinstance(node, ast.Constant):
            self.out.append(_atom(node.value))
        elif isinstance(node, ast.JoinedStr):
            self.pieces(node.values)
        else:
            outer = self.in_class
            if isinstance(node, _SCOPES):
                self.in_class = isinstance(node, ast.ClassDef)
            elif isinstance(node, ast.Import):
                self.imports += [Import(alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                self.imports += self.edges(node)
            for name in _fields(kind):
                self.field(name, getattr(node, name, None))
            self.in_class = outer
        self.out.append(")")

    def field(self, name: str, value: Any) -> None:
        """Append a field unless it is None or empty."""
        if type(value) is list:
            children = list(self.statements(value)) if name in _BODIES else value
            if not children:
                return
            self.out.append(f" {name}[")
            for child in children:
                if isinstance(child, ast.AST):
                    self.node(child)
                else:
                    self.out.append(_atom(child))
            self.out.append("]")
        elif isinstance(value, ast.AST):
            if type(value) is ast.JoinedStr and not value.values:
                return  # an empty format, `{x:}`, which some versions leave out
            self.out.append(f" {name}=")
            self.node(value)
        elif value is not None:
            self.out.append(f" {name}={_atom(value)}")

    def pieces(self, values: list[ast.expr]) -> None:
        """Append an f-string's parts; versions cut the text between the braces differently."""
        text = ""
        for value in values:
            if isinstance(value, ast.Constant):
                text += str(value.value)
                continue
            if text:
                self.out.append(_atom(text))
                text = ""
            self.node(value)
        if text:
            self.out.append(_atom(text))

    def statements(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Yield the statements that have an effect, in their plain form."""
        for statement in body:
            if isinstance(statement, ast.If) and _is_type_checking(statement.test):
                yield from self.statements(statement.orelse)
            elif isinstance(statement, ast.AnnAssign) and not self.in_class:
                if statement.value is not None:
                    yield ast.Assign(targets=[statement.target], value=statement.value)
            elif isinstance(statement, ast.Import):
                names = [alias for alias in statement.names if alias.name not in _TYPING]
                if names:
                    yield ast.Import(names=names)
            elif not _is_idle(statement):
                yield statement

    # -- imports and names

    def edges(self, node: ast.ImportFrom) -> list[Import]:
        """Return what `from module import names` brings."""
        module = self.absolute(node)
        names = [alias.name for alias in node.names]
        return [Import(module, None if name == "*" else name) for name in names]

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the module that an import names, relative ones made absolute."""
        if not node.level:
            return node.module or ""
        parents = self.package.split(".")
        base = parents[: len(parents) - node.level + 1]
        return ".".join([*base, node.module] if node.module else base)

    def bind(self, body: list[ast.stmt], source: Source) -> None:
        """Note the names that top-level statements bind."""
        for statement in self.statements(body):
            for name, origin in self.bound(statement, source):
                known = source.bindings.get(name, origin)
                source.bindings[name] = origin if origin == known else None
            for part in ("body", "orelse", "finalbody", "handlers"):
                inner = getattr(statement, part, ())
                if not isinstance(statement, _DEFINITIONS):
                    for child in inner:
                        self.bind(child.body if part == "handlers" else [child], source)

    def bound(self, statement: ast.stmt, source: Source) -> Iterator[tuple[str, Import | None]]:
        """Yield the names that a statement binds itself, with the import that does."""
        if isinstance(statement, _DEFINITIONS):
            yield statement.name, None
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, Import(alias.name if alias.asname else top)
        elif isinstance(statement, ast.ImportFrom):
            module = self.absolute(statement)
            for alias in statement.names:
                if alias.name == "*":
                    source.stars.append(module)
                else:
                    yield alias.asname or alias.name, Import(module, alias.name)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        yield node.id, None


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SCOPES = (*_DEFINITIONS, ast.Lambda)


@functools.cache
def _fields(kind: str) -> tuple[str, ...]:
    return tuple(name for name in getattr(ast, kind)._fields if name not in _WITHOUT_EFFECT)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _is_idle(statement: ast.stmt) -> bool:
    """Tell whether a statement does nothing: a docstring, `pass`, an import for typing."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.ImportFrom):
        return not statement.level and statement.module in _TYPING
    return type(statement).__name__ in {"Pass", "TypeAlias"}


def _atom(value: Any) -> str:
    """Return a constant or a name as text that is the same on every Python, and unambiguous."""
    if type(value) is str:  # not repr, which depends on the version's Unicode tables
        return f"'{len(value)}:{value}"
    if type(value) is int:
        return hex(value)
    if type(value) is bytes:
        return f"b{value.hex()}'"
    return repr(value)
