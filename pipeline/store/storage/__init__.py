"""Storage of files: a local folder, or any file system of fsspec.

Paths are relative to the storage's root, with slashes, and never lead out of it. Beyond reads and
writes, a storage needs an exclusive `create` of a whole file. A file system without hard links and
an object store without conditional writes are refused.

Files that `write`, `create` and `save` have stored survive a power failure. On a folder this costs
an fsync of the file, then of its folder: 3 to 6 ms for a small file instead of 0.3 ms; 60 to 100 ms
for 100 MB in ten files; 9 to 27 ms for a checkpoint of 1 MB in three (medians, ext4, busy machine).

Stages work on local folders: in local storage the final place, else a scratch folder, which `save`
uploads.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pipeline.base.errors import BadInput
from pipeline.base.secrets import redact
from pipeline.base.text import printable
from pipeline.store.storage.base import AbstractStorage
from pipeline.store.storage.local import LocalStorage


def open_storage(url: str) -> AbstractStorage:
    """Return the storage at `url`: a folder, or any URL that fsspec knows.

    Folders do not use fsspec, whose exclusive creation of a local file has a race.

    Raises:
        BadInput: the URL is invalid, or contains a password, which every run would store.
    """
    scheme, colon, path = url.partition("://")
    if "\0" in url:
        raise BadInput(f"storage: {printable(url)} contains a NUL character, which no path may.")
    if not colon:
        return LocalStorage(Path(url).absolute())
    if scheme in {"file", "local"}:
        return LocalStorage(Path(path).absolute())
    try:
        password = urlsplit(url).password
    except ValueError as error:
        raise BadInput(f"storage: {redact(url)} is no URL ({error}).") from error
    if password is not None:
        raise BadInput(
            f"storage: {redact(url)} has a password in it, which would be stored with every run; "
            "leave it out, and give it by the environment (for S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)."
        )
    from pipeline.store.storage.remote import RemoteStorage  # slow to import

    return RemoteStorage(url)
