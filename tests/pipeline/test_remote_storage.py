"""S3 over HTTP: exclusive creation, patience, and errors that say what is wrong."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from flaky_proxy import FlakyProxy, flaky
from s3_server import BUCKET, SECRET, s3_environment
from test_store import KEY
from toy_runs import ROOT, fls

from pipeline.base.errors import BadInput, StorageUnavailable, StorageUnsupported, StoreError
from pipeline.stage import Context
from pipeline.store.storage import open_storage
from pipeline.store.storage import remote as remote_storage
from pipeline.store.storage.remote import RemoteStorage
from pipeline.store.store import Store
from pipeline.upkeep.gc import collect, find_garbage
from pipeline.upkeep.survey import Retention

_counter = itertools.count()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little patience, so that what ends in an error does so soon."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(remote_storage, "patience_s", lambda answered: 1.0 if answered else 0.3)
    monkeypatch.setattr(remote_storage, "_FIRST_PAUSE_S", 0.05)
    quick = {"connect_timeout": 1, "read_timeout": 0.3, "retries": {"total_max_attempts": 1}}
    monkeypatch.setattr(remote_storage, "_S3_REQUESTS", quick)


@pytest.fixture
def proxy(s3_endpoint: str, hurried: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    with flaky(s3_endpoint) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def storage(proxy: FlakyProxy) -> RemoteStorage:
    return RemoteStorage(f"s3://{BUCKET}/remote-{next(_counter)}")


# -------------------------------------------------------------------- exclusive creation


def test_a_file_is_created_once(s3: str) -> None:
    storage = RemoteStorage(f"s3://{BUCKET}/create-{next(_counter)}")
    assert storage.create("a/file", b"first")
    assert not storage.create("a/file", b"second")
    assert storage.read("a/file") == b"first"


def test_a_large_file_that_goes_up_in_parts_is_created_once(s3: str) -> None:
    # `create` leaves the choice to s3fs, which takes parts from 100 MiB on: smaller ones here.
    storage = RemoteStorage(f"s3://{BUCKET}/create-{next(_counter)}")
    path, part = f"{storage.root}/large", 5 << 20
    for letter in (b"a", b"b"):
        options = {"mode": "create", "chunksize": part}
        try:
            storage.fs.pipe_file(path, letter * (2 * part + 1), **options)
            created = True
        except FileExistsError:
            created = False
        assert created == (letter == b"a")
    assert storage.fs.cat_file(path, start=0, end=3) == b"aaa"
    assert storage.fs.info(path)["size"] == 2 * part + 1
    assert not storage.create("large", b"c")


def test_a_server_without_conditional_puts_is_refused(proxy: FlakyProxy) -> None:
    proxy.dropped_headers.add("if-none-match")
    with pytest.raises(StorageUnsupported, match="use a storage with conditional writes"):
        Store(f"s3://{BUCKET}/unconditional").prepare()


def test_a_creation_whose_answer_got_lost_still_counts(
    proxy: FlakyProxy, storage: RemoteStorage
) -> None:
    proxy.fail("lost")
    assert storage.create("mine", b"mine")
    assert proxy.requests > 1
    assert not storage.create("mine", b"another's")
    assert storage.read("mine") == b"mine"


# ------------------------------------------------------------------------------ patience


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "hang", "lost"])
def test_what_fails_for_a_while_is_tried_again(
    proxy: FlakyProxy, storage: RemoteStorage, tmp_path: Path, fault: str
) -> None:
    storage.write("file", b"1")
    for action in (
        lambda: storage.write("file", b"2"),
        lambda: storage.read("file") == b"2" or pytest.fail("read"),
        lambda: storage.names("folder"),
        lambda: storage.load("folder", tmp_path / fault),
        lambda: storage.remove("folder"),
    ):
        proxy.fail(fault)
        before = proxy.requests
        action()
        assert proxy.requests > before + 1


def test_an_attempt_lists_no_other_results(proxy: FlakyProxy, storage: RemoteStorage) -> None:
    store = Store(storage.url)
    with store.begin_attempt(KEY):
        pass
    store.storage.write(f"stages/{KEY}/manifest.json", b"broken")
    assert store.set_aside(KEY)
    store.storage.write("stages/other/manifest.json", b"")
    asked: list[str] = []
    proxy.fault = lambda method, path: asked.append(path)
    assert store.damaged(KEY) == [1]
    with store.begin_attempt(KEY) as attempt:
        assert attempt.number == 2
    listed = [parse_qs(urlsplit(path).query).get("prefix", [""])[0] for path in asked]
    assert [prefix for prefix in listed if prefix and KEY not in prefix] == []


@pytest.mark.parametrize("fault", ["500", "hang"])
def test_patience_ends(proxy: FlakyProxy, storage: RemoteStorage, fault: str) -> None:
    storage.write("file", b"1")
    proxy.fault = lambda method, path: fault
    with pytest.raises(StorageUnavailable, match=r"cannot read file: .*tried for \d s") as raised:
        storage.read("file")
    assert storage.url in str(raised.value)


# -------------------------------------------------------------------------------- errors


def test_an_endpoint_that_is_gone_is_named(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageUnavailable) as raised:
        Store(f"s3://{BUCKET}/gone").prepare()
    text = str(raised.value)
    assert f"s3://{BUCKET}/gone: cannot read storage.json" in text
    assert "127.0.0.1:9" in text
    assert "AWS_ENDPOINT_URL" in text
    assert SECRET not in text


@pytest.mark.parametrize("action", ["prepare", "list_runs"])
def test_a_bucket_that_is_missing_is_named_and_not_made(s3: str, action: str) -> None:
    with pytest.raises(StoreError, match="s3://nowhere/x: .*no such bucket. Make it") as raised:
        getattr(Store("s3://nowhere/x"), action)()
    assert not isinstance(raised.value, StorageUnavailable)
    assert not RemoteStorage(f"s3://{BUCKET}/x").fs.exists("nowhere")


def test_access_that_is_denied_is_not_asked_for_again(
    proxy: FlakyProxy, storage: RemoteStorage
) -> None:
    proxy.fault = lambda method, path: "403"
    with pytest.raises(StoreError, match=r"access denied .*Check the credentials") as raised:
        storage.write("file", b"1")
    assert proxy.requests == 1
    assert SECRET not in str(raised.value)


def test_a_password_in_the_url_is_refused() -> None:
    with pytest.raises(BadInput, match=r"s3://\*\*\*@bucket/x has a password") as raised:
        open_storage("s3://me:word@bucket/x")
    assert "word@" not in str(raised.value)


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(BadInput, match=r"storage: s3://\[x is no URL \(Invalid IPv6 URL\)"):
        open_storage("s3://[x")


def test_a_name_that_leads_out_of_the_folder_is_not_downloaded(s3: str, tmp_path: Path) -> None:
    storage = RemoteStorage(f"s3://{BUCKET}/evil-{next(_counter)}")
    storage.fs.pipe_file(f"{storage.root}/outputs/x/../../../../evil", b"evil")
    with pytest.raises(StoreError, match="is no path inside a storage"):
        storage.load("outputs/x", tmp_path / "deep/copy")
    assert not list(tmp_path.rglob("evil"))


# ------------------------------------------------------------------ what killed workers left

WORKER = """
import sys, time
from pipeline.store.storage import open_storage
print(open_storage("memory://left").workspace("x"), flush=True)
time.sleep(60)
"""


def test_the_workspace_of_a_killed_worker_is_deleted_by_the_next_one_on_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = open_storage("memory://left")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdout is not None
        theirs = Path(worker.stdout.readline().strip())
        (theirs / "part").write_bytes(b"123")
        os.utime(theirs, (0, 0))  # it works for so long that it seems to be silent
        mine = storage.workspace("x")
        assert storage.leftovers() == []
        worker.kill()
    (left,) = storage.leftovers()
    assert (left.path, left.bytes, left.time) == (str(theirs), 3, 0)
    again = storage.workspace("x")
    assert not theirs.exists()
    assert mine.is_dir()
    for folder in (mine, again):
        storage.release(folder)
    assert storage.leftovers() == []


def test_an_attempt_that_cannot_reach_its_checkpoint_does_not_begin_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(f"memory://left-{next(_counter)}")
    first = store.begin_attempt(KEY)
    with Context(params=None, folder=first.folder).checkpoint() as folder:
        (folder / "x").touch()
    first.append_events([{"type": "checkpoint"}])
    before = sorted(tmp_path.rglob("work-*"))

    def fail(path: str, folder: Path) -> None:
        raise StorageUnavailable("away")

    monkeypatch.setattr(store.storage, "load", fail)
    with pytest.raises(StorageUnavailable):
        store.begin_attempt(KEY)
    assert sorted(tmp_path.rglob("work-*")) == before
    first.__exit__()


def test_the_parts_of_a_killed_upload_are_collected(s3: str, tmp_path: Path) -> None:
    store = Store(f"s3://{BUCKET}/parts-{next(_counter)}")
    with store.begin_attempt(KEY) as attempt:
        store.storage.write(f"stages/{KEY}/attempts/0001/outputs/a/b", b"whole")
        path = f"stages/{KEY}/attempts/{attempt.number:04d}/outputs/a/large"
    fs = store.storage.fs
    bucket, _, folder = store.storage.root.partition("/")
    for key in (f"{folder}/{path}", "another/large"):
        upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        part = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": 1}
        fs.call_s3("upload_part", Body=b"x" * (5 << 20), **part)
    assert path not in {item.paths[-1] for item in find_garbage(store, [], Retention())}
    now = Retention(grace_s=0)
    found = find_garbage(store, [], now)
    assert {item.paths[-1]: item.reason for item in found}[path] == (
        "left by a worker that was killed"
    )
    list(collect(store, [], now, found))
    left = fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert [one["Key"] for one in left] == ["another/large"]
    again = [item for item in found if item.paths[-1] == path]  # ended meanwhile, as if by itself
    assert list(collect(store, [], now, again)) == again
    for one in left:
        fs.call_s3(
            "abort_multipart_upload", Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"]
        )


# ----------------------------------------------------------------- file systems of fsspec


@pytest.mark.parametrize(
    ("url", "module"),
    [("gs://b/x", "gcsfs"), ("abfs://c@a/x", "adlfs"), ("simplecache::sftp://h/x", "paramiko")],
)
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # whether it is installed or not
    code, output, errors = fls("status", "--storage", url)
    assert (code, output) == (2, "")
    assert errors.startswith(f"storage: {url} needs a package that is not installed")
    assert f"no module named {module!r}" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "code", "expected"),
    [
        ("gss://b/x", 2, "storage: gss://b/x: unknown scheme 'gss' (did you mean 'gs'?); exp"),
        ("github://b/x", 2, "storage: github://b/x cannot be used: GithubFileSystem"),
        ("ftp://127.0.0.1:9/x", 1, "ftp://127.0.0.1:9/x: cannot connect: "),
    ],
)
def test_a_url_that_is_no_storage_is_one_clear_error(url: str, code: int, expected: str) -> None:
    found, output, errors = fls("status", "--storage", url)
    assert (found, output) == (code, "")
    assert errors.startswith(expected)
    assert errors.count("\n") == 1
