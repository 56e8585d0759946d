"""A real S3 endpoint on this machine: moto's server, as a process."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import s3fs

BUCKET = "bucket"
SECRET = "a-secret-that-nobody-may-see"  # noqa: S105 - of a server that takes any


@contextmanager
def serve_s3() -> Iterator[str]:
    """Serve S3 with an empty bucket; yield the endpoint's URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_port(port)
        endpoint = f"http://127.0.0.1:{port}"
        with patch.dict(os.environ, s3_environment(endpoint)):
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=20)


def s3_environment(endpoint: str) -> Mapping[str, str]:
    """Return the ordinary environment variables that lead a client to an endpoint."""
    if os.environ.get("AWS_ENDPOINT_URL") != endpoint:
        # Clients are kept by their arguments, of which the environment is none.
        s3fs.S3FileSystem.clear_instance_cache()
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < end, "the S3 server does not come up"
            time.sleep(0.05)
        else:
            return
