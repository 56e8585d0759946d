"""Runs commands as a newcomer's shell would, and prints a line with the seconds of each."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_OF_A_TOOL = (
    "FISHLEG_",
    "FLS_",
    "MLFLOW_",
    "RAY_",
    "AWS_",
    "PYTHON",
    "VIRTUAL_ENV",
    "MAKE",
    "MFLAGS",
)


def newcomers_variables() -> dict[str, str]:
    """Return this process's environment without the variables that steer the tools."""
    found = {name: one for name, one in os.environ.items() if not name.startswith(_OF_A_TOOL)}
    return {**found, "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass
class Shell:
    """A folder, an environment, and the virtual environment that a command has activated."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=newcomers_variables)
    activation: str = ""

    def run(self, command: str, *, shown: str = "", expected: int = 0, **more: str) -> str:
        """Run a command to its end and return its output; `more` are further variables.

        The program ends with the output where the exit code is another than `expected`.
        """
        with step(shown or command) as fail, self._start(command, more) as (process, output):
            if process.wait() != expected:
                fail(f"exit code {process.returncode}\n{output()}")
            return output()

    def run_until(
        self, command: str, pattern: str, then: Callable[[str], None] | None = None
    ) -> str:
        """Run a command until its output has a pattern, then send Ctrl-C; return the output.

        `then` is called with the match before Ctrl-C.
        """
        with step(f"{command}   (then Ctrl-C)") as fail, self._start(command, {}) as (one, output):
            end = time.monotonic() + 180
            while (found := re.search(pattern, output())) is None:
                if one.poll() is not None or time.monotonic() > end:
                    fail(f"its output has no {pattern!r}\n{output()}")
                time.sleep(0.1)
            if then is not None:
                then(found[0])
            os.killpg(one.pid, signal.SIGINT)
            if one.wait(timeout=60) not in {0, 128 + signal.SIGINT}:
                fail(f"exit code {one.returncode} after Ctrl-C\n{output()}")
            return output()

    @contextlib.contextmanager
    def _start(
        self, command: str, more: Mapping[str, str]
    ) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
        with tempfile.NamedTemporaryFile() as file:
            process = subprocess.Popen(
                ["bash", "-c", f"{self.activation}\n{command}"],
                cwd=self.folder,
                env={**self.variables, **more},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal
            )
            try:
                yield process, lambda: Path(file.name).read_text("utf-8", errors="replace")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextlib.contextmanager
def step(name: str) -> Iterator[Callable[[str], None]]:
    """Print a line with the seconds of what is done within; yield what fails the step."""
    began = time.monotonic()

    def fail(why: str) -> None:
        seconds = time.monotonic() - began
        print(f"FAILED after {seconds:.1f} s: {name}\n{why}", file=sys.stderr, flush=True)
        sys.exit(1)

    yield fail
    print(f"{time.monotonic() - began:7.1f} s  {name}", flush=True)
