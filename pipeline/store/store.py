"""The content-addressed store: results by key, attempts at them, and documents of runs.

    <storage>/storage.json                       format, and a token that tells storages apart
    <storage>/.gitignore                         keeps a new store out of Git, and of Ray's launcher
    <storage>/stages/<key>/manifest.json         present means complete; names the attempt that won
    <storage>/stages/<key>/attempts/<number>/    attempt.json, events/, log/, checkpoints/, outputs/
                                                 and, if it failed, failure.json
    <storage>/stages/<key>/collected.json        was the manifest of a result whose files are gone
    <storage>/stages/<key>.damaged-<n>/          set aside
    <storage>/generations/<base>.<n>             how often --force was asked for
    <storage>/runs/<run id>/<name>.json          documents of a run
    <storage>/runs/<run id>/marks/               life-N: its N-th driver; stop-N: that is to stop

A manifest is created last and exclusively, and never overwritten. It holds the sha256 of every
output file, which is checked on reading; every document is sealed (`pipeline.store.seal`), so that
damage to it is noticed too. Each attempt has a number and a folder of its own, so two workers at
the same key never touch the same file; the second to publish discards its work.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.base.errors import (
    BadInput,
    Damaged,
    DamagedDocument,
    StorageUnavailable,
    StorageUnsupported,
    StoreError,
)
from pipeline.base.names import numbers, run_ids
from pipeline.base.places import lead
from pipeline.base.secrets import redact
from pipeline.store.attempt import (
    Attempt,
    attempt_folder,
    attempt_numbers,
    digest_files,
    event_segment,
    manifest_path,
    stage_folder,
)
from pipeline.store.documents import require_event, require_shape
from pipeline.store.events import split
from pipeline.store.logs import Segment
from pipeline.store.logs import segments as log_segments
from pipeline.store.seal import seal, unseal, unseal_lines
from pipeline.store.storage import open_storage, patience_s, retry

_FORMAT = 2
_CLOCK_HOLDS_S = 60.0  # clocks of machines drift apart, and may be set
_COLLECTED = "collected.json"
_GENERATION = re.compile(r"(.+)\.([0-9]{1,9})")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete result says of itself.

    Attributes:
        key: the cell's key.
        attempt: number of the attempt that made it.
        ingredients: see `pipeline.planning.keys.Identity`.
        outputs: output -> file -> {"sha256": hex, "bytes": int}.
        facts: about the making: device, threads, versions, and its cost (`pipeline.worker.cost`).
        time: Unix seconds of publication.
    """

    key: str
    attempt: int
    ingredients: Mapping[str, Any]
    outputs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    facts: Mapping[str, Any]
    time: float


