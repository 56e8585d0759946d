"""What another user of the machine can read, change or block: nothing of ours."""

import fcntl
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.base.errors import PipelineError, StorageUnsupported
from pipeline.base.private import make_private, private_place
from pipeline.planning.outside import read_folder
from pipeline.planning.planner import RunPlan
from pipeline.store.storage.remote import RemoteStorage
from pipeline.store.store import Store
from pipeline.tracking import mlflow_server
from pipeline.tracking.base import RunFacts

OTHER = 65_534  # nobody
GROUP = 54_999


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a temporary folder that all may write to, as /tmp is."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    for one in (tmp_path, *tmp_path.parents):
        if one.stat().st_uid == os.getuid() and one != Path("/"):
            one.chmod(one.stat().st_mode | 0o011)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def as_other(act: Callable[[], object], *, groups: tuple[int, ...] = (), mask: int = 0o022) -> str:
    """Do something as another user, in a process of its own; return what comes of it, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(OTHER)
            os.setuid(OTHER)
            os.umask(mask)
            text = repr(act())
        except BaseException as error:
            text = repr(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as found:
        return found.read()


def test_the_other_user_is_another(shared: Path) -> None:
    assert as_other(os.getuid) == str(OTHER)
    assert as_other(lambda: os.mkdir(shared / "theirs")) == "None"


def test_copies_of_remote_results_are_closed_to_others(shared: Path) -> None:
    storage = RemoteStorage("memory://bucket")
    storage.write("stages/a/result.txt", b"private")
    before = os.umask(0o022)
    try:
        copy = storage.local("stages/a")
        work = storage.workspace("stages/b")
    finally:
        os.umask(before)
    assert (copy / "result.txt").read_bytes() == b"private"
    for level in (private_place(), storage.scratch):
        assert stat.S_IMODE(level.stat().st_mode) == 0o700
    for folder in (copy, work, storage.scratch):
        assert "PermissionError" in as_other(partial(os.listdir, folder))
    storage.release(work)


@pytest.mark.parametrize("level", ["the user's", "the store's"])
def test_a_folder_that_another_user_made_is_refused(shared: Path, level: str) -> None:
    storage = RemoteStorage("memory://bucket")
    storage.write("stages/a/result.txt", b"private")
    if level == "the user's":
        place = private_place()
        assert as_other(lambda: os.makedirs(place)) == "None"
    else:
        make_private(private_place())
        storage.scratch.mkdir()
        os.chown(storage.scratch, OTHER, OTHER)
    for act in (lambda: storage.local("stages/a"), lambda: storage.workspace("stages/b")):
        with pytest.raises(StorageUnsupported, match=r"is not a folder of user .*TMPDIR"):
            act()
    assert storage.leftovers() == []


def test_a_link_in_place_of_the_folder_is_refused(shared: Path, tmp_path: Path) -> None:
    place = private_place()
    assert as_other(lambda: os.symlink(tmp_path, place)) == "None"
    with pytest.raises(StorageUnsupported, match="is not a folder of user"):
        make_private(private_place("copies"))
    assert not (tmp_path / "copies").exists()


def test_a_folder_of_ours_that_is_open_is_closed(shared: Path) -> None:
    private_place().mkdir(mode=0o755)
    make_private(private_place("copies"))
    assert stat.S_IMODE(private_place().stat().st_mode) == 0o700


def test_a_user_without_a_name_has_a_place(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_234_567_890)
    assert RemoteStorage("memory://bucket").scratch.parent.name == "fls-1234567890"


def test_digests_kept_by_another_user_are_not_believed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("a")
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    digest = read_folder(data).digest
    assert stat.S_IMODE(private_place("folders").stat().st_mode) == 0o700
    shutil.rmtree(private_place())
    place = private_place("folders")
    assert as_other(lambda: os.makedirs(place)) == "None"
    with pytest.raises(StorageUnsupported, match="is not a folder of user"):
        read_folder(data)
    assert len(digest) == 64


# ------------------------------------------------------------------- the lock of MLflow's tables


def lock_of(database: Path) -> Path:
    return database.with_name(f".{database.name}.lock")


def test_the_lock_of_a_database_lies_beside_it_and_is_private(shared: Path) -> None:
    database = shared / "mlflow.db"
    mlflow_server.connect(f"sqlite:///{database}")
    assert stat.S_IMODE(lock_of(database).stat().st_mode) == 0o600
    assert not list(shared.glob("fls-*.lock"))
    assert "PermissionError" in as_other(lambda: open(lock_of(database)))


@pytest.mark.parametrize(("folder_mode", "may_read"), [(0o755, False), (0o2770, True)])
def test_a_database_and_its_files_are_their_users_alone_unless_the_folder_is_a_groups(
    shared: Path, folder_mode: int, may_read: bool
) -> None:
    folder = shared / "project"
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(folder_mode)
    before = os.umask(0o002 if may_read else 0o022)
    try:
        uri = f"sqlite:///{folder}/mlflow.db"
        facts = RunFacts(
            run_id="r", name="n", experiment="e", uri=uri, spec_file="f.yaml", spec_text=""
        )
        client = mlflow_server.connect(uri)
        run = client.create_run(mlflow_server.open_experiment(client, facts)).info.run_id
        client.log_text(run, "private: true", "spec.yaml")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "mlruns").stat().st_mode) & 0o777 == (
        0o770 if may_read else 0o700
    )
    for act in (
        lambda: (folder / "mlflow.db").read_bytes()[:6],
        lambda: os.listdir(folder / "mlruns"),
    ):
        found = as_other(act, groups=(GROUP,))
        assert ("PermissionError" in found) != may_read, found


def test_a_lock_that_is_a_link_empties_nothing(shared: Path) -> None:
    database, precious = shared / "mlflow.db", shared / "precious"
    precious.write_text("precious")
    lock_of(database).symlink_to(precious)
    with pytest.raises(PipelineError, match="Too many levels of symbolic links"):
        mlflow_server.connect(f"sqlite:///{database}")
    assert precious.read_text() == "precious"


def test_a_lock_that_is_held_for_long_is_an_error_with_its_path(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_server, "_LOCK_S", 0.3)
    database = shared / "mlflow.db"
    with lock_of(database).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began_s = time.monotonic()
        with pytest.raises(PipelineError, match=r"\.mlflow\.db\.lock has been locked by another"):
            mlflow_server.connect(f"sqlite:///{database}")
        assert time.monotonic() - began_s < 5
    mlflow_server.connect(f"sqlite:///{database}")


# --------------------------------------------------------------------------------------- a store


EMPTY = RunPlan(pipeline="", cells={})


def fill_store(folder: Path) -> Store:
    store = Store(str(folder))
    store.write_run("20260101-000000-aaaa", RunPlan(pipeline="private", cells={}))
    return store


def shared_store(folder: Path, *, mode: int, mask: int) -> None:
    """Make a store in a folder that belongs to a group."""
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(mode)
    before = os.umask(mask)
    try:
        fill_store(folder)
    finally:
        os.umask(before)


def test_a_store_that_a_run_makes_is_its_users_alone(shared: Path) -> None:
    store = fill_store(shared / "project" / ".fls")
    found = as_other(lambda: store.read_run("20260101-000000-aaaa", RunPlan))
    assert "Permission denied" in found
    assert stat.S_IMODE((shared / "project" / ".fls").stat().st_mode) == 0o700
    assert stat.S_IMODE((shared / "project").stat().st_mode) & 0o055  # not the store's


def test_a_store_in_a_folder_shared_on_purpose_serves_its_group(shared: Path) -> None:
    folder = shared / "store"
    shared_store(folder, mode=0o2770, mask=0o002)
    again = partial(
        Store(str(folder)).write_run, "20260102-000000-bbbb", RunPlan(pipeline="", cells={})
    )
    assert as_other(again, groups=(GROUP,), mask=0o002) == "None"
    assert f"{folder}: user {OTHER} may not write" in as_other(again)


def test_a_store_that_keeps_its_group_out_is_refused_at_the_start(shared: Path) -> None:
    folder = shared / "store"
    shared_store(folder, mode=0o2775, mask=0o022)
    found = as_other(Store(str(folder)).prepare, groups=(GROUP,), mask=0o002)
    assert f"{folder}/runs: user {OTHER} may not write in it" in found
    assert f"it belongs to user 0 and group {GROUP}" in found
    assert "umask 002" in found
    for command in (
        ["chgrp", "-R", "GROUP", str(folder)],
        ["chmod", "-R", "g+rwX", str(folder)],
        ["find", str(folder), "-type", "d", "-exec", "chmod", "g+s", "{}", "+"],
    ):
        assert f"`{' '.join(command)}`" in found
        subprocess.run([str(GROUP) if one == "GROUP" else one for one in command], check=True)
    again = partial(
        Store(str(folder)).write_run, "20260102-000000-bbbb", RunPlan(pipeline="", cells={})
    )
    assert as_other(again, groups=(GROUP,), mask=0o002) == "None"


def test_what_the_group_may_not_read_is_no_outage(shared: Path) -> None:
    folder = shared / "store"
    shared_store(folder, mode=0o2770, mask=0o002)
    (plan,) = folder.glob("runs/*/plan.json")
    plan.chmod(0o600)
    read = partial(Store(str(folder)).read_run, "20260101-000000-aaaa", RunPlan)
    found = as_other(read, groups=(GROUP,), mask=0o002)
    assert found.startswith("StoreError")
    assert f"plan.json: Permission denied for user {OTHER}" in found
    assert "umask 002" in found
