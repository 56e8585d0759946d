"""The tree of files in docs/architecture.md: `python -m tests.module_tree` writes it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
HEADING = "## The tree\n"
_FOLDERS = ["fishleg", "stages", "pipeline", "experiments", "benchmarks"]


def tree() -> str:
    """Return one line for each folder and module, with the first line of its docstring."""
    listed = ["git", "-C", str(ROOT), "ls-files", *_FOLDERS]
    tracked = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    modules = [Path(file) for file in tracked if file.endswith(".py")]
    rows = []
    for folder in _FOLDERS:
        rows += _rows(Path(folder), modules)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"    {name:<{width}}{about}".rstrip() for name, about in rows)


def _rows(folder: Path, modules: Iterable[Path]) -> list[tuple[str, str]]:
    """Return the rows of a folder: itself, its folders, then its modules."""
    indent = "  " * (len(folder.parts) - 1)
    rows = [(f"{indent}{folder.name}/", _first_line(folder / "__init__.py"))]
    inside = [module for module in modules if folder in module.parents]
    for name in sorted({module.relative_to(folder).parts[0] for module in inside}):
        if not name.endswith(".py"):
            rows += _rows(folder / name, inside)
    for module in sorted(inside):
        if module.parent == folder and module.name != "__init__.py":
            rows.append((f"{indent}  {module.name}", _first_line(module)))
    return rows


def _first_line(module: Path) -> str:
    if not (ROOT / module).is_file():  # a namespace package
        return ""
    text = ast.get_docstring(ast.parse((ROOT / module).read_text("utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def main() -> None:
    """Write the tree into the page, up to its next heading."""
    before, _, after = PAGE.read_text("utf-8").partition(HEADING)
    _, heading, rest = after.partition("\n## ")
    PAGE.write_text(f"{before}{HEADING}\n{tree()}\n{heading}{rest}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
