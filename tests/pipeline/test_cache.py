"""The cache of remote results: checked, shared, and no larger than it may be."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.base.errors import BadInput, Damaged
from pipeline.stage import Context
from pipeline.store.cache import Cache
from pipeline.store.store import Store

KEY = "k" * 64
_counter = itertools.count()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(f"memory://cache-{next(_counter)}")
    with store.begin_attempt(KEY) as attempt:
        folder = Context(params=None, folder=attempt.folder).output("number")
        (folder / "number.txt").write_text("12345")
        attempt.publish({}, ["number"], {})
    return store


def copies(cache: Path) -> set[str]:
    return {path.read_text() for path in cache.glob("copies/*/copy/file")}


def fill(text: str, size: int = 0) -> object:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text(text)
        (folder / "rest").write_bytes(bytes(size))

    return write


@pytest.mark.parametrize("damage", ["truncated", "tampered", "gone", "link"])
def test_a_damaged_copy_is_noticed_and_fetched_again(
    store: Store, tmp_path: Path, damage: str
) -> None:
    copy = store.fetch(KEY, "number") / "number.txt"
    if damage == "truncated":
        copy.write_text("123")
    elif damage == "tampered":
        copy.write_text("12346")
    else:
        copy.unlink()
    if damage == "link":
        (tmp_path / "outside").write_text("12345")
        copy.symlink_to(tmp_path / "outside")
    again = store.fetch(KEY, "number") / "number.txt"
    assert again.read_text() == "12345"
    assert not again.is_symlink()


def test_a_damaged_original_is_damage_whatever_is_tried(store: Store) -> None:
    store.storage.write(f"stages/{KEY}/attempts/0001/outputs/number/number.txt", b"12346")
    with pytest.raises(Damaged, match="differs from its manifest"):
        store.fetch(KEY, "number")


def test_a_second_look_downloads_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.fetch(KEY, "number")
    monkeypatch.setattr(type(store.storage), "load", None)
    assert store.fetch(KEY, "number") == folder


def test_what_was_used_longest_ago_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLS_CACHE_BYTES", "25000")
    for name in ("a", "b", "a", "c"):  # each time by an owner that is gone at once
        Cache(tmp_path).get(name, fill(name, 10_000))
        time.sleep(0.02)
    assert copies(tmp_path) == {"a", "c"}
    assert len(list((tmp_path / "users").iterdir())) == 1  # those who are gone are forgotten


def test_what_is_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLS_CACHE_BYTES", "15000")
    owner = Cache(tmp_path)
    held = [owner.get(name, fill(name, 10_000)) for name in ("a", "b", "c")]
    Cache(tmp_path).get("d", fill("d", 10_000))
    assert all((copy / "file").exists() for copy in held)
    del owner
    Cache(tmp_path).get("e", fill("e", 10_000))
    assert copies(tmp_path) == {"e"}


def test_a_killed_process_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLS_CACHE_BYTES", "15000")
    program = (
        "import sys, time; from pathlib import Path; from pipeline.store.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "def fill(folder): folder.mkdir(); (folder / 'file').write_text('x' * 10000)\n"
        "cache.get('a', fill); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "ready\n"
        Cache(tmp_path).get("b", fill("b", 10_000))
        assert copies(tmp_path) == {"x" * 10_000, "b"}
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    Cache(tmp_path).get("c", fill("c", 10_000))
    assert copies(tmp_path) == {"c"}


def test_what_a_killed_process_was_about_to_make_goes_though_there_is_room(tmp_path: Path) -> None:
    copy = Cache(tmp_path).get("a", fill("a"))
    for name in ("part-1", "old-1"):
        (copy.parent / name).mkdir()
        (copy.parent / name / "file").touch()
    Cache(tmp_path).get("b", fill("b"))
    assert copies(tmp_path) == {"a", "b"}
    assert not {"part-1", "old-1"} & set(os.listdir(copy.parent))


def test_two_processes_fill_it_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from pipeline.store.cache import Cache\n"
        "def fill(folder):\n"
        "    folder.mkdir(); (folder / 'file').write_text(sys.argv[2]); time.sleep(0.3)\n"
        "print((Cache(Path(sys.argv[1])).get('a', fill) / 'file').read_text())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    answers = [process.communicate(timeout=30) for process in processes]
    assert {errors for _, errors in answers} == {""}
    assert len({text for text, _ in answers}) == 1
    assert len(copies(tmp_path)) == 1
    assert not list(tmp_path.glob("copies/*/part-*"))


@pytest.mark.parametrize("text", ["20 GB", "-1", "1e9", "\u0661"])
def test_a_limit_that_is_no_number_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FLS_CACHE_BYTES", text)
    with pytest.raises(BadInput, match="FLS_CACHE_BYTES is .*expected a number of bytes"):
        store.fetch(KEY, "number")
