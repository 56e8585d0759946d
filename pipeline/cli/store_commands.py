"""The commands that maintain a store: `gc`, `verify` and `accept`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from pipeline.base.errors import BadInput, StorageUnavailable
from pipeline.cli.app import command, console_here, open_store, print_json, read_spec
from pipeline.cli.options import (
    FileOption,
    JsonOption,
    StorageOption,
    TrustOption,
    read_duration,
    show_duration,
)
from pipeline.cli.printing import size
from pipeline.planning.planner import make_plan
from pipeline.running.drift import accept as accept_code
from pipeline.running.drift import plan_of
from pipeline.running.record import DEFAULT_FILE
from pipeline.running.runs import find_run
from pipeline.running.trust import read_trust
from pipeline.spec.spec import Spec
from pipeline.store.store import Store
from pipeline.upkeep.gc import Garbage, collect, find_garbage, find_spared
from pipeline.upkeep.rerun import Comparison, rerun
from pipeline.upkeep.survey import GRACE_S, Retention
from pipeline.upkeep.verify import find_damage

FileArgument = Annotated[
    Path | None,
    typer.Argument(help="The pipeline; default: pipeline.yaml, unless --storage is given."),
]
RunOption = Annotated[str, typer.Option("--run", help="A run, or 'last'.")]


@command(
    "fls gc",
    "fls gc pipeline.yaml experiments/mnist_mlp.yaml --older-than 30d --apply",
    "fls gc --storage s3://bucket/results --keep-runs 20",
)
def gc(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Pipelines whose plans are kept; pipeline.yaml unless --storage is given.",
        ),
    ] = None,
    storage: StorageOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Delete the listed results.")] = False,
    keep_runs: Annotated[
        int | None,
        typer.Option("--keep-runs", metavar="N", min=0, help="Drop all runs but the newest N."),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            metavar="TIME",
            parser=read_duration,
            help="Drop runs that began before this time (30d).",
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=read_duration,
            help="Keep files that were written to within this time.",
            show_default="1h",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the unneeded results of a store; with --apply, delete them.

    All runs are kept, unless --keep-runs or --older-than drops some; with both options, a run is
    dropped if both drop it. A live run is always kept. The files of a stage with `keep: results`
    are unneeded once all downstream results exist; its cells stay complete, and run again when
    their files are needed.
    """
    specs = [read_spec(file) for file in files or ([] if storage else [DEFAULT_FILE])]
    store = Store(storage or _storage_of(specs)).require()
    plans = [make_plan(spec, store) for spec in specs]
    retention = Retention(keep_runs=keep_runs, older_than_s=older_than, grace_s=grace or GRACE_S)
    console = Console(stderr=True) if as_json else console_here()

    def pass_over(what: str) -> None:
        console.print(f"passed over: {what}", soft_wrap=True)

    found = find_garbage(store, plans, retention, pass_over)
    spared = find_spared(store, plans, retention, found)
    listed = collect(store, plans, retention, found, pass_over) if apply else found
    if as_json:
        print_json([one.to_dict(deleted=apply) for one in listed])
        return
    count, total = _print_garbage(listed, console)
    if apply:
        console.print(f"{store.url}: deleted {count} unneeded items, {size(total)}.")
    else:
        hint = "; --apply deletes them" if count else ""
        console.print(f"{store.url}: {count} unneeded items, {size(total)}{hint}.")
    _print_kept(spared, retention, len(store.list_runs()), console)


@command(
    "fls verify",
    "fls verify --storage s3://bucket/results --set-aside",
    "fls verify pipeline.yaml --rerun 'curvature[method=kfac,seed=0]'",
)
def verify(
    file: FileArgument = None,
    storage: StorageOption = None,
    set_aside: Annotated[
        bool,
        typer.Option(
            "--set-aside",
            help="Move damaged results aside; their cells run again when they are needed.",
        ),
    ] = False,
    rerun_cell: Annotated[
        str | None,
        typer.Option(
            "--rerun", metavar="CELL", help="Compute a cell again, and compare its files."
        ),
    ] = None,
    run: RunOption = "last",
    trust_store: TrustOption = False,
) -> None:
    """Check each file of the store against its hash; exit code 1 if one is damaged.

    With --rerun, compute one cell again in a temporary folder instead; nothing is published. If its
    code has changed, compare with the result of the earlier code, as a test of `fls accept`. The
    cell is searched in the pipeline or, with --storage alone, in --run. Plugins of the run's
    spec, and functions that its parameters name, are imported if pipeline.yaml names them too, or
    with --trust.
    """
    store = open_store(file or DEFAULT_FILE, storage)
    if rerun_cell is not None:
        trust = read_trust(file or DEFAULT_FILE, store, everything=trust_store)
        where = "" if storage is None else f" --storage {shlex.quote(storage)}{trust.option}"
        if file is None and storage is not None:
            plan = plan_of(find_run(store, run), store, trust)
        else:
            plan = make_plan(read_spec(file or DEFAULT_FILE), store)
        found = rerun(plan, store, rerun_cell, where)
        sys.exit(_print_comparison(found, console_here()))
    sys.exit(_verify(store, console_here(), set_aside=set_aside))


