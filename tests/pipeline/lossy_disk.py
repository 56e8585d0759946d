"""A disk that keeps through a power cut what was fsynced, and of the rest whatever it likes.

While `recording`, every fsync of a file or a folder below the root is noted with what it makes
safe: a file's content, or the names in a folder. `cut` lays out what a power cut would leave.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


class LossyDisk:
    """What is safe on the disk below `root`, which is itself taken to be."""

    def __init__(self, root: Path):
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.folders: set[int] = set()
        self.synced: list[Path] = []
        self._pinned: list[int] = []  # open files, so that no inode's number is used twice

    @contextmanager
    def recording(self, before: Callable[[], None]) -> Iterator[None]:
        """Note what is synced; call `before` each time, as the moment at which most is at risk."""

        def note(opened: int) -> None:  # the real disk need not be waited for
            before()
            path = Path(os.readlink(f"/proc/self/fd/{opened}"))
            if path.is_relative_to(self.root):
                self._note(path, os.fstat(opened).st_ino)

        with patch("os.fsync", note):
            yield
        before()

    def _note(self, path: Path, inode: int) -> None:
        self.synced.append(path.relative_to(self.root))
        self._pinned.append(os.open(path, os.O_RDONLY))
        if not path.is_dir():
            self.contents[inode] = path.read_bytes()
            return
        self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
        for entry in os.scandir(path):
            self._pinned.append(os.open(entry.path, os.O_RDONLY))
            if entry.is_dir():
                self.folders.add(entry.inode())

    def cut(self, into: Path, lucky: random.Random | None = None) -> Path:
        """Lay out what is left after a power cut now.

        Args:
            into: the folder to lay it out in, which does not exist yet.
            lucky: without it nothing is left that is not safe; with it some of it is, by chance.
        """
        self._lay_out(self.root.stat().st_ino, self.root, into, lucky)
        return into

    def _lay_out(
        self, inode: int, live: Path | None, target: Path, lucky: random.Random | None
    ) -> None:
        target.mkdir()
        names = dict(self.names.get(inode, {}))
        there = {entry.name: entry for entry in os.scandir(live)} if live else {}
        if lucky:
            for name in sorted(names.keys() | there.keys()):
                if lucky.random() < 0.5:
                    names.pop(name, None)
                    if name in there:
                        names[name] = there[name].inode()
        for name, child in names.items():
            entry = there.get(name)
            same = live / name if live and entry and entry.inode() == child else None
            if child in self.folders or (same and same.is_dir()):
                self._lay_out(child, same, target / name, lucky)
                continue
            content = self.contents.get(child)
            if content is None:
                whole = same.read_bytes() if same and lucky else b""
                content = whole[: lucky.randint(0, len(whole))] if lucky else b""
            (target / name).write_bytes(content)

    def close(self) -> None:
        for opened in self._pinned:
            os.close(opened)
