"""What somebody else wrote into a store: it leads nowhere, runs nothing, and drives no terminal."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_store import KEY, publish
from test_worker import events_of, plugin
from toy_runs import ROOT, fls, last_run, ran, run_here, write_spec

from pipeline.base.errors import BadInput, Damaged, SpecError, StoreError
from pipeline.base.names import require_inside
from pipeline.base.search_path import look_here_last, search_variable
from pipeline.base.text import CONTROLS
from pipeline.planning.planner import RunPlan
from pipeline.running.documents import RunProgress
from pipeline.running.trust import read_trust
from pipeline.spec.cells import Registration
from pipeline.spec.load import load_spec
from pipeline.stage import Context
from pipeline.store.checksum import lines_with_checksum, verified, with_checksum
from pipeline.store.storage import open_storage
from pipeline.store.storage.remote import RemoteStorage
from pipeline.store.store import Store
from pipeline.tracking import CellFacts, RunFacts
from pipeline.tracking.jsonl import JsonLinesTracker
from pipeline.upkeep.verify import find_damage
from pipeline.worker.worker import run_task

TWO = "start: {uses: start, params: {value: 10}}\nadd: {uses: add, inputs: {number: start}}"
ONE = "start: {uses: start, params: {value: 10}}"
SCREEN = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe"


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a document, and write it with a valid checksum: anyone can."""
    document = verified(path.read_bytes())
    change(document)
    path.write_bytes(with_checksum(document))


# ------------------------------------------------------------------------ paths and links


def test_what_stores_use_is_inside() -> None:
    for path in ("storage.json", f"stages/{KEY}.damaged-1/attempts/0001/outputs/model/model.json"):
        assert require_inside(path) == path


def test_a_link_out_of_the_store_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "state.json").write_text("{}")
    store = Store(str(tmp_path / "results"))
    store.prepare()
    (tmp_path / "results" / "runs").mkdir()
    (tmp_path / "results" / "runs" / "run-1").symlink_to(outside)
    with pytest.raises(StoreError, match="leads out of the storage by a symbolic link"):
        store.write_run("run-1", RunPlan(pipeline="", cells={}))
    with pytest.raises(StoreError, match="leads out of the storage by a symbolic link"):
        store.read_run("run-1", RunProgress)
    assert os.listdir(outside) == ["state.json"]


def test_a_store_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    publish(Store(str(tmp_path / "results")))
    assert Store(str(tmp_path / "disk")).manifest(KEY) is not None


def test_an_output_that_became_a_link_is_damaged(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "results"))
    publish(store)
    path = store.fetch(KEY, "number") / "inner" / "number.txt"
    path.rename(tmp_path / "moved")  # the same bytes, but elsewhere
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(Damaged, match=r"number.txt is neither a file nor a folder, but a link"):
        store.fetch(KEY, "number")


def test_a_checkpoint_that_became_a_link_is_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "results"))
    attempt = store.begin_attempt(KEY)
    for number in (1, 2):
        with Context(params=None, folder=attempt.folder).checkpoint() as folder:
            (folder / "x").write_text(str(number))
        attempt.append_events([{"type": "checkpoint"}])
    newest = attempt.folder / "checkpoints" / "000002" / "x"
    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / "moved")
    second = store.begin_attempt(KEY).folder / "checkpoints"
    assert os.listdir(second) == ["000001"]


def test_a_stage_may_not_publish_a_link(toy: Path) -> None:
    outcome = run_task(plugin("(ctx.output('number') / 'x').symlink_to('/etc/passwd')"))
    assert outcome["status"] == "failed"
    assert "x is neither a file nor a folder, but a link or a device" in outcome["error"]["message"]
    assert outcome["error"]["user"]  # so it is not tried again
    assert events_of()


@pytest.mark.parametrize("name", ["a\\b", "\x1b[2J", "\u202egnp.exe", "\u2024\u2024"])
def test_a_stage_may_not_publish_a_name_that_no_storage_takes(toy: Path, name: str) -> None:
    outcome = run_task(plugin(f"(ctx.output('number') / {name!r}).touch()"))
    assert outcome["status"] == "failed"
    assert "is no path inside a storage" in outcome["error"]["message"]
    assert outcome["error"]["user"]
    assert not CONTROLS.search(outcome["error"]["message"])


