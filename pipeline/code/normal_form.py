"""The normal form of a module's source, as a digest, with its imports and its names.

The normal form is the syntax tree without the parts that programs cannot, or seldom do, read at
run time: layout, comments, `pass`, `if TYPE_CHECKING` blocks, and
- annotations, except in class bodies (dataclasses and pydantic read them) and of decorated
  functions (`functools.singledispatch` reads them);
- docstrings, except in a module that reads `__doc__`;
- imports for typing, type aliases and `from __future__ import annotations`, unless a remaining part
  needs them.
It is the same on every supported Python.

A module with a `__getattr__` imports its names lazily; the imports in its `if TYPE_CHECKING` blocks
name their origins, and count as its imports.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_TYPING = {"__future__", "collections.abc", "numpy.typing", "typing", "typing_extensions"}
_WITHOUT_EFFECT = {"ctx", "kind", "type_comment", "type_ignores"}
_SIGNATURE = {"args", "returns", "type_params"}
_BODIES = {"body", "orelse", "finalbody"}
_FUTURE = "__future__.annotations"

# Version of the digest rule, stored with digests. Rule 1 left out all annotations, docstrings and
# imports for typing.
RULE = 2


@dataclass(frozen=True)
class Import:
    """`import module` (name None) or `from module import name`, absolute."""

    module: str
    name: str | None = None


@dataclass
class ModuleSyntax:
    """The digest, imports and names of a module's source.

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


