"""Which environment variables go along with a job.

A job's variables are stored by Ray as plain text and shown in its dashboard. So a secret goes
along only when the user names it; otherwise the machines of the cluster are to have it already, by
their roles, their secret store, or the shell that Ray was started from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.base.errors import BadInput
from pipeline.base.secrets import is_secret_variable

PREFIXES = ("AWS_", "FISHLEG_", "FSSPEC_", "MLFLOW_")
# What these name lies on this machine: a file, a folder, a section of a file.
_OF_THIS_MACHINE = re.compile(r"_(FILE|PATH|BUNDLE|PROFILE|DIR)$")

_INSTEAD = {
    "MLFLOW_TRACKING_URI": "Take it out of the address, and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD on the nodes"
}


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
    secret = [name for name, value in candidates.items() if is_secret_variable(name, value)]
    local = [name for name in candidates if name not in secret and _OF_THIS_MACHINE.search(name)]
    plain = {name: value for name, value in candidates.items() if name not in {*secret, *local}}
    return Forwarding(given={**plain, **wanted}, secret=secret, local=local)


def refuse_secrets(
    environment: Mapping[str, str], wishes: Sequence[str], origins: Mapping[str, str]
) -> None:
    """Check that a job is given no secret without a wish for it.

    Args:
        environment: all that the job is to be given, as it will be.
        wishes: as in `forwarding`.
        origins: name -> where its value comes from, of those that this process does not have.

    Raises:
        BadInput: it would be; names the variable, not what it holds.
    """
    wished = {wish.partition("=")[0] for wish in wishes}
    for name, value in environment.items():
        if name in wished or not is_secret_variable(name, value):
            continue
        named, first = name, ""
        if name in origins:
            named, first = f"{name} ({origins[name]})", f"set {name} here, and "
        instead = _INSTEAD.get(name, "Set it on the nodes")
        raise BadInput(
            f"{named} holds a password or a token, which Ray would show in its dashboard. "
            f"{instead}; or {first}hand it over as it is by --env {name}."
        )


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
