"""Fuzzes the spec loader: every input must give a spec or a clear error, within a second.

    python tests/faults/fuzz_spec.py --inputs 100000 --state fuzz-spec

Uses atheris where it is installed (coverage leads it to new inputs), else hypothesis, or what
`--engine` says. The folder `--state` holds how far it is, what atheris found worth keeping, and the
input that failed, if one did; started again, it goes on from there, so it may be stopped at any
time. Prints one JSON line: the inputs done, by outcome, and the slowest. The exit code is 1 if an
input failed.
"""

import argparse
import importlib.util
import json
import math
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


class State:
    """What has been tried so far, kept in a file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "state.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.done: int = kept.get("done", 0)
        self.seconds: float = kept.get("seconds", 0.0)
        self.kinds = Counter(kept.get("kinds", {}))
        self.slowest_s: float = kept.get("slowest_s", 0.0)
        self.failures: list[str] = kept.get("failures", [])
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


def run_batch(state: State, count: int) -> None:
    """Try `count` inputs with hypothesis."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st
    from spec_inputs import draw_input

    @seed(state.done)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(st.binary(max_size=300), st.randoms(use_true_random=False).map(draw_input)))
    def spoilt(data: bytes) -> None:
        state.try_input(data)

    spoilt()


def run_atheris_batch(state: State, count: int) -> None:
    """Try `count` inputs with atheris, which ends the process."""
    import atheris

    # Ours alone: with PyYAML instrumented, too, an input takes eight times as long.
    with atheris.instrument_imports(include=["pipeline"]):
        from spec_inputs import draw_input

    corpus = state.folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for number in range(50):
            first = draw_input(random.Random(number))  # noqa: S311 - no secret
            (corpus / f"first-{number}").write_bytes(b"\x00" + first)

    def one_input(data: bytes) -> None:
        # Either the bytes themselves, which grow by what atheris learns; or a spec spoilt by them.
        raw = data[:1] < b"\x80"
        state.try_input(data[1:] if raw else draw_input(random.Random(data)))  # noqa: S311
        if state.done >= end:
            state.save()
            os._exit(0)

    end = state.done + count
    options = [f"-seed={state.done + 1}", "-max_len=4096", "-rss_limit_mb=4000", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


def fuzz(folder: Path, engine: str, inputs: int, seconds: float = math.inf) -> dict[str, Any]:
    """Try inputs until there are so many in all, or time is up; return what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--state", str(folder), "--engine", engine, "--batch"]
    began = time.monotonic()
    while (left := inputs - State(folder).done) > 0 and time.monotonic() - began < seconds:
        before = State(folder)
        ended = subprocess.run([*command, str(min(BATCH, left))], stdout=sys.stderr)
        state = State(folder)
        crashed = ended.returncode and state.failures == before.failures
        if crashed or state.done == before.done:
            state.failures.append(f"a batch ended with exit code {ended.returncode}")
            state.save()
            break
    state = State(folder)
    slowest = folder / "slowest.yaml"
    return {
        "engine": engine,
        "inputs": state.done,
        "outcomes": dict(state.kinds),
        "failures": state.failures,
        "slowest_cpu_s": time_alone(slowest) if slowest.exists() else None,
        "seconds": round(state.seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="how many in all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument(
        "--state", type=Path, default=Path("fuzz-spec"), help="folder to go on from"
    )
    parser.add_argument(
        "--engine",
        choices=["atheris", "hypothesis"],
        default="atheris" if importlib.util.find_spec("atheris") else "hypothesis",
        help="what draws the inputs",
    )
    parser.add_argument("--time", type=Path, default=None, help="only time this file, once")
    parser.add_argument("--batch", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time is not None:
        return do_time(arguments.time.resolve())
    folder: Path = arguments.state.resolve()
    if arguments.batch is not None:
        return do_batch(folder, arguments.engine, arguments.batch)
    found = fuzz(folder, arguments.engine, arguments.inputs, arguments.seconds)
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if found["failures"] else 0


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
    state = State(folder)
    with working_directory():
        try:
            (run_atheris_batch if engine == "atheris" else run_batch)(state, count)
        except Exception as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        state.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
