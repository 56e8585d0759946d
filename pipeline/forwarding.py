"""Which environment variables go along with a job.

A job's variables are stored by Ray as plain text and shown in its dashboard. So a secret goes
along only when the user names it; otherwise the machines of the cluster are to have it already, by
their roles, their secret store, or the shell that Ray was started from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import BadInput
from pipeline.secrets import has_credentials, is_secret

PREFIXES = ("AWS_", "FISHLEG_", "FSSPEC_", "MLFLOW_")
# What these name lies on this machine: a file, a folder, a section of a file.
_OF_THIS_MACHINE = re.compile(r"_(FILE|PATH|BUNDLE|PROFILE|DIR)$")


@dataclass(frozen=True, kw_only=True)
class Forwarding:
    """What becomes of this process's environment when a job is submitted.

    Attributes:
        given: name -> value of what goes along.
        secret: names that do not, because their values are secret.
        local: names that do not, because their values are of this machine.
    """

    given: Mapping[str, str]
    secret: Sequence[str]
    local: Sequence[str]


def forwarding(environment: Mapping[str, str], wishes: Sequence[str]) -> Forwarding:
    """Choose what goes along with a job.

    Args:
        environment: of this process.
        wishes: each `NAME=VALUE`, or `NAME` for the value that it has here.
    """
    wanted = dict(_wish(wish, environment) for wish in wishes)
    candidates = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(PREFIXES) and name not in wanted
    }
    secret = [n for n, value in candidates.items() if is_secret(n) or has_credentials(value)]
    local = [name for name in candidates if name not in secret and _OF_THIS_MACHINE.search(name)]
    plain = {name: value for name, value in candidates.items() if name not in {*secret, *local}}
    return Forwarding(given={**plain, **wanted}, secret=secret, local=local)


def _wish(wish: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the name and value that a wish stands for.

    Raises:
        BadInput: it has no name, or names what is not set.
    """
    name, equals, value = wish.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise BadInput(f"--env {name}: expected NAME=VALUE, or NAME for the value it has here.")
    if not equals and name not in environment:
        raise BadInput(f"--env {name}: it is not set here; give it as {name}=VALUE.")
    return name, value if equals else environment[name]
