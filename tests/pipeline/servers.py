"""Real servers for tests, on 127.0.0.1 and free ports, ended by their process id."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def mlflow_server(backend: str, folder: Path) -> Iterator[str]:
    """Run a real MLflow server that stores artifacts itself; yield its address.

    Args:
        backend: URI of its database.
        folder: where its artifacts and its log go.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **quiet},
            start_new_session=True,
        )
        try:
            _wait_for_health(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the server and its own workers
            process.wait()


def _wait_for_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own address
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


class Proxy:
    """A TCP proxy whose line can be cut: connections are dropped, and new ones refused.

    Attributes:
        url: its address.
        requests: how many requests went through whole or in part.
    """

    def __init__(self, target: str):
        host, port = target.removeprefix("http://").split(":")
        self._target = host, int(port)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._server: socket.socket | None = None
        self.restore()

    def cut(self) -> None:
        """Refuse connections, and drop those there are."""
        with self._lock:
            server, self._server = self._server, None
            dropped, self._open = self._open, []
        if server is not None:
            server.shutdown(socket.SHUT_RDWR)
            server.close()
        for one in dropped:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed by the other side meanwhile

    def restore(self) -> None:
        """Take connections again."""
        server = socket.create_server(("127.0.0.1", self._port))
        with self._lock:
            self._server = server
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as upstream:
            with self._lock:
                if self._server is None:
                    return
                self._open += [client, upstream]
            selector = selectors.DefaultSelector()
            selector.register(client, selectors.EVENT_READ, upstream)
            selector.register(upstream, selectors.EVENT_READ, client)
            with selector:
                self._relay(selector, client)

    def _relay(self, selector: selectors.BaseSelector, client: socket.socket) -> None:
        while True:
            for key, _ in selector.select():
                source: socket.socket = key.fileobj  # type: ignore[assignment]
                try:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client and data.partition(b" ")[0] in {b"GET", b"POST", b"PUT"}:
                        self.requests.append(data.partition(b"\r\n")[0].decode())
                    key.data.sendall(data)
                except OSError:
                    return


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a fresh PostgreSQL as this user, or as `postgres` for root; yield its URI."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    data, port = folder / "postgres", free_port()
    # PostgreSQL refuses to run as root.
    user: dict[str, object] = {}
    if os.getuid() == 0:
        data.mkdir()
        for path in (data, *data.parents):
            if path == Path("/tmp"):  # noqa: S108 - only where pytest's folders may begin
                break
            path.chmod(path.stat().st_mode | 0o055)
        subprocess.run(["chown", "postgres", str(data)], check=True)
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    run = {"cwd": "/", "check": True, "stdout": subprocess.DEVNULL, **user}
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "fls", "-A", "trust", "--no-sync"],
        **run,  # type: ignore[call-overload]
    )
    process = subprocess.Popen(
        [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", data],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        **user,  # type: ignore[call-overload]
    )
    try:
        end = time.monotonic() + 60
        while subprocess.run(
            [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
        ).returncode:
            assert time.monotonic() < end, "PostgreSQL did not start"
            time.sleep(0.1)
        yield f"postgresql+psycopg://fls@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # fast shutdown: its own processes end with it
        process.wait(timeout=30)
