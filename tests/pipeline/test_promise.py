"""A key is a promise about what was used: what is changed while a run is on, and what then."""

import os
import py_compile
import shutil
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_local_executor import collect, named, pid_of
from test_worker import KEY, start_task, task_of
from toy_runs import fls, last_run, numbers, ran, run_here, write_spec

from pipeline.base.states import CellState
from pipeline.code.digest import CodeIndex
from pipeline.executors.local import LocalExecutor
from pipeline.executors.machine import Machine
from pipeline.stage import Resources
from pipeline.store.store import Store

HOST = socket.gethostname()
TIMES = Path("toy/operations/times.py")

# `change` runs while the run is on, before `times` does.
CODE = """
    start: {uses: start, params: {value: 5}}
    change: {uses: apply, inputs: {number: start}, params: {operation: "toy.mine:change"}}
    times: {uses: apply, inputs: {number: change}, params: {operation: times}, retries: 3}
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def on_the_way(body: str) -> None:
    """Have the cell `change` do this, in between."""
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    head = "from pathlib import Path\nimport os\ndef change(value, operand):\n"
    Path("toy/mine.py").write_text(f"{head}{lines}\n    return value\n")


def replace(path: Path, old: str, new: str) -> str:
    """Return a statement that replaces text in a file."""
    return f"p = Path({str(path)!r}); p.write_text(p.read_text().replace({old!r}, {new!r}))"


FILE = "Annotated[str, ExternalFile()]"
DATA = "Annotated[str, DATA]"


def plugin(body: str, annotation: str) -> None:
    """Write a plugin with a stage `peek`, whose function has this body."""
    Path("toy/peeking.py").write_text(
        "from typing import Annotated\n"
        "from pathlib import Path\n"
        "from pipeline.stage import *\n"
        "data = Entry(target='toy.common:load_number', folder=lambda name: Path(name[7:]))\n"
        "DATA = Registry(kind='data', entries={}, prefixes={'folder:': data}, data=True)\n"
        f"class PeekParams(Params):\n    path: {annotation}\n"
        "peek = Stage(name='peek', entry='toy.peeker:peek', params=PeekParams,\n"
        "             outputs={'number': Output(kind='number')})\n"
        "CATALOGUE = Catalogue(stages=[peek], packages=['toy'])\n"
    )
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    head = "import os\nfrom pathlib import Path\nfrom toy.common import save_number\n"
    Path("toy/peeker.py").write_text(f"{head}def peek(ctx):\n{lines}\n")


def peek(body: str, value: str = "number.txt", annotation: str = FILE) -> tuple[int, str]:
    """Run a stage with this body, which is given a path."""
    plugin(body, annotation)
    path = write_spec(f"peek: {{uses: peek, params: {{path: '{value}'}}, retries: 3}}")
    path.write_text(path.read_text().replace("[toy]", "[toy, toy.peeking]"))
    return run_here()


def failure(cell: str) -> str:
    status = last_run().cells[cell]
    assert status.state is CellState.FAILED
    assert Store(".fls").manifest(status.key) is None
    assert len(Store(".fls").attempts(status.key)) == 1, "it is not tried again"
    assert status.error is not None
    return str(status.error["message"])


# ------------------------------------------------------------------------------------- code


def test_code_changed_on_the_way_is_not_published_under_the_old_key(toy: Path) -> None:
    on_the_way(replace(TIMES, "*", "+"))
    write_spec(CODE)
    code, output = run_here(max_parallel=1)
    assert code == 1
    assert failure("times") == (
        f"Module toy.operations.times ({toy}/toy/operations/times.py on {HOST}) has changed since "
        "the run was planned. Nothing is published under the planned key. Restore it, or start the "
        "run again, which plans with the present one."
    )
    assert "retry" not in output
    TIMES.write_text(TIMES.read_text().replace("+", "*"))
    assert run_here()[0] == 0
    assert numbers()["times"] == 10
    assert ran() == {"start": 1, "change": 1, "times": 1}
    assert fls("verify")[0] == 0
    TIMES.write_text(TIMES.read_text().replace("*", "+"))
    assert run_here()[0] == 0
    assert numbers()["times"] == 7, "started again, the run is planned with the present file"


def test_what_changes_nothing_that_was_used_loses_nothing(toy: Path) -> None:
    comment = replace(TIMES, "return", "# a comment\n    return")
    # `plus` is imported with `times`, and is not in its key.
    stranger = replace(Path("toy/operations/plus.py"), "+", "-")
    # What all stages use was imported long ago, and is edited after that.
    imported = replace(Path("toy/common.py"), "ctx.log(", "ctx.say(")
    on_the_way("\n".join([comment, stranger, imported]))
    write_spec(CODE)
    assert run_here(max_parallel=1)[0] == 0
    assert numbers()["times"] == 10
    assert ran() == {"start": 1, "change": 1, "times": 1}


def test_a_module_of_the_key_that_is_never_imported_may_be_anything(toy: Path) -> None:
    on_the_way("if value > 100:\n    import toy.rare\n" + replace(Path("toy/rare.py"), "1", "2"))
    Path("toy/rare.py").write_text("x = 1\n")
    write_spec(CODE)
    assert run_here(max_parallel=1)[0] == 0
    assert "toy.rare" in Store(".fls").manifest(last_run().cells["change"].key).ingredients["code"]  # type: ignore[union-attr]


def test_an_import_late_in_a_stage_is_checked_even_if_the_stage_hides_that_it_failed(
    toy: Path,
) -> None:
    Path("toy/late.py").write_text("x = 1\n")
    body = """
        Path("toy/late.py").write_text("x = 2\\n")
        try:
            from toy.late import x
        except Exception:
            x = 3
        save_number(ctx, x)
    """
    Path("number.txt").write_text("1")
    assert peek(body)[0] == 1
    assert f"Module toy.late ({toy}/toy/late.py on {HOST})" in failure("peek")


def test_stale_bytecode_is_never_run(toy: Path) -> None:
    """Python itself takes it for the source's: the size is the same, and the second."""
    stat = TIMES.stat()
    text = TIMES.read_text()
    TIMES.write_text(text.replace("*", "-"))
    os.utime(TIMES, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    py_compile.compile(str(TIMES), doraise=True)
    TIMES.write_text(text)
    os.utime(TIMES, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    on_the_way("")
    write_spec(CODE)
    assert run_here()[0] == 0
    assert numbers()["times"] == 10


def test_of_accepted_code_counts_what_it_is(toy: Path) -> None:
    on_the_way("")
    write_spec(CODE)
    assert run_here()[0] == 0
    TIMES.write_text(TIMES.read_text().replace("operand\n", "operand + 0\n"))
    assert fls("accept", "times", "--why", "nothing is added")[0] == 0
    other = "start.value=6"
    assert run_here(overrides=[other])[0] == 0
    assert numbers()["times"] == 12
    Path("toy/mine.py").unlink()
    on_the_way(replace(TIMES, "+ 0", "+ 1"))
    assert run_here(overrides=["start.value=7"], max_parallel=1)[0] == 1
    assert "Module toy.operations.times" in failure("times")


# ---------------------------------------------------------------------------- warm processes


@pytest.fixture
def executor(toy: Path) -> Iterator[LocalExecutor]:
    executor = LocalExecutor()
    executor._machine = Machine(cpus=2, memory=1000, gpus={})
    yield executor
    executor.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_has_run_other_code_is_replaced(
    executor: LocalExecutor, workers: int
) -> None:
    stages = Path("toy/stages.py")
    text = stages.read_text()
    for name, source in (("old", text + "\nOLD = 1\n"), ("new", text)):
        stages.write_text(source)
        code = CodeIndex(["toy"], ["toy.catalogue"]).digests(["toy.stages:start"])
        ingredients = {"stage": "start", "code": code}
        task = named(start_task(ingredients=ingredients), name)
        executor.submit(task, Resources(workers=workers))
        assert collect(executor, 1)[name]["status"] == "ok"
    assert pid_of("old") != pid_of("new")
    assert Store(".fls").attempts("new".ljust(64, "0")) == [1], "it costs no attempt"


def test_no_rank_of_several_may_use_other_code(executor: LocalExecutor) -> None:
    ranks = Path("toy/ranks.py")
    ranks.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "def ranks(ctx):\n"
        "    while not Path('go').exists(): time.sleep(0.01)\n"
        "    import toy.other\n"
    )
    Path("toy/other.py").write_text("x = 1\n")
    code = CodeIndex(["toy"], ["toy.catalogue"]).digests(["toy.ranks:ranks"])
    Path("toy/other.py").write_text("x = 2\n")
    Path("go").write_text("")
    ingredients = {"stage": "ranks", "code": code}
    executor.submit(
        task_of("toy.ranks:ranks", "RanksParams", {}, ingredients=ingredients),
        Resources(workers=2),
    )
    outcome = collect(executor, 1)["cell"]
    assert outcome["error"]["user"]
    assert "Module toy.other" in outcome["error"]["message"]
    assert Store(".fls").manifest(KEY) is None


# ------------------------------------------------------------------------- files of the user's

READ = """
    start: {uses: start, params: {value: 5}}
    change: {uses: apply, inputs: {number: start}, params: {operation: "toy.mine:change"}}
    total: {uses: total, inputs: {numbers: change}}
    read: {uses: read, params: {path: number.txt}, retries: 3}
"""


def test_a_file_changed_before_its_cell_began_is_not_published(toy: Path) -> None:
    file = Path("number.txt")
    file.write_text("3")
    on_the_way("Path('number.txt').write_text('4')")
    write_spec(READ)
    assert run_here(max_parallel=1)[0] == 1
    assert failure("read").startswith(
        f"File number.txt (params.path, on {HOST}) has changed since the run was planned."
    )
    file.write_text("3")
    assert run_here()[0] == 0
    assert numbers()["read"] == 3
    file.write_text("4")
    assert run_here()[0] == 0
    assert numbers()["read"] == 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("path.write_text('4')", "was changed while the stage ran"),
        (
            "path.write_text('4'); path.write_text('3')",
            "data that the stage has read are not known",
        ),
        ("path.rename('b'); path.write_text('4'); Path('b').rename(path)", "are not known"),
        (
            "stat = path.stat(); path.write_text('4'); path.write_text('3')\n"
            "os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))",
            "are not known",
        ),
        (
            "path.unlink()",
            f"File number.txt (params.path, on {HOST}) existed when the run was planned, and",
        ),
    ],
)
def test_a_file_changed_while_its_stage_ran_is_not_published(
    toy: Path, body: str, message: str
) -> None:
    Path("number.txt").write_text("3")
    before = "path = Path(ctx.params.path)\nimport time; time.sleep(0.02)\n"
    code, _ = peek(f"{before}{body}\nsave_number(ctx, 1)")
    assert code == 1
    assert message in failure("peek")


