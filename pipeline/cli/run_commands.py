"""The commands that run cells: `run`, `submit`, `resume`, `stop` and `sync`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from pipeline.base.errors import Damaged
from pipeline.base.states import RunState
from pipeline.cli.app import command, console_here, find, open_store, read_spec
from pipeline.cli.options import (
    NONE_GIVEN,
    ExecutorOption,
    File,
    FileOption,
    ForceOption,
    FromOption,
    GraceOption,
    LaterOption,
    OnlyOption,
    ParallelOption,
    SetOption,
    StopOption,
    StorageOption,
    TrackingOption,
    TrustOption,
    UntilOption,
)
from pipeline.cli.printing import print_failures, print_plan, print_reports, print_tracking
from pipeline.executors import ExecutorName
from pipeline.planning.planner import make_plan
from pipeline.running.documents import RunOptions
from pipeline.running.driver import GRACE_S
from pipeline.running.launch import Ended, resume_run, run_and_read, stop_run
from pipeline.running.record import DEFAULT_FILE
from pipeline.running.runs import find_run, load_runs
from pipeline.running.sync import sync_runs
from pipeline.running.trust import read_trust
from pipeline.store.store import Store
from pipeline.tracking import TrackerName


@command(
    "fls run",
    "fls run pipeline.yaml --executor local --tracking jsonl",
    "fls run pipeline.yaml --only 'oneshot[method=eigen]' --set oneshot.distribution=uniform",
    "fls run pipeline.yaml --force 'pretrain[seed=0]' --max-parallel 4",
    "fls run experiments/cifar10_resnet18.yaml --stop-after 9m",
)
def run(
    file: File = DEFAULT_FILE,
    executor: ExecutorOption = ExecutorName.RAY,
    tracking: TrackingOption = TrackerName.MLFLOW,
    from_: FromOption = NONE_GIVEN,
    only: OnlyOption = NONE_GIVEN,
    until: UntilOption = NONE_GIVEN,
    force: ForceOption = NONE_GIVEN,
    set_: SetOption = NONE_GIVEN,
    max_parallel: ParallelOption = None,
    stop_after: StopOption = None,
    grace: GraceOption = None,
    tracking_later: LaterOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    run_id: Annotated[
        str | None, typer.Option("--run-id", metavar="ID", help="The new run's id.", hidden=True)
    ] = None,
) -> None:
    """Run the cells of a pipeline whose results are not in the store."""
    spec = read_spec(file, set_)
    options = RunOptions(
        file=str(file),
        overrides=set_,
        from_=from_,
        only=only,
        until=until,
        force=force,
        executor=executor,
        tracking=tracking,
        tracking_later=tracking_later,
        max_parallel=max_parallel,
    )
    console = console_here()
    if dry_run:
        print_plan(make_plan(spec, Store(spec.storage), options), console, why=False)
        return
    read = partial(print_end, console=console)
    sys.exit(run_and_read(spec, options, console, read, stop_after, grace or GRACE_S, run_id))


@command(
    "fls submit pipeline.yaml --address http://10.0.0.1:8265 --follow",
    "fls submit pipeline.yaml --env AWS_SECRET_ACCESS_KEY --exclude 'notebooks/'",
    "fls submit pipeline.yaml --set 'vars.seeds=[0,1,2]' --until oneshot",
    "fls submit pipeline.yaml --resume 20260730-101500-042-1f2e",
)
def submit(
    file: File = DEFAULT_FILE,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="URL",
            envvar="RAY_API_SERVER_ADDRESS",
            help="The dashboard of the cluster's head.",
        ),
    ] = "http://127.0.0.1:8265",
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log, and exit as the job does.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Resume this run.")
    ] = None,
    env: Annotated[
        list[str],
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="A variable for the job; default: its value here.",
        ),
    ] = NONE_GIVEN,
    exclude: Annotated[
        list[str],
        typer.Option(
            "--exclude", metavar="GLOB", help="Do not pack these files, as in .gitignore."
        ),
    ] = NONE_GIVEN,
    tracking: TrackingOption = TrackerName.MLFLOW,
    from_: FromOption = NONE_GIVEN,
    only: OnlyOption = NONE_GIVEN,
    until: UntilOption = NONE_GIVEN,
    force: ForceOption = NONE_GIVEN,
    set_: SetOption = NONE_GIVEN,
    max_parallel: ParallelOption = None,
    stop_after: StopOption = None,
    tracking_later: LaterOption = False,
) -> None:
    """Run a pipeline on a Ray cluster, as a job: pack the working directory and submit it.

    The package omits version control, environments, stores, data, weights, the patterns of
    .gitignore and .flsignore, and files with keys or passwords, recognised by their names (*.env,
    credentials.json, kubeconfig, *.pem, ...) or by the first bytes of a private key. The omitted
    secret files are listed; !/PATH in .flsignore packs one. A store is never packed.

    The job gets the variables AWS_*, FISHLEG_*, FSSPEC_* and MLFLOW_*, except secrets (names with
    KEY, SECRET, TOKEN, PASSWORD and the like; URLs, JSON and connection strings with a password)
    and paths of this machine: Ray stores a job's variables as plain text. Set secrets on the nodes,
    or pass one by --env NAME.
    """
    from pipeline.cluster.submit import Submission
    from pipeline.cluster.submit import submit as submit_pipeline

    spec = read_spec(file, set_)
    chosen = {"--from": from_, "--only": only, "--until": until, "--force": force, "--set": set_}
    arguments = [word for name, values in chosen.items() for one in values for word in (name, one)]
    if tracking is not TrackerName.MLFLOW:
        arguments += ["--tracking", tracking]
    if max_parallel is not None:
        arguments += ["--max-parallel", str(max_parallel)]
    if tracking_later:
        arguments.append("--tracking-later")
    asked = Submission(
        file=file,
        address=address,
        arguments=arguments,
        stop_after_s=stop_after,
        resume=resume,
        excludes=exclude,
        env=env,
    )
    sys.exit(submit_pipeline(spec, asked, console_here(), follow=follow))


@command(
    "fls resume last",
    "fls resume 20260730-101500-042-1f2e --storage s3://bucket/results",
)
def resume(
    run: Annotated[str, typer.Argument(help="A run, or 'last'.")],
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
    replan: Annotated[
        bool,
        typer.Option(
            "--replan", help="Run changed cells again, for example after a change of code."
        ),
    ] = False,
    trust_store: TrustOption = False,
    stop_after: StopOption = None,
    grace: GraceOption = None,
) -> None:
    """Resume a run that was killed, stopped, or failed, as the same run in tracking.

    The spec is that of the run's start. Its plugins, and functions that its parameters name, are
    imported if --file names them too, or with --trust. If code has changed since, the command names
    the change and the affected cells, and stops: then use --replan or `fls accept`.
    """
    store = open_store(file, storage)
    record = find(store, run, storage)
    trust = read_trust(file, store, everything=trust_store)
    if storage is not None or trust_store:
        record.trust = trust.option
    limits = (stop_after, grace or GRACE_S)
    ended = resume_run(store, record, trust, console_here(), *limits, replan=replan)
    sys.exit(print_end(ended, console_here()))


@command(
    "fls stop last",
    "fls stop 20260730-101500-042-1f2e --file experiments/mnist_mlp.yaml",
)
def stop(
    run: Annotated[str, typer.Argument(help="A run, or 'last'.")],
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
) -> None:
    """Stop a run, wherever its driver is: cells end after a checkpoint; `fls resume` resumes."""
    store = open_store(file, storage)
    sys.exit(stop_run(store, find(store, run, storage), console_here()))


@command(
    "fls sync",
    "fls sync last",
    "fls sync 20260730-101500-042-1f2e --storage s3://bucket/results",
)
def sync(
    run: Annotated[str | None, typer.Argument(help="A run, or 'last'; default: all.")] = None,
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
) -> None:
    """Send the missing data of a run, and its final state, to the tracking server."""
    store = open_store(file, storage)
    records = load_runs(store)[0] if run is None else [find_run(store, run)]
    for record in records:
        record.storage = storage
    complete = sync_runs(
        store, records, read_trust(file, store), console_here(), named=run is not None
    )
    sys.exit(0 if complete else 1)


def print_end(ended: Ended, console: Console) -> int:
    """Print the reports, the failures and the tracking of a run; return the exit code.

    After a run that ran nothing, a damaged report is an error, see `Store.fetch`.
    """
    record = ended.record
    if ended.signal is not None and record is not None:
        console.print(f"Stopped. `{record.resume_command}` resumes it.", soft_wrap=True)
        return 128 + ended.signal
    if ended.spec is None:
        return 0
    if record is None:
        print_reports(ended.spec, ended.store, ended.keys, console)
        return 0
    code = 0 if record.state is RunState.DONE else 1
    try:
        print_reports(ended.spec, ended.store, ended.keys, console)
    except Damaged as error:
        ended.store.set_aside(error.key)
        console.print(f"{error}. The next `fls run` computes it again.", soft_wrap=True)
        code = 1
    print_failures(record, console)
    print_tracking(record, ended.folder, console)
    return code
