"""A cell's log: the printed output and the messages of its stage, as plain text.

An attempt's log consists of segments, files named by the number of bytes before them:

    log/000000000000.log   0:00  first line
    log/000001048576.log   0:07  ...

The middle of a long log is left out: the first half of `log_bytes` stays, and the newest segments
after it. The gap between the end of a segment and the next one's name is the missing amount. Each
line goes to the operating system when it ends, and an unfinished line when it is flushed, so output
survives a killed process. Secrets are redacted first.
"""

from __future__ import annotations

import codecs
import io
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.base.secrets import redact
from pipeline.base.text import clock
from pipeline.store.storage.base import AbstractStorage

DEFAULT_BYTES = 16 * 2**20
FOLDER = "log"
_SUFFIX = ".log"
_HEAD, _TAIL = 8, 8  # segments kept at the beginning and at the end
_LONGEST_LINE = 64 * 1024  # characters; a longer one is cut
_OVERLAP = 4 * 1024  # its last characters wait for the next ones: a secret may cross the cut
_PIECE_BYTES = 2**20
_FILE_BYTES = 16 * 2**20  # the file of output that bypasses Python is then emptied

# --------------------------------------------------------------------------------- writing


class LogWriter:
    """Writes the log of one attempt; thread-safe.

    Args:
        folder: the folder of the segments; created on demand.
        limit_bytes: approximate maximal size of the log.
    """

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_BYTES):
        self._folder = folder
        self._segment_bytes = max(1, limit_bytes // (_HEAD + _TAIL))
        self._began = time.monotonic()
        self._lock = threading.RLock()  # a destructor may print in the middle of a write
        self._kept: list[int] = []
        self._start = self._size = self._unfinished = 0
        self._file = -1
        self._begin_segment()

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            os.close(self._file)
            self._file = -1

    def write(self, lines: Iterable[str]) -> None:
        """Write lines, without line ends."""
        stamp = self._stamp()
        text = "".join(f"{stamp}{line}\n" for line in redact("\n".join(lines)).split("\n"))
        with self._lock:
            self._append(_encode(text))

    def show_unfinished(self, text: str) -> None:
        """Write an unfinished line; the next write replaces it."""
        with self._lock:
            data = _encode(self._stamp() + redact(text)) if text else b""
            os.pwrite(self._file, data, self._size)
            self._drop_unfinished(len(data))
            self._unfinished = len(data)

    def _stamp(self) -> str:
        return f"{clock(time.monotonic() - self._began):>8}  "

    def _append(self, data: bytes) -> None:
        at, view = 0, memoryview(data)
        while at < len(data):
            room, end = self._segment_bytes - self._size, len(data)
            if end - at > room:  # then end at the last line that fits
                end = data.rfind(b"\n", at, at + max(0, room)) + 1
                if not end and self._size:
                    self._begin_segment()
                    continue
                end = end or at + self._segment_bytes
            written = os.pwrite(self._file, view[at:end], self._size)
            self._size += written
            at += written
            self._drop_unfinished(0)

    def _drop_unfinished(self, beyond: int) -> None:
        """Cut off the rest of an unfinished line that is longer than its replacement."""
        if self._unfinished:
            os.ftruncate(self._file, self._size + beyond)
            self._unfinished = 0

    def _begin_segment(self) -> None:
        """Begin the next segment; delete the oldest one after the head if there are too many."""
        if self._file >= 0:
            self._drop_unfinished(0)
            os.close(self._file)
        self._start += self._size
        self._size = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path(self._start), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._kept.append(self._start)
        if len(self._kept) > _HEAD + _TAIL:
            self._path(self._kept.pop(_HEAD)).unlink(missing_ok=True)

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:012d}{_SUFFIX}"


