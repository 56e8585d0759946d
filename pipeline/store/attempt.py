"""One attempt at a cell: its local folder, its events, and its publication or failure."""

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
from pipeline.store import layout, logs
from pipeline.store.checksum import lines_with_checksum, verified, verified_lines, with_checksum
from pipeline.store.events import EVENTS_AT_ONCE, merge
from pipeline.store.manifest import FileDigest, Manifest, digest_files
from pipeline.store.storage.base import AbstractStorage

_CHECKPOINTS_KEPT = 2
_SAID_BYTES = 16_000_000  # an attempt with more bytes of events merges none


class Failure(TypedDict, total=False):
    """The reason why an attempt has no result.

    `user` marks an error that no retry corrects, see `pipeline.worker.failures`.
    """

    message: Required[str]
    traceback: str
    user: bool


class Attempt:
    """An attempt of this process, from `Store.begin_attempt`; a context manager.

    Attributes:
        key: the cell's key.
        number: the attempt's fencing number, unique under the key.
        folder: local folder with `checkpoints/`, `outputs/` and `log/`; a scratch folder is deleted
            at the end.
        passed_over: unusable checkpoints of earlier attempts, each with the reason.
    """

    def __init__(self, storage: AbstractStorage, key: str, number: int):
        self.key = key
        self.number = number
        self._storage = storage
        self._path = layout.attempt_folder(key, number)
        self._segments = 0
        # The segments' content: reading back a day's events from a remote storage takes minutes.
        self._said: list[bytes] = []
        self._said_bytes = 0
        self._log: dict[str, tuple[int, int]] = {}  # stored file -> its size and time of writing
        self.passed_over: list[str] = []
        self.folder = storage.workspace(self._path)
        try:
            self._take_over_checkpoint()
        except BaseException:  # `__exit__` will not run
            storage.release(self.folder)
            raise

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *exception: object) -> None:
        self._storage.release(self.folder)

    def append_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Store events as the next segment.

        A `checkpoint` event stores the checkpoint. Earlier events are stored before it, in their
        own segment: an attempt that resumes from the checkpoint does not repeat them.
        """
        types = [event["type"] for event in events]
        if "checkpoint" in types:
            first = types.index("checkpoint")
            self._append(events[:first])
            self._save_checkpoint()
            events = events[first:]
        self._append(events)

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Write a segment; after the `end` event, merge all, unless they are very large."""
        if not events:
            return
        data = lines_with_checksum(events)
        self._segments += 1
        self._storage.write(layout.event_segment(self.key, self.number, self._segments), data)
        self._said.append(data)
        self._said_bytes += len(data)
        if self._said_bytes > _SAID_BYTES:
            self._said.clear()
        elif events[-1]["type"] == "end" and len(self._said) == self._segments:
            self._merge_segments()

    def _merge_segments(self) -> None:
        """Merge the segments into as few as possible; see `pipeline.store.events`.

        A merged segment replaces its first part before the others are deleted, so a reader finds
        each event once at any moment.
        """
        number, segments = 1, [verified_lines(data) for data in self._said]
        while segments:
            sizes = accumulate(map(len, segments))
            count = max(1, sum(size <= EVENTS_AT_ONCE for size in sizes))
            parts, segments = segments[:count], segments[count:]
            if count > 1:
                path = layout.event_segment(self.key, self.number, number)
                self._storage.write(path, lines_with_checksum(merge(parts)))
                merged = range(number + 1, number + count)
                self._storage.remove_files(
                    [layout.event_segment(self.key, self.number, one) for one in merged]
                )
            number += count

    def save_log(self) -> None:
        """Store new files of `log/`, and delete stored ones that are gone there."""
        folder, found = self.folder / logs.FOLDER, {}
        for path in folder.iterdir() if folder.is_dir() else ():
            with suppress(FileNotFoundError):  # deleted meanwhile
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
        """Publish `outputs/` as the key's result; the manifest is stored after all outputs.

        Args:
            ingredients: see `pipeline.planning.keys.Identity`.
            outputs: names of the declared outputs.
            making: see `pipeline.store.manifest.Making`; JSON.

        Returns:
            True, or False if another attempt was first; then this one's work is discarded.

        Raises:
            StageError: the stage left out a declared output, or wrote an undeclared one.
            StoreError: an output contains a link or a file with an invalid name.
            FileNotFoundError: a file vanished during the read, or the attempt was set aside with a
                damaged result.

        Cost: one read of all output files; on remote storage an upload.
        """
        try:
            found = self._outputs(list(outputs))
            for name in found:
                folder = self.folder / layout.OUTPUTS / name
                self._storage.save(folder, layout.output_folder(self.key, self.number, name))
            self._check_not_set_aside()
        except (StageError, StoreError, FileNotFoundError):
            if not self._beaten():
                raise
            first = False  # the winner has deleted this attempt's files
        else:
            manifest = Manifest(
                key=self.key,
                attempt=self.number,
                ingredients=ingredients,
                outputs=found,
                making=making,
                time=time.time(),
            )
            first = self._storage.create(
                layout.manifest_path(self.key), with_checksum(to_json(manifest))
            )
        if first:
            self._clear_up()
        else:
            self._storage.remove(f"{self._path}/{layout.OUTPUTS}")
            self._storage.remove(f"{self._path}/{layout.CHECKPOINTS}")
            self.fail({"message": "another attempt published first; this one's work is discarded"})
        return first

    def fail(self, error: Failure) -> None:
        """Record that the attempt ends without a result; checkpoints stay for the next one."""
        self._storage.write(layout.failure_path(self.key, self.number), with_checksum(error))

    def _check_not_set_aside(self) -> None:
        try:
            self._storage.read(f"{self._path}/attempt.json")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"attempt {self.number} was set aside together with a damaged result; its outputs "
                "may be incomplete, so it begins again"
            ) from error

    def _beaten(self) -> bool:
        """Tell whether another attempt has published."""
        try:
            self._storage.read(layout.manifest_path(self.key))
        except FileNotFoundError:
            return False
        return True

    def _outputs(self, declared: Sequence[str]) -> dict[str, dict[str, FileDigest]]:
        root = self.folder / layout.OUTPUTS
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
        """Delete this attempt's checkpoints, and checkpoints and outputs of earlier attempts."""
        self._storage.remove(f"{self._path}/{layout.CHECKPOINTS}")
        for number in _earlier(self._storage, self.key, self.number):
            for part in (layout.CHECKPOINTS, layout.OUTPUTS):
                self._storage.remove(f"{layout.attempt_folder(self.key, number)}/{part}")

    # -- in-stage checkpoints

    def _save_checkpoint(self) -> None:
        """Store the newest checkpoint, its digests last; delete all but the one before it."""
        root = self.folder / layout.CHECKPOINTS
        found = root.iterdir() if root.is_dir() else ()  # a winner may have deleted it
        newest = max(numbers(path.name for path in found), default=0)
        if not newest:
            return
        folder = root / f"{newest:06d}"
        path = layout.checkpoint_folder(self.key, self.number, newest)
        digests = _digest_checkpoint(folder)
        self._storage.save(folder, path)
        self._storage.write(f"{path}/{layout.DIGESTS}", with_checksum(digests))
        for old in _checkpoints(self._storage, self.key, self.number):
            if old <= newest - _CHECKPOINTS_KEPT:
                self._storage.remove(layout.checkpoint_folder(self.key, self.number, old))

    def _take_over_checkpoint(self) -> None:
        # Copies the newest whole checkpoint of earlier attempts into this one's folder.
        found = [
            (checkpoint, number)
            for number in _earlier(self._storage, self.key, self.number)
            for checkpoint in _checkpoints(self._storage, self.key, number)
        ]
        for checkpoint, number in sorted(found, reverse=True):
            path = layout.checkpoint_folder(self.key, number, checkpoint)
            part = self.folder / layout.CHECKPOINTS / f"{checkpoint:06d}.part"
            try:
                wanted = verified(self._storage.read(f"{path}/{layout.DIGESTS}"))
                self._storage.load(path, part)
                whole = _digest_checkpoint(part) == wanted
                why = "its files differ from their digests"
            except StorageUnavailable:  # the next attempt may find it
                raise
            except FileNotFoundError:  # unfinished, or deleted by its attempt, which still lives
                whole, why = False, ""
            except shutil.Error as error:  # hard links to another owner's files, or across devices
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
    return [n for n in attempt_numbers(storage, layout.attempts_folder(key)) if n < before]


def whole_checkpoints(storage: AbstractStorage, key: str, number: int) -> list[str]:
    """Return the folders of an attempt's complete checkpoints, oldest first."""
    found = [
        layout.checkpoint_folder(key, number, one) for one in _checkpoints(storage, key, number)
    ]
    return [folder for folder in found if storage.files(f"{folder}/{layout.DIGESTS}")]


def _checkpoints(storage: AbstractStorage, key: str, number: int) -> list[int]:
    return sorted(numbers(storage.names(layout.checkpoints_folder(key, number))))


def _digest_checkpoint(folder: Path) -> dict[str, FileDigest]:
    found = digest_files(folder)
    found.pop(layout.DIGESTS, None)
    return found
