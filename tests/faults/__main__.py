"""Runs what is not done of the fault tests, the fuzzer and the matrix, one after another.

    python -m tests.faults --out build/faults.jsonl [--only 'driver,kill,*']

May be stopped at any time: the same command goes on. The exit code is 1 if a case is lost.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest

from tests.faults import matrix
from tests.faults.fuzz_spec import fuzz
from tests.faults.ledger import ROOT, Ledger
from tests.faults.recorder import Recorder

_FUZZER = "tests/faults/fuzz_spec.py"
_INPUTS = 2_000


def run_tests(ledger: Ledger) -> None:
    """Run the tests of this folder, each alone, for they measure."""
    options = [f"--rootdir={ROOT}", "--continue-on-collection-errors"]
    code = pytest.main([str(ROOT / "tests/faults"), *options], plugins=[Recorder(ledger)])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code in {pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR}:
        raise RuntimeError(f"pytest ended with {code!r}")


def run_fuzzer(ledger: Ledger) -> None:
    """Give some inputs to the loader of specs."""
    for case in ledger.plan([_FUZZER]):
        state = ledger.path.parent / "fuzz-spec" / ledger.code
        if ledger.was_lost(case):
            shutil.rmtree(state, ignore_errors=True)
        found = fuzz(state, "hypothesis", _INPUTS)
        ledger.write(case, found.pop("seconds"), found.pop("failures"), **found)


def main() -> int:
    """Run the parts, whatever becomes of those before."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/faults.jsonl")
    parser.add_argument("--only", default="*", help="names of cases; * stands for any text")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended
    ledger = Ledger(arguments.out.absolute(), arguments.only)
    try:
        for part in (run_tests, run_fuzzer, matrix.run):
            try:
                part(ledger)
            except Exception as error:
                traceback.print_exc()
                ledger.note_broken(f"{part.__module__}.{part.__name__} broke off: {error!r}")
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.")
        return 130
    return ledger.summarise()


if __name__ == "__main__":
    sys.exit(main())