class Store:
    """A store at `url`: a folder or an fsspec URL. Making one reads and writes nothing."""

    def __init__(self, url: str):
        self.url = url if "://" in url else os.path.abspath(lead(url))
        self.storage = open_storage(self.url)
        self._clock: tuple[float, float] | None = None  # the storage's time, and ours then

    # -- the storage as a whole

    def prepare(self) -> str:
        """Make the storage ready for writing, once; return the token that tells it from others.

        A storage that cannot create files exclusively is refused (`StorageUnsupported`), and one
        that has the layout of another version, or does not say which (`StoreError`).
        """
        self.storage.require_writable("stages", "runs", "generations")
        found = self._about()
        if found is None:
            self._probe()
            self.storage.create(".gitignore", b"*\n")
            found = {"format": _FORMAT, "token": uuid.uuid4().hex}
            if not self.storage.create("storage.json", seal(found)):
                return self.prepare()
        self._require_format(found)
        return str(found["token"])

    def exists(self) -> bool:
        """Tell whether the storage has been made ready.

        One that has the layout of another version, or does not say which, is a `StoreError`.
        """
        found = self._about()
        if found is not None:
            self._require_format(found)
        return found is not None

    def _require_format(self, about: Mapping[str, Any]) -> None:
        """Refuse what another version wrote, whose files would be taken for damage or garbage.

        Raises:
            StoreError: another version did.
        """
        found = about["format"]
        if found != _FORMAT:
            whose = "a later" if found > _FORMAT else "an earlier"
            raise StoreError(
                f"{self.url} has the layout of version {found}, of {whose} fls; this one reads "
                f"and writes version {_FORMAT} alone. Nothing was changed. Use the fls that made "
                "it, or another storage."
            )

    def require(self) -> Store:
        """Return the store, which is there and has the layout of this version.

        Raises:
            BadInput: it is not there, so what is asked of it would seem to be in order, or empty.
        """
        if self.exists():
            return self
        raise BadInput(
            f"{self.url} is no store: it has no storage.json. Check the address; the first "
            "`fls run` makes one."
        )

    def now(self) -> float:
        """Return the Unix time by the clock of the storage, which all machines have in common.

        Where nothing can be written, or the storage does not tell times, it is this machine's.

        Cost: once a minute a file is written, looked at and removed.
        """
        if self._clock is None or time.monotonic() - self._clock[1] > _CLOCK_HOLDS_S:
            self._clock = self._look_at_clock(), time.monotonic()
        return self._clock[0] + time.monotonic() - self._clock[1]

    def _look_at_clock(self) -> float:
        name = f"probe-{uuid.uuid4().hex}"
        try:
            self.storage.write(name, b"")  # which a full disk takes, too
            try:
                (file,) = self.storage.files(name)
            finally:
                self.storage.remove(name)
        except (StoreError, OSError, ValueError):
            return time.time()
        return file.time

    def _about(self) -> dict[str, Any] | None:
        """Return what `storage.json` says, or None if there is none.

        Raises:
            StoreError: it says nothing that can be relied on.
        """
        try:
            data = self.storage.read("storage.json")
        except FileNotFoundError:
            return None
        try:
            document = unseal(data)
            require_shape("storage", data)
            return document
        except ValueError as error:
            if b'"format": 1,' in data:
                return {"format": 1}  # the layout before seals
            raise StoreError(
                f"{self.url}/storage.json is damaged ({error}). It only tells storages apart: "
                "delete it while nothing runs, and the next run makes it again."
            ) from error

    def _probe(self) -> None:
        """Check that a file cannot be created twice.

        Raises:
            StorageUnsupported: it can, or it cannot be created exclusively at all.
        """
        name = f"probe-{uuid.uuid4().hex}"
        try:
            first, second = (self.storage.create(f"{name}/file", data) for data in (b"1", b"2"))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise StorageUnsupported(f"{self.url}: cannot create exclusively: {error}") from error
        finally:
            self.storage.remove(name)
        if not first or second:
            raise StorageUnsupported(
                f"{self.url}: creating a file that exists did not fail, so two workers could "
                "overwrite each other; use a storage with conditional writes"
            )

    # -- results

    def manifest(self, key: str) -> Manifest | None:
        """Return the manifest of a complete result, or None.

        Raises:
            Damaged: there is one that cannot be read.
        """
        try:
            data = self.storage.read(manifest_path(key))
            manifest = Manifest(**unseal(data))
            require_shape("manifest", data)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise Damaged(key, f"its manifest cannot be read ({error})") from error
        if manifest.key != key:
            raise Damaged(key, f"its manifest is that of {manifest.key[:12]}")
        return manifest

    def collected(self, key: str) -> Manifest | None:
        """Return the manifest of a result that was complete and whose files are gone, or None."""
        try:
            document = self._document(f"{stage_folder(key)}/{_COLLECTED}")
        except DamagedDocument:  # as if it never was: its cell runs again
            return None
        try:
            return Manifest(**document) if document else None
        except TypeError:
            return None

    def collect(self, manifest: Manifest) -> None:
        """Delete the files of a result, and keep what its manifest says of it."""
        folder = stage_folder(manifest.key)
        self.storage.write(f"{folder}/{_COLLECTED}", seal(asdict(manifest)))
        self.storage.remove(manifest_path(manifest.key))
        self.storage.remove(f"{attempt_folder(manifest.key, manifest.attempt)}/outputs")

    def fetch(self, key: str, output: str) -> Path:
        """Return a local folder with an output, to be read only.

        Args:
            key: of a complete result.
            output: its name.

        Returns:
            The folder, with the files that the manifest lists and no others, each with the sha256
            that it says; otherwise the result is `Damaged`.

        Raises:
            StoreError: there is no such result.

        Cost: one read of all files; on remote storage a download, unless there is a copy already.
        """
        manifest = self.manifest(key)
        if manifest is None or output not in manifest.outputs:
            raise StoreError(f"the store has no output {output!r} of {key[:12]}")
        try:
            return self._check(manifest, output)
        except Damaged:  # perhaps only a copy of it is
            return self._check(manifest, output, fresh=True)

    def read_file(self, manifest: Manifest, output: str, name: str) -> bytes:
        """Return one file of a result's output; one that is not there is an OSError."""
        folder = attempt_folder(manifest.key, manifest.attempt)
        return self.storage.read(f"{folder}/outputs/{output}/{name}")

    def _check(self, manifest: Manifest, output: str, *, fresh: bool = False) -> Path:
        """Return a local folder with an output after comparing it with the manifest.

        Raises:
            Damaged: a file is missing or one too many, or its bytes were read and differ.
            StorageUnavailable: the storage is out of reach, or full.
        """
        path = f"{attempt_folder(manifest.key, manifest.attempt)}/outputs/{output}"
        try:
            folder = self.storage.local(path, fresh=fresh)
            found = retry(partial(digest_files, folder), patience_s() if fresh else 0.0)
        except FileNotFoundError as error:  # deleted meanwhile
            raise Damaged(manifest.key, f"{output} is not all there ({error})") from error
        except OSError as error:
            if not fresh:  # perhaps only a copy of it cannot be read
                return self._check(manifest, output, fresh=True)
            raise StorageUnavailable(
                f"{self.url}: {output} of {manifest.key[:12]} cannot be read ({error}). If that "
                f"stays so, move {self.url}/{stage_folder(manifest.key)} away by hand, and its "
                "cell runs again."
            ) from error
        except StorageUnavailable:
            raise
        except StoreError as error:  # a link, or a name that leads elsewhere
            raise Damaged(manifest.key, str(error)) from error
        for name, wanted in manifest.outputs[output].items():
            if found.get(name) != wanted:
                what = "differs from" if name in found else "is missing, unlike in"
                raise Damaged(manifest.key, f"{output}/{name} {what} its manifest")
        for name in sorted(found.keys() - manifest.outputs[output].keys()):
            raise Damaged(manifest.key, f"{output}/{name} is there, unlike in its manifest")
        return folder

    def set_aside(self, key: str) -> bool:
        """Move a damaged result to `<key>.damaged-N`, so that its cell runs again.

        It is checked again first, because another worker may have set it aside and made it again.

        Returns:
            Whether it was damaged, and moved.
        """
        try:
            manifest = self.manifest(key)
            if manifest is not None:
                for output in manifest.outputs:
                    self._check(manifest, output, fresh=True)
        except Damaged:
            taken = numbers(name.rpartition("-")[2] for name in self.damaged(key))
            aside = f"{stage_folder(key)}.damaged-{max(taken, default=0) + 1}"
            self.storage.move(stage_folder(key), aside)
            return True
        return False

    def damaged(self, key: str) -> list[str]:
        """Return the names of the results of a key that were set aside."""
        aside = re.compile(re.escape(key) + r"\.damaged-[0-9]+")
        names = self.storage.names("stages", f"{key}.damaged-")
        return [name for name in names if aside.fullmatch(name)]

    # -- attempts

    def begin_attempt(self, key: str) -> Attempt:
        """Begin an attempt at a key, going on from the newest in-stage checkpoint of earlier ones.

        A result whose manifest cannot be read is set aside first. The numbers go on over those of
        results set aside, so a number is never used twice for a key.
        """
        self.prepare()
        try:
            self.manifest(key)
        except Damaged:
            self.set_aside(key)
        folders = [key, *self.damaged(key)]
        taken = [n for name in folders for n in attempt_numbers(self.storage, f"stages/{name}")]
        number = max(taken, default=0) + 1
        who = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        about = seal({**who, "id": uuid.uuid4().hex})
        while not self.storage.create(f"{attempt_folder(key, number)}/attempt.json", about):
            number += 1
        return Attempt(self.storage, key, number)

    def attempts(self, key: str) -> list[int]:
        """Return the numbers of the attempts at a key, ascending."""
        return attempt_numbers(self.storage, stage_folder(key))

    def failure(self, key: str, attempt: int) -> dict[str, Any] | None:
        """Return what `Attempt.fail` was told of an attempt, or None.

        Of a record that is damaged only that is known.
        """
        try:
            return self._document(f"{attempt_folder(key, attempt)}/failure.json")
        except DamagedDocument as error:
            return {"message": f"it failed, and the record of how is lost: {error}"}

    def log_segments(self, key: str, attempt: int) -> list[Segment]:
        """Return the segments of an attempt's log, none of an old attempt."""
        return log_segments(self.storage, attempt_folder(key, attempt))

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

        In place of a segment that is damaged, or of an event that is none, comes a `text` event
        that says so; before it, where the `start` is lost with the first segment, one that does not
        say whose the attempt is.

        Args:
            key: the cell's key.
            attempt: the attempt's number.
            after: the segment up to which they are known.
            limit: no further segment is read once there are as many events.
            merged: whether to look for segments that were merged since `after` was read.

        Cost: a read for each segment, and one more unless the attempt has ended; with `merged`, and
        if some are known, a listing.
        """
        events: list[dict[str, Any]] = []
        lost: set[int] = set()
        while limit is None or len(events) < limit:
            number = after + 1
            try:
                data = self.storage.read(event_segment(key, attempt, number))
            except FileNotFoundError:
                found = self._merged_into(key, attempt, after, lost) if merged and after else None
                if found is None:
                    return events, after
                number, data = found
            now = time.time()
            try:
                segments = split(unseal_lines(data))
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
            if events and events[-1]["type"] == "end":  # nothing comes after it
                break
        return events, after

    def _merged_into(
        self, key: str, attempt: int, after: int, lost: Container[int]
    ) -> tuple[int, bytes] | None:
        """Return the segment into which the one after `after` may have been merged, or None.

        Where that is a `lost` one, it is the segment behind all that were merged into it.
        """
        folder = f"{attempt_folder(key, attempt)}/events"
        known = sorted(numbers(name[: -len(".jsonl")] for name in self.storage.names(folder)))
        before = [number for number in known if number <= after][-1:]
        if before and before[0] in lost:
            before = [number for number in known if number > after][:1]
        if not before:
            return None
        try:
            return before[0], self.storage.read(event_segment(key, attempt, before[0]))
        except FileNotFoundError:  # the attempt was deleted
            return None

    # -- generations

    def generations(self) -> dict[str, int]:
        """Return base identity -> generation, of those that were ever forced."""
        found: dict[str, int] = {}
        for name in self.storage.names("generations"):
            if match := _GENERATION.fullmatch(name):
                base, number = match.groups()
                found[base] = max(int(number), found.get(base, 0))
        return found

    def raise_generation(self, base: str, generation: int) -> None:
        """Record that `base` was forced to `generation`; doing so twice is doing so once."""
        self.prepare()
        self.storage.create(f"generations/{base}.{generation}", b"")

    # -- documents of runs

    def write_run(self, run_id: str, name: str, document: Mapping[str, Any]) -> None:
        """Write, or replace, the document `name` of a run, redacted; run ids sort by time."""
        self.prepare()
        self.storage.write(f"runs/{run_id}/{name}.json", seal(redact(document)))

    def read_run(self, run_id: str, name: str) -> dict[str, Any] | None:
        """Return the document `name` of a run, or None; it may be a `DamagedDocument`."""
        return self._document(f"runs/{run_id}/{name}.json")

    def peek_run(self, run_id: str, name: str) -> dict[str, Any] | None:
        """Return the document `name` of a run, or None if there is none that can be relied on."""
        try:
            return self.read_run(run_id, name)
        except DamagedDocument:
            return None

    def list_runs(self) -> list[str]:
        """Return the ids of all runs, oldest first."""
        return run_ids(self.storage.names("runs"))

    def begin_life(self, run_id: str) -> int:
        """Return a number that no other driver of the run has, above all earlier ones'."""
        number = self.newest_life(run_id)[0] + 1
        while not self.mark_run(run_id, f"life-{number}"):
            number += 1
        return number

    def newest_life(self, run_id: str) -> tuple[int, float]:
        """Return the number of the run's newest driver, and when it began; zeros without any."""
        marks = self.storage.files(f"runs/{run_id}/marks")
        begun = [
            (number, mark.time)
            for mark in marks
            for number in numbers([mark.path.rpartition("/life-")[2]])
        ]
        return max(begun, default=(0, 0.0))

    def beat(self, run_id: str) -> None:
        """Leave a sign of life of a run's driver, in place of the one before."""
        self.storage.write(f"runs/{run_id}/marks/alive", b"")

    def last_beat(self, run_id: str) -> float | None:
        """Return the Unix time of the last sign of life of a run's driver, by the storage's clock.

        That is a mark or the document `state`. None if the storage does not tell times.
        """
        try:
            paths = (f"runs/{run_id}/state.json", f"runs/{run_id}/marks/alive")
            return max(file.time for path in paths for file in self.storage.files(path))
        except (StoreError, ValueError):
            return None

    def mark_run(self, run_id: str, mark: str) -> bool:
        """Leave a mark on a run, for its driver to see; tell whether it is new."""
        # What it holds tells it from the same mark of another process, see `create`.
        return self.storage.create(f"runs/{run_id}/marks/{mark}", uuid.uuid4().hex.encode())

    def run_marks(self, run_id: str, kind: str = "") -> list[str]:
        """Return the marks on a run that begin with `kind`."""
        names = self.storage.names(f"runs/{run_id}/marks")
        return [name for name in names if name.startswith(kind)]

    def _document(self, path: str) -> dict[str, Any] | None:
        """Return a document, or None if there is none.

        Raises:
            DamagedDocument: it is not as it was written.
        """
        try:
            data = self.storage.read(path)
            document = unseal(data)
            require_shape(path.rpartition("/")[2].removesuffix(".json"), data)
            return document
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedDocument(f"{self.url}/{path} is damaged: {error}.") from error