def test_a_remote_name_leads_to_no_other_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores take any name; memory does not, so only its listing is made up."""
    storage = open_storage("memory://hostile-names")
    assert isinstance(storage, RemoteStorage)
    monkeypatch.setattr(storage.fs, "find", lambda root: [f"{root}/../../evil"])
    monkeypatch.setattr(storage.fs, "get", lambda stored, copies: Path(copies[0]).touch())
    with pytest.raises(StoreError, match="is no path inside a storage"):
        storage.load("folder", tmp_path / "a" / "b" / "copy")
    assert not (tmp_path / "a" / "evil").exists()


def test_what_is_not_ours_in_a_store_is_passed_over(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    key = last_run().cells["start"].key
    for junk in ("runs/..x", "runs/\x1b[2J", f"stages/{key}/attempts/notes", "generations/x"):
        Path(f".fls/{junk}").mkdir(parents=True)
    assert fls("status")[0] == 0
    assert run_here()[0] == 0
    assert Store(".fls").attempts(key) == [1]
    assert last_run().cells


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc", "a/b", ".", "..", "ａｄｄ", "аdd", "e\u0301", "\u00e9", "a b", "a\tb",
        "a\nb", "-x", "", "a[b]", "x" * 101, "a\u200bb", "C:", "a%2e%2e",
    ],
)  # fmt: skip
def test_names_of_stages_are_plain(toy: Path, name: str) -> None:
    spec = {"name": "x", "plugins": ["toy"], "stages": {name: {"uses": "total"}}}
    for field, value in (("stages", spec["stages"]), ("name", name)):
        text = json.dumps({**spec, "stages": {"a": {"uses": "start", "params": {"value": 1}}}})
        Path("p.yaml").write_text(json.dumps({**json.loads(text), field: value}))
        with pytest.raises(SpecError, match="expected a name of") as raised:
            load_spec(Path("p.yaml"))
        assert not CONTROLS.search(str(raised.value))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["ｐｌｕｓ"], r"'\uff50\uff4c\uff55\uff53' cannot name a cell: expected ASCII"),
        (["plus", "рlus"], r"'\u0440lus' cannot name a cell: expected ASCII characters"),
        (["\u00e9", "e\u0301"], r"'\xe9' cannot name a cell: expected ASCII characters"),
        (["a\u200bb"], r"'a\u200bb' cannot name a cell: expected ASCII characters"),
        (["x" * 101], "cannot name a cell: expected at most 100 characters, got 101"),
        (["a,b"], "'a,b' cannot name a cell: no spaces, nor any of"),
        ([SCREEN], "the control character U+001B is not allowed in a value"),
        (["\u202eplus"], "the control character U+202E is not allowed in a value"),
    ],
)
def test_axis_values_that_look_like_others_are_refused(
    toy: Path, values: list[str], expected: str
) -> None:
    stages = {"a": {"uses": "apply", "matrix": {"operation": values}, "inputs": {"number": "s"}}}
    stages["s"] = {"uses": "start", "params": {"value": 1}}  # type: ignore[dict-item]
    Path("p.yaml").write_text(json.dumps({"name": "x", "plugins": ["toy"], "stages": stages}))
    with pytest.raises(SpecError) as raised:
        load_spec(Path("p.yaml"))
    (problem,) = str(raised.value).splitlines()
    assert expected in problem


@pytest.mark.parametrize("plugin", ["../toy", "/tmp", "toy/catalogue", ".toy", "toy.", "tоy", ""])  # noqa: S108
def test_plugins_are_names_of_modules(toy: Path, plugin: str) -> None:
    Path("p.yaml").write_text(json.dumps({"name": "x", "plugins": [plugin], "stages": {"a": {}}}))
    with pytest.raises(SpecError, match="expected the name of a Python module"):
        load_spec(Path("p.yaml"))


@pytest.mark.parametrize(
    "target", ["../toy:x", "toy./etc/passwd:x", "toy..x:y", "/etc:passwd", "toy:x.y", "tоy:x"]
)
def test_registered_targets_are_names_of_modules(toy: Path, target: str) -> None:
    write_spec(
        f"{ONE}\na: {{uses: apply, inputs: {{number: start}}, params: {{operation: '{target}'}}}}"
    )
    with pytest.raises(SpecError, match="unknown operation"):
        load_spec(Path("pipeline.yaml"))


def test_long_names_of_cells_are_refused(toy: Path) -> None:
    text = "x" * 99
    write_spec(
        f"{text}:\n  uses: fail\n  matrix: {{counter: [{text}], how: [nothing], "
        f"until: [{10**17}, 1], }}"
    )
    load_spec(Path("pipeline.yaml"))
    Path("pipeline.yaml").write_text(Path("pipeline.yaml").read_text().replace("nothing", text))
    with pytest.raises(SpecError, match="names of cells of at most 250 characters, got 3"):
        load_spec(Path("pipeline.yaml"))


def test_names_given_to_commands_find_nothing_elsewhere(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    run_here(overrides=["start.value=11"])
    file = "pipeline.yaml"
    for name, command in (
        (name, command)
        for name in ("../../x", "/etc/passwd", SCREEN, "a" * 5000, "", "%2e%2e")
        for command in COMMANDS
    ):
        given = [part.format(name=name, file=file) for part in command]
        code, output, errors = fls(*given)
        assert (code, output) == (2, ""), given
        assert "Traceback" not in errors
        assert not CONTROLS.search(errors)
    assert not Path("out").exists()


COMMANDS = [
    ["status", "{name}"], ["resume", "{name}"], ["logs", "{name}"],
    ["logs", "start", "--run", "{name}"], ["export", "{file}", "{name}", "out"],
    ["run", "{file}", "--only", "{name}"],
]  # fmt: skip


def test_an_export_holds_the_result_alone(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    before = sorted(toy.rglob("*"))
    assert fls("export", "pipeline.yaml", "start", "out")[0] == 0
    assert sorted(set(toy.rglob("*")) - set(before)) == [toy / "out", toy / "out" / "number.json"]


# ----------------------------------------------------------------- documents and terminals


def test_what_a_stage_says_does_not_drive_the_terminal(toy: Path) -> None:
    Path("toy/stages.py").write_text(
        Path("toy/stages.py").read_text()
        + f"\n_start = start\ndef start(ctx):\n    ctx.say({SCREEN!r})\n    print({SCREEN!r})\n"
        f"    ctx.log({{{SCREEN!r}: 1}})\n    _start(ctx)\n    raise ValueError({SCREEN!r})\n"
    )
    write_spec(ONE.replace("}}", "}, retries: 0}"))
    code, output = run_here()
    assert code == 1
    shown = [output]
    for command in (["logs", "start"], ["status", "last"], ["status"], ["results", "--json"]):
        code, said, errors = fls(*command)
        shown += [said, errors]
    assert r"\x1b]0;owned\x07\x1b[2J\u009b31m\u202egnp.exe" in shown[1]
    assert r"failed: ValueError: \x1b]0;owned" in shown[0]
    for text in shown:
        assert not CONTROLS.search(text)


def test_documents_of_a_run_do_not_drive_the_terminal(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    record = last_run()
    folder = Path(f".fls/runs/{record.run_id}")
    forge(folder / "run.json", lambda run: run["options"].update(file=f"{SCREEN}/{SCREEN}"))

    def change(state: dict[str, Any]) -> None:
        state["state"] = "failed"
        failed = {"state": "failed", "error": {"message": SCREEN}}
        state["cells"][0] |= {"cell": SCREEN, "stage": SCREEN, **failed}

    forge(folder / "state.json", change)
    for command in (["status"], ["status", "last"], ["logs", SCREEN], ["logs", "x"]):
        code, output, errors = fls(*command)
        assert "Traceback" not in errors
        assert not CONTROLS.search(output + errors), command
    assert r"\x1b]0;owned" in fls("status", "last")[1]


@pytest.mark.parametrize("place", ["runs/20260101-000000-000-abcd", "stages/{key}/attempts/0001"])
def test_names_in_a_store_do_not_drive_the_terminal(toy: Path, place: str) -> None:
    write_spec(ONE)
    run_here()
    key = last_run().cells["start"].key
    path = Path(".fls", place.format(key=key), f"{SCREEN}.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    forge(
        Path(f".fls/stages/{key}/manifest.json"),
        lambda manifest: manifest["facts"].update(cell=SCREEN),
    )
    Path(f".fls/stages/{key}/attempts/0001/outputs/number/number.json").write_text("5")
    code, output, errors = fls("verify", "--set-aside")
    assert (code, errors) == (1, "")
    assert output.count(r"\x1b]0;owned") == 4  # two of a path, two of a cell
    for command in (["gc", "--grace", "1s"], ["status"], ["results"], ["plan", "--why"]):
        code, said, errors = fls(*command)
        assert code == 0, errors
        output += said + errors
    assert not CONTROLS.search(output)


DAMAGES = ("", "[]", "null", "{", "[" * 100_000, '{"a": ' * 100_000, '{"a": 1}', "\x00", "NaN")


def test_damaged_documents_are_one_clear_error(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    path = Path(f".fls/runs/{last_run().run_id}/run.json")
    for text in DAMAGES:
        path.write_text(text)
        code, output, errors = fls("status", "last")
        assert (code, output) == (1, "")
        assert "run.json is damaged: " in errors
        assert errors.count("\n") == 1
    deep: Any = 1
    for _ in range(400):  # Python reads and writes it, but not what does so with its own functions
        deep = [deep]
    path.write_bytes(with_checksum({"a": deep}))
    assert "run.json is damaged: it is nested too deeply" in fls("status", "last")[2]
    path.write_bytes(with_checksum({"a": 1}))
    code, output, errors = fls("status", "last")
    assert (code, output) == (1, "")
    assert "run.json is damaged: options: field required" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["state", "tracking", "plan", "facts"])
def test_damaged_documents_that_are_not_needed_are_no_error(toy: Path, name: str) -> None:
    write_spec(ONE)
    run_here()
    path = Path(f".fls/runs/{last_run().run_id}/{name}.json")
    assert path.exists()
    for text in DAMAGES:
        path.write_text(text)
        assert fls("status", "last")[0] == 0


WRONG = (None, True, -1, 3.5, 10**30, "x", "", [], [1], [[]], {}, {"a": 1})


def places(value: Any, *at: str | int) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to each value inside of a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in entries:
        yield *at, name
        if isinstance(inner, dict | list):
            yield from places(inner, *at, name)


READERS = [
    "status", "status last", "logs add", "plan --why", "results --json", "verify", "sync",
    "gc --keep-runs 0 --grace 1s", "accept add --why x", "resume last --stop-after 0.01s",
]  # fmt: skip


@pytest.mark.parametrize("name", ["run", "state", "tracking", "plan", "facts", "manifest"])
def test_values_of_other_types_in_documents_are_no_defect_of_ours(toy: Path, name: str) -> None:
    """With a valid checksum, as any writer to the store can write it; no command crashes."""
    write_spec("bad: {uses: fail, params: {how: user, counter: c, until: 9}, retries: 0}\n" + TWO)
    run_here()
    run, key = last_run().run_id, last_run().cells["add"].key
    path = Path(f".fls/stages/{key}" if name == "manifest" else f".fls/runs/{run}", f"{name}.json")
    shutil.copytree(".fls", "whole")
    chance = random.Random(name)  # noqa: S311
    ways = list(places(verified(path.read_bytes())))
    for *above, last in chance.sample(ways, min(12, len(ways))):

        def change(document: Any) -> None:
            for part in above:  # noqa: B023 - called at once
                document = document[part]
            document[last] = chance.choice(WRONG)  # noqa: B023

        forge(path, change)
        for command in chance.sample(READERS, 3):
            code, _, errors = fls(*command.split())
            assert "Traceback" not in errors, (last, command)
            assert code in {0, 1, 2, 143}
        shutil.rmtree(".fls")
        shutil.copytree("whole", ".fls")


def test_what_is_wrong_in_a_document_is_said_with_its_place(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    path = Path(f".fls/runs/{last_run().run_id}/plan.json")
    forge(path, lambda plan: plan["cells"]["start"]["ingredients"].update(inputs=True))
    code, _, errors = fls("gc")
    assert code == 1
    assert "plan.json is damaged: cells.start.ingredients.inputs: input should be " in errors
    assert "got True" in errors


def test_damaged_results_run_again(toy: Path) -> None:
    write_spec(ONE)
    for count, text in enumerate(DAMAGES):
        run_here()
        assert ran()["start"] == count + 1
        Path(f".fls/stages/{last_run().cells['start'].key}/manifest.json").write_text(text)


def test_whatever_a_log_holds_is_shown_without_harm(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    (first,) = Path(f".fls/stages/{last_run().cells['start'].key}").rglob("*.log")
    first.write_bytes(b"\x1b]0;title\x07 \xff\xfe no end\n" + b"\0" * 3)
    for name in ("9" * 30, "x", "²", "000000000005"):
        first.with_name(f"{name}.log").write_bytes(b"of another\n")
    code, output, errors = fls("logs", "start")
    assert (code, errors) == (0, "")
    assert "\x1b" not in output and "\\x1b]0;title\\x07" in output
    Path("outside").write_text("secret")
    first.unlink()
    first.symlink_to(Path("outside").absolute())
    code, output, errors = fls("logs", "start")
    assert (code, "secret" in output) == (1, False)
    assert "leads out of the storage by a symbolic link" in errors


def test_damaged_events_of_before_there_were_logs_are_told_among_the_others(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    segment = next(Path(f".fls/stages/{last_run().cells['start'].key}").rglob("000001.jsonl"))
    Store(".fls").storage.remove(f"{segment.parents[1].relative_to('.fls')}/log")
    deep = b"[" * 100_000
    checked = (
        lines_with_checksum([])
        .splitlines()[0]
        .replace(
            hashlib.sha256(b"").hexdigest().encode(), hashlib.sha256(deep).hexdigest().encode()
        )
    )
    for data in (*map(str.encode, DAMAGES), checked + b"\n" + deep):
        segment.write_bytes(data)
        code, output, errors = fls("logs", "start")
        assert (code, errors) == (0, "")
        assert "segment 1 of the events of attempt 1 is damaged" in output


def test_a_key_in_a_document_leads_nowhere(toy: Path) -> None:
    write_spec(ONE)
    run_here()
    path = Path(f".fls/runs/{last_run().run_id}/state.json")
    forge(path, lambda state: state["cells"][0].update(key="../../../etc"))
    code, output, errors = fls("logs", "start")
    assert (code, output) == (1, "")
    assert "'stages/../../../etc/attempts' is no path inside a storage" in errors


# -------------------------------------------------------------------------------- code

EVIL = "from pathlib import Path\nPath('executed').touch()\n"


def test_a_stored_spec_cannot_run_code_from_the_store(toy: Path) -> None:
    """The document of a run names a plugin that lies in the store: resuming must not import it."""
    write_spec("start: {uses: fail, retries: 0}", storage="results")
    run_here()
    path = Path(f"results/runs/{last_run('results').run_id}/run.json")
    Path("results/evil.py").write_text(EVIL + "CATALOGUE = None\n")
    shutil.copy("results/evil.py", "importable.py")

    def name_it(request: dict[str, Any]) -> None:
        text = request["spec_text"].replace("plugins: [toy]", "plugins: [results.evil]")
        request["spec_text"] = text

    forge(path, name_it)
    code, output, errors = fls("resume", "last", "--trust")
    assert code == 2
    assert "cannot import plugin 'results.evil': ImportError: it lies in the store" in errors
    assert not Path("executed").exists()


def test_a_spec_cannot_name_code_in_a_store(toy: Path) -> None:
    write_spec(ONE, storage="results")
    run_here()
    Path("results/evil.py").write_text(EVIL + "def operation(x, y): ...\n")
    write_spec(
        f"{ONE}\na: {{uses: apply, inputs: {{number: start}}, "
        "params: {operation: 'results.evil:operation'}}",
        storage="results",
    )
    with pytest.raises(BadInput, match=r"'results.evil:operation' lies in the store"):
        load_spec(Path("pipeline.yaml"))
    assert not Path("executed").exists()
    assert ran()["start"] == 1


# ------------------------------------------------------------------- code of a stored spec

APPLY = (
    "start: {uses: start, params: {value: 10}}\n"
    "apply: {uses: apply, inputs: {number: start}, params: {operation: plus}}\n"
    "bad: {uses: fail, retries: 0}"
)
BY_RUN = {
    "resume": "resume last",
    "verify": "verify --storage .fls --rerun start",
    "accept": "accept start --why so",
}


@pytest.fixture
def evil(toy: Path) -> Iterator[Path]:
    """The file that is there once the module `evil`, which lies beside the pipeline, has run."""
    Path("evil.py").write_text(
        f"from pathlib import Path\nPath({str(toy / 'executed')!r}).touch()\n"
        "from toy.catalogue import CATALOGUE\ndef operation(x, y): return x\n"
    )
    yield toy / "executed"
    sys.modules.pop("evil", None)


def rewrite(old: str, new: str, **options: Any) -> str:
    """Let the last run's document have another spec, and other options; return the run's id."""

    def change(request: dict[str, Any]) -> None:
        request["spec_text"] = request["spec_text"].replace(old, new)
        request["options"].update(options)

    run = last_run().run_id
    forge(Path(f".fls/runs/{run}/run.json"), change)
    return run


@pytest.mark.parametrize("command", BY_RUN)
@pytest.mark.parametrize("way", ["plainly", "by a variable", "by an option"])
def test_a_plugin_that_the_store_alone_names_is_not_imported(
    toy: Path, evil: Path, command: str, way: str
) -> None:
    write_spec(APPLY)
    run_here()
    head = {
        "plainly": "plugins: [toy, evil]",
        "by a variable": "vars: {x: evil}\nplugins: ['${vars.x}']",
        "by an option": "vars: {x: toy}\nplugins: ['${vars.x}']",
    }[way]
    options = ["vars.x=evil"] if way == "by an option" else []
    run = rewrite("plugins: [toy]", head, overrides=options)
    code, output, errors = fls(*BY_RUN[command].split())
    assert (code, output, errors.count("\n")) == (2, "", 1), errors
    assert f"The spec of run {run} in {toy}/.fls, which says that it is pipeline.yaml" in errors
    assert "names plugin evil to be imported, and pipeline.yaml does not; nothing was" in errors
    assert "Give the run's own pipeline file to" in errors and errors.endswith("give --trust.\n")
    assert not evil.exists()


@pytest.mark.parametrize("command", BY_RUN)
@pytest.mark.parametrize("way", ["plainly", "by an option"])
def test_a_function_that_the_store_alone_names_is_not_called(
    toy: Path, evil: Path, command: str, way: str
) -> None:
    write_spec(APPLY)
    run_here()
    if way == "plainly":
        rewrite("operation: plus", "operation: 'evil:operation'")
    else:
        rewrite("", "", overrides=["apply.operation=evil:operation"])
    given = BY_RUN[command].replace("--rerun start", "--rerun apply").split()
    code, output, errors = fls(*given)
    assert (code, output, errors.count("\n")) == (2, "", 1), errors
    assert "names evil:operation, with the options that it gives, to be imported, and" in errors
    assert not evil.exists()


@pytest.mark.parametrize("command", BY_RUN)
def test_what_a_store_names_is_imported_where_the_user_says_so(
    toy: Path, evil: Path, command: str
) -> None:
    write_spec(APPLY.replace("operation: plus", "operation: 'evil:operation'"))
    run_here()
    evil.unlink()
    given = BY_RUN[command].replace("--rerun start", "--rerun apply").split()
    write_spec(APPLY)
    for file, why in (("pipeline.yaml", ""), ("pipeline.yaml", " (which has mistakes, see `fls")):
        if why:
            Path(file).write_text("name: x\n")
        if command == "verify" or not why:
            assert f"{file} does not{why}" in fls(*given)[2]
    write_spec(APPLY)
    assert fls(*given, "--trust")[2] == ""
    write_spec(APPLY.replace("operation: plus", "operation: 'evil:operation'"))
    assert fls(*given)[2] == ""
    assert evil.exists() == (command == "verify")  # where the cell is computed


def test_what_comes_along_is_known_without_a_pipeline_file(toy: Path) -> None:
    trust = read_trust(Path("pipeline.yaml"), Store(".fls"))
    trust.require_plugins("x", ["stages"])
    with pytest.raises(BadInput, match=r"pipeline.yaml does not \(which cannot be read\)"):
        trust.require_plugins("x", ["toy"])


def test_json_lines_go_into_no_folder_that_a_stored_spec_alone_names(toy: Path) -> None:
    write_spec(APPLY)
    run_here()
    run = rewrite("", "", file=f"{toy}/outside/pipeline.yaml")
    Path(f".fls/runs/{run}/facts.json").unlink()
    before = Path(f"tracking/{run}.jsonl").read_bytes()
    code, output, errors = fls("resume", "last")
    assert (code, errors) == (1, "")
    assert not Path("outside").exists()
    assert Path(f"tracking/{run}.jsonl").read_bytes() != before


# -------------------------------------------------------------- files that nobody published


@pytest.mark.parametrize("name", ["evil.json", "inner/evil.json", "inner/deeper/._x"])
def test_a_file_that_no_manifest_lists_is_not_fetched(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / "results"))
    publish(store)
    folder = store.fetch(KEY, "number")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("evil")
    with pytest.raises(Damaged, match=f"number/{name} is there, unlike in its manifest"):
        store.fetch(KEY, "number")
    (found,) = find_damage(store, lambda done, total: None)
    assert (found.path.endswith(f"number/{name}"), found.reason) == (True, "is not in its manifest")
    assert store.set_aside(KEY)


def test_a_file_that_no_manifest_lists_is_not_passed_on(toy: Path) -> None:
    write_spec(TWO)
    run_here()
    folder = Store(".fls").fetch(last_run().cells["start"].key, "number")
    (folder / "evil.json").write_text("evil")
    code, _ = run_here(overrides=["add.amount=5"])
    assert code == 0
    assert ran() == {"start": 2, "add": 2}
    kept = [path for path in Path(".fls").rglob("evil.json") if ".damaged-" not in str(path)]
    assert kept == []


def test_what_file_managers_leave_in_a_result_is_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "results"))
    attempt = store.begin_attempt(KEY)
    output = Context(params=None, folder=attempt.folder).output("number")
    for name in ("number.json", ".DS_Store"):
        (output / name).write_text(name)
    attempt.publish({}, ["number"], {"device": "cpu"})
    manifest = store.manifest(KEY)
    assert manifest is not None and list(manifest.outputs["number"]) == ["number.json"]
    (store.fetch(KEY, "number") / ".DS_Store").write_text("another view")
    store.fetch(KEY, "number")
    assert list(find_damage(store, lambda done, total: None)) == []
    assert not store.set_aside(KEY)


# ------------------------------------------------------- loaders, addresses and folders


class Overhearing(JsonLinesTracker):
    """Notes which runs it was to open or to end, and which models to register."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[RunFacts] = []
        self.registered: list[Any] = []

    def forget(self) -> None:
        self.opened.clear()
        self.registered.clear()

    def open_run(self, run: RunFacts) -> None:
        self.opened.append(run)

    def register(self, cell: CellFacts, folder: Path) -> None:
        self.registered.append(cell.registration)

    def close_orphan(self, run: RunFacts, state: str, cells: Any) -> bool:
        self.opened.append(run)
        return False

    def _write(self, kind: str, **fields: Any) -> None: ...

    def log(self, cell: str, events: Any) -> None: ...


