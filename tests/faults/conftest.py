"""The fault tests use the fixtures of the runner's tests."""

from runner_fixtures import fresh_database, s3, s3_endpoint, toy

__all__ = ["fresh_database", "s3", "s3_endpoint", "toy"]
