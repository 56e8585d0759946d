"""Runs a pipeline, prints what it ends with, and makes an exit code of that."""

from __future__ import annotations

from rich.console import Console

from pipeline.base.errors import Damaged
from pipeline.cli.printing import print_failures, print_reports, print_tracking
from pipeline.planning.planner import Selection
from pipeline.running.driver import GRACE_S
from pipeline.running.launch import Ended, start_run
from pipeline.running.record import RunOptions, RunState
from pipeline.spec.build import Spec


def run_spec(
    spec: Spec,
    options: RunOptions,
    selection: Selection,
    console: Console,
    stop_after_s: float | None = None,
    grace_s: float = GRACE_S,
    run_id: str | None = None,
) -> int:
    """Run what is selected of a spec, see `start_run`; print its end, and return the exit code.

    Where nothing is to be run and a result proves to be damaged, it is made again.
    """
    while True:
        ended = start_run(spec, options, selection, console, stop_after_s, grace_s, run_id)
        try:
            return print_end(ended, console)
        except Damaged as error:
            ended.store.set_aside(error.key)
            console.print(f"{error}", soft_wrap=True)


def print_end(ended: Ended, console: Console) -> int:
    """Print the reports, the failures and where the run is tracked; return the exit code.

    Of a run that ran nothing, a damaged report is an error, see `Store.fetch`.
    """
    record = ended.record
    if ended.signal is not None and record is not None:
        console.print(f"Stopped. `{record.resume_command}` goes on from here.", soft_wrap=True)
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
        console.print(f"{error}. The next `fls run` makes it again.", soft_wrap=True)
        code = 1
    print_failures(record, console)
    print_tracking(record, ended.folder, console)
    return code