@pytest.fixture
def overheard(monkeypatch: pytest.MonkeyPatch) -> Overhearing:
    """What commands ask of tracking from here on."""
    tracker = Overhearing()
    monkeypatch.setattr("pipeline.running.sync.make_tracker", lambda name: tracker)
    monkeypatch.setattr("pipeline.tracking.thread.make_tracker", lambda name: tracker)
    return tracker


def untrack(change: Callable[[dict[str, Any]], object], tracker: str = "jsonl") -> Path:
    """Forge the facts of the last run, as if it had been killed before it was recorded."""
    folder = Path(f".fls/runs/{last_run().run_id}")
    forge(folder / "facts.json", change)
    forge(folder / "run.json", lambda run: run["options"].update(tracking=tracker))
    fields = {"ended": False, "tracked": False, "registered": [], "destination": ""}
    forge(folder / "tracking.json", lambda tracking: tracking.update(fields))
    forge(folder / "state.json", lambda state: state.update(state="running", heartbeat=0.0))
    return folder


REGISTERED = ONE.replace("}}", "}, register: one}")


@pytest.mark.parametrize("where", [(), ("--storage", ".fls")])
def test_the_store_does_not_say_what_loads_a_model(
    toy: Path, overheard: Overhearing, where: tuple[str, ...]
) -> None:
    write_spec(REGISTERED)
    run_here()
    evil = {"loader": "site:addsitedir", "name": "another"}
    untrack(lambda facts: facts["cells"][0]["registration"].update(evil))
    overheard.forget()
    for _ in range(2):
        assert fls("sync", "last", *where)[0] == 0
    (made,) = overheard.registered
    assert made == Registration(name="one", output="number", loader="toy.exporter:load")


