"""A newcomer's path: everything that the README has a reader do, in a fresh clone.

    python -m tests.acceptance

It clones this checkout, with its uncommitted changes, and runs `make run` and every other command
and code block of the README there, as the README has them; `EXCEPTIONS` are run otherwise. Then it
builds the wheel and uses it in environments of their own. It takes about ten minutes on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.acceptance import wheel
from tests.acceptance.readme import ROOT, Piece, pieces
from tests.acceptance.shell import Shell, step
from tests.acceptance.walk import EXCEPTIONS, Walk


def main() -> None:
    """Run all steps; the first that fails ends it with the output of its command."""
    began = time.monotonic()
    found = list(pieces((ROOT / "README.md").read_text("utf-8")))
    with tempfile.TemporaryDirectory(prefix="newcomer-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with step("git clone"):
            clone(folder / "clone")
        walk_through(Shell(folder / "clone"), found)
        wheel.use(Shell(folder), folder / "clone", found)
        print(f"{time.monotonic() - began:7.1f} s  all. Run otherwise than the README has it:")
        for beginning, reason in EXCEPTIONS.items():
            print(f"           {beginning}: {reason}")


def clone(folder: Path) -> None:
    """Clone this checkout, and copy what is not committed."""
    git("clone", "-q", str(ROOT), str(folder))
    changed = git("diff", "-z", "--name-only", "HEAD")
    for name in (changed + git("ls-files", "-z", "--others", "--exclude-standard")).split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        elif name:
            target.unlink(missing_ok=True)


def git(*arguments: str) -> str:
    """Run git in this checkout and return its output."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def walk_through(shell: Shell, found: list[Piece]) -> None:
    """Run all commands and blocks in the clone but those of the wheel."""
    with Walk(shell) as walk:
        for piece in found:
            if piece.kind == "code":
                walk.code(piece.text)
            elif piece.kind == "command":
                walk.command(piece.text)


if __name__ == "__main__":
    main()
