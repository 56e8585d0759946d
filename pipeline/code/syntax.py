"""The syntax of a module's source, cached while its file is unchanged."""

from __future__ import annotations

import ast
import functools
import warnings
from pathlib import Path

from pipeline.base.errors import BadInput
from pipeline.code.normal_form import (
    DEFINITIONS,
    ModuleSyntax,
    Normaliser,
    is_text,
    reads_docstrings,
)

_sources: dict[tuple[str, bool, Path], tuple[tuple[int, ...], ModuleSyntax]] = {}


def read_source(file: Path, module: str, is_package: bool) -> ModuleSyntax:
    """Read and cache the syntax of a module's source; invalid Python is `BadInput`.

    Args:
        file: the source.
        module: its full name, the origin of relative imports.
        is_package: whether it is an `__init__`.
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
def parse_source(data: bytes, file: Path, module: str, is_package: bool) -> ModuleSyntax:
    """Return the syntax of a source; `module` and `is_package` as in `read_source`.

    Raises:
        BadInput: no valid Python; names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes: Python says so itself
            tree = ast.parse(data, filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        what = getattr(error, "msg", error)
        raise BadInput(f"{file}:{line}: no valid Python: {what}") from None
    docstrings = _docstrings(tree) if b"__doc__" in data or b"getdoc" in data else set()
    package, needed = module if is_package else module.rpartition(".")[0], set[str]()
    while True:  # a type alias that is needed may need an import for typing
        normaliser = Normaliser(package, docstrings, needed)
        source = normaliser.read(tree)
        if normaliser.needed == needed:
            return source
        needed = normaliser.needed


def _docstrings(tree: ast.Module) -> set[int]:
    """Return the ids of the docstrings, if anything in the module reads docstrings."""
    nodes = list(ast.walk(tree))
    if not any(map(reads_docstrings, nodes)):
        return set()
    scopes = [node for node in nodes if isinstance(node, (ast.Module, *DEFINITIONS)) and node.body]
    return {id(node.body[0]) for node in scopes if is_text(node.body[0])}
