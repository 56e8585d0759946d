"""Submits a pipeline to a Ray cluster: packs the folder, records its source, and starts a job.

The run's id is chosen here, so that the commands that follow, stop and resume the run can be
printed before it starts.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from pipeline.base.errors import BadInput
from pipeline.base.secrets import is_secret_variable, presentable, secret_values
from pipeline.base.variables import STORAGE, TRACKING_URI
from pipeline.cluster.forwarding import Forwarding, forwarding, refuse_secrets
from pipeline.cluster.packing import IGNORE_FILE, Package, collect
from pipeline.code.provenance import SOURCE_FILE, Provenance, look_at
from pipeline.running.runs import new_run_id
from pipeline.spec.params import marked
from pipeline.spec.spec import Spec
from pipeline.stage import ExternalFile

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request to submit.

    Attributes:
        file: the spec's path, in or below the working directory.
        address: of the head's dashboard.
        arguments: options of `fls run`; none when a run is resumed.
        stop_after_s: time limit of the job in seconds, or None.
        resume: the run to resume, or None for a new one.
        excludes: patterns of files to omit.
        env: environment variables for the job: NAME=VALUE, or NAME.
    """

    file: Path
    address: str
    arguments: Sequence[str] = ()
    stop_after_s: float | None = None
    resume: str | None = None
    excludes: Sequence[str] = ()
    env: Sequence[str] = ()


def submit(spec: Spec, asked: Submission, console: Console, *, follow: bool) -> int:
    """Submit a pipeline; return 0, or the job's exit code if it is followed."""
    _require_url(asked.address)
    local = is_this_machine(asked.address)
    folder = Path.cwd()
    moving = forwarding(os.environ, asked.env)
    environment = {**moving.given, **_storage(spec, local)}
    named = {"MLFLOW_TRACKING_URI"} & {*moving.given, *moving.secret} or spec.mlflow.tracking_uri
    if named or asked.resume is None or not local:  # else the run stays where it is tracked
        environment["MLFLOW_TRACKING_URI"] = _tracking(spec, moving, local)
    refuse_secrets(environment, asked.env, _origins(spec))
    package = collect(folder, asked.excludes)
    _require_packed(spec, asked.file, package)
    package.refuse_if_large()
    source = look_at(folder, package.files)
    if local:
        source = dataclasses.replace(source, submitted_from=socket.gethostname())
    extra = {SOURCE_FILE: source.to_json()}
    package.refuse_if_holding(secret_values(os.environ), extra)

    run_id = asked.resume or new_run_id()
    submission_id = f"fls-{run_id}" if asked.resume is None else f"fls-{run_id}-{new_run_id()[-4:]}"
    file = Path(os.path.relpath(asked.file, folder)).as_posix()
    command = _command(file, run_id, asked)

    from pipeline.executors.ray_jobs import RayJobs  # here, because Ray takes a second to import

    jobs = RayJobs(asked.address)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "package.zip"
        package.write(archive, extra)
        jobs.submit(
            submission_id,
            command,
            archive,
            environment,
            {"fls.run": run_id, "fls.file": file, **source.tags()},
        )
    _tell(asked, console, submission_id, run_id, package, source, environment, moving)
    if not follow:
        return 0
    try:
        return jobs.follow(submission_id, _print)
    except KeyboardInterrupt:
        console.print(f"\n{submission_id} continues; the commands above follow or stop it.")
        return _INTERRUPTED


def _require_url(address: str) -> None:
    """Check that an address can be a dashboard's.

    Raises:
        BadInput: it is not an http or https URL with a host.
    """
    try:
        parts = urlsplit(address)
        fits = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise BadInput(
            f"--address {address}: expected the URL of the dashboard of Ray's head, such as "
            "http://HEAD:8265 or https://HEAD:8265."
        )


def is_this_machine(address: str) -> bool:
    """Tell whether an address is one of this machine's own."""
    host = urlsplit(address).hostname or ""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(where)
        except OSError:
            continue
        return True
    return False


def _command(file: str, run_id: str, asked: Submission) -> str:
    """Return the job's command.

    Raises:
        BadInput: a resumed run is given other options.
    """
    words = ["run", file, "--run-id", run_id, *asked.arguments]
    if asked.resume is not None:
        if asked.arguments:
            raise BadInput(
                "--resume continues a run with its own options; remove "
                f"{shlex.join(asked.arguments)}."
            )
        words = ["resume", run_id, "--file", file]
    if asked.stop_after_s is not None:
        words += ["--stop-after", f"{asked.stop_after_s:g}s"]
    # Ray runs a shell; by exec the driver replaces it, so Ray stops and awaits the driver.
    return "exec " + shlex.join(["python", "-m", "pipeline", *words])


def _storage(spec: Spec, local: bool) -> dict[str, str]:
    """Return the variable that makes a relative storage absolute for a job in another folder.

    Raises:
        BadInput: the storage is relative, and the cluster is on other machines.
    """
    if spec.storage == spec.storage_given:
        return {}
    if local:
        return {STORAGE.name: spec.storage}
    raise BadInput(
        f"{spec.path}: storage: {spec.storage_given} is a folder of this machine, which the "
        "cluster does not see. Use a URL such as s3://bucket/folder, or the absolute path of a "
        f"folder that all nodes share; {STORAGE.name} overrides `storage:`."
    )


