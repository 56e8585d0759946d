"""Damage in a store is found and named, and a cell can be computed again."""

import json
import shutil
from pathlib import Path

from toy_runs import DIAMOND, fls, last_run, numbers, ran, run_here, write_spec

from pipeline.store.checksum import verified, with_checksum
from pipeline.store.store import Store
from pipeline.upkeep.verify import Damage, find_damage


def damage(storage: str = ".fls") -> list[Damage]:
    return list(find_damage(Store(storage), lambda done, total: None))


def key_of(cell: str) -> str:
    return last_run().cells[cell].key


def number_file(cell: str) -> Path:
    return Store(".fls").fetch(key_of(cell), "number") / "number.json"


def test_a_store_in_order_has_no_damage(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    seen: list[tuple[int, int]] = []
    assert list(find_damage(Store(".fls"), lambda done, total: seen.append((done, total)))) == []
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    code, output, errors = fls("verify")
    assert (code, output, errors) == (0, f"{toy}/.fls: no damage.\n", "")


def test_every_damaged_file_is_named_and_can_be_set_aside(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    before = numbers()
    flipped, short, missing = (
        number_file(cell)
        for cell in ("start[seed=0]", "add[amount=1,seed=0]", "add[amount=2,seed=0]")
    )
    flipped.write_text(flipped.read_text().replace("10", "11"))
    short.write_text(short.read_text()[:-4])
    missing.unlink()
    manifest = Path(f".fls/stages/{key_of('total')}/manifest.json")
    manifest.write_text(manifest.read_text()[:-10])
    events = Path(f".fls/stages/{key_of('report')}/attempts/0001/events/000001.jsonl")
    events.write_text("{")
    code, output, _ = fls("verify", "--storage", ".fls")
    assert code == 1
    paths = [path.absolute().relative_to(toy / ".fls") for path in (flipped, short, missing)]
    assert f"{paths[0]} (start[seed=0]): differs from its manifest" in output
    assert f"{paths[1]} (add[amount=1,seed=0]): has" in output
    assert f"{paths[2]} (add[amount=2,seed=0]): is missing" in output
    assert f"{manifest.relative_to('.fls')}: its manifest cannot be read" in output
    assert f"{events.relative_to('.fls')}: cannot be read" in output
    assert "5 damaged files, in 4 results." in output
    assert len(output.splitlines()) == 6

    code, output, _ = fls("verify", "--set-aside")
    assert (code, output.count("set aside: ")) == (1, 4)
    events.unlink()
    assert fls("verify")[0] == 0
    assert run_here()[0] == 0
    assert numbers() == before
    assert ran()["start[seed=0]"] == 2
    assert ran()["start[seed=1]"] == 1


def test_damage_in_remote_storage_is_read_from_there(toy: Path) -> None:
    """A copy that is good hides nothing."""
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    store = Store("memory://verify")
    for file in Store(".fls").storage.files(""):
        store.storage.write(file.path, Path(".fls", file.path).read_bytes())
    key = key_of("start")
    store.fetch(key, "number")
    assert damage("memory://verify") == []
    path = f"stages/{key}/attempts/0001/outputs/number/number.json"
    store.storage.write(path, b"{}")
    assert [(one.path, one.key, one.cell) for one in damage("memory://verify")] == [
        (path, key, "start")
    ]
    code, output, _ = fls("verify", "--storage", "memory://verify", "--set-aside")
    assert (code, f"set aside: {key[:12]} start" in output) == (1, True)
    assert damage("memory://verify") == []
    assert store.damaged(key)


def test_a_result_that_became_a_link_is_damage(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    folder, aside = Path(f".fls/stages/{key_of('start')}"), toy / "outside"
    folder.rename(aside)
    folder.symlink_to(aside)
    code, output, _ = fls("verify")
    assert code == 1
    assert f"stages/{folder.name}: is a link to a folder; replace the link by" in output
    code, output, _ = fls("gc", "--storage", ".fls", "--grace", "1s", "--apply")
    assert (code, aside.is_dir()) == (0, True)
    assert f"passed over: stages/{folder.name}: no name that a store gives" in output
    folder.unlink()
    aside.rename(folder)
    assert fls("verify")[0] == 0


# ---------------------------------------------------------------------------------- again


def test_a_cell_computed_again_gives_the_same_bytes_and_publishes_nothing(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(".fls").rglob("*"))
    for cell in ("add[amount=2,seed=1]", "total"):
        code, output, errors = fls("verify", "--rerun", cell)
        assert (code, output, errors) == (
            0,
            f"{cell}: all 1 files are the same, byte by byte.\n",
            "",
        )
    assert ran()["add[amount=2,seed=1]"] == ran()["total"] == 2
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(".fls").rglob("*")) == before


def test_a_cell_that_gives_other_bytes_is_told(toy: Path) -> None:
    """The stage depends on something that is no ingredient of its key."""
    write_spec("fail: {uses: fail, params: {counter: counter, until: 0}}")
    assert run_here()[0] == 0
    manifest = Path(f".fls/stages/{key_of('fail')}/manifest.json")
    document = verified(manifest.read_bytes())
    document["facts"]["python"] = "3.10.0"
    manifest.write_bytes(with_checksum(document))
    code, output, _ = fls("verify", "--rerun", "fail")
    assert code == 1
    assert "fail: number/number.json differs\n" in output
    assert "Made differently: python 3.10.0 -> " in output
    assert json.loads((number_file("fail")).read_text()) == {"number": 0}


def test_a_cell_is_computed_again_by_the_url_of_its_run_alone(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here(overrides=["start.value=20"])
    Path("pipeline.yaml").unlink()
    shutil.move(".fls", "moved")
    code, output, _ = fls("verify", "--storage", "moved", "--rerun", "start[seed=1]", "--trust")
    assert (code, "all 1 files are the same" in output) == (0, True)


def test_what_cannot_be_computed_again_is_told(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    for name in ("start[seed=0]", "add[amount=1,seed=0]"):
        shutil.rmtree(f".fls/stages/{key_of(name)}")
    for cell, message in (
        ("add", "names 4 cells"),
        ("ad", "did you mean 'add'?"),
        ("add[amount=1,seed=0]", "is not in the store, so there is nothing to compare"),
        (
            "add[amount=2,seed=0]",
            "needs start[seed=0], which is missing; `fls run pipeline.yaml --until",
        ),
    ):
        code, _, errors = fls("verify", "--rerun", cell)
        assert (code, message in errors) == (2, True), errors


def test_the_present_code_is_compared_with_what_earlier_code_made(toy: Path) -> None:
    write_spec(
        """
        a: {uses: start, params: {value: 1}}
        b: {uses: apply, inputs: {number: a}, params: {operation: plus}}
        """
    )
    run_here()
    code = Path("toy/operations/plus.py")
    code.write_text("def plus(value: int, operand: int) -> int:\n    return operand + value\n")
    status, output, _ = fls("verify", "--rerun", "b")
    assert status == 0
    assert f"to accept it: fls accept b --run {last_run().run_id} --why '...'\n" in output
    assert "b: all 1 files are the same, byte by byte." in output
    code.write_text("def plus(value: int, operand: int) -> int:\n    return operand - value\n")
    status, output, _ = fls("verify", "--rerun", "b")
    assert (status, "b: number/number.json differs" in output) == (1, True)
    Path("pipeline.yaml").write_text(Path("pipeline.yaml").read_text().replace("1}", "2}"))
    status, _, errors = fls("verify", "--rerun", "a")
    assert status == 2
    assert "a is not in the store as it is now (params.value: 1 -> 2), so there is" in errors
