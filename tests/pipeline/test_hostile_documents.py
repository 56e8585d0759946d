"""Every field of every document that is read from a store, as anybody may have written it.

None runs code, contacts a host, writes outside of the store, or ends in a traceback.
"""

import json
import os
import random
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile_documents import (
    CANARY,
    MISSING,
    WATCH,
    Kind,
    fields,
    get,
    listener,
    mutations,
    read,
    replaced,
    shape,
    write,
)
from runner_fixtures import TOY
from toy_runs import fls, last_run, write_spec

from pipeline.base.errors import BadInput, PipelineError
from pipeline.base.variables import STORAGE, VARIABLES, Variable
from pipeline.code.provenance import SOURCE_FILE, Provenance
from pipeline.store.store import Store

LOCAL = ("--executor", "local", "--tracking", "jsonl")
SPEC = """
    start: {uses: start, params: {value: 10}, keep: results}
    apply: {uses: apply, inputs: {number: start}, params: {operation: plus}, register: model}
    bad: {uses: fail, params: {how: user, counter: count, until: 1}, retries: 0}
    total: {uses: total, inputs: {numbers: [apply]}}
    report: {uses: report, inputs: {results: total}}
    slow: {uses: slow, params: {steps: 3000, delay_s: 0.05}, inputs: {number: apply},
           checkpoint_every_s: 0}
"""
# Of the twelve for each field, drawn by a seed; tests/faults asks for all.
_MUTATIONS = int(os.environ.get("FISHLEG_TEST_MUTATIONS", "3"))
RUN = "runs/[^/]+"
KEY = "stages/[0-9a-f]{64}"
ATTEMPT = rf"{KEY}/attempts/\d+"
ALL_RUNS = ("status", "status last", "sync", "gc --keep-runs 0 --grace 1s", "results --json")
KINDS = [
    Kind("storage", r"storage\.json", ("status", "plan", "verify", "gc", "sync", "logs slow")),
    Kind("request", rf"{RUN}/run\.json", (*ALL_RUNS, "resume last", "accept apply --why x",
         "verify --storage .fls --rerun bad", "sync --storage .fls", "logs slow")),
    Kind("state", rf"{RUN}/state\.json", (*ALL_RUNS, "logs slow", "resume last", "stop last",
         "export pipeline.yaml apply out")),
    Kind("tracking", rf"{RUN}/tracking\.json", (*ALL_RUNS, "resume last")),
    Kind("plan of a run", rf"{RUN}/plan\.json", ("plan --why", "resume last", "results",
         "accept apply --why x", "gc --keep-runs 1", "verify --rerun apply")),
    Kind("facts", rf"{RUN}/facts\.json", ("sync", "sync last", "sync --storage .fls",
         "resume last", "status")),
    Kind("source", rf"{RUN}/source\.json", ("status last", "sync", "gc", "verify")),
    Kind("manifest", rf"{KEY}/manifest\.json", ("plan --why", "results --json", "verify", "gc",
         "export pipeline.yaml apply out", "verify --rerun apply", "resume last")),
    Kind("collected result", rf"{KEY}/collected\.json", ("plan --why", "gc", "verify",
         "resume last", "verify --rerun apply")),
    Kind("attempt", rf"{ATTEMPT}/attempt\.json", ("verify", "gc", "attempt")),
    Kind("failure", rf"{ATTEMPT}/failure\.json", ("logs bad", "status last", "sync", "verify")),
    Kind("digests of a checkpoint", rf"{ATTEMPT}/checkpoints/\d+/\.digests\.json",
         ("attempt", "verify", "gc")),
    Kind("acceptance", r"accepted/[0-9a-f]+\.json", ("plan --why", "resume last", "gc",
         "accept apply --why x", "results")),
    Kind("events", rf"{ATTEMPT}/events/\d+\.jsonl", ("logs slow", "logs bad", "status last",
         "sync", "logs apply --tail 3", "logs total"), "lines"),
    Kind("rows", rf"{ATTEMPT}/outputs/results/rows\.json", ("results", "results --json",
         "results --csv"), "output"),
    Kind("log", rf"{ATTEMPT}/log/\d+\.log", ("logs slow", "logs bad --tail 2", "verify"), "bytes"),
    Kind("generation", r"generations/[0-9a-f]+\.\d+", ("plan", "gc", "resume last"), "bytes"),
    Kind("mark", rf"{RUN}/marks/(alive|life-\d+|stop-\d+)", ("status", "gc", "resume last"),
         "bytes"),
    Kind("output", rf"{ATTEMPT}/outputs/(?!results/rows).+", ("verify", "results",
         "export pipeline.yaml apply out"), "bytes"),
    Kind("checkpoint", rf"{ATTEMPT}/checkpoints/\d+/[^.].*", ("attempt", "verify"), "bytes"),
]  # fmt: skip
WRITERS = ("sync", "accept", "attempt", "resume", "stop", "export", "verify --storage")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a pipeline, and its store after runs that finished, failed and were stopped."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as here:
        shutil.copytree(TOY, folder / "toy", ignore=shutil.ignore_patterns("__pycache__"))
        here.chdir(folder)
        here.syspath_prepend(str(folder))
        for name in ("tmp", "cache"):
            (folder / name).mkdir()
        here.setenv("TMPDIR", str(folder / "tmp"))
        here.setattr("tempfile.tempdir", None)
        here.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        here.setenv("TOY_LOG", str(folder / "ran"))
        here.delenv("MLFLOW_TRACKING_URI", raising=False)
        here.setattr(sys, "dont_write_bytecode", True)
        (folder / f"{CANARY}.py").write_text("open('executed', 'w')\ndef load(*_, **__): ...\n")
        write_spec(SPEC)
        fls("run", *LOCAL, "--until", "report")
        fls("run", *LOCAL, "--force", "start", "--until", "report")
        code = "def plus(value: int, operand: int) -> int:\n    return operand + value\n"
        Path("toy/operations/plus.py").write_text(code)
        assert fls("accept", "apply", "--why", "the same")[0] == 0
        for seconds in (1.2, 4, 16):  # long enough, on a busy machine too, for a cell to fail
            fls("run", *LOCAL, "--stop-after", f"{seconds}s")
            if any(Path(".fls").rglob("failure.json")):
                break
        store = Store(".fls")
        manifest = store.manifest(last_run().cells["start"].key)
        assert manifest is not None
        store.collect(manifest)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in {"toy", CANARY}]:
        del sys.modules[name]


