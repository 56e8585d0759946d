"""What the product's texts advise, and what there is of it, both read from the sources.

A text is a string of a module that is no docstring of it, or the docstring of a command, which is
its help; what stands in an f-string for a value is a placeholder here.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fishleg", "stages", "pipeline")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "experiments/*.yaml", "pipeline.yaml")
HELP = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline/cli").glob("*_commands.py")}
# Placeholders that stand for options, by the end of their expression; the others are one word.
OPTIONS = {"where": " --storage s ", "trust": " --trust "}


@dataclass(frozen=True)
class Text:
    """A text, where it stands, and whether it is a line of prose, which no command begins."""

    where: str
    text: str
    prose: bool = False


@functools.cache
def texts(*packages: str) -> list[Text]:
    """Return the texts of some packages."""
    found = []
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for line, text in _texts_of(tree, name in HELP):
                found.append(Text(f"{name}:{line}", text))
    return found


def pages() -> Iterator[Text]:
    """Yield what is in backticks, and the lines of commands, in the pages for people."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            text = path.read_text(encoding="utf-8")
            prose = path.suffix == ".md"
            for number, line in enumerate(text.splitlines(), start=1):
                if path.suffix == ".md" and line.lstrip().startswith("```"):
                    prose = not prose
                yield Text(f"{name}:{number}", line, prose)


def _texts_of(tree: ast.Module, help_too: bool) -> Iterator[tuple[int, str]]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        scope = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if scope and node.body and isinstance(node.body[0], ast.Expr):
            command = isinstance(node, ast.FunctionDef) and any(
                isinstance(one, ast.Call) and ast.unparse(one.func) == "command"
                for one in node.decorator_list
            )
            if not (help_too and command):
                skipped.add(node.body[0].value)
        elif isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(map(_part, node.values))


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.FormattedValue):
        name = ast.unparse(node.value).rpartition(".")[2]
        return OPTIONS.get(name, "PLACEHOLDER")
    assert isinstance(node, ast.Constant)
    return str(node.value)


def quoted(text: str) -> list[str]:
    """Return what stands in backticks."""
    return [found for found in re.findall(r"`([^`\n]+)`", text) if "tags." not in text]


def commands(found: Iterable[Text]) -> Iterator[tuple[str, list[str]]]:
    """Yield where a text has a command of `fls`, and its words."""
    for one in found:
        wanted = [part for part in quoted(one.text) if part.startswith("fls ")]
        line = one.text.removeprefix("#!").strip()
        line = re.sub(r"^(\w+=\S+ )+", "", line)
        if line.startswith("fls ") and not one.prose:
            wanted.append(re.sub(r"\s{2,}#.*| [|>] .*|\s+# .*", "", line.partition("\n")[0]))
        for command in wanted:
            yield one.where, shlex.split(command.replace("\\|", "|"))[1:]


@dataclass
class Names:
    """What the sources of some packages define.

    Attributes:
        all: names of functions, classes, parameters, fields and variables.
        parameters: names of parameters and fields.
        callables: function or class -> the names of its parameters, or "**" for any.
    """

    all: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    callables: dict[str, set[str]] = field(default_factory=dict)


def names_of(*packages: str) -> Names:
    """Return what packages define."""
    found = Names()
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                _note(node, found)
    found.all |= found.parameters | found.callables.keys()
    return found


def _note(node: ast.AST, found: Names) -> None:
    if isinstance(node, ast.FunctionDef):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = {one.arg for one in given} | ({"**"} if node.args.kwarg else set())
        found.callables.setdefault(node.name, set()).update(names)
        found.parameters |= names
    elif isinstance(node, ast.ClassDef):
        fields = {
            one.target.id
            for one in node.body
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
        for one in node.body:
            if isinstance(one, ast.FunctionDef) and one.name == "__init__":
                fields |= {arg.arg for arg in [*one.args.args, *one.args.kwonlyargs]}
        found.callables.setdefault(node.name, set()).update(fields)
        found.parameters |= fields
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        found.all.add(node.id)


@functools.cache
def words_run_by_tests() -> list[set[str]]:
    """Return, for each call and list of strings in the tests, the words in it."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name in {"advice.py", "test_advice.py"}:  # which run nothing
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call | ast.List | ast.Tuple):
                words: set[str] = set()
                for one in ast.walk(node):
                    if isinstance(one, ast.Constant) and isinstance(one.value, str):
                        words.update(re.split(r"[\s=]+", one.value))
                if len(words) < 60:
                    found.append(words)
    return found