def test_a_file_that_is_read_as_it_was_is_published(toy: Path) -> None:
    Path("number.txt").write_text("3")
    assert peek("save_number(ctx, int(Path(ctx.params.path).read_text()))")[0] == 0
    assert numbers()["peek"] == 3


def test_no_checkpoint_rests_on_a_changed_file(toy: Path) -> None:
    """Put back, the file would let the next attempt go on from it."""
    Path("number.txt").write_text("3")
    body = """
        import time
        number = 0
        if ctx.last_checkpoint():
            number = int((ctx.last_checkpoint() / "n").read_text())
        elif not Path("seen").exists():
            Path("seen").write_text("")
            time.sleep(0.02)
            Path("number.txt").write_text("4")
            number = int(Path("number.txt").read_text())
            with ctx.checkpoint() as folder:
                (folder / "n").write_text(str(number))
        save_number(ctx, number or int(Path("number.txt").read_text()))
    """
    assert peek(body)[0] == 1
    assert "File number.txt" in failure("peek")
    Path("number.txt").write_text("3")
    assert run_here()[0] == 0
    assert numbers()["peek"] == 3


# -------------------------------------------------------------------------- folders of data


def tree() -> Path:
    """Make a folder of data, and return a file in it."""
    file = Path("data/train/cat/1")
    file.parent.mkdir(parents=True)
    file.write_text("3")
    return file


