"""The command line: reads options, calls what does the work, prints.

Ray, MLflow and torch are imported by none of this, but in the thread, process or function that
needs them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from pipeline.base.console import PlainConsole
from pipeline.base.rows import csv_text
from pipeline.base.secrets import presentable
from pipeline.base.variables import VARIABLES, check_variables
from pipeline.cli.printing import (
    follow_log,
    print_inspections,
    print_log,
    print_plan,
    print_rows,
    print_run,
    print_runs,
)
from pipeline.cli.results import export as export_cell
from pipeline.cli.results import result_rows
from pipeline.cli.running import print_end, run_spec
from pipeline.executors import ExecutorName
from pipeline.planning.inspection import inspect as inspect_cells
from pipeline.planning.notes import plan_notes
from pipeline.planning.planner import Selection, make_plan
from pipeline.running.driver import GRACE_S
from pipeline.running.launch import resume_run, stop_run
from pipeline.running.record import DEFAULT_FILE, RunOptions, RunRecord, find_run, load_runs
from pipeline.running.sync import sync_runs
from pipeline.running.trust import BUILT_IN, read_trust
from pipeline.spec.build import Spec, import_catalogue, load_spec
from pipeline.spec.render import cell_drawing, dot, mermaid, stage_drawing
from pipeline.store.store import Store
from pipeline.tracking import TrackerName
from pipeline.tracking.ui import serve_ui

NONE_GIVEN: list[str] = []
Command = TypeVar("Command", bound=Callable[..., Any])


def _paragraph(title: str, lines: Iterable[str]) -> str:
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="fls",
    help="Trains, prunes and compares networks, as one reproducible pipeline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_paragraph(
        "Environment variables:", [f"{one.name}: {one.purpose}" for one in VARIABLES]
    ),
)


@app.callback()
def _begin() -> None:
    if not {"-h", "--help"} & set(sys.argv):
        check_variables()


def read_duration(text: str) -> float:
    """Return a duration such as 90s, 9m, 1.5h or 30d in seconds.

    Raises:
        ValueError: it is no such text, or not above 0.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] not in units or not (seconds := float(text[:-1]) * units[text[-1]]) > 0:
        raise ValueError(f"{text!r} is no duration such as 90s, 9m or 2h")
    return seconds


