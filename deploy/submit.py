"""What `ray submit` runs on the head: hands a pipeline of the project's folder over as a job.

    ray submit deploy/cluster.yaml deploy/submit.py -- pipeline.yaml --set 'vars.seeds=[0,1]'

The arguments are those of `fls submit`. Ray copies this file alone, and joins the arguments
without quoting them for the remote shell. A job outlives the connection: when it breaks, the run
goes on.
"""

import os
import sys
from pathlib import Path

PROJECT = Path("~/fishleg-surgeon").expanduser()  # as `file_mounts` in cluster.yaml has it


def main() -> None:
    """Become `fls submit --follow`, in the project's folder."""
    os.chdir(PROJECT)
    command = [sys.executable, "-m", "pipeline", "submit", "--follow", *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606 - no shell, our own module


if __name__ == "__main__":
    main()
