"""A Ray cluster of several nodes on this machine, whose processes can be shot at one by one."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

_READY_S = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Cluster:
    """A head without CPUs, and nodes with one each, so that every task runs on a node.

    Args:
        nodes: how many beside the head.
        folder: of Ray's session files; a short path, for it holds sockets.
        environment: of all its processes, and so of the workers.
    """

    def __init__(self, nodes: int, folder: Path, environment: Mapping[str, str]):
        self._wanted = nodes
        self._folder = folder
        self._environment = {**environment, "RAY_USAGE_STATS_ENABLED": "0"}
        self._head: subprocess.Popen[bytes] | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self.address = ""

    def ensure(self) -> None:
        """Start what is not running: the nodes that died, or everything when the head did."""
        if self._head is None or not self._lives(self._head) or not self._answers():
            self.stop()
            port = _free_port()
            self.address = f"127.0.0.1:{port}"
            self._head = self._start("--head", f"--port={port}", "--num-cpus=0")
            _wait(self._answers)
        for node in [one for one in self._nodes if not self._lives(one)]:
            _end(node)  # what waits for a raylet that ended well, waits on
            self._nodes.remove(node)
        missing = self._wanted - len(self._nodes)
        for _ in range(missing):
            self._nodes.append(self._start(f"--address={self.address}", "--num-cpus=1"))
        if missing:
            _wait(lambda: self._cpus() >= self._wanted)

    def raylets(self) -> list[psutil.Process]:
        """Return the raylets of all nodes, the head's included."""
        return self._named("raylet")

    def head(self) -> psutil.Process:
        """Return the process that holds the cluster's state."""
        return self._named("gcs_server")[0]

    def stop(self) -> None:
        """Kill every process of the cluster."""
        for starter in [*self._nodes, *([self._head] if self._head else [])]:
            _end(starter)
        self._head, self._nodes = None, []

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", "--block", "--disable-usage-stats", *arguments]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        self._started += 1  # a folder each, for what nodes unpack and log
        command += [f"--temp-dir={self._folder / str(self._started)}"]
        if "--head" in arguments:
            command += ["--include-dashboard=false"]
        return subprocess.Popen(
            command,
            env=dict(self._environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def _named(self, name: str) -> list[psutil.Process]:
        starters = [node.pid for node in self._nodes] + ([self._head.pid] if self._head else [])
        family = [process for pid in starters for process in _family(pid)]
        return [process for process in family if _is(process, name)]

    def _lives(self, node: subprocess.Popen[bytes]) -> bool:
        return any(_is(process, "raylet") for process in _family(node.pid))

    def _cpus(self) -> int:
        """Return how many CPUs the cluster knows of."""
        program = "import ray; ray.init(log_to_driver=False); print(ray.cluster_resources()['CPU'])"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**self._environment, "RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
        )
        return int(float(done.stdout.split()[-1])) if done.returncode == 0 else 0

    def _answers(self) -> bool:
        host, _, port = self.address.partition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True


def _die_with_parent() -> None:
    """Have this process killed with its parent, even by SIGKILL; Ray's own follow their starter."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(starter: subprocess.Popen[bytes]) -> None:
    for process in _family(starter.pid):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it went with its parent
    starter.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _is(process: psutil.Process, name: str) -> bool:
    try:
        return process.name() == name and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(condition) -> None:
    end_s = time.monotonic() + _READY_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError("the cluster does not come up")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pause(pid: int, seconds: float) -> None:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
