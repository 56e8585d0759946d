"""The Jobs API of a Ray cluster: submits a packed folder with a command, and follows the log.

Each failure of a request (no server, a wrong token, a refusal) becomes one sentence with a remedy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pipeline.executors.ray_settings  # noqa: F401 - before Ray, which reads them

# isort: split
import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.base.errors import PipelineError
from pipeline.executors.ray_settings import TOKENS

# Their INFO reports uploads and closed sockets.
for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_POLL_S = 0.2
_STOPPED = 143  # a shell's exit code after SIGTERM, by which Ray stops a job
# Each of these would override the address that the user gives.
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


class RayJobs:
    """A cluster's jobs.

    Args:
        address: of the head's dashboard, such as `http://10.0.0.1:8265`.
    """

    def __init__(self, address: str):
        self._address = address
        hidden = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
        try:
            with self._explaining():
                self._client = JobSubmissionClient(address)
        finally:
            os.environ.update(hidden)

    def submit(
        self,
        submission_id: str,
        command: str,
        archive: Path,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Upload a packed folder, unless the cluster has it, and run a command in it.

        Args:
            submission_id: the job's name, new on this cluster.
            command: for the shell.
            archive: the folder as a zip file.
            environment: variables for the command and its tasks.
            metadata: shown with the job in the dashboard.
        """
        runtime = {"working_dir": str(archive), "env_vars": dict(environment)}
        with self._explaining():
            self._client.submit_job(
                entrypoint=command,
                submission_id=submission_id,
                runtime_env=runtime,
                metadata=dict(metadata),
            )

    def follow(self, submission_id: str, say: Callable[[str], None]) -> int:
        """Pass a job's output on until it ends; return the exit code of its end."""
        with self._explaining():
            asyncio.run(self._tail(submission_id, say))
            while not (info := self._client.get_job_info(submission_id)).status.is_terminal():
                time.sleep(_POLL_S)
        if info.status == JobStatus.STOPPED:
            return _STOPPED
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.driver_exit_code is None:  # it never ran; a job that ran has printed the reason
            say(f"{info.message}\n")
        return info.driver_exit_code or 1

    async def _tail(self, submission_id: str, say: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(submission_id):
            say(text)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn errors inside the context into one sentence for the user.

        Raises:
            PipelineError: a request failed.
        """
        try:
            yield
        except AuthenticationError as error:
            raise PipelineError(
                f"Ray at {self._address} asks for its token: {_first(error)}. {TOKENS}"
            ) from error
        except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
            raise PipelineError(
                f"No Ray head answers at {self._address} ({type(error).__name__}). Expected the "
                "address of its dashboard, such as http://HEAD:8265; `ray start --head "
                "--dashboard-host 0.0.0.0` opens it to other machines."
            ) from error
        except (RuntimeError, ValueError) as error:
            raise PipelineError(f"Ray at {self._address}: {error}") from error


def _first(error: Exception) -> str:
    """Return the first sentence of Ray's message, which may be a page long."""
    return str(error).partition("\n")[0].partition(". ")[0]