@pytest.mark.parametrize("missing", ["file", "stage", "register"])
def test_a_model_that_no_pipeline_here_registers_is_not_loaded(
    toy: Path, overheard: Overhearing, missing: str
) -> None:
    write_spec(REGISTERED)
    run_here()
    untrack(lambda facts: facts["cells"][0]["registration"].update(loader="site:addsitedir"))
    overheard.forget()
    if missing == "file":
        Path("pipeline.yaml").unlink()
    else:
        write_spec(ONE if missing == "register" else REGISTERED.replace("start:", "other:"))
    code, output, errors = fls("sync", "last", "--storage", ".fls")
    assert (code, errors) == (1, "")
    assert "start is not registered: the store names 'site:addsitedir' to load its mod" in output
    assert "or give its own pipeline as --file" in output
    assert overheard.opened and not overheard.registered


EVIL_ADDRESS = "http://me:word@evil.example:5000"


@pytest.mark.parametrize(
    "command", ["sync", "sync --storage .fls", "run --executor local --set start.value=1", "resume"]
)
def test_an_address_that_the_store_alone_names_is_not_contacted(
    toy: Path, overheard: Overhearing, command: str
) -> None:
    write_spec(ONE)
    run_here()
    overheard.forget()
    run = last_run().run_id
    untrack(lambda facts: facts["run"].update(uri=EVIL_ADDRESS), "mlflow")
    if command == "resume":
        folder = Path(f".fls/runs/{run}")
        forge(folder / "facts.json", lambda facts: facts["run"].update(uri="sqlite:///mlflow.db"))
        text = f"mlflow: {{tracking_uri: '{EVIL_ADDRESS.replace('me:word@', '')}'}}\n"
        forge(folder / "run.json", lambda run: run.update(spec_text=text + run["spec_text"]))
        command = f"resume {run}"
    code, output, errors = fls(*command.split())
    assert all("evil" not in run.uri for run in overheard.opened)
    if command.startswith("run"):
        assert code == 0 and len(overheard.opened) == 1
    else:
        assert code in {1, 2} and not overheard.opened
        assert (
            "is recorded at http://evil.example:5000, which the store names and pipeline.yaml"
            in (output + errors)
        )
        assert "set MLFLOW_TRACKING_URI to it" in output + errors


