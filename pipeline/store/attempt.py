"""One attempt at a cell: its local folder, its events, and its publication or failure.

`pipeline.store.layout` has the layout of the store.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict

from pipeline.base.errors import StorageUnavailable, StoreError
from pipeline.base.names import numbers
from pipeline.base.shapes import to_json
from pipeline.stage import StageError
from pipeline.store import logs
from pipeline.store.checksum import lines_with_checksum, verified, verified_lines, with_checksum
from pipeline.store.events import EVENTS_AT_ONCE, merge
from pipeline.store.layout import (
    CHECKPOINTS,
    DIGESTS,
    OUTPUTS,
    attempt_folder,
    attempts_folder,
    checkpoint_folder,
    checkpoints_folder,
    event_segment,
    failure_path,
    manifest_path,
    output_folder,
)
from pipeline.store.manifest import FileDigest, Manifest, digest_files
from pipeline.store.storage.base import AbstractStorage

_CHECKPOINTS_KEPT = 2
_SAID_BYTES = 16_000_000  # of events, of which an attempt that says more merges none


class Failure(TypedDict, total=False):
    """The reason why an attempt has no result.

    `user` marks what no retry corrects, see `pipeline.worker.failures`.
    """

    message: Required[str]
    traceback: str
    user: bool


class Attempt:
    """An attempt that this process makes; `Store.begin_attempt` begins one.

    It is a context manager: on leaving, a scratch folder is deleted.

    Attributes:
        key: the cell's key.
        number: the attempt's fencing number, unique under the key.
        folder: local folder for the stage's context; holds `checkpoints/`, `outputs/` and `log/`.
        passed_over: checkpoints of earlier attempts that this one cannot use, each with the reason.
    """

    def __init__(self, storage: AbstractStorage, key: str, number: int):
        self.key = key
        self.number = number
        self._storage = storage
        self._path = attempt_folder(key, number)
        self._segments = 0
        # Their content: a storage that is far away would take minutes to give back a day's.
        self._said: list[bytes] = []
        self._said_bytes = 0
        self._log: dict[str, tuple[int, int]] = {}  # what is stored of it: size and time of writing
        self.passed_over: list[str] = []
        self.folder = storage.workspace(self._path)
        try:
            self._take_over_checkpoint()
        except BaseException:  # then no caller will leave this attempt as a context
            storage.release(self.folder)
            raise

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *exception: object) -> None:
        self._storage.release(self.folder)

    def append_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Store events as the next segment.

        A `checkpoint` event stores the checkpoint first; but what came before it is stored earlier,
        in a segment of its own: an attempt that resumes from the checkpoint does not say it again.
        """
        types = [event["type"] for event in events]
        if "checkpoint" in types:
            first = types.index("checkpoint")
            self._append(events[:first])
            self._save_checkpoint()
            events = events[first:]
        self._append(events)

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Write a segment; after the `end`, which is the last event, merge all.

        The segments of an attempt that said a very great deal stay: they are large, and few.
        """
        if not events:
            return
        data = lines_with_checksum(events)
        self._segments += 1
        self._storage.write(event_segment(self.key, self.number, self._segments), data)
        self._said.append(data)
        self._said_bytes += len(data)
        if self._said_bytes > _SAID_BYTES:
            self._said.clear()
        elif events[-1]["type"] == "end" and len(self._said) == self._segments:
            self._merge_segments()

    def _merge_segments(self) -> None:
        """Leave as few segments as hold the events without being too large to be read at once.

        Each replaces the first of those that it holds, which are deleted only then: at any moment,
        and wherever this is interrupted, a reader finds each event once. See
        `pipeline.store.events`.
        """
        number, segments = 1, [verified_lines(data) for data in self._said]
        while segments:
            sizes = accumulate(map(len, segments))
            count = max(1, sum(size <= EVENTS_AT_ONCE for size in sizes))
            parts, segments = segments[:count], segments[count:]
            if count > 1:
                path = event_segment(self.key, self.number, number)
                self._storage.write(path, lines_with_checksum(merge(parts)))
                merged = range(number + 1, number + count)
                self._storage.remove_files(
                    [event_segment(self.key, self.number, one) for one in merged]
                )
            number += count

    def save_log(self) -> None:
        """Store what is new in `log/`, and delete what was left out there."""
        folder, found = self.folder / logs.FOLDER, {}
        for path in folder.iterdir() if folder.is_dir() else ():
            with suppress(FileNotFoundError):  # left out meanwhile
                about = path.stat()
                found[path.name] = about.st_size, about.st_mtime_ns
                if self._log.get(path.name) != found[path.name]:
                    self._storage.save_file(path, f"{self._path}/{logs.FOLDER}/{path.name}")
        for name in self._log.keys() - found.keys():
            self._storage.remove(f"{self._path}/{logs.FOLDER}/{name}")
        self._log = found

    def publish(
        self, ingredients: Mapping[str, Any], outputs: Iterable[str], making: Mapping[str, Any]
    ) -> bool:
        """Publish what `outputs/` holds as the key's result.

        Args:
            ingredients: see `pipeline.planning.keys.Identity`.
            outputs: names of the declared outputs.
            making: see `pipeline.store.manifest.Making`; JSON.

        Returns:
            True, or False if another attempt was first; then this one's work is discarded.

        All outputs are on the disk, or in the object store, before the manifest is.

        Raises:
            StageError: the stage left out a declared output, or wrote one that is not declared.
            StoreError: an output holds a symbolic link or the like, or a file with a wild name.
            FileNotFoundError: a file vanished while it was read; or the whole attempt was set
                aside with a damaged result, and what is left of its outputs is not all.

        Cost: one read of all output files; on remote storage an upload.
        """
        try:
            found = self._outputs(list(outputs))
            for name in found:
                folder = self.folder / OUTPUTS / name
                self._storage.save(folder, output_folder(self.key, self.number, name))
            self._check_not_set_aside()
        except (StageError, StoreError, FileNotFoundError):
            if not self._beaten():
                raise
            first = False  # the winner has deleted what this attempt wrote
        else:
            manifest = Manifest(
                key=self.key,
                attempt=self.number,
                ingredients=ingredients,
                outputs=found,
                making=making,
                time=time.time(),
            )
            first = self._storage.create(manifest_path(self.key), with_checksum(to_json(manifest)))
        if first:
            self._clear_up()
        else:
            self._storage.remove(f"{self._path}/{OUTPUTS}")
            self._storage.remove(f"{self._path}/{CHECKPOINTS}")
            self.fail({"message": "another attempt published first; this one's work is discarded"})
        return first

    def fail(self, error: Failure) -> None:
        """Record that the attempt ends without a result; checkpoints stay for the next one.

        Args:
            error: the reason; JSON.
        """
        self._storage.write(failure_path(self.key, self.number), with_checksum(error))

    def _check_not_set_aside(self) -> None:
        """Refuse to publish what is left of an attempt whose folder was moved away meanwhile.

        Raises:
            FileNotFoundError: it was.
        """
        try:
            self._storage.read(f"{self._path}/attempt.json")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"attempt {self.number} was set aside together with a damaged result; what it "
                "has written since may not be all, so it begins again"
            ) from error

    def _beaten(self) -> bool:
        """Tell whether another attempt has published."""
        try:
            self._storage.read(manifest_path(self.key))
        except FileNotFoundError:
            return False
        return True

    def _outputs(self, declared: Sequence[str]) -> dict[str, dict[str, FileDigest]]:
        """Return output -> file -> digest and size.

        Raises:
            StageError: see `publish`.
        """
        root = self.folder / OUTPUTS
        written = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        extra = [name for name in written if name not in declared]
        if extra:
            raise StageError(f"the stage wrote an output that it does not declare: {extra[0]!r}.")
        found = {name: digest_files(root / name) for name in written}
        for name in declared:
            if not found.get(name):
                raise StageError(f"the stage wrote nothing into its output {name!r}.")
        return found

    def _clear_up(self) -> None:
        """Delete what this attempt and the earlier ones need no more: all but their records."""
        self._storage.remove(f"{self._path}/{CHECKPOINTS}")
        for number in _earlier(self._storage, self.key, self.number):
            for part in (CHECKPOINTS, OUTPUTS):
                self._storage.remove(f"{attempt_folder(self.key, number)}/{part}")

    # -- in-stage checkpoints

    def _save_checkpoint(self) -> None:
        """Store the newest checkpoint, its digests last; delete all but the one before it."""
        root = self.folder / CHECKPOINTS
        found = root.iterdir() if root.is_dir() else ()  # a winner deletes it with all else
        newest = max(numbers(path.name for path in found), default=0)
        if not newest:
            return
        folder = root / f"{newest:06d}"
        path = checkpoint_folder(self.key, self.number, newest)
        digests = _digest_checkpoint(folder)
        self._storage.save(folder, path)
        self._storage.write(f"{path}/{DIGESTS}", with_checksum(digests))
        for old in _checkpoints(self._storage, self.key, self.number):
            if old <= newest - _CHECKPOINTS_KEPT:
                self._storage.remove(checkpoint_folder(self.key, self.number, old))

    def _take_over_checkpoint(self) -> None:
        """Put the newest whole checkpoint of earlier attempts into this one's folder.

        Raises:
            StorageUnavailable: perhaps there is one, but it cannot be had now.
        """
        found = [
            (checkpoint, number)
            for number in _earlier(self._storage, self.key, self.number)
            for checkpoint in _checkpoints(self._storage, self.key, number)
        ]
        for checkpoint, number in sorted(found, reverse=True):
            path = checkpoint_folder(self.key, number, checkpoint)
            part = self.folder / CHECKPOINTS / f"{checkpoint:06d}.part"
            try:
                wanted = verified(self._storage.read(f"{path}/{DIGESTS}"))
                self._storage.load(path, part)
                whole = _digest_checkpoint(part) == wanted
                why = "its files differ from their digests"
            except StorageUnavailable:  # the next attempt may find it
                raise
            except FileNotFoundError:  # it is in the making, or its attempt lives, further on
                whole, why = False, ""
            except shutil.Error as error:  # of links: another owner's files, or another device
                whole, why = False, str(error.args[0][0][2])
            except (ValueError, StoreError) as error:  # a link in it, for example
                whole, why = False, str(error)
            if whole:
                part.replace(part.with_suffix(""))
                return
            if why:
                self.passed_over.append(f"checkpoint {checkpoint} of attempt {number} ({why})")
            shutil.rmtree(part, ignore_errors=True)


def attempt_numbers(storage: AbstractStorage, folder: str) -> list[int]:
    """Return the numbers of the attempts in a folder, ascending."""
    return sorted(numbers(storage.names(folder)))


def _earlier(storage: AbstractStorage, key: str, before: int) -> list[int]:
    return [number for number in attempt_numbers(storage, attempts_folder(key)) if number < before]


def whole_checkpoints(storage: AbstractStorage, key: str, number: int) -> list[str]:
    """Return where the checkpoints of an attempt are that were stored whole, oldest first."""
    found = [checkpoint_folder(key, number, one) for one in _checkpoints(storage, key, number)]
    return [folder for folder in found if storage.files(f"{folder}/{DIGESTS}")]


def _checkpoints(storage: AbstractStorage, key: str, number: int) -> list[int]:
    return sorted(numbers(storage.names(checkpoints_folder(key, number))))


def _digest_checkpoint(folder: Path) -> dict[str, FileDigest]:
    found = digest_files(folder)
    found.pop(DIGESTS, None)
    return found
