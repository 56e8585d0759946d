"""Submitting to a real Ray head with token authentication; one head serves all tests here."""

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_heads import TOKEN, Head, start_head
from s3_server import BUCKET
from test_packing import git
from toy_runs import DIAMOND, TOY, fls, last_run, numbers, ran, wait_for, write_spec

from pipeline.base.errors import BadInput
from pipeline.base.states import RunState
from pipeline.cluster.forwarding import forwarding, refuse_secrets
from pipeline.cluster.submit import Submission, _resume_command, is_this_machine
from pipeline.code.provenance import SOURCE_FILE, Provenance
from pipeline.store.store import Store

SECRET = "correct-horse-battery"  # noqa: S105 - to be looked for where it must not be
SLOW = "slow: {uses: slow, params: {steps: 200, delay_s: 0.02}}"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with start_head("--num-cpus=2") as found:
        yield found


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with the plugin `toy`, as the user's own would be."""
    shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "ran"))
    return tmp_path


def submit(head: Head, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "submit", "--address", head.address]
    return subprocess.run(
        [*command, "--tracking", "jsonl", *arguments] if "--resume" not in arguments
        else [*command, *arguments],
        env={**head.environment, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def ask(head: Head, path: str) -> Any:
    request = urllib.request.Request(  # noqa: S310 - our own server
        head.address + path, headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return json.load(answer)


def submission_of(output: str) -> str:
    return output.split()[1]


def test_a_submitted_run_is_the_run_that_it_says(head: Head, work: Path) -> None:
    write_spec(DIAMOND)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (work / "toy" / "new.py").write_text("")
    log = f"TOY_LOG={work / 'ran'}"
    found = submit(
        head, "--follow", "--env", log, "--set", "start.value=20", "--until", "total",
        MLFLOW_TRACKING_PASSWORD=SECRET, AWS_REGION="eu",
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, ""), found.stdout
    # The results came from the job, and are where this machine looks for them.
    record = last_run()
    assert record.state is RunState.DONE
    assert numbers()["add[amount=2,seed=1]"] == 23
    assert ran()["start[seed=0]"] == 1
    assert "report" not in ran()
    assert "] 7 done" in found.stdout
    # What is printed is enough to go on with it.
    submission = submission_of(found.stdout)
    assert submission == f"fls-{record.run_id}"
    assert f"ray job logs {submission} --address {head.address} --follow" in found.stdout
    assert f"ray job stop {submission} --address {head.address}" in found.stdout
    line = f"fls submit pipeline.yaml --address {head.address} --resume {record.run_id} --env {log}"
    assert f"resume:  AWS_REGION=eu {line}\n" in found.stdout
    # Commit, changes and versions are known without a .git in the job's folder.
    source = Store(".fls").read_run(record.run_id, Provenance)
    assert source is not None
    head_commit = (work / ".git" / "refs" / "heads").rglob("*")
    assert source.commit in {path.read_text().strip() for path in head_commit if path.is_file()}
    assert source.changes == ["? toy/new.py"]
    assert source.packages["pydantic"]
    # No secret went along: not in the job's record, nor in the package, nor in the store.
    job = ask(head, f"/api/jobs/{submission}")
    assert job["runtime_env"]["env_vars"]["AWS_REGION"] == "eu"
    assert job["metadata"]["mlflow.source.git.commit"] == source.commit
    assert job["metadata"]["fls.uncommitted"] == "? toy/new.py"
    assert SECRET not in json.dumps(job)
    assert "secrets not given, the nodes must have them: MLFLOW_TRACKING_PASSWORD" in found.stdout
    assert SECRET not in found.stdout
    assert not [path for path in work.glob(".fls/**/*.json") if SECRET in path.read_text()]


def test_a_stopped_job_is_a_stopped_run_that_can_be_resumed(head: Head, work: Path) -> None:
    write_spec(SLOW)
    log = f"TOY_LOG={work / 'ran'}"
    submission = submission_of(submit(head, "--env", log).stdout)
    wait_for(lambda: any(Path(".fls").glob("stages/*/attempts/*/checkpoints/00*[0-9]")), 60)
    command = ["ray", "job", "stop", submission, "--address", head.address]
    subprocess.run(command, env=head.environment, check=True, capture_output=True, timeout=60)
    assert ask(head, f"/api/jobs/{submission}")["status"] == "STOPPED"
    record = last_run()
    assert record.state is RunState.STOPPED
    assert record.tracked  # and all that was to be recorded was, before Ray's three seconds
    resumed = submit(head, "--resume", record.run_id, "--env", log, "--follow")
    assert resumed.returncode == 0, resumed.stdout
    assert (last_run().run_id, last_run().state) == (record.run_id, RunState.DONE)
    assert fls("logs", "slow")[1].count("  step 1:") == 1  # it went on from its checkpoint


def test_a_wrong_token_is_refused_in_one_sentence(head: Head, work: Path) -> None:
    write_spec(DIAMOND)
    wrong = submit(head, RAY_AUTH_TOKEN="f" * 32)
    missing = submit(head, RAY_AUTH_MODE="disabled")
    for found in (wrong, missing):
        assert (found.returncode, found.stdout) == (1, "")
        assert len(found.stderr.splitlines()) == 1
        assert "asks for its token" in found.stderr
        assert "put the cluster's token into RAY_AUTH_TOKEN" in found.stderr
    assert "Invalid authentication token" in wrong.stderr
    assert "Missing authentication token" in missing.stderr


def test_a_run_that_a_cluster_refuses_is_one_paragraph_and_no_run(head: Head, work: Path) -> None:
    write_spec(DIAMOND)
    for wrong in ({"RAY_AUTH_TOKEN": "f" * 32}, {"RAY_AUTH_MODE": "disabled"}):
        found = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", "--tracking", "jsonl"],
            env={**head.environment, "RAY_ADDRESS": head.gcs, **wrong},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr.startswith(f"Ray at {head.gcs} (RAY_ADDRESS) asks for its token")
        assert len(found.stderr.splitlines()) == 1
        assert "put the cluster's token into RAY_AUTH_TOKEN" in found.stderr
    assert Store(".fls").list_runs() == []


def test_a_node_takes_no_module_of_the_working_directory_for_an_installed_one(
    head: Head, work: Path
) -> None:
    write_spec(DIAMOND)
    for name in ("fsspec", "pydantic", "ray", "torch", "yaml"):
        Path(f"{name}.py").write_text(f"open({str(work / 'executed')!r}, 'a').write('{name} ')\n")
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "--tracking", "jsonl"],
        env={**head.environment, "RAY_ADDRESS": head.gcs},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not Path("executed").exists(), Path("executed").read_text()
    assert found.returncode == 0, found.stdout + found.stderr


# ------------------------------------------------------------- what needs no head to be refused


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nonsense", "http://x.invalid:8265"]
)
def test_a_run_for_which_no_head_answers_is_one_paragraph_and_no_run(
    work: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    import pipeline.executors.ray_settings  # noqa: F401 - once, and without RAY_ADDRESS

    write_spec(DIAMOND)
    monkeypatch.setenv("RAY_ADDRESS", address)
    code, output, errors = fls("run", "--tracking", "jsonl")
    assert (code, output) == (2, "")
    assert errors.startswith(f"No Ray cluster answers at {address} (RAY_ADDRESS): ")
    assert "RAY_AUTH_TOKEN" in errors
    assert len(errors.splitlines()) == 1
    assert Store(".fls").list_runs() == []


@pytest.mark.parametrize(
    ("storage", "arguments", "variables", "message"),
    [
        (".fls", [], {}, "storage: .fls is a folder of this machine"),
        ("/shared", [], {}, "MLflow at sqlite:///mlflow.db is a file of this machine"),
        (
            "/shared",
            [],
            {"MLFLOW_TRACKING_URI": "http://localhost:5000"},
            "is this machine's own address",
        ),
        (
            "/shared",
            [],
            {"MLFLOW_TRACKING_URI": "postgresql://me:hunter2-hunter2@db/x"},
            "MLFLOW_TRACKING_URI holds a password",
        ),
        ("/shared", ["--resume", "x", "--until", "a"], {}, "remove --until a"),
        ("/shared", ["--exclude", "pipeline.yaml"], {}, "pipeline.yaml (the pipeline) would not"),
        ("/shared", ["--env", "NOT_SET"], {}, "--env NOT_SET: it is not set here"),
    ],
)
def test_what_a_remote_cluster_could_not_use_is_refused(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    arguments: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in {"MLFLOW_TRACKING_URI": "http://192.0.2.9:5000", **variables}.items():
        monkeypatch.setenv(name, value)
    if "sqlite" in message:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    write_spec("a: {uses: start, params: {value: 1}}", storage=storage)
    code, output, errors = fls("submit", "--address", "http://192.0.2.1:8265", *arguments)
    assert (code, output) == (2, "")
    assert message in errors
    assert "hunter2" not in errors


@pytest.mark.parametrize("address", ["http://192.0.2.1:8265", "http://127.0.0.1:9"])
def test_a_password_that_the_pipeline_takes_from_a_variable_goes_into_no_job(
    work: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("LAB", "postgresql://me:hunter2-hunter2@192.0.2.9/db")
    path = write_spec("a: {uses: start, params: {value: 1}}", storage=str(work / "results"))
    path.write_text(path.read_text() + "mlflow: {tracking_uri: '${env.LAB}'}\n")
    code, output, errors = fls("submit", "--address", address)
    assert (code, output) == (2, "")
    assert errors.startswith(
        "MLFLOW_TRACKING_URI (mlflow.tracking_uri of pipeline.yaml, by LAB) holds a"
    )
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes" in errors
    assert "--env MLFLOW_TRACKING_URI" in errors
    assert len(errors.splitlines()) == 1
    assert "hunter2" not in errors
    # Who names it has decided.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2-hunter2@192.0.2.9/db")
    code, _, errors = fls(
        "submit", "--address", "http://127.0.0.1:9", "--env", "MLFLOW_TRACKING_URI"
    )
    assert (code, errors[:27]) == (1, "No Ray head answers at http")


def test_a_job_is_given_no_secret_whatever_chose_its_variables() -> None:
    final = {
        "MLFLOW_TRACKING_URI": "http://me:hunter2-hunter2@host",
        "FSSPEC_S3": '{"secret": "x"}',
    }
    with pytest.raises(BadInput, match="^FSSPEC_S3 holds a password or a token, which") as caught:
        refuse_secrets(final, ["MLFLOW_TRACKING_URI"], {})
    assert "on the nodes" in str(caught.value)
    assert "--env FSSPEC_S3" in str(caught.value)
    refuse_secrets(final, ["MLFLOW_TRACKING_URI", "FSSPEC_S3=x"], {})


def test_a_file_that_a_stage_reads_must_be_packed(work: Path) -> None:
    Path("data").mkdir()
    Path("data/number.txt").write_text("7")
    write_spec("r: {uses: read, params: {path: data/number.txt}}")
    code, _, errors = fls("submit")
    assert code == 2
    assert "data/number.txt (r) would not be packed" in errors
    assert "`!/data/number.txt` in .flsignore" in errors


def test_a_pipeline_outside_of_the_packed_folder_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_spec("a: {uses: start, params: {value: 1}}").absolute()
    (work / "inner").mkdir()
    monkeypatch.chdir(work / "inner")
    code, _, errors = fls("submit", str(file))
    assert code == 2
    assert (
        f"{file} (the pipeline) would not be packed: it lies outside the working directory"
        in errors
    )
    assert ".flsignore" not in errors


@pytest.mark.parametrize("address", ["ftp://head:8265", "head:8265", "auto", "http://", "http://["])
def test_an_address_that_is_no_dashboards_is_refused(work: Path, address: str) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    code, _, errors = fls("submit", "--address", address)
    assert code == 2
    assert f"--address {address}: expected the URL of the dashboard" in errors
    assert "http://HEAD:8265" in errors


def test_the_line_that_resumes_is_true_in_another_shell_and_shows_no_secret(work: Path) -> None:
    shell = {
        "FISHLEG_STORAGE": "/shared/my runs",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "MODE": "fast",
    }
    env = ["HF_TOKEN", "MODE", "DB_PASSWORD=hunter2-hunter2", "URL=http://me:hunter2@x", "X=a b"]
    asked = Submission(file=Path("p.yaml"), address="http://h:8265", env=env, excludes=["notes/*"])
    assert _resume_command(asked, "the-run", forwarding(shell, env)) == (
        "FISHLEG_STORAGE='/shared/my runs' fls submit p.yaml --address http://h:8265 "
        "--resume the-run --env HF_TOKEN --env MODE=fast --env DB_PASSWORD --env URL "
        "--env 'X=a b' --exclude 'notes/*'"
    )


def test_nobody_answers(work: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    code, _, errors = fls("submit", "--address", "http://127.0.0.1:9")
    assert code == 1
    assert errors.startswith("No Ray head answers at http://127.0.0.1:9")


def test_which_addresses_are_this_machines() -> None:
    assert is_this_machine("http://localhost:8265")
    assert not is_this_machine("http://192.0.2.1:8265")
    assert not is_this_machine("http://no-such-host.invalid:8265")


def test_a_tunnel_is_found_out_where_it_ends(work: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    Path(SOURCE_FILE).write_text(Provenance(submitted_from="my-laptop").to_json())
    code, _, errors = fls("run", "--executor", "local", "--tracking", "jsonl")
    assert code == 2
    assert "my-laptop submitted this job to an address of its own, but this is " in errors
    assert not Path(".fls/runs").exists()


def test_a_folder_of_the_job_is_no_place_for_results(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    local = ("--executor", "local", "--tracking", "jsonl")
    assert "Ray deletes after the job" in fls("run", *local)[1]
    monkeypatch.setenv("FISHLEG_STORAGE", str(work / "elsewhere"))
    code, output, _ = fls("run", *local)
    assert (code, "Ray deletes" in output) == (0, False)
    assert len(list((work / "elsewhere" / "stages").iterdir())) == 1


def test_the_json_lines_of_a_job_outlive_its_folder_or_it_says_that_they_do_not(
    work: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    local = ("--executor", "local", "--tracking", "jsonl")
    monkeypatch.setenv("FISHLEG_STORAGE", f"file://{work / 'results'}")
    code, output, _ = fls("run", *local, "--run-id", "first")
    lines = work / "results" / "tracking" / "first.jsonl"
    assert (code, f"All events: {lines}" in output) == (0, True)
    assert '"state": "done"' in lines.read_text().splitlines()[-1]
    assert not Path("tracking").exists()
    assert "no damage" in fls("verify")[1]
    monkeypatch.setenv("FISHLEG_STORAGE", f"s3://{BUCKET}/lines")
    code, output, _ = fls("run", *local, "--run-id", "second")
    assert (code, output.count("The JSON lines go into a folder of this job, which Ra")) == (0, 1)


def test_an_id_is_taken_once(work: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    local = ("--executor", "local", "--tracking", "jsonl", "--run-id", "mine")
    assert fls("run", *local)[0] == 0
    code, _, errors = fls("run", *local, "--force", "a")
    assert (code, "has a run mine already; `fls resume mine`" in errors) == (2, True)
