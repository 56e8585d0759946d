"""docs/cluster.md on three Ray nodes of this machine: each of its commands, in its order."""

import contextlib
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_heads import ROOT, SEVERAL_NODES, environment, free_ports, start_head, start_node

GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^    ((?:ray|fls|mlflow|export|\(umask) .*)$", re.MULTILINE)

LOGIN = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
)


class Walk:
    """Runs the guide's commands one by one, with this machine's names for HEAD and /shared.

    Nodes and servers are started in the background, and end with the walk; `ray stop` would end
    every Ray on this machine, so the last command is the end of the walk itself.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.commands = iter(COMMAND.findall(GUIDE))
        self.folder = folder
        self.stack = stack
        (folder / "bin").mkdir()
        (folder / "bin" / "fls").write_text('#!/bin/sh\nexec python -m pipeline "$@"\n')
        (folder / "bin" / "fls").chmod(0o700)
        self.variables = environment(HOME=str(folder))
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
            del self.variables[name]
        for name in LOGIN:
            self.variables.pop(name, None)
        self.variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{self.variables['PATH']}"
        self.names = {"/shared": str(folder / "shared")}

    def next(self, expected: str) -> str:
        """Return the guide's next command, which is to begin so."""
        command = next(self.commands)
        assert command.startswith(expected), command
        for name, value in self.names.items():
            command = command.replace(name, value)
        return command

    def run(self, expected: str) -> str:
        return self._execute(self.next(expected))

    def run_until(self, expected: str, shown: str) -> None:
        """Run the next command until it shows what the guide says, as its reader would."""
        command, end = self.next(expected), time.monotonic() + 60
        while shown not in (output := self._execute(command)):
            assert time.monotonic() < end, output

    def _execute(self, command: str) -> str:
        done = subprocess.run(
            ["/bin/sh", "-f", "-c", command],
            cwd=ROOT, env=self.variables, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def export(self, name: str) -> None:
        command = f'{self.next(f"export {name}=")}; printf %s "${name}"'
        self.variables[name] = self._execute(command)

    def serve(self) -> None:
        (port,) = free_ports(1)
        self.names["HEAD:5000"] = f"127.0.0.1:{port}"
        self.server = f"http://127.0.0.1:{port}"
        command = self.next("mlflow server").replace("--port 5000", f"--port {port}")
        command = command.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - to be replaced
        log = (self.folder / "mlflow.log").open("wb")
        server = subprocess.Popen(
            shlex.split(command), cwd=self.folder, env=self.variables, stdout=log, stderr=log
        )
        self.stack.callback(log.close)
        self.stack.callback(server.wait)
        self.stack.callback(server.terminate)
        end = time.monotonic() + 120
        while _status(f"{self.server}/health") != 200:
            assert time.monotonic() < end, (self.folder / "mlflow.log").read_text()
            time.sleep(0.2)

    def start_head(self) -> None:
        arguments = shlex.split(self.next("ray start --head --port=6379 --dashboard-host=0.0.0.0"))
        self.head = self.stack.enter_context(start_head(*arguments[5:], **self._own()))
        self.names["HEAD:6379"] = self.head.gcs
        self.names["http://HEAD:8265"] = self.head.address

    def start_node(self) -> None:
        arguments = shlex.split(self.next("ray start --address="))
        assert arguments[2] == f"--address={self.head.gcs}"
        self.stack.enter_context(start_node(self.head, *arguments[3:]))

    def _own(self) -> dict[str, str]:
        # The token comes from the file that the guide has had made.
        return {**self.variables, **SEVERAL_NODES, "RAY_AUTH_TOKEN": ""}


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    with contextlib.ExitStack() as stack:
        yield Walk(tmp_path, stack)


def test_the_guide_leads_from_three_machines_to_the_table(walk: Walk) -> None:
    walk.run("(umask 077 && ray get-auth-token --generate)")
    token = (walk.folder / ".ray" / "auth_token").stat()
    assert (token.st_size > 16, token.st_mode & 0o777) == (True, 0o600)
    walk.export("RAY_AUTH_MODE")
    walk.run("(umask 077 && python3")
    assert (walk.folder / ".mlflow_password").stat().st_mode & 0o777 == 0o600
    for name in LOGIN:
        walk.export(name)
    walk.serve()
    assert _status(f"{walk.server}/api/2.0/mlflow/experiments/get?experiment_id=0") == 401
    walk.start_head()
    walk.start_node()
    walk.start_node()
    walk.run_until("ray status", "/3.0 CPU")
    walk.export("FISHLEG_STORAGE")
    walk.export("MLFLOW_TRACKING_URI")
    output = walk.run("fls submit")
    assert re.search(r"^\| fishleg \| \**[0-9]{2}\.", output, re.MULTILINE), output
    assert ": done" in walk.run("fls status last")
    assert "step" in walk.run("fls logs 'pretrain[seed=0]'")
    submission = walk.run("fls submit").split()[1]
    walk.names |= {"SUBMISSION": submission, "RUN": submission.removeprefix("fls-")}
    _await(walk, walk.names["RUN"])
    walk.run("ray job stop")
    assert "1 done" in walk.run("fls submit")
    assert "Nothing to do: all 1 cells are in the store." in walk.run("ray job submit")
    assert walk.next("ray stop") == "ray stop"
    assert not list(walk.commands)


def _await(walk: Walk, run: str) -> None:
    """Wait until a run has begun."""
    end = time.monotonic() + 60
    while not (Path(walk.variables["FISHLEG_STORAGE"]) / "runs" / run / "state.json").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def _status(url: str) -> int:
    """Return what an HTTP server answers to somebody without a password; 0 if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own server
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, urllib.error.URLError):
        return 0
