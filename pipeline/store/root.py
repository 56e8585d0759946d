"""The root of a store: preparation, format, identity and clock."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import Self, TypeVar

from pipeline.base.errors import BadInput, DamagedDocument, StorageUnsupported, StoreError
from pipeline.base.names import ABOUT, STAGES
from pipeline.base.places import lead
from pipeline.base.shapes import Count
from pipeline.store.checksum import read_verified, with_checksum
from pipeline.store.layout import FORMAT, GENERATIONS, RUNS
from pipeline.store.storage import open_storage

_CLOCK_HOLDS_S = 60.0  # clocks drift, and may be set
_Shape = TypeVar("_Shape")


@dataclass(frozen=True, kw_only=True)
class About:
    """The document `storage.json`: the version of the layout, and the storage's identity."""

    format: Count
    token: str


class StoreRoot:
    """A store at `url`: a folder or an fsspec URL. Construction reads and writes nothing."""

    def __init__(self, url: str):
        self.url = url if "://" in url else os.path.abspath(lead(url))
        self.storage = open_storage(self.url)
        self._clock: tuple[float, float] | None = (
            None  # the storage's time, and ours at that moment
        )

    def prepare(self) -> str:
        """Prepare the storage for writing, if it is new; return its token.

        A storage that cannot create files exclusively raises `StorageUnsupported`; one with another
        or an unknown version of the layout raises `StoreError`.
        """
        self.storage.require_writable(STAGES, RUNS, GENERATIONS)
        found = self._about()
        if found is None:
            self._probe()
            self.storage.create(".gitignore", b"*\n")
            found = About(format=FORMAT, token=uuid.uuid4().hex)
            if not self.storage.create(ABOUT, with_checksum(vars(found))):
                return self.prepare()
        self._require_format(found)
        return found.token

    def exists(self) -> bool:
        """Tell whether the storage is prepared; another version of the layout is a `StoreError`."""
        found = self._about()
        if found is not None:
            self._require_format(found)
        return found is not None

    def _require_format(self, about: About) -> None:
        if about.format != FORMAT:
            whose = "a later" if about.format > FORMAT else "an earlier"
            raise StoreError(
                f"{self.url} has the layout of version {about.format}, of {whose} fls; this one "
                f"reads and writes version {FORMAT} alone. Nothing was changed. Use the fls that "
                "made it, or another storage."
            )

    def require(self) -> Self:
        """Return this store if it exists and has the layout of this version.

        Raises:
            BadInput: it does not exist.
        """
        if self.exists():
            return self
        raise BadInput(
            f"{self.url} is no store: it has no {ABOUT}. Check the address; the first "
            "`fls run` makes one."
        )

    def now(self) -> float:
        """Return the Unix time by the storage's clock, which all machines share.

        It is this machine's clock if the storage is read-only or has no times.

        Cost: once a minute, a file is written, listed and removed.
        """
        if self._clock is None or time.monotonic() - self._clock[1] > _CLOCK_HOLDS_S:
            self._clock = self._look_at_clock(), time.monotonic()
        return self._clock[0] + time.monotonic() - self._clock[1]

    def _look_at_clock(self) -> float:
        name = f"probe-{uuid.uuid4().hex}"
        try:
            self.storage.write(name, b"")  # empty: fits on a full disk
            try:
                (file,) = self.storage.files(name)
            finally:
                self.storage.remove(name)
        except (StoreError, OSError, ValueError):
            return time.time()
        return file.time

    def _about(self) -> About | None:
        try:
            data = self.storage.read(ABOUT)
        except FileNotFoundError:
            return None
        try:
            return read_verified(About, data)
        except ValueError as error:
            if b'"format": 1,' in data:  # the layout before checksums
                return About(format=1, token="")
            raise StoreError(
                f"{self.url}/{ABOUT} is damaged ({error}). It only tells storages apart: "
                "delete it while nothing runs, and the next run writes it again."
            ) from error

    def _probe(self) -> None:
        name = f"probe-{uuid.uuid4().hex}"
        try:
            first, second = (self.storage.create(f"{name}/file", data) for data in (b"1", b"2"))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise StorageUnsupported(f"{self.url}: cannot create exclusively: {error}") from error
        finally:
            self.storage.remove(name)
        if not first or second:
            raise StorageUnsupported(
                f"{self.url}: the storage created a file twice, so two workers could overwrite "
                "each other; use a storage with conditional writes"
            )

    def read_document(self, shape: type[_Shape], path: str) -> _Shape | None:
        """Return a document as a dataclass, or None without one.

        Raises:
            DamagedDocument: it is damaged, or has another shape.
        """
        try:
            return read_verified(shape, self.storage.read(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedDocument(f"{self.url}/{path} is damaged: {error}.") from error
