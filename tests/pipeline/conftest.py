"""Fixtures of the runner's tests."""

from runner_fixtures import client, fresh_database, s3, s3_endpoint, toy

__all__ = ["client", "fresh_database", "s3", "s3_endpoint", "toy"]
