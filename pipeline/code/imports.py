"""A record of the source that this process has run of each module of the plugins and the user.

Python keeps no such record, and uses bytecode of a source with equal size and time. So the first
finder gives these modules to a loader that compiles and records the source, and uses no bytecode.
Installed modules and the standard library are loaded as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from pipeline.code.digest import RUNNER, is_installed
from pipeline.code.normal_form import ModuleSyntax
from pipeline.code.syntax import parse_source, read_source


@dataclass(frozen=True)
class Loaded:
    """The source that was compiled for a module."""

    module: str
    file: Path
    data: bytes
    is_package: bool

    def source(self) -> ModuleSyntax:
        """Return its syntax."""
        return parse_source(self.data, self.file, self.module, self.is_package)


class _Imports(MetaPathFinder):
    """Finds modules as the finders after it do, and records the source of those that count."""

    def __init__(self) -> None:
        self.packages: set[str] = set()
        self.loaded: dict[str, dict[bytes, Loaded]] = {}
        self.check: Callable[[str], None] | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        after = sys.meta_path[sys.meta_path.index(self) + 1 :]
        for finder in after:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if type(spec.loader) is SourceFileLoader and self.counts(fullname, spec):
                    spec.loader = _Loader(spec.loader.name, spec.loader.path)
                return spec
        return None

    def counts(self, module: str, spec: ModuleSpec) -> bool:
        """Tell whether a module's code may enter a key; see `pipeline.code.digest`."""
        top = module.partition(".")[0]
        return top != RUNNER and (top in self.packages or not is_installed(spec.origin or ""))

    def note(self, found: Loaded) -> None:
        """Record a source before it runs, and check its module."""
        self.loaded.setdefault(found.module, {})[found.data] = found
        if self.check is not None:
            self.check(found.module)


class _Loader(SourceFileLoader):
    """Compiles a module's source and ignores its bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        data = self.get_data(path)
        _imports.note(Loaded(fullname, Path(path), data, self.is_package(fullname)))
        code: CodeType = self.source_to_code(data, path)
        return code


_imports = _Imports()


def watch_imports(packages: Iterable[str]) -> None:
    """Record the modules that are loaded from now on; may be called again.

    Args:
        packages: top-level packages that count even where they are installed.
    """
    _imports.packages.update(packages)
    if _imports not in sys.meta_path:
        sys.meta_path.insert(0, _imports)


def check_imports(check: Callable[[str], None] | None) -> None:
    """Call `check` with each module's name before the module runs; it may raise."""
    _imports.check = check


def loaded(module: str) -> list[Loaded]:
    """Return all sources that this process has compiled of a module; several after a reload."""
    return list(_imports.loaded.get(module, {}).values())


def loaded_unseen(module: str) -> tuple[Path, ModuleSyntax] | None:
    """Return the current source of a module that was imported before recording began.

    None if it was not imported, is recorded, or has no source.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module in _imports.loaded or not file.endswith(".py"):
        return None
    is_package = hasattr(sys.modules[module], "__path__")
    return Path(file), read_source(Path(file), module, is_package)
