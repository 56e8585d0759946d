"""The check that a worker used the code and data of its cell's key: a key is a promise of both.

A cell may run hours after its planning, when a source, a file or a folder of data has changed. So
the worker compares. For a module it compares the source that this process compiled, in the key's
normal form: comments, edits after the import, and modules that were never imported do not count.
For a file or folder it compares the content before and after the stage, and checks that nothing was
written there in between, because it cannot see the stage's reads.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from pipeline.base.errors import BadInput, BrokenPromise
from pipeline.code.imports import check_imports, loaded, loaded_unseen, watch_imports
from pipeline.code.normal_form import RULE
from pipeline.planning.outside import (
    Reading,
    files_of,
    folders_of,
    read_file,
    read_folder,
    state_of_file,
    state_of_folder,
)

_T = TypeVar("_T")

_spoilt: list[str] = []  # why this process must not run another task

_WHAT_NOW = (
    "Nothing is published under the planned key. Restore it, or start the run again, which plans "
    "with the present one."
)

_ELSEWHERE = (
    " The run was planned on another machine: if this one has its own code, install the same on "
    "both, or ship the folder with the job: `fls submit`."
)


class CodePromise:
    """The modules of a key, and their digests.

    Args:
        ingredients: of the key; for accepted code, the digests are those of the present code.
        elsewhere: whether the run was planned on another machine.

    Raises:
        BrokenPromise: the key was made by another version of the runner, with other digests.
    """

    def __init__(self, ingredients: Mapping[str, Any], *, elsewhere: bool = False):
        self._remedy = _WHAT_NOW + (_ELSEWHERE if elsewhere else "")
        if ingredients.get("rule", RULE) != RULE:
            raise BrokenPromise(
                f"The worker's runner digests code by rule {RULE}, the driver's by rule "
                f"{ingredients['rule']}: they are different versions. Install the same version on "
                "all nodes, and start the run again."
            )
        accepted = ingredients.get("accepted") or {}
        self._code: Mapping[str, str] = accepted.get("code") or ingredients.get("code", {})
        watch_imports({module.partition(".")[0] for module in self._code})

    def outdated(self) -> str | None:
        """Return why this process's earlier tasks unfit it for this one, or None."""
        for module in self._code:
            if any(self._differing(module)):
                return f"the worker has run other code of {module} for an earlier cell"
        return _spoilt[0] if _spoilt else None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Let imports of other code fail inside the context."""
        check_imports(self.check_module)
        try:
            yield
        finally:
            check_imports(None)

    def check(self) -> None:
        """Check all modules that this process has run; other code raises `BrokenPromise`."""
        for module in self._code:
            self.check_module(module)

    def check_module(self, module: str) -> None:
        """Check one module.

        Raises:
            BrokenPromise: its code differs from the key's.
        """
        for file in self._differing(module):
            raise BrokenPromise(
                f"Module {module} ({file} on {socket.gethostname()}) has changed since the run was "
                f"planned. {self._remedy}"
            )

    def _differing(self, module: str) -> Iterator[Path]:
        """Yield the files of a module whose code, as it ran, differs from the key's."""
        promised = self._code.get(module)
        if promised is None:
            return
        for found in loaded(module):
            if found.source().digest != promised:
                yield found.file
        unseen = loaded_unseen(module)
        if unseen is not None and unseen[1].digest != promised:
            yield unseen[0]


@dataclass(frozen=True)
class _Thing:
    """A file or folder, with its name for people and its expected digest."""

    what: str
    path: Path
    promised: str
    read: Callable[[Path], Reading]
    look: Callable[[Path], str]


class DataPromise:
    """The files and folders that parameters name, and their digests.

    Args:
        ingredients: of the key.
        params: the stage's parameters.
    """

    def __init__(self, ingredients: Mapping[str, Any], params: BaseModel):
        host = socket.gethostname()
        self._things = [
            _Thing(f"{kind} {path} (params.{name}, on {host})", path, digests[name], read, look)
            for kind, paths, digests, read, look in (
                ("File", files_of(params), ingredients.get("files", {}), read_file, state_of_file),
                (
                    "Folder",
                    folders_of(params),
                    ingredients.get("data", {}),
                    read_folder,
                    state_of_folder,
                ),
            )
            for name, path in paths.items()
            if name in digests
        ]
        self._begun: dict[Path, str] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Read everything before the stage does, and again after it.

        The stage itself reports missing files. A process whose stage failed is not used again: it
        may hold changed data.

        Raises:
            BrokenPromise: a file or folder differs from the key's, or was written to.
        """
        for one in self._things:
            if one.path.exists():
                reading = one.read(one.path)
                if reading.digest != one.promised:
                    raise BrokenPromise(
                        f"{one.what} has changed since the run was planned. {_WHAT_NOW}"
                    )
                self._begun[one.path] = reading.state
        try:
            yield
            for one in self._things:
                reading = self._look_at(one, one.read)
                if reading.digest != one.promised:
                    raise BrokenPromise(f"{one.what} was changed while the stage ran. {_WHAT_NOW}")
                self._check_state(one, reading.state)
        except BaseException:
            _spoilt.extend(f"the worker may hold earlier data of {o.what}" for o in self._things)
            raise

    def check_untouched(self) -> None:
        """Check, without reading, that nothing was written since the stage began.

        A checkpoint must rest on the right data as well: the next attempt may find them restored.
        Raises `BrokenPromise`.
        """
        for one in self._things:
            if one.path in self._begun:
                self._check_state(one, self._look_at(one, one.look))

    def _check_state(self, one: _Thing, state: str) -> None:
        """Compare the state of a file or folder with the one before the stage.

        Raises:
            BrokenPromise: it was written.
        """
        if self._begun.get(one.path) != state:
            raise BrokenPromise(
                f"{one.what} was written, moved or given other rights while the stage ran: the "
                "data that the stage has read are not known, even if they are restored by now. "
                "Nothing is published. Start the run again."
            )

    def _look_at(self, one: _Thing, look: Callable[[Path], _T]) -> _T:
        """Look at a file or folder that existed before.

        Raises:
            BrokenPromise: it can no longer be read.
        """
        try:
            return look(one.path)
        except BadInput as error:
            raise BrokenPromise(
                f"{one.what} existed when the run was planned, and now: {error}. {_WHAT_NOW}"
            ) from None