class LogStream(io.TextIOBase):
    """A text stream whose lines go into a log.

    Of a line with carriage returns, as progress bars write it, only the last state counts; empty
    lines do not count. Output of a forked child goes to file descriptor 2. A closed stream, which a
    logging handler of an earlier cell in a warm worker may hold, writes into the log of the current
    cell, if any.
    """

    encoding = "utf-8"
    _present: ClassVar[LogStream | None] = None  # the stream of the current cell

    def __init__(self, log: LogWriter):
        self._log = log
        self._line = ""
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> LogStream:
        LogStream._present = self
        return self

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor for child processes and the like."""
        return 2

    def write(self, text: str) -> int:
        """Take text; completed lines go into the log."""
        if os.getpid() != self._process:
            os.write(2, _encode(text))
            return len(text)
        if self.closed:
            return LogStream._present.write(text) if LogStream._present else len(text)
        with self._lock:
            *lines, rest = (self._line + text).split("\n")
            shown = [one for line in lines if (one := _last_state(line))]
            if shown:
                self._log.write(shown)
            self._line = rest[rest.rstrip("\r").rfind("\r") + 1 :]
            if len(self._line) > _LONGEST_LINE:
                hidden = redact(self._line)
                self._log.write([hidden[:-_OVERLAP]])
                self._line = hidden[-_OVERLAP:]
        return len(text)

    def flush(self) -> None:
        """Write the unfinished line."""
        if os.getpid() != self._process:
            return
        if self.closed:
            if LogStream._present:
                LogStream._present.flush()
            return
        with self._lock:
            if self._line:
                self._log.show_unfinished(_last_state(self._line))

    def close(self) -> None:
        """Write the unfinished line as a whole one."""
        if not self.closed and os.getpid() == self._process:
            self.write("\n")
        super().close()
        if LogStream._present is self:
            LogStream._present = None


class OutputFile:
    """The file behind file descriptors 1 and 2, with output of C code and child processes.

    Args:
        file: descriptor of a readable file, opened for appending; None if such output goes
            elsewhere.
        log: takes the new output.
    """

    def __init__(self, file: int | None, log: LogWriter):
        self._file = file
        self._stream = LogStream(log)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at = 0 if file is None else os.fstat(file).st_size
        self._lock = threading.Lock()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drain(self) -> None:
        """Move the output since the last call into the log."""
        if self._file is None:
            return
        with self._lock:
            while not self._stream.closed:
                data = os.pread(self._file, _PIECE_BYTES, self._at)
                if not data:
                    break
                self._at += len(data)
                self._stream.write(self._decoder.decode(data))
            if self._at > _FILE_BYTES:
                os.ftruncate(self._file, 0)
                self._at = 0

    def close(self) -> None:
        """Move the rest of the output into the log."""
        self.drain()
        self._stream.close()


def _last_state(line: str) -> str:
    """Return a line as a terminal finally shows it."""
    return line.rstrip().rpartition("\r")[2]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


# --------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Segment:
    """One segment of a stored log: its path, its first byte in the log, and its size."""

    path: str
    start: int
    bytes: int

    @property
    def end(self) -> int:
        """The position of its end in the log."""
        return self.start + self.bytes


def segments(storage: AbstractStorage, attempt: str) -> list[Segment]:
    """Return the segments of the log in an attempt's folder, in order; none without a log."""
    found = []
    for file in storage.files(f"{attempt}/{FOLDER}"):
        stem = file.path.rpartition("/")[2].removesuffix(_SUFFIX)
        if file.path.endswith(_SUFFIX) and stem.isascii() and stem.isdecimal() and len(stem) < 19:
            found.append(Segment(file.path, int(stem), file.bytes))
    return sorted(found, key=lambda segment: segment.start)


def read_text(
    storage: AbstractStorage, found: Iterable[Segment], start: int = 0
) -> Iterator[tuple[str, int]]:
    """Yield the text of a log in pieces of whole lines, each with the position of its end.

    A line with the number of missing bytes replaces each gap.

    Args:
        storage: the storage of the segments.
        found: the segments, in order.
        start: number of bytes of the log to skip.

    Cost: one read; memory for about a megabyte.
    """
    at = start
    for segment in found:
        if segment.end <= at:
            continue
        if segment.start > at:
            yield f"{_left_out(segment.start - at)}\n", segment.start
            at = segment.start
        try:
            file = storage.open(segment.path)
        except FileNotFoundError:  # deleted meanwhile
            continue
        with file:
            file.seek(at - segment.start)
            rest = b""
            while data := file.read(_PIECE_BYTES):
                whole, end, rest = (rest + data).rpartition(b"\n")
                if end:
                    at += len(whole) + 1
                    yield f"{whole.decode(errors='replace')}\n", at
            if rest:
                at += len(rest)
                yield rest.decode(errors="replace"), at


def last_lines(storage: AbstractStorage, found: Sequence[Segment], count: int) -> str:
    """Return the last lines of a log; reads segments from the end until there are enough."""
    text, start = "", found[-1].end if found else 0
    for segment in reversed(found):
        if text.count("\n") > count:
            break
        gap = f"{_left_out(start - segment.end)}\n" if segment.end < start else ""
        whole = "".join(piece for piece, _ in read_text(storage, [segment], segment.start))
        text, start = whole + gap + text, segment.start
    lines = text.splitlines(keepends=True)
    return "".join(lines[max(0, len(lines) - count) :])


def _left_out(count: int) -> str:
    return f"... {count:,} bytes of the log are left out here, see `log_bytes:` ..."
