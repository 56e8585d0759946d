"""Verification of a store: reads and hashes every file of every result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.base.errors import Damaged, StoreError
from pipeline.store.checksum import verified, verified_lines
from pipeline.store.layout import OUTPUTS, attempt_folder, is_document, manifest_path, parse
from pipeline.store.manifest import FileDigest, Manifest
from pipeline.store.storage.base import FOREIGN, StoredFile
from pipeline.store.store import Store

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file.

    Attributes:
        path: the file's, in the storage.
        reason: its damage.
        key: of its result; None for a document of the runner.
        cell: the name of the result's cell, or "".
    """

    path: str
    reason: str
    key: str | None = None
    cell: str = ""


def find_damage(store: Store, advance: Callable[[int, int], None]) -> Iterator[Damage]:
    """Yield the damaged files of a store, except in results set aside.

    Args:
        store: the store.
        advance: called with the numbers of bytes read and in total.

    Cost: one read of all files except checkpoints.
    """
    files = {file.path: file for file in store.storage.files("")}
    places = filter(None, map(parse, files))
    keys = dict.fromkeys(one.key for one in places if manifest_path(one.key) in files)
    outputs = _outputs(files)
    documents = [file for path, file in files.items() if is_document(path)]
    for file in files.values():
        if file.leads_on:
            reason = "is a link to a folder; replace the link by its target"
            yield Damage(path=file.path, reason=reason)
    manifests: list[Manifest] = []
    for key in keys:
        try:
            manifest = store.manifest(key)
        except Damaged as error:
            yield Damage(path=manifest_path(key), reason=error.reason, key=key)
        else:
            manifests += [manifest] if manifest else []
    total = sum(file.bytes for file in documents) + sum(manifest.bytes for manifest in manifests)
    done = 0
    for file in documents:
        damage = _check_document(store, file)
        done += file.bytes
        advance(done, total)
        if damage:
            yield damage
    for manifest in manifests:
        found = [*_check_result(store, manifest), *_find_unlisted(store, manifest, outputs)]
        done += manifest.bytes
        advance(done, total)
        if found and _unchanged(store, manifest):
            yield from found


def _check_result(store: Store, manifest: Manifest) -> Iterator[Damage]:
    """Yield the files of a result that differ from its manifest."""
    for path, wanted in _listed(manifest).items():
        if reason := _compare(store, path, wanted["sha256"], wanted["bytes"]):
            yield Damage(path=path, reason=reason, key=manifest.key, cell=manifest.cell)


def _listed(manifest: Manifest) -> dict[str, FileDigest]:
    """Return path -> digest and size of the files in a manifest."""
    root = f"{attempt_folder(manifest.key, manifest.attempt)}/{OUTPUTS}"
    return {
        f"{root}/{output}/{name}": digest
        for output, files in manifest.outputs.items()
        for name, digest in files.items()
    }


def _outputs(paths: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """Return folder of an attempt's outputs -> paths of its files."""
    found: dict[str, list[str]] = {}
    for path in paths:
        place = parse(path)
        if place is not None and place.part == OUTPUTS:
            found.setdefault(place.part_path, []).append(path)
    return found


def _find_unlisted(
    store: Store, manifest: Manifest, outputs: Mapping[str, Sequence[str]]
) -> Iterator[Damage]:
    """Yield the files among a result's outputs that its manifest does not list."""
    root, listed = f"{attempt_folder(manifest.key, manifest.attempt)}/{OUTPUTS}", _listed(manifest)
    for path in outputs.get(root, ()):
        strange = path not in listed and path.rpartition("/")[2] not in FOREIGN
        if strange and store.storage.files(path):  # not deleted meanwhile
            reason = "is not in its manifest"
            yield Damage(path=path, reason=reason, key=manifest.key, cell=manifest.cell)


def _compare(store: Store, path: str, sha256: str, size: int) -> str | None:
    """Return how a file differs from its digest and size, or None."""
    digest, found = hashlib.sha256(), 0
    try:
        with store.storage.open(path) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                found += len(piece)
    except FileNotFoundError:
        return "is missing"
    except (OSError, StoreError) as error:
        return f"cannot be read ({error})"
    if found != size:
        return f"has {found} bytes instead of {size}"
    return None if digest.hexdigest() == sha256 else "differs from its manifest"


def _unchanged(store: Store, manifest: Manifest) -> bool:
    """Tell whether a result still exists, and was not set aside or collected meanwhile."""
    try:
        return store.manifest(manifest.key) == manifest
    except Damaged:
        return True


def _check_document(store: Store, file: StoredFile) -> Damage | None:
    """Return a document's damage; None if it is whole or was deleted meanwhile."""
    try:
        data = store.storage.read(file.path)
        verified_lines(data) if file.path.endswith(".jsonl") else verified(data)
    except FileNotFoundError:
        return None
    except (ValueError, OSError, StoreError) as error:
        return Damage(path=file.path, reason=f"cannot be read ({error})")
    return None
