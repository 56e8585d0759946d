"""Files that hold keys and passwords stay here: they are not packed, nor in what a run records."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_packing import git, put

from pipeline.base.errors import BadInput
from pipeline.base.secret_files import PATTERNS, is_secret_file
from pipeline.cluster.packing import LEFT_BEHIND, collect
from pipeline.code.provenance import SOURCE_FILE, look_at, read_source
from pipeline.store.store import Store

ROOT = Path(__file__).parents[2]
PROVEN = [
    "deploy/fishleg.env", "prod.env", ".envrc", "kaggle.json", ".huggingface/token", ".npmrc",
    "terraform.tfvars", ".secrets.toml", "aws_credentials",
]  # fmt: skip
OF_THE_KIND = [
    ".env", ".env.local", ".netrc", "_netrc", ".pypirc", ".pgpass", ".git-credentials",
    ".dockercfg", ".docker/config.json", ".aws/credentials", ".ssh/id_rsa", ".kube/config",
    "sub/id_ed25519", "a.pem", "a.key", "credentials", "sub/credentials", ".credentials",
    "my-credentials.json", "service_account.json", "service-account-prod.json", "auth.json",
    ".streamlit/secrets.toml", "prod.secrets.yaml", "prod.tfvars.json", "terraform.tfstate",
    "terraform.tfstate.backup", ".databrickscfg", ".modal.toml", ".my.cnf", "rclone.conf",
    ".bash_history", "auth_token", "hf.token", ".vault_pass", "openai_api_key.txt", "a.kdbx",
    "passwords.txt", "basic_auth.ini", ".ray/auth_token", ".yarnrc.yml", ".comet.config",
]  # fmt: skip
CODE = [
    "pipeline.yaml", "secrets.py", "credentials/__init__.py", "tokens.py", "my_token/__init__.py",
    "keys.json", "tokenizer.json", "environment.yml", "environment.py", "env/__init__.py",
    "authentication.py", "history.py",
]  # fmt: skip
SERVICE_ACCOUNT = '{\n  "type": "service_account",\n  "private_key": "-----BEGIN PRIVATE KEY-----"}'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def commit() -> None:
    git("init", "-q")
    git("add", "-A", "-f")
    git("commit", "-q", "-m", "first")


@pytest.mark.parametrize("name", [*PROVEN, *OF_THE_KIND])
def test_a_file_that_is_known_to_hold_secrets_is_not_packed(folder: Path, name: str) -> None:
    put("stage.py", name)
    package = collect(folder)
    assert list(package.files) == ["stage.py"]
    assert any(name == one or name.startswith(one) for one in package.secrets)
    assert is_secret_file(name)


def test_code_of_such_a_name_is_packed(folder: Path) -> None:
    put(*CODE)
    package = collect(folder)
    assert sorted(package.files) == sorted(CODE)
    assert package.secrets == []
    assert not any(map(is_secret_file, CODE))


def test_the_key_of_a_service_account_is_not_packed_whatever_its_name(folder: Path) -> None:
    put("sub/robot.json", text=SERVICE_ACCOUNT)
    put("aws.txt", text="[default]\naws_access_key_id = AKIA\n")
    assert collect(folder).secrets == ["aws.txt", "sub/robot.json"]


def test_a_store_is_not_packed_whatever_its_name(folder: Path) -> None:
    put("stage.py", "sub/stage.py", "stages/a.py", "storage.json")
    put(".flsignore", text="!/results/\n!/results/**\n")
    for name in ("results", "sub/other"):
        Store(name).prepare()
        put(f"{name}/stages/a/manifest.json", f"{name}/runs/r/spec.yaml")
    package = collect(folder)
    assert package.stores == ["results/", "sub/other/"]
    assert sorted(package.files) == [
        ".flsignore", "stage.py", "stages/a.py", "storage.json", "sub/stage.py",
    ]  # fmt: skip


def test_what_is_made_for_the_package_holds_no_secret_either(folder: Path) -> None:
    put("stage.py")
    extra = {"notes.json": '{"diff": "-hunter2-hunter2"}'}
    with pytest.raises(BadInput, match=r"notes.json holds .* variable MY_TOKEN"):
        collect(folder).refuse_if_holding([("MY_TOKEN", "hunter2-hunter2")], extra)


def test_the_record_of_a_submission_names_a_deleted_secret_file_and_shows_none_of_it(
    folder: Path,
) -> None:
    put("a.py", ".env", "prod.env", ".aws/credentials", text="PASSWORD=5entinel\n")
    commit()
    put("a.py", text="changed\n")
    for name in (".env", "prod.env", ".aws/credentials"):
        Path(name).unlink()
    source = look_at(folder, collect(folder).files)
    assert source.changes == ["M a.py"]
    assert source.left_out == [".aws/credentials", ".env", "prod.env"]
    assert source.diff.count("5entinel") == 1  # of a.py, which is no secret file
    text = "M a.py\nleft out, as keys or passwords: .aws/credentials, .env, prod.env"
    assert source.tags()["fls.uncommitted"] == text
    put(SOURCE_FILE, text=source.to_json())
    assert read_source(folder) == source


def test_the_record_of_a_run_names_changed_secret_files_and_shows_none_of_them(
    folder: Path,
) -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\n5entinel\n"
    put("a.py", ".env", ".npmrc")
    put("deploykey", "gone", text=key)
    put("robot.json", text=SERVICE_ACCOUNT)
    commit()
    put("a.py", text="changed\n")
    put(".env", ".npmrc", text="PASSWORD=5entinel\n")
    put("deploykey", text=f"{key}5entinel\n")
    put("robot.json", text=f"{SERVICE_ACCOUNT}5entinel\n")
    Path("gone").unlink()
    put("new.env", "new.py")
    put("newkey", text=key)
    source = read_source(folder)
    assert source.changes == ["M a.py", "? new.py"]
    assert source.left_out == [
        ".env", ".npmrc", "deploykey", "gone", "new.env", "newkey", "robot.json",
    ]  # fmt: skip
    assert "5entinel" not in source.to_json()
    assert "+changed" in source.diff


def test_a_patch_shows_no_secret_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a.py", text="password = 'hunter2-hunter2'\n")
    commit()
    put("a.py", text="password = None\n")
    monkeypatch.setenv("MY_PASSWORD", "hunter2-hunter2")
    source = look_at(folder, ["a.py"])
    assert "-password = '***'" in source.diff


def test_rays_launcher_leaves_the_same_files_behind() -> None:
    cluster = yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())
    git_itself, ours = cluster["rsync_exclude"][:2], cluster["rsync_exclude"][2:]
    assert git_itself == ["/.git/config", "+ /.git/**"]
    # The first pattern that matches decides for rsync, the last for .gitignore.
    same = reversed([one for one in (*PATTERNS, *LEFT_BEHIND) if one != ".git"])
    assert ours == [f"+ {one[1:]}" if one.startswith("!") else one for one in same]


@pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")
def test_rsync_understands_the_list(folder: Path) -> None:
    put(*CODE, *(one for one in [*PROVEN, *OF_THE_KIND] if one != "credentials"))
    put(".git/config", ".git/refs/heads/my_token", ".git/HEAD", "a.egg-info/x", ".venv/bin/x")
    Store("results").prepare()
    put("results/stages/key/manifest.json")
    cluster = yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())
    excludes = [word for one in cluster["rsync_exclude"] for word in ("--exclude", one)]
    (ignored,) = cluster["rsync_filter"]
    filters = ["--filter", f"dir-merge,- {ignored}"]  # as Ray words it
    subprocess.run(["rsync", "-a", *excludes, *filters, "./", "../copy"], check=True)
    copy = folder.parent / "copy"
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert found == {*CODE, ".git/refs/heads/my_token", ".git/HEAD"}


def test_environment_files_are_not_committed_by_accident() -> None:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert {"*.env", ".envrc"} <= set(lines)
