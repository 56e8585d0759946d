"""Packs a working directory for a cluster: code and pipeline, without data and results.

Patterns in the language of `.gitignore` omit files; the last pattern that matches a file decides.
In order: those of `pipeline.base.secret_files`, those below, each folder's `.gitignore`,
`.flsignore` in the directory itself, and the user's `--exclude`. Links and stores are never packed.
A file that begins like a private key is packed only if a pattern of `.flsignore` or `--exclude`
names it, such as `!/tests/key.txt`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.base.errors import BadInput
from pipeline.base.names import is_store
from pipeline.base.secret_files import BEGINNING_BYTES, PATTERNS, begins_like_key, is_secret_file

IGNORE_FILE = ".flsignore"
LEFT_BEHIND = (
    # version control, environments and caches
    ".git", ".hg", ".svn", ".venv/", "venv/", ".conda/", "node_modules/", "__pycache__/",
    ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/", ".ipynb_checkpoints/",
    "*.egg-info/", "*.pyc", ".DS_Store", "/.fls-source.json",
    # stores, tracking, data and weights
    ".fls*/", "mlruns/", "mlartifacts/", "/tracking/", "*.db", "*.db-journal", "*.sqlite",
    "/data/", "/checkpoints/", "*.pt", "*.pth", "*.pt2", "*.ckpt", "*.safetensors", "*.onnx",
    "*.npy", "*.npz", "*.parquet", "*.h5", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.whl",
)  # fmt: skip
# Ray's dashboard takes packages of up to 100 MiB; code is far smaller than this.
LIMIT_BYTES = 50 << 20
_LARGEST = 5
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every packed file: the same content, the same bytes


@dataclass(frozen=True)
class Package:
    """The packed and the omitted files of a folder.

    Attributes:
        folder: the folder.
        files: relative path, with slashes -> size in bytes.
        links: relative paths of links, which are omitted.
        secrets: relative paths omitted because they hold keys or passwords, see
            `pipeline.base.secret_files`; those of folders end with a slash.
        stores: relative paths of stores, which are omitted under any name.
    """

    folder: Path
    files: Mapping[str, int]
    links: Sequence[str]
    secrets: Sequence[str]
    stores: Sequence[str]

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())

    def refuse_if_large(self, limit_bytes: int = LIMIT_BYTES) -> None:
        """Check the size.

        Raises:
            BadInput: the size is above the limit; names the largest files.
        """
        if self.size_bytes <= limit_bytes:
            return
        largest = sorted(self.files.items(), key=lambda item: -item[1])[:_LARGEST]
        lines = [f"  {_mebibytes(size):>10}  {path}" for path, size in largest]
        raise BadInput(
            f"{len(self.files)} files of {_mebibytes(self.size_bytes)} would be packed; the limit "
            f"is {_mebibytes(limit_bytes)}. The largest:\n"
            + "\n".join(lines)
            + f"\nOmit files by --exclude, or by patterns in {IGNORE_FILE}."
        )

    def refuse_if_holding(
        self, secrets: Iterable[tuple[str, str]], extra: Mapping[str, str]
    ) -> None:
        """Check that no file holds the value of a secret.

        Args:
            secrets: names of environment variables, and their values.
            extra: as in `write`.

        Raises:
            BadInput: a file does; names file and variable.
        """
        needles = [(name, os.fsencode(value)) for name, value in secrets]
        files = {path: (self.folder / path).read_bytes for path in self.files}
        files |= {path: partial(os.fsencode, text) for path, text in extra.items()}
        for path, read in files.items():
            content = read()
            for name, needle in needles:
                if needle in content:
                    raise BadInput(
                        f"{path} holds the value of the environment variable {name}, a secret, "
                        f"and would be packed. Remove the value, or omit the file by --exclude."
                    )

    def write(self, archive: Path, extra: Mapping[str, str]) -> None:
        """Write a zip file of the files and of `extra` (path -> text); equal content, equal bytes.

        Args:
            archive: the zip file.
            extra: generated files.
        """
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for path in sorted(self.files):
                file = self.folder / path
                mode = 0o755 if os.access(file, os.X_OK) else 0o644
                target.writestr(_entry(path, mode), file.read_bytes())
            for path, text in sorted(extra.items()):
                target.writestr(_entry(path, 0o644), text)


def collect(folder: Path, excludes: Sequence[str] = ()) -> Package:
    """Find the files of a folder to pack."""
    last = [*_lines(folder / IGNORE_FILE), *excludes]
    first = [*PATTERNS, *LEFT_BEHIND]
    walk = _Walk(folder, GitIgnoreSpec.from_lines(first), GitIgnoreSpec.from_lines(last))
    files = dict(walk.files("", []))
    return Package(folder, files, walk.links, walk.secrets, walk.stores)


class _Walk:
    def __init__(self, folder: Path, first: GitIgnoreSpec, last: GitIgnoreSpec):
        self.folder = folder
        self.first = first
        self.last = last
        self.links: list[str] = []
        self.secrets: list[str] = []
        self.stores: list[str] = []

    def files(
        self, prefix: str, outer: Sequence[tuple[str, GitIgnoreSpec]]
    ) -> Iterator[tuple[str, int]]:
        """Yield path and size of the files below `prefix`, which is empty or ends with a slash.

        Args:
            prefix: path of the folder.
            outer: (path of a folder, patterns of its `.gitignore`), outermost first.
        """
        here = self.folder / prefix
        specs = [*outer, (prefix, GitIgnoreSpec.from_lines(_lines(here / ".gitignore")))]
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            path = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            full = path + "/" if is_folder else path
            if self.ignored(full, specs):
                if is_secret_file(full):
                    self.secrets.append(full)
                continue
            if entry.is_symlink():
                self.links.append(path)
            elif is_folder and is_store(self.folder / path):
                self.stores.append(full)
            elif is_folder:
                yield from self.files(full, specs)
            elif entry.is_file() and self.is_key(path):
                self.secrets.append(path)
            elif entry.is_file():
                yield path, entry.stat().st_size

    def is_key(self, path: str) -> bool:
        """Tell whether a file begins like a private key, and no pattern includes it."""
        with open(self.folder / path, "rb") as file:
            found = begins_like_key(file.read(BEGINNING_BYTES))
        return found and self.last.check_file(path).include is not False

    def ignored(self, path: str, specs: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
        """Tell whether the last pattern that matches `path` omits it."""
        verdict = False
        for prefix, spec in (("", self.first), *specs, ("", self.last)):
            found = spec.check_file(path.removeprefix(prefix)).include
            verdict = verdict if found is None else found
        return verdict


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _entry(path: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(path, _EPOCH)
    entry.external_attr = mode << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
