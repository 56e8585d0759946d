"""Fuzzes the spec loader: every input must give a spec or a clear error, within a second.

    python tests/faults/fuzz_spec.py --inputs 100000 --state fuzz-spec

Uses atheris where it is installed (coverage leads it to new inputs), else hypothesis. The folder
`--state` holds how far it is, what atheris found worth keeping, and the input that failed, if one
did; started again, it goes on from there, so it may be stopped at any time. Prints one JSON line:
the inputs done, by outcome, and the slowest. The exit code is 1 if an input failed.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "pipeline"), str(TESTS.parent)]

LONGEST_S = 1.0
BATCH = 5_000
SAVE_EVERY = 100


class Ledger:
    """What has been tried so far, kept in a file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "state.json"
        state = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.done: int = state.get("done", 0)
        self.seconds: float = state.get("seconds", 0.0)
        self.kinds = Counter(state.get("kinds", {}))
        self.slowest_s: float = state.get("slowest_s", 0.0)
        self.failures: list[str] = state.get("failures", [])
        self.began = time.monotonic()

    def save(self) -> None:
        now = time.monotonic()
        self.seconds, self.began = self.seconds + now - self.began, now
        part = self.path.with_suffix(".part")
        names = ("done", "seconds", "kinds", "slowest_s", "failures")
        part.write_text(json.dumps({name: getattr(self, name) for name in names}))
        part.replace(self.path)

    def try_input(self, data: bytes) -> None:
        """Give an input to the loader; one that fails is kept as a file, and raised."""
        from spec_inputs import judge

        try:
            verdict = judge(data, Path("p.yaml"))
            if verdict.seconds > LONGEST_S and (seconds := time_alone(Path("p.yaml"))) > LONGEST_S:
                raise AssertionError(f"took {seconds:.2f} s")
        except Exception as error:
            name = f"failed-{len(self.failures) + 1}.yaml"
            (self.folder / name).write_bytes(data)
            self.failures.append(f"{name}: {type(error).__name__}: {error}"[:500])
            self.done += 1
            self.save()
            raise
        self.kinds[verdict.kind] += 1
        self.done += 1
        if verdict.seconds > self.slowest_s:
            self.slowest_s = round(verdict.seconds, 4)
            (self.folder / "slowest.yaml").write_bytes(data)
        if self.done % SAVE_EVERY == 0:
            self.save()


def time_alone(path: Path) -> float:
    """Return the CPU seconds that a spec takes in a process of its own: atheris slows code down."""
    path = path.resolve()
    command = [sys.executable, str(Path(__file__).resolve()), "--time", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def run_batch(ledger: Ledger, count: int) -> None:
    """Try `count` inputs with hypothesis."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st
    from spec_inputs import draw_input

    @seed(ledger.done)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(st.binary(max_size=300), st.randoms(use_true_random=False).map(draw_input)))
    def spoilt(data: bytes) -> None:
        ledger.try_input(data)

    spoilt()


def run_atheris_batch(ledger: Ledger, count: int) -> None:
    """Try `count` inputs with atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["yaml", "pipeline"]):
        from spec_inputs import draw_input

    corpus = ledger.folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for number in range(50):
            first = draw_input(random.Random(number))  # noqa: S311 - no secret
            (corpus / f"first-{number}").write_bytes(b"\x00" + first)

    def one_input(data: bytes) -> None:
        # Either the bytes themselves, which grow by what atheris learns; or a spec spoilt by them.
        raw = data[:1] < b"\x80"
        ledger.try_input(data[1:] if raw else draw_input(random.Random(data)))  # noqa: S311
        if ledger.done >= end:
            ledger.save()
            os._exit(0)

    end = ledger.done + count
    options = [f"-seed={ledger.done + 1}", "-max_len=4096", "-rss_limit_mb=4000", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="how many in all")
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")
    parser.add_argument(
        "--state", type=Path, default=Path("fuzz-spec"), help="folder to go on from"
    )
    parser.add_argument("--time", type=Path, default=None, help="only time this file, once")
    parser.add_argument("--batch", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time is not None:
        return do_time(arguments.time.resolve())
    folder: Path = arguments.state.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    engine = "atheris" if importlib.util.find_spec("atheris") else "hypothesis"
    if arguments.batch is not None:
        return do_batch(folder, engine, arguments.batch)
    began = time.monotonic()
    while (left := arguments.inputs - Ledger(folder).done) > 0:
        if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
            break
        before = Ledger(folder).done
        batch = str(min(BATCH, left))
        options = [*sys.argv[1:], "--state", str(folder), "--batch", batch]
        done = subprocess.run([sys.executable, __file__, *options], stdout=sys.stderr)
        if Ledger(folder).done == before:  # it did not even begin
            return done.returncode or 1
    ledger = Ledger(folder)
    report: dict[str, Any] = {
        "case": "fuzz_spec",
        "engine": engine,
        "inputs": ledger.done,
        "outcomes": dict(ledger.kinds),
        "failures": ledger.failures,
        "slowest_cpu_s": time_alone(folder / "slowest.yaml"),
        "seconds": round(ledger.seconds, 1),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if ledger.failures else 0


@contextmanager
def working_directory() -> Iterator[None]:
    """Work in a fresh folder with the plugin that the specs use."""
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(TESTS / "pipeline" / "toy", Path(work) / "toy")
        os.chdir(work)
        sys.path.insert(0, work)
        yield
        os.chdir(TESTS)


def do_time(path: Path) -> int:
    """Print the CPU seconds of a spec, without those of the imports."""
    from spec_inputs import judge

    data = path.read_bytes()
    with working_directory():
        judge(b"name: x\nplugins: [toy]\nstages: {s: {uses: total}}\n", Path("p.yaml"))
        sys.stdout.write(f"{judge(data, Path('p.yaml')).seconds:.4f}\n")
    return 0


def do_batch(folder: Path, engine: str, count: int) -> int:
    """Try a batch in a working directory of its own, in this process."""
    ledger = Ledger(folder)
    with working_directory():
        try:
            (run_atheris_batch if engine == "atheris" else run_batch)(ledger, count)
        except Exception as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        ledger.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