def test_an_address_that_the_pipeline_names_is_used_in_its_own_words(
    toy: Path, overheard: Overhearing, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec(ONE)
    run_here()
    overheard.forget()
    untrack(lambda facts: facts["run"].update(uri="http://another@host:5000/"), "mlflow")
    text = Path("pipeline.yaml").read_text()
    Path("pipeline.yaml").write_text(f"{text}mlflow: {{tracking_uri: 'http://host:5000'}}\n")
    assert fls("sync", "last", "--storage", ".fls")[0] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me@there")
    untrack(lambda facts: None, "mlflow")
    assert fls("sync", "last")[0] == 0
    assert [run.uri for run in overheard.opened] == ["http://host:5000", "http://me@there"]


@pytest.mark.parametrize("command", ["sync", "sync --storage .fls", "resume last"])
def test_json_lines_go_into_no_folder_that_the_store_alone_names(toy: Path, command: str) -> None:
    write_spec(ONE)
    run_here()
    before = last_run()
    shutil.copytree("tracking", "outside")
    untrack(lambda facts: facts["run"].update(folder=f"{toy}/outside"))
    lines = Path(f"outside/{before.run_id}.jsonl").read_bytes()
    code, output, errors = fls(*command.split())
    assert Path(f"outside/{before.run_id}.jsonl").read_bytes() == lines
    if command == "resume last":
        assert (code, errors) == (0, "")
    else:
        assert code == 1
        assert (
            f"is recorded in {toy}/outside, which the store names and pipeline.yaml does" in output
        )


@pytest.mark.parametrize("name", ["../home/data", "20260101-000000-000-abcd", "/etc/x"])
def test_the_facts_of_a_run_are_its_own(toy: Path, name: str) -> None:
    write_spec(ONE)
    run_here()
    Path("home").mkdir()
    Path("home/data.jsonl").write_text("mine\n")
    untrack(lambda facts: facts["run"].update(run_id=name))
    before = sorted(path for path in toy.rglob("*.jsonl") if ".fls" not in path.parts)
    code, output, errors = fls("sync")
    assert (code, errors) == (1, "")
    assert f"run.run_id: expected the folder's name, got '{name}'" in output
    assert run_here(overrides=["start.value=11"])[0] == 0  # ends what others left open
    assert fls("sync", last_run().run_id)[0] == 0
    after = sorted(path for path in toy.rglob("*.jsonl") if ".fls" not in path.parts)
    assert Path("home/data.jsonl").read_text() == "mine\n"
    assert set(after) - set(before) == {toy / f"tracking/{last_run().run_id}.jsonl"}


# ------------------------------------------------------------ modules in the working directory

SHADOWS = (
    "ray", "mlflow", "yaml", "fsspec", "typer", "rich", "pydantic", "difflib", "numpy", "torch",
    "sqlalchemy", "uvicorn", "tempfile", "traceback",
)  # fmt: skip


@pytest.fixture
def shadows(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the working directory that have the names of installed ones."""
    for name in SHADOWS:
        Path(f"{name}.py").write_text(f"open({str(toy / 'executed')!r}, 'a').write('{name} ')\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy}/mlflow.db")
    monkeypatch.setenv("RAY_ADDRESS", "")  # none


@pytest.mark.parametrize(
    "command",
    ["run --executor local", "run --executor ray --tracking jsonl", "status", "inspect"],
)
@pytest.mark.usefixtures("shadows")
def test_a_module_in_the_working_directory_is_not_taken_for_an_installed_one(
    toy: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.startswith("run --executor ray"):
        monkeypatch.delenv("RAY_ADDRESS")
    write_spec(REGISTERED if "local" in command else ONE)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == (2 if command == "inspect" else 0), said
    assert not Path("executed").exists(), Path("executed").read_text()
    assert "Traceback" not in said
    if command.startswith("run"):
        assert ran() == {"start": 1}, "the plugin is still found there"
    if "local" in command:
        assert "cannot be recorded" not in said


@pytest.mark.usefixtures("shadows")
def test_modules_are_looked_for_here_last_unless_that_is_asked_for(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(toy), "", "/installed"])
    monkeypatch.setenv("PYTHONPATH", str(toy))
    look_here_last()
    assert sys.path == [str(toy), "", "/installed"]
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/installed")
    look_here_last()
    assert sys.path == ["/installed", str(toy)]
    assert search_variable() == {"PYTHONPATH": f"/installed{os.pathsep}{toy}"}