@pytest.fixture
def stored(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh copy of that store, in that folder; no executor is at hand."""

    def refuse(name: object) -> Any:
        raise BadInput("nothing runs here")

    monkeypatch.setattr("pipeline.running.launch.make_executor", refuse)
    monkeypatch.setattr("pipeline.upkeep.rerun.make_executor", refuse)
    monkeypatch.setenv("FLS_PATIENCE_S", "0")
    # What these tell takes long to find out, and is not the store's.
    monkeypatch.setattr("pipeline.code.provenance._git", lambda folder, *arguments: "")
    monkeypatch.setattr("pipeline.code.provenance._installed", lambda: {"numpy": "1.0"})
    shutil.copytree(".fls", "whole", symlinks=True)
    yield made
    restore()
    shutil.rmtree("whole")


def restore() -> None:
    """Put the store back as it was, as far as it is not."""
    for name in ("out", "tracking"):
        shutil.rmtree(name, ignore_errors=True)
    whole, now = look("whole"), look(".fls")
    for path in sorted(now.keys() - whole.keys(), reverse=True):
        found = Path(".fls", path)
        if found.is_dir() and not found.is_symlink():
            found.rmdir()
        else:
            found.unlink()
    for path, seen in sorted(whole.items()):
        found = Path(".fls", path)
        if now.get(path) != seen:
            if path in now:
                shutil.rmtree(
                    found
                ) if found.is_dir() and not found.is_symlink() else found.unlink()
            if seen is None:
                found.mkdir()
            else:
                shutil.copy2(Path("whole", path), found)


def look(folder: str) -> dict[str, tuple[int, int] | None]:
    """Return path -> size and time of each file in a folder, and None for each folder."""
    found: dict[str, tuple[int, int] | None] = {}
    for above, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(above, name)
            about = os.lstat(path)
            is_folder = stat.S_ISDIR(about.st_mode)
            found[os.path.relpath(path, folder)] = (
                None if is_folder else (about.st_size, about.st_mtime_ns)
            )
    return found


def files_of(kind: Kind) -> list[Path]:
    """Return the files of a kind in the store, some of many."""
    found = [path for path in sorted(Path(".fls").rglob("*")) if path.is_file()]
    return [path for path in found if kind.fits(path.relative_to(".fls").as_posix())]


def test_every_document_of_a_store_is_of_a_kind_that_is_looked_at(stored: Path) -> None:
    paths = [p.relative_to(".fls").as_posix() for p in Path(".fls").rglob("*") if p.is_file()]
    kinds = {path: [kind.name for kind in KINDS if kind.fits(path)] for path in paths}
    assert kinds.pop(".gitignore") == []  # which Git and rsync read
    assert {path: names for path, names in kinds.items() if len(names) != 1} == {}
    assert {kind.name for kind in KINDS} == {name for names in kinds.values() for name in names}


class Trial:
    """Runs commands on what a store holds, and notes what they must not do."""

    def __init__(self, folder: Path, came: Callable[[], int]):
        self.folder = folder
        self.came = came
        self.wrong: list[str] = []
        self.count = 0

    def run(self, command: str, what: str) -> None:
        """Run a command, and note what it did wrong under a name."""
        self.count += 1
        began = time.monotonic()
        roots = [self.folder / name for name in (".fls", "tmp", "cache", "tracking", "out")]
        # Beside the database is its lock; what is exported, is written beside and renamed.
        with WATCH.over(*roots, self.folder / "mlflow.db.lock") as found:
            if command == "attempt":
                code, output, errors = self._attempt()
            else:
                code, output, errors = fls(*command.split())
        seconds = time.monotonic() - began
        found = [
            one
            for one in found
            if one != f"os.mkdir {self.folder}" and f"{self.folder}/.out." not in one
        ]
        for text in (
            *found,
            *(
                ["Traceback: " + " | ".join(errors.splitlines()[-4:])]
                if "Traceback" in errors
                else []
            ),
            *([f"code {code}"] if code not in {0, 1, 2} else []),
            *([f"{len(errors)} characters of errors"] if len(errors) > 8000 else []),
            *([f"{seconds:.1f} s"] if seconds > 8 else []),
            *(["executed"] if Path("executed").exists() else []),
            *(["contacted"] if self.came() else []),
        ):
            self.wrong.append(f"{what}; {command}: {text}"[:900])
        if command.startswith(WRITERS):
            restore()

    def _attempt(self) -> tuple[int, str, str]:
        """Begin an attempt at each cell, as a worker does."""
        try:
            for key in sorted(os.listdir(".fls/stages")):
                with Store(".fls").begin_attempt(key):
                    pass
        except PipelineError as error:
            return error.exit_code, "", str(error)
        return 0, "", ""


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.form != "bytes"], ids=lambda kind: kind.name
)
def test_no_field_of_a_document_leads_anywhere(stored: Path, kind: Kind) -> None:
    chance = random.Random(kind.name)  # noqa: S311
    some = files_of(kind)
    outside = stored / "outside"
    with listener() as (url, came):
        trial = Trial(stored, came)
        seen = set()
        for path in chance.sample(some, min(4, len(some))):
            document = read(kind, path)
            for way in fields(document, chance):
                if (form := shape(document, way)) in seen:
                    continue
                seen.add(form)
                every = mutations(get(document, way), outside, url, chance)
                for name, value in chance.sample(list(every.items()), _MUTATIONS):
                    write(kind, path, replaced(document, way, value))
                    reader = chance.choice(kind.readers)
                    trial.run(reader, f"{'.'.join(map(str, way))} = {name}")
            restore()
    assert trial.count == _MUTATIONS * len(seen) > 0
    assert trial.wrong == [], "\n".join(trial.wrong)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.form != "bytes"], ids=lambda kind: kind.name
)
def test_ten_megabytes_in_a_field_are_no_defect_of_ours(stored: Path, kind: Kind) -> None:
    chance = random.Random(kind.name)  # noqa: S311
    path = chance.choice(files_of(kind))
    document = read(kind, path)
    ways = [way for way in fields(document, chance) if isinstance(get(document, way), str)]
    way = chance.choice(ways)
    write(kind, path, replaced(document, way, "x" * 10_000_000))
    with listener() as (_, came):
        trial = Trial(stored, came)
        trial.run(chance.choice(kind.readers), f"{'.'.join(map(str, way))} = 10 MB")
    assert trial.wrong == [], "\n".join(trial.wrong)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_file_that_is_something_else_leads_anywhere(stored: Path, kind: Kind) -> None:
    """A circle of links, a link out of the store or to a device, a folder, a pipe, odd bytes."""
    chance = random.Random(kind.name)  # noqa: S311
    (stored / "outside").mkdir(exist_ok=True)
    (stored / "outside" / "x").write_bytes(b"mine")

    def circle(path: Path) -> None:
        path.symlink_to(path.name + ".next")
        path.with_name(path.name + ".next").symlink_to(path.name)

    others: dict[str, Callable[[Path], object]] = {
        "a circle of links": circle,
        "a link out of the store": lambda path: path.symlink_to(stored / "outside" / "x"),
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a folder": lambda path: path.mkdir(),
        "a pipe": os.mkfifo,
        "odd bytes": lambda path: path.write_bytes(bytes(range(256)) * 100),
        "nothing": lambda path: None,
    }
    with listener() as (_, came):
        trial = Trial(stored, came)
        for name, make in others.items():
            path = chance.choice(files_of(kind))
            path.unlink()
            make(path)
            trial.run(chance.choice(kind.readers), f"{kind.name} is {name}")
            restore()
    assert (stored / "outside" / "x").read_bytes() == b"mine"
    assert trial.wrong == [], "\n".join(trial.wrong)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_name_in_a_store_leads_anywhere(stored: Path, kind: Kind) -> None:
    """Beside each document, one of a name that nobody gave: a huge number, a wild name, a link."""
    chance = random.Random(kind.name)  # noqa: S311
    (stored / "outside").mkdir(exist_ok=True)
    names = ["9" * 200, "9" * 9, "-1", "..x", "\x1b[2J", "a\\b", "\udce4", "x" * 250, CANARY]
    with listener() as (_, came):
        trial = Trial(stored, came)
        for name in names:
            path = chance.choice(files_of(kind))
            beside = path.with_name(path.name.replace(path.name.split(".")[0], name, 1)[:255])
            if kind.name == "generation":
                beside = path.with_name(f"{path.stem}.{name}"[:255])
            if os.fsencode(beside) != os.fsencode(path) and not os.path.lexists(beside):
                shutil.copy(path, beside)
            trial.run(chance.choice(kind.readers), f"{name!r} beside {kind.name}")
            above = path.parent.with_name(name)  # a folder that leads out
            if path.parent != Path(".fls") and not os.path.lexists(above):
                above.symlink_to(stored / "outside")
            trial.run(chance.choice(kind.readers), f"{name!r} above {kind.name}")
            restore()
    assert os.listdir(stored / "outside") in ([], ["x"])
    assert trial.wrong == [], "\n".join(trial.wrong)


# ------------------------------------------------------------- job packs and the environment


def test_no_field_of_what_a_job_is_told_of_its_source_leads_anywhere(stored: Path) -> None:
    """`fls submit` packs the file; whoever unpacks it runs `fls run` or `fls resume` there."""
    chance = random.Random("source")  # noqa: S311
    path = Path(SOURCE_FILE)
    document = json.loads(
        replace(Provenance(), commit="ab", changes=["M x", "? y"], diff="+").to_json()
    )
    with listener() as (url, came):
        trial = Trial(stored, came)
        wrong = [document | {"more": 1}, [], None, 1, "x"]
        for way in fields(document, chance):
            every = mutations(get(document, way), stored / "outside", url, chance)
            for value in chance.sample(list(every.values()), _MUTATIONS):
                wrong.append(replaced(document, way, value))
        for number, one in enumerate(wrong):
            path.write_text(json.dumps(one))
            trial.run("resume last", f"source {number}: {one!r:.200}")
        for data in (b"", b"{", b"\xff", b"[" * 100_000, b'{"commit": NaN}'):
            path.write_bytes(data)
            trial.run("resume last", f"source {data!r:.20}")
        path.unlink()
        path.symlink_to(path.name)
        trial.run("resume last", "source is a link to itself")
        path.unlink()
    assert trial.wrong == [], "\n".join(trial.wrong)


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_no_value_of_a_variable_ends_in_a_traceback(
    stored: Path, monkeypatch: pytest.MonkeyPatch, variable: Variable
) -> None:
    """What the environment names may be used; it is the user's. But nothing else may happen."""
    chance = random.Random(variable.name)  # noqa: S311
    with listener() as (url, came):
        values = mutations("30", stored / "outside", url, chance).values()
        texts = [str(value) for value in values if value not in (None, MISSING)]
        if variable is STORAGE:  # the user's own word, so it is looked for; where nobody answers
            texts = [text.replace(url, "http://127.0.0.1:1") for text in texts]
        texts += ["nan", "inf", "1e400", "-0", " ", "~", "~nobody/x", "9" * 5000, "a\nb", "\udce4"]
        trial = Trial(stored, came)
        for text in texts:
            if "\0" not in text and len(text) < 100_001:
                monkeypatch.setenv(
                    variable.name,
                    text.encode(errors="surrogatepass").decode(errors="surrogateescape"),
                )
                trial.run(chance.choice(("status", "plan", "status last")), f"{text!r:.60}")
    own = (f": os.mkdir {stored}/outside", "socket.connect" if variable is STORAGE else "nothing")
    wrong = [one for one in trial.wrong if not any(text in one for text in own)]
    assert wrong == [], "\n".join(wrong)