def show_duration(seconds: float) -> str:
    """Return a duration as `read_duration` reads it.

    >>> show_duration(3600), show_duration(90), show_duration(2 * 86400)
    ('1h', '90s', '2d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


class Format(StrEnum):
    """Languages that graphs are drawn in."""

    MERMAID = "mermaid"
    DOT = "dot"


File = Annotated[Path, typer.Argument(help="The pipeline.", show_default=True)]
FileOption = Annotated[
    Path, typer.Option("--file", help="The pipeline whose storage is looked into.")
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="The storage itself; no pipeline file is read."),
]
ExecutorOption = Annotated[ExecutorName, typer.Option("--executor", help="What runs the cells.")]
TrackingOption = Annotated[TrackerName, typer.Option("--tracking", help="Where runs are recorded.")]
FromOption = Annotated[
    list[str],
    typer.Option(
        "--from",
        metavar="CELLS",
        help="Run this and what depends on it; the rest must be in the store.",
    ),
]
OnlyOption = Annotated[
    list[str],
    typer.Option("--only", metavar="CELLS", help="Run this alone; the rest must be in the store."),
]
UntilOption = Annotated[
    list[str], typer.Option("--until", metavar="CELLS", help="Run this and what it needs.")
]
ForceOption = Annotated[
    list[str],
    typer.Option(
        "--force",
        metavar="CELLS",
        help="Run this again (a stage, a cell or a group), and what depends on it.",
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set a parameter: stage.param=value, stage.axis=[values] or vars.name=value.",
    ),
]
LaterOption = Annotated[
    bool,
    typer.Option(
        "--tracking-later",
        help="Neither wait for a tracking server nor end because of one; `fls sync` sends later.",
    ),
]
ParallelOption = Annotated[
    int | None,
    typer.Option("--max-parallel", metavar="N", min=1, help="Most cells at the same time."),
]
StopOption = Annotated[
    float | None,
    typer.Option(
        "--stop-after",
        metavar="TIME",
        parser=read_duration,
        help="Stop after so long (90s, 9m, 2h); a later run goes on from there.",
    ),
]
GraceOption = Annotated[
    float | None,
    typer.Option(
        "--grace",
        metavar="TIME",
        parser=read_duration,
        help="When stopped: wait so long for checkpoints.",
        show_default="10s",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import all code that the run's stored spec names, also what --file does not: then "
        "who can write to the store can run code as you.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def command(*examples: str, name: str | None = None) -> Callable[[Command], Command]:
    """Make a function a command whose help ends with examples."""
    return app.command(name, epilog=_paragraph("Examples:", examples))


@command(
    "fls run",
    "fls run pipeline.yaml --executor local --tracking jsonl",
    "fls run pipeline.yaml --only 'oneshot[method=fishleg]' --set oneshot.distribution=uniform",
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
    """Run a pipeline: what is in the store already is not run again."""
    spec = read_spec(file, set_)
    selection = Selection(from_=from_, only=only, until=until, force=force)
    if dry_run:
        print_plan(make_plan(spec, Store(spec.storage), selection), console_here(), why=False)
        return
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
    limits = (stop_after, grace or GRACE_S)
    sys.exit(run_spec(spec, options, selection, console_here(), *limits, run_id))


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
        bool, typer.Option("--follow", help="Print the job's log, and end as it ends.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")
    ] = None,
    env: Annotated[
        list[str],
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="A variable for the job; without a value, the one it has here.",
        ),
    ] = NONE_GIVEN,
    exclude: Annotated[
        list[str],
        typer.Option("--exclude", metavar="GLOB", help="Leave these files behind, as .gitignore."),
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
    """Run a pipeline on a Ray cluster, as a job: packs this folder and hands it over.

    Packed is the working directory without version control, environments, stores, data, weights,
    without what .gitignore and .flsignore name, and without files that are known to hold keys or
    passwords, by their names (*.env, credentials.json, kubeconfig, *.pem, ...) or because they
    begin like a private key; these are listed, and !/PATH in .flsignore takes one along. A store is
    never packed, whatever its name.

    The job is given the variables AWS_*, FISHLEG_*, FSSPEC_* and MLFLOW_*, by these names, except
    secrets (names with KEY, SECRET, TOKEN, PASSWORD and the like, URLs, JSON and connection strings
    with a password in them) and paths of this machine: Ray keeps a job's variables as plain text.
    Set secrets on the nodes, or hand one over by --env NAME.
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
    "fls plan --why",
    "fls plan pipeline.yaml --set finetune.epochs=20 --json",
)
def plan(
    file: File = DEFAULT_FILE,
    why: Annotated[
        bool,
        typer.Option(
            "--why", help="Give each cell's reason, and the run that it is compared with."
        ),
    ] = False,
    as_json: JsonOption = False,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="A plan always is one.")] = False,
) -> None:
    """Show what `fls run` with the same options would do: which cells run, and with --why, why.

    Options that change nothing of that, such as --max-parallel, are taken and not needed.
    """
    spec = read_spec(file, set_)
    selection = Selection(from_=from_, only=only, until=until, force=force)
    made = make_plan(spec, Store(spec.storage), selection)
    if as_json:
        _print_json([planned.row() for planned in made.cells])
    else:
        print_plan(made, console_here(), why=why)
        for line in plan_notes(made, Store(spec.storage)):
            console_here().print(line, soft_wrap=True)


@command(
    "fls inspect pipeline.yaml",
    "fls inspect pipeline.yaml 'oneshot[method=fishleg,seed=0,sparsity=0.9]' --json",
)
def inspect(
    file: File = DEFAULT_FILE,
    cell: Annotated[
        str | None, typer.Argument(help="A cell, or a stage; all without.", show_default=False)
    ] = None,
    set_: SetOption = NONE_GIVEN,
    as_json: JsonOption = False,
) -> None:
    """Build the networks of a pipeline, and show which of their weights may be removed.

    Nothing is trained, and nothing is written. Each distinct network is shown once: its weights
    with two or more dimensions, and of each that is not prunable why.
    """
    found = inspect_cells(load_spec(file, set_), cell)
    if as_json:
        _print_json(found)
    else:
        print_inspections(found, console_here())