@command(
    "fls accept pretrain --why 'only a message was reworded'",
    "fls accept pretrain finetune --run 20260730-101500-042-1f2e --why 'same arithmetic, faster'",
    "fls accept --why 'a newer version, whose changelog says that results are the same'",
)
def accept(
    why: Annotated[str, typer.Option("--why", help="Why the results are the same.")],
    stages: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE]...", help="Stages of the run; default: all."),
    ] = None,
    run: RunOption = "last",
    file: FileOption = DEFAULT_FILE,
    storage: StorageOption = None,
    trust_store: TrustOption = False,
) -> None:
    """Accept the present code of stages as equivalent to the code of a run.

    The plugins of the run's spec, and functions that its parameters name, are imported if --file
    names them too, or with --trust.

    The results in the store stay valid, for all stages of the same type. The user, the time and the
    reason are recorded, and shown by `fls plan --why` and in tracking.
    """
    store = open_store(file, storage)
    trust = read_trust(file, store, everything=trust_store)
    cells = accept_code(store, find_run(store, run), trust, stages or [], why)
    console, whose = console_here(), ", ".join(stages or ["all stages"])
    if cells:
        console.print(f"Accepted for {len(cells)} cells of {whose}.", soft_wrap=True)
    else:
        console.print(f"Nothing to accept: the code of {whose} is the run's.")


def _storage_of(specs: Sequence[Spec]) -> str:
    """Return the common storage of all specs.

    Raises:
        BadInput: they have several.
    """
    found = list(dict.fromkeys(spec.storage for spec in specs))
    if len(found) > 1:
        raise BadInput(f"The pipelines have several storages, choose one: {', '.join(found)}.")
    return found[0]


def _print_garbage(garbage: Iterable[Garbage], console: Console) -> tuple[int, int]:
    """Print a line for each item; return their number and total size."""
    count = total = 0
    for item in garbage:
        count, total = count + 1, total + item.bytes
        cell = f" ({item.cell})" if item.cell else ""
        console.print(
            f"{size(item.bytes):>8}  {item.paths[-1]}{cell}: {item.reason}", soft_wrap=True
        )
    return count, total


def _print_kept(
    spared: Sequence[Garbage], retention: Retention, runs: int, console: Console
) -> None:
    """Print the things that other options would delete."""
    if spared:
        console.print(
            f"Kept, though unneeded, because written to within the grace period of "
            f"{show_duration(retention.grace_s)} (--grace): {len(spared)} items, "
            f"{size(sum(item.bytes for item in spared))}.",
            soft_wrap=True,
        )
    if retention.keep_runs is retention.older_than_s is None and runs:
        console.print(
            f"All {runs} runs are kept, with their results; see --keep-runs and --older-than.",
            soft_wrap=True,
        )


def _verify(store: Store, console: Console, *, set_aside: bool) -> int:
    """Print the damaged files of a store, and return the exit code."""
    errors = Console(stderr=True)
    damaged: dict[str, str] = {}
    count = 0
    with Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    ) as progress:
        task = progress.add_task("verify", total=None)
        for damage in find_damage(
            store, lambda done, total: progress.update(task, completed=done, total=total)
        ):
            count += 1
            cell = f" ({damage.cell})" if damage.cell else ""
            console.print(f"{damage.path}{cell}: {damage.reason}", soft_wrap=True)
            if damage.key:
                damaged[damage.key] = damage.cell
    for key, cell in damaged.items() if set_aside else ():
        try:
            aside = store.set_aside(key)
        except StorageUnavailable as error:  # perhaps for a moment
            console.print(f"not set aside: {key[:12]} {cell}: {error}", soft_wrap=True)
            continue
        if aside:
            console.print(f"set aside: {key[:12]} {cell}; it runs again when it is needed")
    if not count:
        console.print(f"{store.url}: no damage.", soft_wrap=True)
        return 0
    results = f", in {len(damaged)} results" if damaged else ""
    console.print(f"{store.url}: {count} damaged files{results}.", soft_wrap=True)
    return 1


def _print_comparison(found: Comparison, console: Console) -> int:
    """Print the comparison of a cell computed again, and return the exit code."""
    for phrase in found.differences:
        console.print(f"{found.cell}: {phrase}", soft_wrap=True)
    if found.circumstances:
        console.print(f"Made differently: {', '.join(found.circumstances)}.", soft_wrap=True)
    if found.earlier:
        console.print(
            f"Compared with the result of earlier code; to accept it: {found.earlier}",
            soft_wrap=True,
        )
    if found.differences:
        return 1
    console.print(f"{found.cell}: all {found.files} files are the same, byte by byte.")
    return 0
