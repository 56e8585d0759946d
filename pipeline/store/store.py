"""The content-addressed store: results by key, attempts at them, and documents of runs.

A manifest is created last and exclusively, and never overwritten. It holds the sha256 of every
output file, and reading checks it; every document has a checksum (`pipeline.store.checksum`). Each
attempt has a number and its own folder, so two workers at one key never touch the same file; the
second to publish discards its work. `pipeline.store.layout` describes the paths.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.base.errors import Damaged, DamagedDocument, StorageUnavailable, StoreError
from pipeline.base.names import numbers
from pipeline.base.shapes import to_json
from pipeline.store import layout
from pipeline.store.attempt import Attempt, Failure, attempt_numbers
from pipeline.store.checksum import read_verified, verified_lines, with_checksum
from pipeline.store.event_shapes import require_event
from pipeline.store.events import split
from pipeline.store.logs import Segment
from pipeline.store.logs import segments as log_segments
from pipeline.store.manifest import Manifest, digest_files
from pipeline.store.runs import RunStore
from pipeline.store.storage.base import patience_s, retry


class Store(RunStore):
    """A store at `url`: a folder or an fsspec URL. Construction reads and writes nothing."""

    # -- results

    def manifest(self, key: str) -> Manifest | None:
        """Return the manifest of a complete result, or None.

        Raises:
            Damaged: the manifest is unreadable, or another key's.
        """
        try:
            manifest = read_verified(Manifest, self.storage.read(layout.manifest_path(key)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Damaged(key, f"its manifest cannot be read ({error})") from error
        if manifest.key != key:
            raise Damaged(key, f"its manifest is that of {manifest.key[:12]}")
        return manifest

    def readable(self, key: str) -> Manifest | None:
        """Return the manifest of a complete result, or None without a readable one."""
        try:
            return self.manifest(key)
        except Damaged:
            return None

    def made(self, key: str) -> Manifest | None:
        """Return the manifest of a result, also if its files were collected; None if damaged."""
        try:
            return self.manifest(key) or self.collected(key)
        except Damaged:
            return None

    def collected(self, key: str) -> Manifest | None:
        """Return the manifest of a result whose files were collected, or None."""
        try:
            return self.read_document(Manifest, layout.collected_path(key))
        except DamagedDocument:  # as if missing: its cell runs again
            return None

    def collect(self, manifest: Manifest) -> None:
        """Delete the files of a result, and keep its manifest as `collected.json`."""
        key = manifest.key
        self.storage.write(layout.collected_path(key), with_checksum(to_json(manifest)))
        self.storage.remove(layout.manifest_path(key))
        self.storage.remove(f"{layout.attempt_folder(key, manifest.attempt)}/{layout.OUTPUTS}")

    def fetch(self, key: str, output: str) -> Path:
        """Return a local, read-only folder with an output of a complete result.

        Its files match the manifest, else the result is `Damaged`.

        Raises:
            StoreError: there is no such result.

        Cost: one read of all files; on remote storage a download, unless a copy exists.
        """
        manifest = self.manifest(key)
        if manifest is None or output not in manifest.outputs:
            raise StoreError(f"the store has no output {output!r} of {key[:12]}")
        try:
            return self._check(manifest, output)
        except Damaged:  # perhaps only a local copy is
            return self._check(manifest, output, fresh=True)

    def read_file(self, manifest: Manifest, output: str, name: str) -> bytes:
        """Return a file of a result's output; a missing one is an OSError."""
        folder = layout.output_folder(manifest.key, manifest.attempt, output)
        return self.storage.read(f"{folder}/{name}")

    def _check(self, manifest: Manifest, output: str, *, fresh: bool = False) -> Path:
        path = layout.output_folder(manifest.key, manifest.attempt, output)
        try:
            folder = self.storage.local(path, fresh=fresh)
            found = retry(partial(digest_files, folder), patience_s() if fresh else 0.0)
        except FileNotFoundError as error:  # deleted meanwhile
            raise Damaged(manifest.key, f"{output} is not all there ({error})") from error
        except OSError as error:
            if not fresh:  # perhaps only a local copy is unreadable
                return self._check(manifest, output, fresh=True)
            raise StorageUnavailable(
                f"{self.url}: {output} of {manifest.key[:12]} cannot be read ({error}). If that "
                f"stays so, move {self.url}/{layout.stage_folder(manifest.key)} away by hand, and "
                "its cell runs again."
            ) from error
        except StorageUnavailable:
            raise
        except StoreError as error:  # a link, or a name that leads elsewhere
            raise Damaged(manifest.key, str(error)) from error
        for name, wanted in manifest.outputs[output].items():
            if found.get(name) != wanted:
                how = "differs from" if name in found else "is missing, unlike in"
                raise Damaged(manifest.key, f"{output}/{name} {how} its manifest")
        for name in sorted(found.keys() - manifest.outputs[output].keys()):
            raise Damaged(manifest.key, f"{output}/{name} is there, unlike in its manifest")
        return folder

    def set_aside(self, key: str) -> bool:
        """Move a damaged result to `<key>.damaged-N`, so that its cell runs again.

        It is checked first: another worker may have replaced it.

        Returns:
            Whether it was damaged, and moved.
        """
        try:
            manifest = self.manifest(key)
            if manifest is not None:
                for output in manifest.outputs:
                    self._check(manifest, output, fresh=True)
        except Damaged:
            aside = max(self.damaged(key), default=0) + 1
            self.storage.move(
                layout.stage_folder(key), layout.stage_folder(layout.aside_name(key, aside))
            )
            return True
        return False

    def damaged(self, key: str) -> list[int]:
        """Return the numbers of a key's damaged results, ascending."""
        return layout.asides(key, self.storage.names(layout.STAGES, f"{key}."))

    # -- attempts

    def begin_attempt(self, key: str) -> Attempt:
        """Begin an attempt at a key, from the newest in-stage checkpoint of earlier ones.

        A result with an unreadable manifest is set aside first. Numbers are unique for a key, also
        among results set aside.
        """
        self.prepare()
        try:
            self.manifest(key)
        except Damaged:
            self.set_aside(key)
        names = [key, *(layout.aside_name(key, aside) for aside in self.damaged(key))]
        taken = [
            n for one in names for n in attempt_numbers(self.storage, layout.attempts_folder(one))
        ]
        number = max(taken, default=0) + 1
        host, pid = socket.gethostname(), os.getpid()
        about = with_checksum(
            {"time": time.time(), "host": host, "pid": pid, "id": uuid.uuid4().hex}
        )
        while not self.storage.create(f"{layout.attempt_folder(key, number)}/attempt.json", about):
            number += 1
        return Attempt(self.storage, key, number)

    def attempts(self, key: str) -> list[int]:
        """Return the numbers of the attempts at a key, ascending."""
        return attempt_numbers(self.storage, layout.attempts_folder(key))

    def failure(self, key: str, attempt: int) -> Failure | None:
        """Return the failure of an attempt, or None; a damaged record says only that it failed."""
        try:
            return self.read_document(Failure, layout.failure_path(key, attempt))
        except DamagedDocument as error:
            return {"message": f"it failed, and its record is lost: {error}"}

    def log_segments(self, key: str, attempt: int) -> list[Segment]:
        """Return the segments of an attempt's log; none for an old attempt."""
        return log_segments(self.storage, layout.attempt_folder(key, attempt))

    def read_events(
        self,
        key: str,
        attempt: int,
        after: int = 0,
        *,
        limit: int | None = None,
        merged: bool = True,
    ) -> tuple[list[dict[str, Any]], int]:
        """Return an attempt's events after segment `after`, and the number of the last segment.

        A `text` event replaces a damaged segment or an invalid event. If the first segment is
        damaged, a `start` event without a run precedes it.

        Args:
            key: the cell's key.
            attempt: the attempt's number.
            after: the last segment that is known.
            limit: reading stops once there are as many events.
            merged: whether to look for segments that were merged since `after` was read.

        Cost: a read for each segment, and one more unless the attempt has ended; with `merged` and
        `after` > 0, a listing.
        """
        events: list[dict[str, Any]] = []
        lost: set[int] = set()
        while limit is None or len(events) < limit:
            number = after + 1
            try:
                data = self.storage.read(layout.event_segment(key, attempt, number))
            except FileNotFoundError:
                found = self._merged_into(key, attempt, after, lost) if merged and after else None
                if found is None:
                    return events, after
                number, data = found
            now = time.time()
            try:
                segments = split(verified_lines(data))
            except ValueError as error:
                lost.add(number)
                if after == 0:
                    events.append({"type": "start", "time": now})
                text = f"segment {number} of the events of attempt {attempt} is damaged ({error})"
                events.append({"type": "text", "time": now, "text": text})
                after = max(after, number)
                continue
            if number + len(segments) - 1 <= after:
                return events, after
            new = [event for one in segments[max(0, after + 1 - number) :] for event in one]
            after = number + len(segments) - 1
            for event in new:
                try:
                    require_event(event)
                    events.append(event)
                except ValueError as error:
                    text = f"an event of attempt {attempt} cannot be read ({error})"
                    events.append({"type": "text", "time": now, "text": text})
            if events and events[-1]["type"] == "end":
                break
        return events, after

    def _merged_into(
        self, key: str, attempt: int, after: int, lost: Container[int]
    ) -> tuple[int, bytes] | None:
        """Return the segment into which the one after `after` may have been merged, or None.

        If that is a `lost` one, return the segment after it.
        """
        folder = layout.events_folder(key, attempt)
        known = sorted(numbers(name[: -len(".jsonl")] for name in self.storage.names(folder)))
        before = [number for number in known if number <= after][-1:]
        if before and before[0] in lost:
            before = [number for number in known if number > after][:1]
        if not before:
            return None
        try:
            return before[0], self.storage.read(layout.event_segment(key, attempt, before[0]))
        except FileNotFoundError:  # the attempt was deleted
            return None

    # -- generations

    def generations(self) -> dict[str, int]:
        """Return base identity -> generation, of all forced ones."""
        found: dict[str, int] = {}
        for base, number in filter(
            None, map(layout.parse_generation, self.storage.names(layout.GENERATIONS))
        ):
            found[base] = max(number, found.get(base, 0))
        return found

    def raise_generation(self, base: str, generation: int) -> None:
        """Record that `base` was forced to `generation`; idempotent."""
        self.prepare()
        self.storage.create(layout.generation_path(base, generation), b"")