READ_TREE = """
    file = Path("data/train/cat/1")
    {before}
    save_number(ctx, int(file.read_text()))
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("file.write_text('4')", "was changed while the stage ran"),
        ("file.with_name('2').write_text('4')", "was changed while the stage ran"),
        (
            "file.write_text('4'); file.write_text('3')",
            "data that the stage has read are not known",
        ),
        (
            "cat = file.parent; cat.rename('data/train/c'); Path('data/train/c').rename(cat)",
            "data that the stage has read are not known",
        ),
    ],
)
def test_data_changed_while_their_stage_ran_are_not_published(
    toy: Path, before: str, message: str
) -> None:
    tree()
    body = READ_TREE.format(before=f"import time; time.sleep(0.02); {before}")
    assert peek(body, "folder:data", DATA)[0] == 1
    assert failure("peek").startswith(f"Folder data (params.path, on {HOST}) ")
    assert message in failure("peek")


def test_data_enter_the_key_by_names_and_contents(toy: Path) -> None:
    file = tree()
    assert peek(READ_TREE.format(before=""), "folder:data", DATA)[0] == 0
    Path("data/.decoded").write_text("what is hidden is no data")
    shutil.copytree("data", "copy")
    shutil.rmtree("data")
    shutil.move("copy", "data")
    assert "Nothing to do" in run_here()[1]
    file.write_text("4")
    assert "data behind params.path changed" in fls("plan", "--why")[1]
    assert run_here()[0] == 0
    assert numbers()["peek"] == 4


def test_what_a_process_keeps_of_changed_data_is_not_found_by_the_next_cell(toy: Path) -> None:
    tree()
    body = """
        import functools, toy.common, time
        if not hasattr(toy.common, "kept"):  # as a stage may, of large data
            time.sleep(0.02)
            if not Path("seen").exists():
                Path("data/train/cat/1").write_text("4")
            toy.common.kept = int(Path("data/train/cat/1").read_text())
            Path("data/train/cat/1").write_text("3") if not Path("seen").exists() else None
            Path("seen").write_text("")
        save_number(ctx, toy.common.kept)
    """
    plugin(body, DATA)
    path = write_spec("peek: {uses: peek, matrix: {name: [a, b]}, params: {path: 'folder:data'}}")
    text = path.read_text().replace("[toy]", "[toy, toy.peeking]")
    path.write_text(text)
    peeking = Path("toy/peeking.py")
    peeking.write_text(peeking.read_text().replace("    path:", "    name: str\n    path:"))
    assert run_here(max_parallel=1)[0] == 1
    assert sorted(numbers().values()) == [3]


def test_data_that_the_planner_does_not_see_are_said_to_be_unchecked(toy: Path) -> None:
    assert peek("save_number(ctx, 3)", "folder:nowhere", DATA)[0] == 0
    _, output, _ = fls("plan", "--why")
    assert "peek: cached: in the store" in output
    assert "; data not checked: params.path\n" in output
    assert "Data not checked: peek. No digest of it enters the key" in output
    assert "data not checked" in fls("plan", "--json")[1]
