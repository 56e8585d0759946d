"""Faults on a real cluster: who is hit, how, and in the middle of which stage.

Each case starts from the results that the stage needs, hits once the stage has begun, lets the run
end or resumes it, and then looks: the same bytes as undisturbed, nothing that was complete ran
again, no MLflow run left RUNNING. One JSON line a case; cases that have one are not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.planning.planner import make_plan
from pipeline.spec.load import load_spec
from pipeline.store.layout import attempt_folder
from pipeline.store.store import Store
from tests.faults.cluster import Cluster, pause
from tests.faults.ledger import ROOT, Ledger

SPEC = Path(__file__).with_name("pipeline.yaml")
VICTIMS = ("driver", "worker", "raylet", "head")
HOWS = ("kill", "term", "pause")
STAGES = (
    "pretrain",
    "curvature",
    "prune_oneshot",
    "prune_gradual",
    "finetune",
    "evaluate",
    "compare",
)
LEASE_S = 2.0
_CASE_S = 150.0
_RESUMES = 3


def cases() -> list[str]:
    """Return `victim,how,stage` of all cases."""
    return [",".join(parts) for parts in itertools.product(VICTIMS, HOWS, STAGES)]


class Bench:
    """A cluster, an undisturbed run to compare with, and a folder for the case at hand."""

    def __init__(self, folder: Path, log: Path):
        self.log = log
        self._log = log.open("ab")
        mine = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {
            **mine,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "FLS_LEASE_S": str(LEASE_S),
            "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
            "RAY_AUTH_MODE": "disabled",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # 60, of which each case waits all
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # Ray's switch for several nodes
        }
        self.cluster = Cluster(2, folder / "ray", self._environment)
        self._whole = folder / "whole"
        self._case = folder / "case"

    def prepare(self) -> None:
        """Run once undisturbed."""
        self.cluster.ensure()
        self._whole.mkdir()
        shutil.copy(SPEC, self._whole)
        code = self._start(self._whole, "run").wait(timeout=600)
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}")
        with contextlib.chdir(self._whole):
            plan = make_plan(load_spec(Path("pipeline.yaml")), Store(".fls"))
        self.keys = {one.cell.name: one.key for one in plan.cells}
        self._inputs = {one.cell.name: set(one.cell.sources) for one in plan.cells}
        self.digests = self._digests()

    def close(self) -> None:
        """Stop the cluster."""
        self.cluster.stop()
        self._log.close()

    def run(self, case: str) -> dict[str, Any]:
        """Run one case, and return what was found."""
        victim, how, stage = case.split(",")
        self.cluster.ensure()
        self._lay_out(stage)
        complete = self._complete()
        began_s = time.monotonic()
        driver = self._start(self._case, "run")
        try:
            pid = self._wait_for_start(stage, driver)
            time.sleep(random.Random(case).uniform(0, 0.5))  # noqa: S311 - when to hit
            hit = self._hit(victim, how, driver.pid, pid)
            codes = [self._end_of(driver)]
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        while codes[-1] != 0 and len(codes) <= _RESUMES:
            self.cluster.ensure()
            again = self._start(self._case, "resume", "last")
            codes.append(self._end_of(again))
        return {
            "problems": self._problems(codes, complete),
            "exit_codes": codes,
            "hit": hit,
            "attempts": self._attempts(stage),
            "seconds": round(time.monotonic() - began_s, 1),
        }

    # -- one case

    def _lay_out(self, stage: str) -> None:
        """Copy the undisturbed store, without the stage and what comes after it."""
        shutil.rmtree(self._case, ignore_errors=True)
        shutil.copytree(self._whole, self._case, ignore=shutil.ignore_patterns("runs", "mlruns"))
        gone = {stage}
        for name, sources in self._inputs.items():  # in topological order
            if sources & gone:
                gone.add(name)
        for name in gone:
            shutil.rmtree(self._case / ".fls/stages" / self.keys[name])
        with sqlite3.connect(self._case / "mlflow.db") as database:
            database.execute("update runs set status = 'FINISHED'")

    def _start(self, folder: Path, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command],
            cwd=folder,
            env={**self._environment, "RAY_ADDRESS": self.cluster.address},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _wait_for_start(self, stage: str, driver: subprocess.Popen[bytes]) -> int:
        """Return the process of the stage's worker, once it has begun."""
        store, key = Store(str(self._case / ".fls")), self.keys[stage]
        end_s = time.monotonic() + _CASE_S
        while time.monotonic() < end_s:
            if driver.poll() is not None:
                raise RuntimeError(f"the driver ended with {driver.returncode} before the fault")
            for number in store.attempts(key)[-1:]:
                for event in store.read_events(key, number)[0][:1]:
                    return event["pid"]
            time.sleep(0.02)
        raise TimeoutError(f"{stage} does not begin")

    def _hit(self, victim: str, how: str, driver: int, worker: int) -> str:
        """Hit the victim; return what became of it, for a process may be gone before."""
        try:
            pid = {
                "driver": lambda: driver,
                "worker": lambda: worker,
                "raylet": lambda: self._raylet_of(worker),
                "head": lambda: self.cluster.head().pid,
            }[victim]()
            if how == "pause":
                pause(pid, 3 * LEASE_S)
            else:
                os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        except (ProcessLookupError, LookupError):
            return "was gone already"
        return "hit"

    def _raylet_of(self, worker: int) -> int:
        status = Path(f"/proc/{worker}/status")
        try:
            lines = status.read_text().splitlines()
        except FileNotFoundError as error:
            raise ProcessLookupError from error
        parent = int(next(line for line in lines if line.startswith("PPid:")).split()[1])
        raylets = [process.pid for process in self.cluster.raylets()]
        if parent not in raylets:
            raise ProcessLookupError
        return parent

    def _end_of(self, process: subprocess.Popen[bytes]) -> int:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_CASE_S)
        finally:
            process.kill()
        return process.wait()

    # -- what is looked at

    def _problems(self, codes: list[int], complete: dict[str, int]) -> list[str]:
        found = []
        if codes[-1] != 0:
            found.append(f"not brought to its end: exit codes {codes}")
        digests = self._digests(self._case)
        differing = [name for name in self.digests if digests.get(name) != self.digests[name]]
        if differing:
            found.append(f"other bytes: {', '.join(differing)}")
        again = [n for n, count in complete.items() if self._attempts(n) != count]
        if again:
            found.append(f"ran again though complete: {', '.join(again)}")
        with sqlite3.connect(self._case / "mlflow.db") as database:
            running = database.execute("select count(*) from runs where status = 'RUNNING'")
            (count,) = running.fetchone()
        if count:
            found.append(f"{count} MLflow runs are RUNNING")
        return found

    def _digests(self, folder: Path | None = None) -> dict[str, Any]:
        """Return cell -> digest of its outputs, read anew from the disk."""
        root = (folder or self._whole) / ".fls"
        store, found = Store(str(root)), {}
        for name, key in self.keys.items():
            manifest = store.manifest(key)
            if manifest is not None:
                outputs = root / attempt_folder(key, manifest.attempt) / "outputs"
                found[name] = {
                    str(path.relative_to(outputs)): hashlib.sha256(path.read_bytes()).hexdigest()
                    for path in sorted(outputs.rglob("*"))
                    if path.is_file()
                }
        return found

    def _complete(self) -> dict[str, int]:
        """Return cell -> number of attempts, of the cells that are complete."""
        root = self._case / ".fls/stages"
        names = [n for n, key in self.keys.items() if (root / key / "manifest.json").is_file()]
        return {name: self._attempts(name) for name in names}

    def _attempts(self, name: str) -> int:
        return len(list((self._case / ".fls/stages" / self.keys[name]).glob("attempts/*")))


def run(ledger: Ledger) -> None:
    """Run the cases that are still to do; what the drivers say is kept beside the ledger."""
    todo = ledger.plan(cases())
    if not todo:
        return
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), ledger.path.with_suffix(".log"))
        try:
            bench.prepare()
            for case in todo:
                began_s = time.monotonic()
                try:
                    found = bench.run(case)
                except Exception as error:
                    found = {"problems": [f"{type(error).__name__}: {error}"]}
                ledger.write(case, **{"seconds": time.monotonic() - began_s, **found})
        finally:
            bench.close()
