"""Starts real Ray nodes on 127.0.0.1 for tests, on free ports, and ends them by their pids."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105 - of the tests' own cluster

SEVERAL_NODES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}


@dataclass(frozen=True)
class Head:
    """A running head: `address` is the dashboard's, `gcs` the cluster's own."""

    address: str
    gcs: str
    environment: Mapping[str, str]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with our commands and packages, as a user would have it."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "FISHLEG_", "AWS_"))
    }
    return {
        **own,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for 127.0.0.1 alone, one node
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        **more,
    }


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def start_head(*arguments: str, **variables: str) -> Iterator[Head]:
    """Start a head with a dashboard; end it, with all its processes, at the end."""
    gcs, dashboard, client, agent = free_ports(4)
    # Ray's sockets lie in this folder, and a socket's path may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [
            "ray", "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", folder,
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0",
            f"--object-store-memory={100 << 20}", *arguments,
        ]  # fmt: skip
        found = environment(**variables)
        address = f"http://127.0.0.1:{dashboard}"
        with _process(command, found, Path(folder) / "start.log") as process:
            wait_until(lambda: _answers(address), process, Path(folder) / "start.log")
            yield Head(address, f"127.0.0.1:{gcs}", found)


@contextlib.contextmanager
def start_node(head: Head, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a further node of the cluster of a head that was started with `SEVERAL_NODES`."""
    (agent,) = free_ports(1)
    # A folder of its own: nodes that share one unpack jobs over each other.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "start.log"
        command = [
            "ray", "start", "--block", "--disable-usage-stats", f"--address={head.gcs}",
            "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}",
            "--temp-dir", folder, "--min-worker-port=0", "--max-worker-port=0",
            f"--object-store-memory={100 << 20}", *arguments,
        ]  # fmt: skip
        with _process(command, head.environment, log) as process:
            wait_until(lambda: b"Ray runtime started" in log.read_bytes(), process, log)
            yield process


def wait_until(condition, process, log: Path, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@contextlib.contextmanager
def _process(
    command: list[str], variables: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it has started
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=1)  # noqa: S310 - our own server
    except urllib.error.HTTPError as error:
        return error.code in {401, 403}  # it is up, and wants a token
    except OSError:
        return False
    return True
