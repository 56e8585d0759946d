"""Provenance of a run's code: commit, uncommitted changes, versions of the environment.

A folder packed for a cluster has no `.git`; the packer writes the provenance into a file there.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from pipeline.base.errors import BadInput
from pipeline.base.secret_files import KEY_LINE, is_secret_file
from pipeline.base.secrets import redact
from pipeline.base.shapes import read_json

SOURCE_FILE = ".fls-source.json"
_DIFF_CHARACTERS = 500_000
_SHOWN_VERSIONS = 8
_SHOWN_CHANGES = 20


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The state of the code in a folder, and the versions of Python and its packages.

    Attributes:
        commit: the checked-out commit, or None outside of Git.
        changes: a line for each file that differs, such as `M pipeline.yaml`; `?` for new files.
        diff: the changes of tracked files as a patch, redacted, and cut after 500,000 characters.
        left_out: differing files that hold keys or passwords, and appear in neither of these.
        packages: installed distribution -> version.
        user: owner of the process, or packer of a packed folder.
        submitted_from: the machine that packed the folder, if its local paths are used; or None.
    """

    DOCUMENT: ClassVar[str] = "source"
    commit: str | None = None
    changes: Sequence[str] = ()
    diff: str = ""
    left_out: Sequence[str] = ()
    python: str = field(default_factory=platform.python_version)
    packages: Mapping[str, str] = field(default_factory=lambda: _installed())
    user: str = field(default_factory=lambda: this_user())
    submitted_from: str | None = None

    def tags(self) -> dict[str, str]:
        """Return the tags of a tracked run."""
        if self.commit is None:
            return {}
        shown = list(self.changes[:_SHOWN_CHANGES])
        if len(self.changes) > len(shown):
            shown.append(f"and {len(self.changes) - len(shown)} more")
        if self.left_out:
            shown.append(f"left out, as keys or passwords: {', '.join(self.left_out)}")
        return {
            "mlflow.source.git.commit": self.commit,
            "fls.uncommitted": "\n".join(shown) or "none",
        }

    def environment(self) -> dict[str, Any]:
        """Return the versions of Python and the packages, and the commit."""
        return {"python": self.python, "packages": dict(self.packages), "commit": self.commit}

    def to_json(self) -> str:
        """Return all fields as JSON with sorted keys."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def read_source(folder: Path) -> Provenance:
    """Return the provenance in the packer's file of a folder, or else from Git.

    Raises:
        BadInput: the file is malformed.
    """
    path = folder / SOURCE_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return look_at(folder)
    try:
        return read_json(Provenance, data)
    except ValueError as error:
        raise BadInput(
            f"{path.name} is not as `fls submit` writes it ({error}). Delete it, or submit again."
        ) from error


def look_at(folder: Path, files: Collection[str] | None = None) -> Provenance:
    """Return the provenance of a folder, from Git.

    Args:
        folder: inside or outside of a working tree.
        files: paths, relative to the folder, to look at; None for all.
    """
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not commit:
        return Provenance()
    pairs = _git(folder, "diff", "HEAD", "--relative", "--no-renames", "--name-status", "-z")
    words = pairs.split("\0")[:-1]
    states = dict(zip(words[1::2], words[::2], strict=True))
    for path in _git(folder, "ls-files", "--others", "--exclude-standard", "-z").split("\0")[:-1]:
        states[path] = "?"
    left_out = _secret_files(folder, states)
    states = {path: state for path, state in states.items() if path not in left_out}
    if files is not None:
        states = {p: state for p, state in states.items() if p in files or state == "D"}
    tracked = [path for path, state in states.items() if state != "?"]
    diff = ""
    if tracked:
        options = ("--relative", "--no-renames", "--no-color", "--no-ext-diff", "--no-textconv")
        diff = redact(_git(folder, "diff", "HEAD", *options, "--", *tracked))
    if len(diff) > _DIFF_CHARACTERS:
        diff = f"{diff[:_DIFF_CHARACTERS]}\n... cut after {_DIFF_CHARACTERS} characters\n"
    changes = [f"{state} {path}" for path, state in sorted(states.items())]
    return Provenance(commit=commit, changes=changes, diff=diff, left_out=sorted(left_out))


def _secret_files(folder: Path, paths: Collection[str]) -> set[str]:
    """Return the paths of files that hold keys or passwords, now or in the commit."""
    found = {path for path in paths if is_secret_file(path)}
    others = [path for path in paths if path not in found]
    for where in ("--untracked", "HEAD") if others else ():
        options = ("--files-with-matches", "-z", "--text", "-E", "-e", f"^{KEY_LINE}", where)
        done = _run_git(folder, "grep", *options, "--", *others)
        if done is None or done.returncode > 1:  # unsearchable files may hold keys
            return set(paths)
        found |= {name.removeprefix("HEAD:") for name in done.stdout.split("\0")[:-1]}
    return found


def changed_versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a phrase for Python and each package whose version changed.

    >>> changed_versions(
    ...     {"python": "3.11.2", "packages": {"torch": "2.12", "numpy": "2.0"}},
    ...     {"python": "3.11.2", "packages": {"torch": "2.13"}},
    ... )
    ['torch 2.12 -> 2.13']
    """
    old = {"python": before.get("python"), **before.get("packages", {})}
    return changes(old, {"python": after["python"], **after["packages"]})


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each value that changed, of the names in both.

    >>> changes({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4})
    ['b 2 -> 4']
    """
    shared = [name for name in old if name in new]
    return [f"{name} {old[name]} -> {new[name]}" for name in shared if old[name] != new[name]]


def other_versions(source: Provenance) -> str | None:
    """Return a sentence about versions here that differ from those of `source`, or None."""
    found = changed_versions(source.environment(), Provenance().environment())
    if not found:
        return None
    more = f", and {len(found) - _SHOWN_VERSIONS} more" if len(found) > _SHOWN_VERSIONS else ""
    return f"Other versions here than where it was submitted: {', '.join(found[:8])}{more}."


def this_user() -> str:
    """Return the name of this process's user, or the number of a user without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container
        return str(os.getuid())


def _installed() -> dict[str, str]:
    found = ((one.metadata["Name"], one.version) for one in metadata.distributions())
    return dict(sorted((name, version) for name, version in found if name))


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of a Git command; "" without Git, a repository or a commit."""
    done = _run_git(folder, *arguments)
    return done.stdout if done is not None and done.returncode == 0 else ""


def _run_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """Run a Git command; None without Git or after 30 s."""
    try:
        return subprocess.run(  # noqa: S603 - fixed commands, paths after `--`
            ["git", "--literal-pathspecs", *arguments],  # noqa: S607 - the user's own git
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
