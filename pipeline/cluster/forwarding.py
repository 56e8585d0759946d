"""The environment variables that a job gets.

Ray stores a job's variables as plain text and shows them in its dashboard. So a job gets a secret
only if the user names it; otherwise the machines of the cluster must have it already, by their
roles, their secret store, or the shell that Ray was started from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.base.errors import BadInput
from pipeline.base.secrets import is_secret_variable

PREFIXES = ("AWS_", "FISHLEG_", "FSSPEC_", "MLFLOW_")
# Names of variables that refer to this machine: a file, a folder, a section of a file.
_OF_THIS_MACHINE = re.compile(r"_(FILE|PATH|BUNDLE|PROFILE|DIR)$")

_INSTEAD = {
    "MLFLOW_TRACKING_URI": "Take it out of the address, and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD on the nodes"
}


@dataclass(frozen=True, kw_only=True)
class Forwarding:
    """The parts of this process's environment, by their treatment at a submission.

    Attributes:
        given: name -> value of the job's variables.
        secret: names withheld because their values are secret.
        local: names withheld because their values refer to this machine.
    """

    given: Mapping[str, str]
    secret: Sequence[str]
    local: Sequence[str]


def forwarding(environment: Mapping[str, str], wishes: Sequence[str]) -> Forwarding:
    """Choose the environment variables of a job.

    Args:
        environment: of this process.
        wishes: each `NAME=VALUE`, or `NAME` for its value here.
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
    """Check that a job gets no secret that the user has not named.

    Args:
        environment: the final variables of the job.
        wishes: as in `forwarding`.
        origins: name -> origin of its value, for names that this process does not have.

    Raises:
        BadInput: it would get one; names the variable, not its value.
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
            f"{instead}; or {first}pass it unchanged by --env {name}."
        )


def _wish(wish: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the name and value of a wish.

    Raises:
        BadInput: it has no valid name, or the named variable is not set.
    """
    name, equals, value = wish.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise BadInput(f"--env {name}: expected NAME=VALUE, or NAME for its value here.")
    if not equals and name not in environment:
        raise BadInput(f"--env {name}: it is not set here; give it as {name}=VALUE.")
    return name, value if equals else environment[name]
