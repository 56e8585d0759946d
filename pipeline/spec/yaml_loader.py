"""YAML with positions: the scalars of YAML 1.2, no duplicate keys, plain data only.

`1e-3` is a number, `on` and `2024-01-01` are strings, `010` is 10, `0o10` is 8. Anchors, aliases
and merge keys work. Values are JSON data: dict with string keys, list, str without control
characters, int, finite float, bool or None. A path is a tuple of keys and indices from the root,
such as `("stages", "a", 0)`. Too large or too deep documents are refused before expansion.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.base import limits
from pipeline.base.errors import Position, Problem, SpecError
from pipeline.base.text import CONTROLS, cut

Path = tuple[str | int, ...]


def _finite(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text


def _whole(text: str, base: int = 10) -> int | str:
    """Read an integer; one of more than 64 bits stays text."""
    if len(text) > 2 + 64:
        return text
    value = int(text, base)
    return value if -(2**63) <= value < 2**64 else text


# The core schema of YAML 1.2.2, section 10.3.2, in order of precedence; .inf, .nan and integers
# beyond 64 bits are strings, as JSON has none of them.
_SCALARS = (
    (re.compile(r"(?:|~|null|Null|NULL)"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), _whole),
    (re.compile(r"0o[0-7]+"), lambda text: _whole(text, 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: _whole(text, 16)),
    (re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"), _finite),
)
_MERGE = "<<"
_KINDS = "keys and values (aliases and '<<' replaced), got more"
_PLAIN = "plain"  # our tag of scalars without quotes and tag
_TAGS = {_PLAIN, *(f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str"))}


class Budget:
    """Counts the keys and values of a file, and refuses it at the limit."""

    def __init__(self) -> None:
        self.values = 0

    def take(self, position: Position, depth: int) -> None:
        """Count a key or value inside `depth` mappings and lists.

        Raises:
            SpecError: it exceeds the limit.
        """
        self.values += 1
        if self.values > limits.SPEC_VALUES:
            raise SpecError(
                [Problem(position, f"expected at most {limits.SPEC_VALUES:,} {_KINDS}")]
            )
        self.check_depth(position, depth)

    def check_depth(self, position: Position, depth: int) -> None:
        """Check a depth of mappings and lists.

        Raises:
            SpecError: it exceeds the limit.
        """
        if depth > limits.SPEC_DEPTH:
            message = f"expected at most {limits.SPEC_DEPTH} mappings, lists and variables in each "
            raise SpecError([Problem(position, f"{message}other, got more")])


class _Loader(yaml.SafeLoader):
    """Tags plain scalars instead of resolving them by the rules of YAML 1.1."""

    def __init__(self, text: str, file: str):
        super().__init__(text)
        self.file = file
        self.budget = Budget()
        self.depth = 0

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """Return the tag of a node without an explicit one."""
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node, unless it is too deep."""
        self.budget.check_depth(_place(self.file, self.peek_event().start_mark), self.depth)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _place(file: str, mark: yaml.Mark) -> Position:
    return Position(file, mark.line + 1, mark.column + 1)


@dataclass
class Document:
    """A YAML document as plain data, with the position of each key and value.

    Attributes:
        value: the data.
        root: position of the document.
        values: path -> position of the value there.
        keys: path -> position of the key of the mapping entry there.
        problems: all mistakes beyond the syntax.
        unknown: positions of unreadable values, for which no further problems are reported.
        known: the problems as a set.
    """

    value: Any
    root: Position
    values: dict[Path, Position] = field(default_factory=dict)
    keys: dict[Path, Position] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unknown: set[Position] = field(default_factory=set)
    known: set[Problem] = field(default_factory=set)

    def add(self, problem: Problem) -> None:
        """Add a problem.

        Raises:
            SpecError: there are `limits.PROBLEMS`.
        """
        if problem not in self.known:
            self.known.add(problem)
            self.problems.append(problem)
        if len(self.problems) >= limits.PROBLEMS:
            raise SpecError(self.problems, more=True)

    def note(self, position: Position, message: str) -> None:
        """Add a problem with the value at `position`, unless the message is empty."""
        if message:
            self.add(Problem(position, message))
        self.unknown.add(position)

    def position(self, path: Path, *, key: bool = False) -> Position:
        """Return the position of the value (or the key) at `path`, or of its nearest ancestor.

        An element of a list from a variable, for example, has no position itself.
        """
        if key and path in self.keys:
            return self.keys[path]
        for length in range(len(path), 0, -1):
            if path[:length] in self.values:
                return self.values[path[:length]]
        return self.root

    def replace(self, path: Path, value: Any, position: Position) -> None:
        """Put `value` with `position` at `path`, and make missing mappings on the way."""
        for known in (self.values, self.keys):
            for old in [old for old in known if old[: len(path)] == path]:
                del known[old]
        self.values[path] = self.keys[path] = position
        folder = self.value
        for part in path[:-1]:
            if not isinstance(folder.get(part), dict):
                folder[part] = {}
            folder = folder[part]
        folder[path[-1]] = value


