"""A disk or a file server that has a bad moment is waited for; only wrong bytes are damage."""

import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_runs import fls, numbers, ran, run_here, write_spec

from pipeline.base.errors import StorageUnavailable
from pipeline.store import manifest
from pipeline.store.storage import base as storage
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store

PASSING = [errno.EIO, errno.ESTALE, errno.ENOSPC]
REQUESTS: dict[str, Callable[[LocalStorage], Any]] = {
    "read": lambda disk: disk.read("a/file"),
    "write": lambda disk: disk.write("a/file", b"2"),
    "create": lambda disk: disk.create("a/new", b"2"),
    "names": lambda disk: disk.names("a"),
    "files": lambda disk: disk.files("a"),
    "open": lambda disk: disk.open("a/file").close(),
    "remove": lambda disk: disk.remove("a/file"),
    "move": lambda disk: disk.move("a", "b"),
    "workspace": lambda disk: disk.workspace("c/d"),
}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.001)
    found = LocalStorage(tmp_path)
    found.write("a/file", b"1")
    return found


def fail(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[str]:
    """Let the first calls of the system that a storage makes fail; return what failed."""
    failed: list[str] = []

    def failing(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if len(failed) < times:
                failed.append(name)
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("lstat", "unlink", "rename", "mkdir"):
        failing(Path, name)
    for name in ("open", "listdir", "link", "fsync"):
        failing(os, name)
    return failed


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_bad_moment_of_a_disk_is_waited_for(
    disk: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int, request_: str
) -> None:
    with monkeypatch.context() as patch:
        failed = fail(patch, number, 2)
        REQUESTS[request_](disk)
    assert len(failed) == 2


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_disk_that_stays_so_is_unavailable_in_bounded_time(
    disk: LocalStorage, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    monkeypatch.setenv("FLS_PATIENCE_S", "0.05")
    began = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailable, match="Input/output"):
        fail(patch, errno.EIO, 10**9)
        REQUESTS[request_](disk)
    assert time.monotonic() - began < 5


def test_what_will_not_pass_is_told_at_once(
    disk: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailable, match="Read-only"):
        failed = fail(patch, errno.EROFS, 10**9)
        disk.read("a/file")
    assert len(failed) == 1


def failing_reads(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let reading the files of results fail with EIO."""
    real, count = manifest.hashlib.file_digest, itertools.count()

    def digest(file: Any, name: str) -> Any:
        if "/outputs/" in file.name and next(count) < times:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, name)

    monkeypatch.setattr(manifest.hashlib, "file_digest", digest)


@pytest.mark.parametrize("times", [1, 3, 10**9])
def test_a_read_error_is_no_damage_and_a_good_result_stays(
    toy: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("FLS_PATIENCE_S", "0.2")
    write_spec(
        "start: {uses: start, params: {value: 1}}\nadd: {uses: add, inputs: {number: start}}"
    )
    assert run_here()[0] == 0
    key = next(path.parent.name for path in Path(".fls").glob("stages/*/manifest.json"))
    store = Store(".fls")
    with monkeypatch.context() as patch:
        failing_reads(patch, times)
        if times < 10**9:
            assert store.fetch(key, "number").is_dir()
            assert not store.set_aside(key)
        else:
            for call in (lambda: store.fetch(key, "number"), lambda: store.set_aside(key)):
                with pytest.raises(StorageUnavailable, match="cannot be read .*Input/output error"):
                    call()
    assert not store.damaged(key)
    before = ran()
    assert run_here()[0] == 0
    assert ran() == before
    assert set(numbers()) == {"start", "add"}


def test_verify_sets_nothing_aside_that_cannot_be_read(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLS_PATIENCE_S", "0")
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    (manifest,) = Path(".fls").glob("stages/*/manifest.json")
    real = LocalStorage.open

    def unreadable(self: LocalStorage, path: str) -> Any:
        if "/outputs/" in path:
            raise StorageUnavailable(f"{path}: Input/output error.")
        return real(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "open", unreadable)
        failing_reads(patch, 10**9)
        code, output, errors = fls("verify", "--set-aside")
    assert (code, errors) == (1, "")
    assert "not set aside: " in output
    assert manifest.exists()
