"""Digests of folders of the user's."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.base.errors import BadInput
from pipeline.planning import outside
from pipeline.planning.outside import read_folder, state_of_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(outside, "_SETTLED_S", -1.0)  # what is new is not told from what is old
    folder = tmp_path / "data"
    for name in ("train/a/1", "train/b/2", "test/a/3"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_it_stands_for_names_sizes_and_contents(folder: Path) -> None:
    """Against the definition, written out."""
    lines = b""
    for name in ("test/a/3", "train/a/1", "train/b/2"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        lines += name.encode() + b"\0" + f"{len(name)} {digest}\n".encode()
    assert read_folder(folder).digest == hashlib.sha256(lines).hexdigest()


@pytest.mark.parametrize("name", [".hidden", "train/.DS_Store", ".ipynb_checkpoints/x"])
def test_what_is_hidden_is_left_out(folder: Path, name: str) -> None:
    before = read_folder(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert read_folder(folder).digest == before.digest


def test_the_same_size_and_modification_time_do_not_hide_a_change(folder: Path) -> None:
    before, file = read_folder(folder), folder / "train/a/1"
    stat = file.stat()
    file.write_text("train/a/X")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    after = read_folder(folder)
    assert after.digest != before.digest
    assert state_of_folder(folder) == after.state != before.state


def test_the_second_time_nothing_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("read again")

    first = read_folder(folder)
    (folder / "test/a/3").rename(folder / "test/a/4")
    second = read_folder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(outside.hashlib, "file_digest", refuse)
        assert read_folder(folder) == second != first
    with monkeypatch.context() as patch:
        patch.setattr(outside, "_known", {})  # as another process begins
        patch.setattr(outside.hashlib, "file_digest", refuse)
        assert read_folder(folder) == second
    for damage in ("", "{}", '{"version": 1, "files": {"a": 1}}', '{"version": 1, "files": []}'):
        (cache,) = (folder.parent / "cache/fishleg-surgeon/folders").iterdir()
        cache.write_text(damage)
        outside._known.clear()
        assert read_folder(folder) == second


def test_what_takes_long_is_announced_and_where_nothing_can_be_kept_it_is_read_once_a_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "train/a/1"))  # a file
    monkeypatch.setattr(outside, "_MUCH_BYTES", 10)
    for _ in range(2):
        read_folder(folder)
    assert capsys.readouterr().err.count(f"GB of {folder}, whose digest enters a key.") == 1


def test_what_was_just_written_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "_SETTLED_S", 10.0)
    read_folder(folder)
    (cache,) = (folder.parent / "cache/fishleg-surgeon/folders").iterdir()
    assert '"files": {}' in cache.read_text()


def test_links_are_followed_and_rings_end(folder: Path) -> None:
    before = read_folder(folder).digest
    elsewhere = folder.parent / "elsewhere"
    (folder / "train/a").rename(elsewhere)
    (folder / "train/a").symlink_to(elsewhere)
    assert read_folder(folder).digest == before
    (elsewhere / "ring").symlink_to(folder)
    assert read_folder(folder).digest == before
    (elsewhere / "broken").symlink_to("nothing")
    with pytest.raises(BadInput, match=r"cannot read .*data: .*broken"):
        read_folder(folder)
