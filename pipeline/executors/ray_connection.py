"""The connection to the Ray cluster at RAY_ADDRESS, with one paragraph for each error.

Ray itself retries a head that does not answer, or that refuses the token, for up to a quarter of an
hour, and logs each try. So this module tries once before Ray does.
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
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled, without stubs
from ray.exceptions import AuthenticationError, RpcError
from ray.job_config import JobConfig

from pipeline.base.errors import BadInput
from pipeline.executors.ray_settings import TOKENS

_CLIENT = "ray://"
_PATIENCE_S = 10.0


class _NotHere(list[str]):
    """The folders that Ray's workers search first, without the working directory that Ray adds."""

    def extend(self, folders: Iterable[str]) -> None:
        """Add folders."""
        super().extend(folder for folder in folders if folder != os.getcwd())


def searching_here_last() -> JobConfig:
    """Return a job whose workers do not search the driver's working directory for modules first.

    A worker adds it last, see `pipeline.base.search_path`. It stays first where this package lies
    in it without being installed: the nodes find the package nowhere else.
    """
    job = JobConfig()
    if Path(pipeline.__path__[0]).parent != Path.cwd():
        job._py_driver_sys_path = _NotHere()
    return job


def connect(address: str) -> None:
    """Connect this process to the cluster at an address.

    Args:
        address: the value of RAY_ADDRESS, which Ray reads itself.

    Raises:
        BadInput: no cluster answers, or it refuses.
    """
    try:
        with _silence():
            _ask(address)
            # With Ray's client, the driver is on the head, in another working directory.
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
            f"this machine. If the cluster asks for a token: {TOKENS}"
        ) from error


def _ask(address: str) -> None:
    """Try once to reach the cluster and to authenticate; errors pass unchanged.

    Raises:
        ValueError: the address names no port.
    """
    where = address.removeprefix(_CLIENT)
    found = where if where != address else canonicalize_bootstrap_address(address)
    if found is None:
        return  # Ray starts an own instance
    host, _, port = found.partition("/")[0].rpartition(":")
    if not port.isdecimal():
        raise ValueError("it names no port")
    socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
    if where == address:
        GcsClient(address=found)


@contextmanager
def _silence() -> Iterator[None]:
    """Discard the standard error of Ray's native code."""
    before = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
