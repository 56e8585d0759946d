"""The ledger of the fault cases: a JSON line each, so that what was stopped goes on.

A case is done once its newest line of the same code says `ok`. Lines of other code, and lines that
a kill has torn, stay where they are and count for nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.cluster.packing import collect

ROOT = Path(__file__).parents[2]
# The code, and what else the fault tests read of the project.
_SOURCES = ("fishleg/", "pipeline/", "stages/", "tests/")
_SOURCES += ("deploy/", "docs/cluster.md", "experiments/", "pipeline.yaml")


def code_digest() -> str:
    """Return a digest of all that the outcome of a case may depend on."""
    digest = hashlib.sha256()
    for path in sorted(collect(ROOT).files):
        if path.startswith(_SOURCES):
            content = hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
            digest.update(f"{path}\0{content}\n".encode())
    return digest.hexdigest()[:12]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ledger, oldest first, without those that are torn."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def newest(lines: Iterable[dict[str, Any]], code: str) -> dict[str, dict[str, Any]]:
    """Return case -> its newest line of that code."""
    return {line["case"]: line for line in lines if line.get("code") == code}


class Ledger:
    """What this run is about, and what is known of it.

    Args:
        path: of the file.
        only: the case that this run is about, or a pattern of several.
    """

    def __init__(self, path: Path, only: str = "*"):
        self.path = path
        self.code = code_digest()
        self._only = only
        self._cases: list[str] = []
        self._broken: list[str] = []
        self._left = 0
        self._lines = newest(read_lines(path), self.code)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._append(b"\n")

    def plan(self, cases: Iterable[str]) -> list[str]:
        """Make cases part of this run; return those that are still to do."""
        mine = [case for case in cases if self._is_wanted(case)]
        todo = [case for case in mine if not self._is_done(case)]
        self._cases += mine
        self._left = len(todo)
        return todo

    def was_lost(self, case: str) -> bool:
        """Tell whether a case was tried, in vain."""
        return case in self._lines and not self._is_done(case)

    def write(self, case: str, seconds: float, problems: list[str], **details: Any) -> None:
        """Keep what was found in a case, and say so."""
        line = {"case": case, "ok": not problems, "seconds": round(seconds, 1)}
        line |= {"problems": problems, **details, "code": self.code}
        self._append(json.dumps(line).encode() + b"\n")
        self._lines[case] = line
        self._left -= 1
        verdict = "LOST" if problems else "ok"
        print(f"{self._left:4} left  {verdict:4} {seconds:6.1f} s  {case}", flush=True)

    def note_broken(self, what: str) -> None:
        """Note for this run's summary what kept cases from being found or run."""
        self._broken.append(what)

    def summarise(self) -> int:
        """Print what this run has come to, and return the exit code."""
        lost = [case for case in self._cases if not self._is_done(case)]
        print(f"\n{len(self._cases)} cases of code {self.code}, {len(lost)} lost")
        for case in lost:
            problems = self._lines[case]["problems"] if case in self._lines else ["not run"]
            print(f"  {case}: {'; '.join(problems)}")
        for what in self._broken:
            print(f"  {what}")
        return 1 if lost or self._broken or not self._cases else 0

    def _is_wanted(self, case: str) -> bool:
        return case == self._only or fnmatch.fnmatchcase(case, self._only)

    def _is_done(self, case: str) -> bool:
        return case in self._lines and self._lines[case]["ok"]

    def _append(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
