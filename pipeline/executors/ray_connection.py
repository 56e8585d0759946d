"""Connects to the Ray cluster at RAY_ADDRESS, or says in one paragraph why that does not work.

Ray itself asks a head that does not answer, or that refuses the token, again and again for up to a
quarter of an hour, and logs each time. So it is asked once here, before Ray is.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pipeline.executors.ray_settings  # noqa: F401 - before Ray, which reads them

# isort: split
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError
from ray.job_config import JobConfig

from pipeline.base.errors import BadInput
from pipeline.executors.ray_settings import TOKENS

_CLIENT = "ray://"
_PATIENCE_S = 10.0


class _NotHere(list[str]):
    """Folders that Ray's workers search first; the working directory, which Ray adds, is none."""

    def extend(self, folders: Iterable[str]) -> None:
        """Add folders."""
        super().extend(folder for folder in folders if folder != os.getcwd())


def searching_here_last() -> JobConfig:
    """Return a job whose workers do not look for modules in the driver's working directory first.

    A worker adds it itself, see `pipeline.base.search_path`. It stays the first where this very
    package lies in it, without being installed: then the nodes would find none.
    """
    job = JobConfig()
    if Path(pipeline.__path__[0]).parent != Path.cwd():
        job._py_driver_sys_path = _NotHere()
    return job


def connect(address: str) -> None:
    """Connect this process to the cluster that runs at an address.

    Args:
        address: what RAY_ADDRESS holds, from where Ray takes it.

    Raises:
        BadInput: there is no cluster, or it refuses.
    """
    try:
        with _silence():
            _ask(address)
            # The driver of Ray's client is on the head, and its working directory another.
            job = JobConfig() if address.startswith(_CLIENT) else searching_here_last()
            ray.init(log_to_driver=False, logging_level=logging.ERROR, job_config=job)
    except AuthenticationError as error:
        raise BadInput(f"Ray at {address} (RAY_ADDRESS) asks for its token. {TOKENS}") from error
    except (OSError, RuntimeError, ValueError, RpcError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"No Ray cluster answers at {address} (RAY_ADDRESS): {reason}. Expected the address of "
            "a running head, such as HEAD:6379, that this machine reaches, with the same versions "
            "of Ray and Python; without RAY_ADDRESS, or with --executor local, the run stays on "
            f"this machine. Does the cluster want a token? {TOKENS}"
        ) from error


def _ask(address: str) -> None:
    """Ask once whether a cluster is there and lets us in; what is wrong is raised as it is.

    Raises:
        ValueError: it is no address.
    """
    where = address.removeprefix(_CLIENT)
    found = where if where != address else canonicalize_bootstrap_address(address)
    if found is None:
        return  # Ray starts a cluster of our own
    host, _, port = found.partition("/")[0].rpartition(":")
    if not port.isdecimal():
        raise ValueError("it names no port")
    socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
    if where == address:
        GcsClient(address=found)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what Ray's native code writes to standard error off the screen."""
    before = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
