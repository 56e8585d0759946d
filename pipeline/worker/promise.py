"""Whether a worker used what the key of its cell says: a key is a promise about what was used.

A plan is made once, and a cell may run hours later, when a source, a file or a folder of data has
been changed. So the worker compares. Of a module counts the source that this process compiled, in
the key's normal form: a comment costs nothing, nor does an edit after the import, and a module that
was never imported may be anything. Of a file or folder count its content when the stage begins and
when it ends, and that nothing was written there in between, for what the stage has read is not
seen.
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

_spoilt: list[str] = []  # why this process is not to run another task

_WHAT_NOW = (
    "Nothing is published under the key that was planned. Put it back as it was, or start the run "
    "again: it is then planned with what is there."
)

_ELSEWHERE = (
    " It was planned on another machine: where this one has code of its own, install the same on "
    "both, or ship the folder with the job: `fls submit`."
)


class CodePromise:
    """The modules that a key is made of, and their digests.

    Args:
        ingredients: of the key; where its code was accepted, the code behind that is used.
        elsewhere: whether the run was planned on another machine.

    Raises:
        BrokenPromise: the key was made by another version of the runner, with other digests.
    """

    def __init__(self, ingredients: Mapping[str, Any], *, elsewhere: bool = False):
        self._remedy = _WHAT_NOW + (_ELSEWHERE if elsewhere else "")
        if ingredients.get("rule", RULE) != RULE:
            raise BrokenPromise(
                f"The worker's runner makes digests of code by rule {RULE}, the driver's by rule "
                f"{ingredients['rule']}: they are different versions. Install the same one on all "
                "nodes, and start the run again."
            )
        accepted = ingredients.get("accepted") or {}
        self._code: Mapping[str, str] = accepted.get("code") or ingredients.get("code", {})
        watch_imports({module.partition(".")[0] for module in self._code})

    def outdated(self) -> str | None:
        """Say why the task needs another process, because of what this one ran before; or None."""
        for module in self._code:
            if any(self._differing(module)):
                return f"the worker has run other code of {module} for an earlier cell"
        return _spoilt[0] if _spoilt else None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Have an import of other code fail, as long as the context lasts."""
        check_imports(self.check_module)
        try:
            yield
        finally:
            check_imports(None)

    def check(self) -> None:
        """Check all modules that this process has run.

        A module that is other code than the key says raises `BrokenPromise`.
        """
        for module in self._code:
            self.check_module(module)

    def check_module(self, module: str) -> None:
        """Check one module.

        Raises:
            BrokenPromise: it is other code than the key says.
        """
        for file in self._differing(module):
            raise BrokenPromise(
                f"Module {module} ({file} on {socket.gethostname()}) is not what it was when the "
                f"run was planned. {self._remedy}"
            )

    def _differing(self, module: str) -> Iterator[Path]:
        """Yield the files of a module that are, or were when they ran, other code."""
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
    """A file or folder: what it is called for people, and what its digest should be."""

    what: str
    path: Path
    promised: str
    read: Callable[[Path], Reading]
    look: Callable[[Path], str]


class DataPromise:
    """The files and folders that parameters name, and their digests.

    Args:
        ingredients: of the key.
        params: the stage's.
    """

    def __init__(self, ingredients: Mapping[str, Any], params: BaseModel):
        files, folders = ingredients.get("files", {}), ingredients.get("data", {})
        host = socket.gethostname()
        self._things = [
            _Thing(
                f"File {path} (params.{name}, on {host})",
                path,
                files[name],
                read_file,
                state_of_file,
            )
            for name, path in files_of(params).items()
            if name in files
        ] + [
            _Thing(
                f"Folder {path} (params.{name}, on {host})",
                path,
                folders[name],
                read_folder,
                state_of_folder,
            )
            for name, path in folders_of(params).items()
            if name in folders
        ]
        self._begun: dict[Path, str] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Read everything before the stage does, and again when it has ended.

        What is not there is left to the stage, which knows what to say of it. A process in which
        a stage failed is not used again: it may keep what it read of changed data.

        Raises:
            BrokenPromise: something is not what the key says, or was written to.
        """
        for one in self._things:
            if one.path.exists():
                reading = one.read(one.path)
                if reading.digest != one.promised:
                    raise BrokenPromise(
                        f"{one.what} is not what it was when the run was planned. {_WHAT_NOW}"
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
            _spoilt.extend(f"the worker may keep what it read of {o.what}" for o in self._things)
            raise

    def check_untouched(self) -> None:
        """Check that nothing was written since the beginning, without reading anything.

        What a stage keeps to go on from must rest on the right data as well: the next attempt may
        find them put back. Raises `BrokenPromise`.
        """
        for one in self._things:
            if one.path in self._begun:
                self._check_state(one, self._look_at(one, one.look))

    def _check_state(self, one: _Thing, state: str) -> None:
        """Raise if something was written since the beginning.

        Raises:
            BrokenPromise: it was.
        """
        if self._begun.get(one.path) != state:
            raise BrokenPromise(
                f"{one.what} was written, moved or given other rights while the stage ran: even "
                "where it is by now as it was, what the stage has read is not known. Nothing is "
                "published. Start the run again."
            )

    def _look_at(self, one: _Thing, look: Callable[[Path], _T]) -> _T:
        """Look at something that was there.

        Raises:
            BrokenPromise: it cannot be read any more.
        """
        try:
            return look(one.path)
        except BadInput as error:
            raise BrokenPromise(
                f"{one.what} was there when the run was planned, and now: {error}. {_WHAT_NOW}"
            ) from None
