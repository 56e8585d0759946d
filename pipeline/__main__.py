"""The command `fls`, also `python -m pipeline`."""

from __future__ import annotations

import sys

import pipeline.store_commands  # noqa: F401 - joins its commands to the others
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.stage import StageError


def main() -> None:
    """Run the command line; a user's error is one message and an exit code, never a traceback."""
    try:
        app()
    except (PipelineError, StageError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code if isinstance(error, PipelineError) else 1)


if __name__ == "__main__":
    main()
