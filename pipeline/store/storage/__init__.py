"""Storage of files: a local folder, or anything that fsspec reaches.

Paths are relative to the storage's root, with slashes, and never lead out of it. The one thing
asked of a storage beyond reading and writing is `create`: a file comes into being whole, and only
if there was none. A folder on a file system without hard links, and an object store without
conditional writes, are refused.

What `write`, `create` and `save` have returned from survives a power cut. On a folder that takes
an fsync of the file, then one of the folder that names it. Measured on a virtual disk with ext4 on
a busy machine, medians of 50 and single runs: 3 to 6 ms for a small file instead of 0.3 ms; 60 to
100 ms for outputs of 100 MB in ten files; 9 to 27 ms for a checkpoint of 1 MB in three.

Stages work on local folders. In local storage that is the final place, so nothing is copied; other
storage gets a scratch folder, whose files `save` uploads.
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

    Folders never go through fsspec: its creating of a local file looks first and writes then, so
    that two processes may both believe to have been first.

    Raises:
        BadInput: it is none; or has a password, which would be shown and stored with every run.
    """
    scheme, colon, path = url.partition("://")
    if "\0" in url:
        raise BadInput(f"storage: {printable(url)} has a NUL in it, which no path may have.")
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
    from pipeline.store.storage.remote import RemoteStorage  # a command on a folder should not wait

    return RemoteStorage(url)