@command(
    "fls validate experiments/cifar10_resnet18.yaml",
)
def validate(file: File = DEFAULT_FILE, set_: SetOption = NONE_GIVEN) -> None:
    """Check a pipeline file, and report all its mistakes at once."""
    spec = read_spec(file, set_)
    typer.echo(f"{file}: {len(spec.stages)} stages, {len(spec.cells)} cells, no mistakes.")


@command(
    "fls graph pipeline.yaml",
    "fls graph pipeline.yaml --format dot --cells | dot -Tsvg > graph.svg",
)
def graph(
    file: File = DEFAULT_FILE,
    form: Annotated[Format, typer.Option("--format", help="Language to draw in.")] = Format.MERMAID,
    cells: Annotated[bool, typer.Option("--cells", help="Draw each cell.")] = False,
) -> None:
    """Draw a pipeline as Mermaid or as DOT."""
    spec = read_spec(file)
    drawing = cell_drawing(spec.cells) if cells else stage_drawing(spec.cells)
    typer.echo(dot(drawing) if form == "dot" else mermaid(drawing), nl=False)


@command(
    "fls status",
    "fls status last",
)
def status(
    run: Annotated[str | None, typer.Argument(help="A run, or 'last'; all without.")] = None,
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
) -> None:
    """Show all runs, or one of them."""
    if run is None and storage is None:
        store = Store(read_spec(file).storage)
        if not store.exists():
            console_here().print(f"{store.url}: no runs yet; see `fls run`.", soft_wrap=True)
            return
    store = open_store(file, storage)
    if run is None:
        records, problems = load_runs(store)
        print_runs(records, console_here())
        for problem in problems:
            typer.echo(presentable(problem), err=True)
    else:
        print_run(_find(store, run, storage), console_here())


@command(
    "fls resume last",
    "fls resume 20260730-101500-042-1f2e --storage s3://bucket/results",
)
def resume(
    run: Annotated[str, typer.Argument(help="A run, or 'last'.")],
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
    replan: Annotated[
        bool, typer.Option("--replan", help="Make anew what has changed since, such as code.")
    ] = False,
    trust_store: TrustOption = False,
    stop_after: StopOption = None,
    grace: GraceOption = None,
) -> None:
    """Go on with a run that was killed, stopped, or failed, as the same run in tracking.

    The spec is the one that the run began with. Its plugins, and functions that its parameters
    name, are imported if --file names them too, or with --trust. If code has changed since, this
    says what and which cells that touches, and stops: then choose --replan, or see `fls accept`.
    """
    store = open_store(file, storage)
    record = _find(store, run, storage)
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
    """Stop a run, wherever its driver is: its cells end behind a checkpoint; `resume` goes on."""
    store = open_store(file, storage)
    sys.exit(stop_run(store, _find(store, run, storage), console_here()))


@command(
    "fls sync",
    "fls sync last",
    "fls sync 20260730-101500-042-1f2e --storage s3://bucket/results",
)
def sync(
    run: Annotated[str | None, typer.Argument(help="A run, or 'last'; all without.")] = None,
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
) -> None:
    """Send to the tracking server what it missed of a run, and how the run ended."""
    store = open_store(file, storage)
    records = load_runs(store)[0] if run is None else [find_run(store, run)]
    for record in records:
        record.storage = storage
    complete = sync_runs(
        store, records, read_trust(file, store), console_here(), named=run is not None
    )
    sys.exit(0 if complete else 1)


@command(
    "fls logs 'pretrain[seed=0]'",
    "fls logs 'pretrain[seed=0]' --tail 20 --follow",
    "fls logs compare --run 20260730-101500-042-1f2e",
)
def logs(
    cell: Annotated[str, typer.Argument(help="A cell's full name.")],
    run: Annotated[str, typer.Option("--run", help="A run.")] = "last",
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it has ended.")] = False,
    tail: Annotated[
        int | None,
        typer.Option(
            "--tail", "-n", metavar="N", min=0, help="The last N lines of the newest attempt alone."
        ),
    ] = None,
) -> None:
    """Print what a cell had to say, and the traceback if it failed."""
    store = open_store(file, storage)
    record = find_run(store, run)
    if follow:
        follow_log(store, record.run_id, cell, console_here(), tail=tail)
    else:
        print_log(store, record.status(cell), console_here(), tail=tail)