def read_scalar(text: str) -> Any:
    """Return the value of a plain (unquoted) scalar in YAML 1.2."""
    for pattern, convert in _SCALARS:
        if pattern.fullmatch(text):
            return convert(text)
    return text


def load(text: str, file: str) -> Document:
    """Read one YAML document in less than a second.

    Args:
        text: the document.
        file: its name in positions.

    Returns:
        The document, with its mistakes beyond the syntax in `problems`.

    Raises:
        SpecError: the text is no YAML, or exceeds a limit.
    """
    where, node = Position(file, 1, 1), None
    if len(text) > limits.SPEC_BYTES:
        message = f"expected at most {limits.SPEC_BYTES:,} characters, got {len(text):,}"
        raise SpecError([Problem(where, message)])
    try:
        loader = _Loader(text, file)
        where = _place(file, loader.get_mark())
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError) as error:  # a number beyond Python's range
            where = _place(file, loader.get_mark())
            what = f"a number is out of range in an escape or directive ({error})"
            raise SpecError([Problem(where, f"no valid YAML: {what}")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise SpecError(
            [Problem(_place(file, mark) if mark else where, f"no valid YAML: {what}")]
        ) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = Position(file, before.count("\n") + 1, error.position - before.rfind("\n"))
        what = f"the character U+{error.character:04X} is not allowed"
        raise SpecError([Problem(where, f"no valid YAML: {what}")]) from None
    document = Document(None, where)
    if node is not None:
        document.value = _Reader(document, Budget()).read(node, ())
    return document


class _Reader:
    """Turns nodes into data, and adds positions and problems to a document."""

    def __init__(self, document: Document, budget: Budget):
        self.document = document
        self.budget = budget
        self.open: list[yaml.Node] = []

    def read(self, node: yaml.Node, path: Path) -> Any:
        """Return the value of `node`, at `path`."""
        position = self.document.values[path] = self.place(node)
        self.budget.take(position, len(self.open))
        if node.tag not in _TAGS:
            self.problem(node, f"tag {_quoted(node.tag)} is not supported; write the value plainly")
            return None
        if any(node is parent for parent in self.open):
            self.problem(node, "an alias to a mapping or list that contains it")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.append(node)
        value: Any = None
        if isinstance(node, yaml.SequenceNode):
            value = [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            value = self.mapping(node, path)
        self.open.pop()
        return value

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar; quoted ones and blocks are strings."""
        control = CONTROLS.search(node.value)
        if control:
            code = f"U+{ord(control[0]):04X}"
            self.problem(node, f"the control character {code} is not allowed in a value")
            return None
        return read_scalar(node.value) if node.tag == _PLAIN else node.value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """Return a mapping's entries; its own keys win over those of `<<`."""
        result: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            key = self.key(key_node)
            if key is None:
                continue
            if key == _MERGE and key_node.tag == _PLAIN:
                merged.append(value_node)
                continue
            if key in result:
                first = self.document.keys[*path, key]
                self.problem(key_node, f"duplicate key {_quoted(key)}, first given at {first}")
                continue
            self.document.keys[*path, key] = self.place(key_node)
            result[key] = self.read(value_node, (*path, key))
        for value_node in merged:
            self.merge(value_node, path, result)
        return result

    def merge(self, node: yaml.Node, path: Path, into: dict[str, Any]) -> None:
        """Add the entries of `<<: node` that `into` lacks."""
        if isinstance(node, yaml.SequenceNode):
            for child in node.value:
                if isinstance(child, yaml.SequenceNode):  # a list could contain itself
                    self.problem(child, "expected a mapping in the list after '<<'")
                else:
                    self.merge(child, path, into)
            return
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, "expected a mapping, or a list of them, after '<<'")
            return
        inner = Document(None, self.document.root)
        reader = _Reader(inner, self.budget)
        reader.open = self.open
        entries = reader.read(node, path) or {}
        for problem in inner.problems:
            self.document.add(problem)
        self.document.unknown |= inner.unknown
        new = [key for key in entries if key not in into]
        into.update({key: entries[key] for key in new})
        brought = set(new)
        for ours, theirs in (
            (self.document.values, inner.values),
            (self.document.keys, inner.keys),
        ):
            depth = len(path)
            ours |= {at: p for at, p in theirs.items() if len(at) > depth and at[depth] in brought}

    def key(self, node: yaml.Node) -> str | None:
        """Return a mapping's key, or None after noting that it is no string."""
        self.budget.take(self.place(node), len(self.open))
        if isinstance(node, yaml.ScalarNode):
            known = len(self.document.problems)
            value = self.scalar(node)
            if isinstance(value, str):
                return value
            if len(self.document.problems) == known:
                self.problem(
                    node, f"expected a string as the key, got {cut(node.value, 60)}; quote it"
                )
        else:
            self.problem(node, "expected a string as the key")
        return None

    def place(self, node: yaml.Node) -> Position:
        """Return the position of `node`."""
        return _place(self.document.root.file, node.start_mark)

    def problem(self, node: yaml.Node, message: str) -> None:
        """Note a problem at `node`."""
        self.document.note(self.place(node), message)


def _quoted(text: str) -> str:
    return repr(cut(text, 60))
