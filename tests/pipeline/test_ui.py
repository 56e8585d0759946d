"""`fls ui`: MLflow's pages are for the one who started them; a wrong address is said."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from runner_fixtures import TOY
from toy_runs import ROOT, fls, write_spec

SLOW = "slow: {uses: slow, params: {steps: 1, delay_s: 0, checkpoint_every: 10}}"
PASSWORD = "password"  # noqa: S105 - the name of a group in a pattern


@dataclass(frozen=True)
class Pages:
    """What `fls ui` serves in a process of its own."""

    pid: int
    port: int
    password: str
    experiment: str
    run: str
    folder: Path

    def ask(
        self,
        path: str,
        *,
        password: str | None = None,
        method: str = "GET",
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of an answer; `password` None is the right one."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        if password != "":
            user = f"fls:{self.password if password is None else password}"
            sent["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(line):
            line.request(method, path, None if body is None else json.dumps(body), sent)
            answer = line.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()


@pytest.fixture(scope="module")
def pages(fresh_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """One server for all tests here, on a database with one run that has one file."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("ui")
    shutil.copy(fresh_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=(folder / "mlruns").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "what it says", "report/table.md")
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as other:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "true")
        shutil.copytree(TOY, folder / "toy")
        write_spec(SLOW)
        taken = other.getsockname()[1]
        process = subprocess.Popen(  # not by `start_fls`: MLflow's server warns
            [sys.executable, "-m", "pipeline", "ui", "--port", str(taken)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            link = (
                rf"http://fls:(?P<{PASSWORD}>[\w-]{{32}})@127\.0\.0\.1:(?P<port>\d+)/fls  \(Ctrl-C"
            )
            found = re.match(link, line)
            assert found is not None, line + process.communicate()[1]
            assert int(found["port"]) != taken
            yield Pages(process.pid, int(found["port"]), found[PASSWORD], experiment, run, folder)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 130
            assert "Traceback" not in errors
            assert "Warning" not in errors
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("password", ["", "wrong", "fls"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/fls"),
        ("GET", "/health"),
        ("GET", "/static-files/index.html"),
        ("POST", "/api/2.0/mlflow/runs/delete"),
        ("POST", "/api/2.0/mlflow/experiments/create"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
    ],
)
def test_nothing_is_answered_without_the_password(
    pages: Pages, method: str, path: str, password: str
) -> None:
    body = {"run_id": pages.run, "name": "mine"} if method == "POST" else None
    status, headers, text = pages.ask(path, password=password, method=method, body=body)
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic ")
    assert text == b"Use the link that `fls ui` printed.\n"


def test_the_link_leads_to_an_address_without_the_password(pages: Pages) -> None:
    status, headers, _ = pages.ask("/fls")
    assert (status, headers["location"]) == (303, f"http://127.0.0.1:{pages.port}/")
    status, _, text = pages.ask("/")
    assert status == 200
    assert b"<html" in text


def test_the_pages_show_runs_and_their_files(pages: Pages) -> None:
    search = {"experiment_ids": [pages.experiment]}
    status, _, text = pages.ask("/ajax-api/2.0/mlflow/runs/search", method="POST", body=search)
    assert status == 200
    assert json.loads(text)["runs"][0]["info"]["run_id"] == pages.run
    _, _, text = pages.ask(f"/ajax-api/2.0/mlflow/artifacts/list?run_id={pages.run}&path=report")
    assert json.loads(text)["files"][0]["path"] == "report/table.md"
    _, _, text = pages.ask(f"/get-artifact?run_uuid={pages.run}&path=report/table.md")
    assert text == b"what it says"


def test_the_passing_on_of_files_is_off(pages: Pages) -> None:
    for method in ("GET", "PUT"):
        path = "/api/2.0/mlflow-artifacts/artifacts/report/table.md"
        status, _, _ = pages.ask(path, method=method, body="x" if method == "PUT" else None)
        assert status >= 400
    assert not (pages.folder / "mlartifacts").exists()


def test_other_sites_and_names_are_refused_with_the_password_too(pages: Pages) -> None:
    status, _, _ = pages.ask("/", headers={"Host": f"rebound.example:{pages.port}"})
    assert status == 403
    body = {"run_id": pages.run}
    for origin in (
        "http://localhost:6000",
        "http://127.0.0.1:6000",
        "null",
        "https://evil.example",
    ):
        path = "/ajax-api/2.0/mlflow/runs/delete"
        status, _, _ = pages.ask(path, method="POST", body=body, headers={"Origin": origin})
        assert status == 403


def test_other_users_see_no_password_in_the_list_of_processes(pages: Pages) -> None:
    command = Path(f"/proc/{pages.pid}/cmdline").read_bytes()
    assert pages.password.encode() not in command
    assert b"sqlite" not in command


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """A server that takes connections and says nothing; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nonsense://x", "unsupported URI 'nonsense://x'"),
        ("sqlite:////proc/x.db", "No such file or directory"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
        ("postgresql+psycopg://me:5entinel-pw@127.0.0.1:9/x", "Connection refused"),
        ("postgresql+psycopg://me:5entinel-pw@127.0.0.1:{silent}/x", "no answer within 1 s"),
        ("mysql+nodriver://me:5entinel-pw@127.0.0.1:9/x", "nodriver"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_paragraph(
    toy: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    from pipeline.tracking import ui_server

    monkeypatch.setattr(ui_server, "_PATIENCE_S", 1.0)
    write_spec(SLOW)
    (toy / "text.db").write_text("this is no database, but text\n" * 100)
    with silent_server() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=toy, silent=port))
        begun = time.monotonic()
        code, output, errors = fls("ui", "--port", "0")
    assert (code, output) == (1, "")
    assert errors.startswith("MLflow at ")
    assert errors.count("\n") == 1
    assert reason in errors
    assert "Expected `tracking_uri:`" in errors
    assert "5entinel" not in errors
    assert time.monotonic() - begun < 20


def test_the_pages_of_a_server_are_its_own(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spec(SLOW)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert fls("ui") == (0, "https://mlflow.example\n", "")