@command(
    "fls results pipeline.yaml --json",
    "fls results experiments/mnist_mlp.yaml --csv > mnist.csv",
)
def results(
    file: File = DEFAULT_FILE,
    set_: SetOption = NONE_GIVEN,
    as_json: Annotated[
        bool | None, typer.Option("--json/--csv", help="Print JSON or CSV, not a table.")
    ] = None,
) -> None:
    """Print the results of a pipeline: one row an evaluated model."""
    spec = read_spec(file, set_)
    columns, rows, absent = result_rows(spec, Store(spec.storage))
    if as_json is None:
        print_rows(columns, rows, console_here())
    elif as_json:
        _print_json(rows)
    else:
        typer.echo(presentable(csv_text(columns, rows)), nl=False)
    if absent:
        typer.echo(f"No results yet of: {', '.join(absent)}; `{spec.command()}`.", err=True)


@command(
    "fls export pipeline.yaml 'oneshot[method=fishleg,seed=0,sparsity=0.9]' my_model",
)
def export(
    file: Annotated[Path, typer.Argument(help="The pipeline.")],
    cell: Annotated[str, typer.Argument(help="The cell that made the model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if need be.")],
    set_: SetOption = NONE_GIVEN,
) -> None:
    """Copy a cell's model out of the store: its weights, and what they are."""
    spec = read_spec(file, set_)
    export_cell(spec, Store(spec.storage), cell, folder)
    typer.echo(presentable(f"{folder}: {', '.join(sorted(os.listdir(folder)))}"))


@command(
    "fls list",
    name="list",
)
def list_names(file: File = DEFAULT_FILE) -> None:
    """List what a pipeline file may name: stage types, and what their parameters know by name.

    Where there is no pipeline.yaml, that is what comes with this program.
    """
    fresh = file == DEFAULT_FILE and not file.exists()
    built_in = import_catalogue(BUILT_IN) if fresh else None
    for plugin in [built_in] if built_in else read_spec(file).plugins:
        typer.echo(f"stage types of {plugin.module}:")
        for stage in plugin.catalogue.stages:
            typer.echo(f"  {stage.name:<24}{stage.summary}")
        for registry in plugin.catalogue.registries:
            typer.echo(f"\n{registry.kind} names:")
            families = {f"{prefix}...": entry for prefix, entry in registry.prefixes.items()}
            for name, entry in {**registry.entries, **families}.items():
                typer.echo(f"  {name:<24}{entry.summary}")


@command(
    "fls ui",
    "fls ui experiments/mnist_mlp.yaml --port 0",
)
def ui(
    file: File = DEFAULT_FILE,
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; where it is taken, or 0, a free one.")
    ] = 5000,
) -> None:
    """Serve MLflow's pages on a pipeline's runs, and print the link to them; Ctrl-C ends it.

    The link has a password in it, new each time: without it nobody on this machine gets in.

    Of a tracking server, whose pages are there already, the address is printed.
    """
    serve_ui(read_spec(file).tracking_uri(), port)


def read_spec(file: Path, overrides: Sequence[str] = ()) -> Spec:
    """Return the spec of a pipeline file; say what of it lies elsewhere than one may think."""
    spec = load_spec(file, overrides)
    for sentence in spec.moved:
        typer.echo(presentable(sentence), err=True)
    return spec


def console_here() -> Console:
    """Return the console on standard output."""
    width = None if sys.stdout.isatty() else 200
    return PlainConsole(width=width)


def _find(store: Store, run: str, storage: str | None) -> RunRecord:
    """Return a run; what is printed of it repeats the option --storage."""
    record = find_run(store, run)
    record.storage = storage
    return record


def _print_json(value: object) -> None:
    typer.echo(presentable(json.dumps(value, indent=1, ensure_ascii=False)))


def open_store(file: Path, storage: str | None) -> Store:
    """Return the store at `storage`, or if that is None the one of a pipeline file; it is there."""
    return Store(read_spec(file).storage if storage is None else storage).require()
