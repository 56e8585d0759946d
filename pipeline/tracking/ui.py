"""Opens the tracking server's pages."""

from __future__ import annotations

import os
import socket
import sys

from pipeline.search_path import python_command
from pipeline.secrets import presentable


def serve_ui(uri: str, port: int) -> None:
    """Print the address of the MLflow pages and, unless a server has them already, serve them.

    This process becomes the server, so it ends as any server does: by Ctrl-C or SIGTERM.

    Args:
        uri: of the tracking server or database.
        port: wanted on 127.0.0.1; another one is taken when it is busy, or 0.
    """
    if uri.startswith(("http://", "https://")):
        sys.stdout.write(f"{presentable(uri)}\n")
        return
    port = port if _free(port) else 0
    if port == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    sys.stdout.write(f"http://127.0.0.1:{port}  (Ctrl-C closes it)\n")
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Eight more processes, for things that this project has no use for.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # as an argument, all users here could read it
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that it starts, too
    command = python_command("mlflow", "ui", "--host", "127.0.0.1", "--port", str(port))
    command += ["--workers", "1"]
    os.execv(sys.executable, command)  # noqa: S606 - no shell, our own interpreter


def _free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:  # somebody listens there, or may not
        return False
    return True
