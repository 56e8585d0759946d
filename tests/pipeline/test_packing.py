"""What is packed for a cluster, what is told about it, and what of the environment goes along."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipeline.base.errors import BadInput
from pipeline.base.secrets import secret_values
from pipeline.cluster.forwarding import forwarding
from pipeline.cluster.packing import collect
from pipeline.code.provenance import SOURCE_FILE, look_at, other_versions, read_source


def put(*paths: str, text: str = "x") -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_is_packed_and_what_it_makes_is_not(folder: Path) -> None:
    put("pipeline.yaml", "code/stage.py", "code/data/tables.py", ".github/ci.yml")
    left = [".git/HEAD", ".venv/bin/python", ".fls/stages/a", ".fls-2/b", "data/images.bin"]
    left += ["mlruns/0/meta.yaml", "mlflow.db", "code/model.pt", "w.safetensors", ".env", "a.pem"]
    left += ["code/__pycache__/stage.pyc", "x.egg-info/PKG", "node_modules/a.js", SOURCE_FILE]
    put(*left)
    package = collect(folder)
    assert list(package.files) == [
        ".github/ci.yml", "code/data/tables.py", "code/stage.py", "pipeline.yaml",
    ]  # fmt: skip
    assert package.size_bytes == 4


def test_the_last_pattern_decides(folder: Path) -> None:
    put("a.txt", "b.txt", "data/small.csv", "sub/c.txt", "sub/d.txt", "e.txt", "sub/deep/b.txt")
    put(".gitignore", text="*.txt\n!b.txt\n")
    put("sub/.gitignore", text="!c.txt\nb.txt\n")
    put(".flsignore", text="!/data/\n!e.txt\n")
    found = collect(folder, ["e.txt", "*ignore"]).files
    assert sorted(found) == ["b.txt", "data/small.csv", "sub/c.txt"]


def test_links_are_named_and_not_followed(folder: Path) -> None:
    put("../elsewhere/secret.txt", "real.txt")
    Path("link").symlink_to("../elsewhere")
    Path("file").symlink_to("real.txt")
    package = collect(folder)
    assert (list(package.files), package.links) == (["real.txt"], ["file", "link"])


def test_keys_and_passwords_stay_behind_and_are_named(folder: Path) -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaA==\n"
    put("notes/deploykey", "sub/other.txt", "tests/key.txt", text=key)
    put("a.txt", text="A file of -----BEGIN RSA PRIVATE KEY----- is one.")
    put("secrets.py", "credentials/__init__.py", "keys.json")
    named = [".aws/config", ".env", ".kube/config", "gcp-credentials.json", "kubeconfig"]
    named += ["notes/credentials.json", "secrets.yaml", "secrets.yml", "sub/server.key"]
    put(*named)
    put(".flsignore", text="!/tests/key.txt\n")
    package = collect(folder)
    assert list(package.files) == [
        ".flsignore", "a.txt", "credentials/__init__.py", "keys.json", "secrets.py",
        "tests/key.txt",
    ]  # fmt: skip
    files = {*named, "notes/deploykey", "sub/other.txt"} - {".aws/config", ".kube/config"}
    assert set(package.secrets) == files | {".aws/", ".kube/"}


def test_what_is_too_large_is_refused_by_name(folder: Path) -> None:
    put("small.py")
    put("large.bin", text="x" * (3 << 20))
    package = collect(folder)
    package.refuse_if_large()
    with pytest.raises(BadInput, match=r"2 files of 3.0 MiB .* limit is 2.0 MiB(.|\n)*large.bin"):
        package.refuse_if_large(2 << 20)


def test_a_secret_in_a_file_is_refused(folder: Path) -> None:
    put("notes/setup.md", text="export TOKEN=hunter2-hunter2\n")
    with pytest.raises(BadInput, match=r"notes/setup.md holds .* variable MY_TOKEN") as caught:
        collect(folder).refuse_if_holding([("MY_TOKEN", "hunter2-hunter2")], {})
    assert "hunter2" not in str(caught.value)
    collect(folder, ["notes/"]).refuse_if_holding([("MY_TOKEN", "hunter2-hunter2")], {})


def test_equal_content_gives_equal_bytes_and_run_bits_stay(folder: Path) -> None:
    put("pipeline.yaml", "a/b.py")
    os.chmod("pipeline.yaml", 0o700)
    collect(folder).write(folder / "1.zip", {"extra.json": "{}"})
    os.utime("a/b.py", (1, 1))
    collect(folder).write(folder / "2.zip", {"extra.json": "{}"})
    assert Path("1.zip").read_bytes() == Path("2.zip").read_bytes()
    with zipfile.ZipFile("1.zip") as archive:
        modes = {one.filename: one.external_attr >> 16 for one in archive.infolist()}
    assert modes == {"pipeline.yaml": 0o755, "a/b.py": 0o644, "extra.json": 0o644}


def test_git_tells_commit_and_changes(folder: Path) -> None:
    assert look_at(folder).tags() == {}
    git("init", "-q")
    put("a.py", "b.py", "c.py", "d d.py", ".env")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    assert look_at(folder).tags()["fls.uncommitted"] == "none"
    put("a.py", "d d.py", text="changed\n")
    put(".env", text="PASSWORD=changed\n")
    Path("b.py").unlink()
    put("new.py")
    source = look_at(folder, {"a.py", "c.py", "d d.py", "new.py"})
    assert source.changes == ["M a.py", "D b.py", "M d d.py", "? new.py"]
    assert "+changed" in source.diff
    assert "PASSWORD" not in source.diff
    assert source.tags()["fls.uncommitted"] == "\n".join(
        ["M a.py", "D b.py", "M d d.py", "? new.py", "left out, as keys or passwords: .env"]
    )
    assert len(source.tags()["mlflow.source.git.commit"]) == 40
    put(SOURCE_FILE, text=source.to_json())
    assert read_source(folder).to_json() == source.to_json()


def test_other_versions_are_told(folder: Path) -> None:
    here = look_at(folder)
    assert other_versions(here) is None
    packages = {**here.packages, "pydantic": "0.1", "not-there": "1"}
    elsewhere = type(here)(python="3.1.4", packages=packages)
    told = other_versions(elsewhere)
    assert f"python 3.1.4 -> {here.python}, pydantic 0.1 -> " in told
    assert "not-there" not in told


def test_settings_go_along_and_secrets_do_not() -> None:
    here = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_TRACKING_PASSWORD": "p",
        "AWS_REGION": "eu",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_PROFILE": "me",
        "AWS_SHARED_CREDENTIALS_FILE": "/home/me/.aws/credentials",
        "FISHLEG_DATA": "/shared/data",
        "HOME": "/home/me",
        "GITHUB_TOKEN": "t",
        "OWN": "v",
    }
    found = forwarding(here, ["OWN", "B=c=d"])
    assert found.given == {
        "AWS_REGION": "eu",
        "FISHLEG_DATA": "/shared/data",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "OWN": "v",
        "B": "c=d",
    }
    assert found.secret == [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
    ]
    assert found.local == ["AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE"]
    named = forwarding(here, ["AWS_SECRET_ACCESS_KEY"])
    assert set(named.given) - set(forwarding(here, []).given) == {"AWS_SECRET_ACCESS_KEY"}
    assert "AWS_SECRET_ACCESS_KEY" not in named.secret


@pytest.mark.parametrize("wish", ["NOT_SET_ANYWHERE", "=x", "a b=c"])
def test_a_wish_that_cannot_be_met(wish: str) -> None:
    with pytest.raises(BadInput, match="--env"):
        forwarding({}, [wish])


def test_what_is_a_secret() -> None:
    uri = "MLFLOW_TRACKING_URI"
    assert forwarding({uri: "postgresql://me:hunter2@host/db"}, []).secret == [uri]
    assert forwarding({uri: "http://me@host:5000/"}, []).secret == []
    here = {"A_TOKEN": "longenough", "B_TOKEN": "short", "C": "longenough"}
    assert list(secret_values(here)) == [("A_TOKEN", "longenough")]
    url = "https://me:hunter2%2F-hunter2@host/"
    assert list(secret_values({"URL": url})) == [
        ("URL", url),
        ("URL", "hunter2%2F-hunter2"),
        ("URL", "hunter2/-hunter2"),
    ]
