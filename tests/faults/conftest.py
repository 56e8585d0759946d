"""The fault tests use the helpers and the fixtures of the runner's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from runner_fixtures import s3, s3_endpoint, toy  # noqa: E402 - found by the line above

__all__ = ["s3", "s3_endpoint", "toy"]
