"""Options of networks and data sets, checked against their functions' source, without imports."""

from __future__ import annotations

import ast
from collections.abc import Collection
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from fishleg.options import UnknownName
from pipeline.stage import Registry
from stages.catalogue.declared import refuse


def only_known(
    registry: Registry,
    name: str,
    options: dict[str, Any],
    added: Collection[str],
    skipped: int = 0,
) -> dict[str, Any]:
    """Return the options, or refuse those that the function behind a registry name does not take.

    The worker alone checks a function whose source is not found here, or does not tell: one that
    is imported or decorated, or takes any keyword.

    Args:
        registry: holds the name.
        name: of an entry.
        options: the user's keyword arguments.
        added: names of the keyword arguments that the worker adds.
        skipped: number of positional arguments that the worker gives, beside that of a family.
    """
    entry = registry.find(name)
    taken = _keywords(*entry.target.split(":")) if entry is not None and options else None
    if taken is not None:
        skipped += registry.argument(name) is not None
        known = [one for one in taken[skipped:] if one not in added]
        unknown = [one for one in options if one not in {*known, *added}]
        if unknown:
            kind = f"option of {name!r}"
            refuse((UnknownName(kind, one, known or ["none"]), (one,)) for one in unknown)
    return options


def _keywords(module: str, attribute: str) -> list[str] | None:
    """Return the names of the arguments of a function, or of a class, if its source tells."""
    file = _source(module)
    body = _parsed(file, file.stat().st_mtime_ns).body if file is not None else []
    found = {one.name: one for one in body if isinstance(one, ast.FunctionDef | ast.ClassDef)}
    node, bound = found.get(attribute), 0
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        node, bound = methods.get("__init__"), 1
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.args.kwarg:
        return None
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return [one.arg for one in every][bound:]


def _source(module: str) -> Path | None:
    """Return the file that `import` would find for a module."""
    names, folders, origin = module.split("."), None, None
    for count in range(1, len(names) + 1):
        spec = PathFinder.find_spec(".".join(names[:count]), folders)
        if spec is None:
            return None
        folders, origin = spec.submodule_search_locations, spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


@lru_cache(maxsize=64)
def _parsed(file: Path, changed_ns: int) -> ast.Module:
    """Return a file's syntax tree; an empty one where it is no Python, which planning reports."""
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module([], [])
