"""Digests of a stage's code, one per module, found without an import.

A stage's code is its entry module and all modules that it imports, directly or indirectly, if they
belong to the plugins' packages or to the user (neither installed nor in the standard library).
`from package import name` leads to the module that defines the name; other imports of the package's
`__init__` do not count, so an `__init__` should only re-export. Imports by computed names are not
seen; registries replace them. The runner and the catalogues do not count: the effect of a
catalogue's declarations is in the resolved parameters.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import site
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import BadInput, nearest
from pipeline.base.names import store_around
from pipeline.code.normal_form import Import, ModuleSyntax
from pipeline.code.syntax import read_source

RUNNER = "pipeline"
_SITE = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Place:
    """A module's file (None for a namespace package), and a package's folders."""

    file: Path | None
    folders: tuple[str, ...] = ()


class CodeIndex:
    """Digests of the code behind targets.

    Args:
        packages: top-level packages whose code counts, besides all code that is not installed.
        declarations: the catalogues, which do not count.
    """

    def __init__(self, packages: Iterable[str], declarations: Iterable[str] = ()):
        self.packages = set(packages) - {RUNNER}
        self.declarations = set(declarations)
        self._places: dict[str, Place | None] = {}
        self._direct: dict[str, list[str]] = {}

    def digests(self, targets: Iterable[str]) -> dict[str, str]:
        """Return module -> digest of all code behind `targets`, sorted by module.

        Args:
            targets: each `module:attribute`.

        Raises:
            BadInput: a module of the packages is missing, or is no valid Python.
        """
        todo: list[str] = []
        for target in targets:
            module, _, attribute = target.partition(":")
            if self._counts(module) and self._place(module) is None:
                raise BadInput(f"{target!r}: there is no module {module!r}")
            todo += self._modules(Import(module, attribute or None))
        found: set[str] = set()
        while todo:
            module = todo.pop()
            if module not in found:
                found.add(module)
                todo += self._imported_by(module)
        return {module: self._source(module).digest for module in sorted(found)}

    def _imported_by(self, module: str) -> list[str]:
        """Return the modules that `module` imports and that count."""
        if module not in self._direct:
            edges = dict.fromkeys(self._source(module).imports)
            self._direct[module] = [name for edge in edges for name in self._modules(edge)]
        return self._direct[module]

    def _modules(self, edge: Import, seen: frozenset[Import] = frozenset()) -> list[str]:
        """Return the modules that an import refers to and that count."""
        if not self._counts(edge.module) or edge in seen:
            return []
        place = self._place(edge.module)
        if place is None:  # an optional import, guarded by `try`
            return []
        whole = [edge.module] if place.file else []
        if edge.name is None or not place.folders:
            return whole
        source = self._source(edge.module) if place.file else ModuleSyntax("")
        origin = source.bindings.get(edge.name, edge)
        if origin is None:
            return whole
        if origin != edge:  # equal for `from . import submodule`
            return self._modules(origin, seen | {edge})
        submodule = Import(f"{edge.module}.{edge.name}")
        if self._place(submodule.module) is not None:
            return self._modules(submodule)
        for star in source.stars:
            found = self._modules(Import(star, edge.name), seen | {edge})
            if found and edge.name in self._source(found[-1]).bindings:
                return found
        return whole

    def _counts(self, module: str) -> bool:
        """Tell whether the code of `module` belongs to the plugins or the user."""
        top = module.partition(".")[0]
        if top == RUNNER or module in self.declarations:
            return False
        return top in self.packages or _is_local(self._place(top))

    def _place(self, module: str) -> Place | None:
        if module not in self._places:
            self._places[module] = find_module(module)
        return self._places[module]

    def _source(self, module: str) -> ModuleSyntax:
        place = self._place(module)
        if place is None or place.file is None:
            return ModuleSyntax("")
        return read_source(place.file, module, bool(place.folders))


def missing_target(target: str) -> str | None:
    """Return the reason why `module:attribute` cannot be used, without an import; or None."""
    module, _, attribute = target.partition(":")
    place = find_module(module)
    if place is None or place.file is None:
        return f"{target!r}: there is no module {module!r} here or among the installed ones"
    if store := store_around(place.file):
        return f"{target!r} lies in the store {store}, from which no code is taken"
    if place.file.suffix != ".py":
        return None
    source = read_source(place.file, module, bool(place.folders))
    if attribute in source.bindings or source.stars or "__getattr__" in source.bindings:
        return None
    return f"{target!r}: {module!r} has no {attribute!r}{nearest(attribute, source.bindings)}"


def find_module(module: str) -> Place | None:
    """Find a module's file as the import system does, but run no parent package."""
    top, *rest = module.split(".")
    if not all(part.isidentifier() for part in (top, *rest)):
        return None
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return None
    if spec is None:
        return None
    file = Path(spec.origin) if spec.has_location and spec.origin else None
    place: Place | None = Place(file, tuple(spec.submodule_search_locations or ()))
    for part in rest:
        place = _find_part(part, place.folders) if place else None
    return place


def _is_local(place: Place | None) -> bool:
    """Tell whether a top-level module is neither installed nor of the standard library."""
    paths = [str(path) for path in (place.file, *place.folders) if path] if place else []
    return any(path.endswith(".py") or os.path.isdir(path) for path in paths) and not any(
        map(is_installed, paths)
    )


def is_installed(path: str) -> bool:
    """Tell whether a module's file is in the standard library or in any site-packages folder."""
    if not _SITE.isdisjoint(path.split(os.sep)):
        return True
    return any(path.startswith(folder + os.sep) for folder in _installed())


@functools.cache
def _installed() -> frozenset[str]:
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {sysconfig.get_path(kind) for kind in kinds}
    return frozenset({*folders, *site.getsitepackages(), site.getusersitepackages()})


def _find_part(name: str, folders: Iterable[str]) -> Place | None:
    namespaces = []
    for folder in folders:
        stem = os.path.join(folder, name)
        package = os.path.join(stem, "__init__.py")
        if os.path.isfile(package):
            return Place(Path(package), (stem,))
        if os.path.isfile(f"{stem}.py"):
            return Place(Path(f"{stem}.py"))
        if os.path.isdir(stem):
            namespaces.append(stem)
    return Place(None, tuple(namespaces)) if namespaces else None
