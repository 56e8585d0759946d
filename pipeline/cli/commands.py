"""All commands of `fls`: the import of this module adds them to the application."""

from pipeline.cli import run_commands  # noqa: F401

# isort: split
from pipeline.cli import plan_commands, result_commands, store_commands  # noqa: F401
from pipeline.cli.app import app

__all__ = ["app"]