class Normaliser:
    """Collects the normal form, the imports and the names of a syntax tree in one walk.

    Args:
        package: the package that relative imports start from.
        docstrings: ids of the string statements that count.
        needed: names from typing that the normal form needs, as an earlier walk found them.

    Attributes:
        needed: the same, as this walk found them.
    """

    def __init__(self, package: str, docstrings: set[int], needed: set[str]):
        self.package = package
        self.docstrings = docstrings
        self.kept = needed
        self.out: list[str] = []
        self.imports: list[Import] = []
        self.in_class = False
        self.in_signature = False  # of a decorated function
        self.used: set[str] = set()
        self.offered: set[str] = set()

    def read(self, tree: ast.Module) -> ModuleSyntax:
        """Return digest, imports and names of a tree."""
        self.field("body", tree.body)
        text = "".join(self.out).encode("utf-8", "surrogatepass")
        source = ModuleSyntax(hashlib.sha256(text).hexdigest(), self.imports)
        self.bind(tree.body, source)
        if "__getattr__" in source.bindings:
            self.bind_lazy(tree.body, source)
        return source

    @property
    def needed(self) -> set[str]:
        """The names from typing that were used."""
        return self.used & self.offered

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
            elif isinstance(node, ast.Name):
                self.used.add(node.id)
            if isinstance(node, _FUNCTIONS):
                self.function(node)
            else:
                for name in _fields(kind):
                    value = getattr(node, name, None)
                    if name == "annotation":
                        self.annotation(name, value)
                    else:
                        self.field(name, value)
            self.in_class = outer
        self.out.append(")")

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Append a function's fields; types in its signature only if it is decorated."""
        outer = self.in_signature
        for name in _fields(type(node).__name__):
            self.in_signature = bool(node.decorator_list) and name in _SIGNATURE
            value = getattr(node, name, None)
            if name == "returns":
                self.annotation(name, value)
            elif name != "type_params" or self.in_signature:
                self.field(name, value)
        self.in_signature = outer

    def annotation(self, name: str, value: ast.expr | None) -> None:
        """Append an annotation that counts: in a class body, or of a decorated function."""
        if value is not None and (self.in_signature or self.in_class):
            self.used |= {_FUTURE, *_names_in_texts(value)}
            self.field(name, value)

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
                return  # an empty format, `{x:}`; some Python versions leave it out
            self.out.append(f" {name}=")
            self.node(value)
        elif value is not None:
            self.out.append(f" {name}={_atom(value)}")

    def pieces(self, values: list[ast.expr]) -> None:
        """Append an f-string's parts; Python versions split the text between braces differently."""
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
                names = [alias for alias in statement.names if self.counts(alias, alias.name)]
                if names:
                    yield ast.Import(names=names)
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                module = statement.module or ""
                names = [alias for alias in statement.names if self.counts(alias, module)]
                if names:
                    yield ast.ImportFrom(module=module, names=names, level=0)
            elif type(statement).__name__ == "TypeAlias":
                if self.is_needed(getattr(statement, "name").id):  # noqa: B009 - since 3.12
                    yield statement
            elif id(statement) in self.docstrings or not _is_idle(statement):
                yield statement

    def counts(self, alias: ast.alias, module: str) -> bool:
        """Tell whether an import counts; one for typing counts only where its name is needed."""
        if module == "__future__":
            return alias.name == "annotations" and self.is_needed(_FUTURE)
        name = alias.asname or alias.name.partition(".")[0]
        return module not in _TYPING or alias.name == "*" or self.is_needed(name)

    def is_needed(self, name: str) -> bool:
        """Tell whether the normal form needs a name from typing."""
        self.offered.add(name)
        return name in self.kept

    # -- imports and names

    def edges(self, node: ast.ImportFrom) -> list[Import]:
        """Return `from module import names` as imports."""
        module = self.absolute(node)
        names = [alias.name for alias in node.names]
        return [Import(module, None if name == "*" else name) for name in names]

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the absolute name of the module that a statement imports from."""
        if not node.level:
            return node.module or ""
        parents = self.package.split(".")
        base = parents[: len(parents) - node.level + 1]
        return ".".join([*base, node.module] if node.module else base)

    def bind(self, body: list[ast.stmt], source: ModuleSyntax) -> None:
        """Note the names that top-level statements bind."""
        for statement in self.statements(body):
            for name, origin in self.bound(statement, source):
                known = source.bindings.get(name, origin)
                source.bindings[name] = origin if origin == known else None
            for part in ("body", "orelse", "finalbody", "handlers"):
                inner = getattr(statement, part, ())
                if not isinstance(statement, DEFINITIONS):
                    for child in inner:
                        self.bind(child.body if part == "handlers" else [child], source)

    def bind_lazy(self, body: list[ast.stmt], source: ModuleSyntax) -> None:
        """Note the names that a lazy module declares for type checkers."""
        declared = [
            inner
            for statement in body
            if isinstance(statement, ast.If) and _is_type_checking(statement.test)
            for inner in statement.body
            if isinstance(inner, ast.ImportFrom) and self.absolute(inner) not in _TYPING
        ]
        self.bind(list[ast.stmt](declared), source)
        source.imports += [edge for inner in declared for edge in self.edges(inner)]

    def bound(
        self, statement: ast.stmt, source: ModuleSyntax
    ) -> Iterator[tuple[str, Import | None]]:
        """Yield the names that a statement itself binds, with the import or None."""
        if isinstance(statement, DEFINITIONS):
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


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*DEFINITIONS, ast.Lambda)


@functools.cache
def _fields(kind: str) -> tuple[str, ...]:
    return tuple(name for name in getattr(ast, kind)._fields if name not in _WITHOUT_EFFECT)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _is_idle(statement: ast.stmt) -> bool:
    """Tell whether a statement does nothing: a docstring, `pass`."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass)


def is_text(statement: ast.stmt) -> bool:
    """Tell whether a statement consists of a string, as a docstring does."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def reads_docstrings(node: ast.AST) -> bool:
    """Tell whether a node is `__doc__`, `x.__doc__`, `"__doc__"`, or a use of `inspect.getdoc`."""
    names = {"__doc__", "getdoc"}
    return (
        (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.Constant) and node.value == "__doc__")
    )


def _names_in_texts(annotation: ast.expr) -> Iterator[str]:
    """Yield the names in an annotation's strings, which readers of annotations evaluate."""
    for part in ast.walk(annotation):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            try:
                inner = ast.parse(part.value, mode="eval")
            except (SyntaxError, ValueError):  # it is no annotation, as in Literal["a b"]
                continue
            yield from (node.id for node in ast.walk(inner) if isinstance(node, ast.Name))


def _atom(value: Any) -> str:
    """Return a constant or name as unambiguous text that is equal on every Python version."""
    if type(value) is str:  # not repr, which depends on the version's Unicode tables
        return f"'{len(value)}:{value}"
    if type(value) is int:
        return hex(value)
    if type(value) is bytes:
        return f"b{value.hex()}'"
    return repr(value)