def _tracking(spec: Spec, moving: Forwarding, local: bool) -> str:
    """Return the job's tracking address, valid on all machines.

    Raises:
        BadInput: only this machine reaches the address.
    """
    uri = moving.given.get("MLFLOW_TRACKING_URI") or spec.tracking_uri()
    scheme, _, path = uri.partition("://")
    if scheme == "sqlite":
        if local:
            return f"sqlite:///{os.path.abspath(path.removeprefix('/'))}"
        raise BadInput(
            f"MLflow at {uri} is a file of this machine, which the cluster does not see. Start "
            "an MLflow server, and set MLFLOW_TRACKING_URI or mlflow.tracking_uri to its URL."
        )
    if not local and scheme in {"http", "https"} and is_this_machine(uri):
        raise BadInput(
            f"MLflow at {uri} is this machine's own address, which means another machine on the "
            "cluster. Give the address by which the cluster reaches it."
        )
    return uri


def _origins(spec: Spec) -> dict[str, str]:
    """Return name -> origin of the job's variables that this environment does not have."""
    if TRACKING_URI.read() or spec.mlflow.tracking_uri is None:
        return {}
    uri = spec.mlflow.tracking_uri
    here = {name: value for name, value in os.environ.items() if name in spec.environment}
    used = [name for name, value in here.items() if value and value in uri]
    by = f", by {', '.join(used)}" if used else ""
    return {TRACKING_URI.name: f"mlflow.tracking_uri of {spec.path}{by}"}


def _require_packed(spec: Spec, file: Path, package: Package) -> None:
    """Check that the package has all files that the pipeline names.

    Raises:
        BadInput: such a file is outside the folder, or omitted.
    """
    named = {str(file): "the pipeline"}
    for cell in spec.cells:
        for mark in marked(cell.params):
            if isinstance(mark.marker, ExternalFile) and not os.path.isabs(mark.value):
                named.setdefault(mark.value, cell.name)
    for path, owner in named.items():
        relative = Path(os.path.relpath(path, package.folder)).as_posix()
        if relative.startswith("../"):
            raise BadInput(
                f"{path} ({owner}) would not be packed: it lies outside the working directory, "
                f"{package.folder}. Run the command in a folder that holds all files of the "
                "pipeline."
            )
        if relative not in package.files:
            raise BadInput(
                f"{path} ({owner}) would not be packed: it does not exist, or a pattern omits it. "
                f"`!/{relative}` in {IGNORE_FILE} packs it."
            )


def _tell(
    asked: Submission,
    console: Console,
    submission_id: str,
    run_id: str,
    package: Package,
    source: Provenance,
    environment: Mapping[str, str],
    moving: Forwarding,
) -> None:
    """Print the contents of the submission, and the commands to follow, stop and resume it."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    commit = f"commit {source.commit[:12]}" if source.commit else "no Git"
    changed = f", {len(source.changes)} uncommitted changes" if source.changes else ""
    size = f"{package.size_bytes / 2**20:.1f} MiB"
    say(f"Submitted {submission_id} to {asked.address}: {len(package.files)} files of {size};")
    say(f"  {commit}{changed}; Python {source.python}")
    if package.links:
        say(f"  links are not packed: {', '.join(package.links)}")
    if package.secrets:
        say(f"  not packed, as keys or passwords: {', '.join(package.secrets)}")
    if package.stores:
        say(f"  stores are not packed: {', '.join(package.stores)}")
    say(f"  environment given: {', '.join(environment)}")
    if moving.secret:
        say(f"  secrets not given, the nodes must have them: {', '.join(moving.secret)}")
    if moving.local:
        say(f"  of this machine, not given: {', '.join(moving.local)}")
    at = f"--address {shlex.quote(asked.address)}"
    say(f"  follow:  ray job logs {submission_id} {at} --follow")
    say(f"  stop:    ray job stop {submission_id} {at}")
    say(f"  resume:  {_resume_command(asked, run_id, moving)}")


def _resume_command(asked: Submission, run_id: str, moving: Forwarding) -> str:
    """Return the command that resumes the run in any shell; secrets are named and not shown."""
    wished = dict.fromkeys(wish.partition("=")[0] for wish in asked.env)
    shell = [f"{n}={shlex.quote(v)}" for n, v in moving.given.items() if n not in wished]
    words = ["fls", "submit", str(asked.file), "--address", asked.address, "--resume", run_id]
    for name in wished:
        value = moving.given[name]
        words += ["--env", name if is_secret_variable(name, value) else f"{name}={value}"]
    for pattern in asked.excludes:
        words += ["--exclude", pattern]
    return " ".join([*shell, shlex.join(words)])


def _print(text: str) -> None:
    sys.stdout.write(presentable(text))
    sys.stdout.flush()
