from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.planning.keys import Identity, explain, identify
from pipeline.spec.load import load_spec

SPEC = """
name: toy
plugins: [toy]
stages:
  start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 5}}
  apply:
    uses: apply
    matrix: {seed: [0, 1]}
    inputs: {number: start}
    params: {operation: times}
  total: {uses: total, inputs: {numbers: apply}}
  read: {uses: read, params: {path: number.txt}}
"""


def identities(
    folder: Path, text: str = SPEC, *overrides: str, forced: Mapping[str, int] | None = None
) -> dict[str, Identity]:
    if not (folder / "number.txt").exists():
        (folder / "number.txt").write_text("3")
    (folder / "p.yaml").write_text(text)
    spec = load_spec(Path("p.yaml"), overrides)
    return identify(spec.cells, spec.plugins, lambda cell, base: (forced or {}).get(cell.name, 0))


def changed(before: Mapping[str, Identity], after: Mapping[str, Identity]) -> list[str]:
    return [name for name in before if before[name].key != after[name].key]


def test_keys_are_the_same_every_time(toy: Path) -> None:
    found = identities(toy)
    assert changed(found, identities(toy)) == []
    assert len({identity.key for identity in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("start: {", "start: {resources: {num_cpus: 4}, retries: 7, timeout_s: 5, "),
        ("name: toy\n", "name: other\nstorage: elsewhere\nmlflow: {experiment: x}\n"),
        ("params: {operation: times}", "params: {operation: times, operand: 2}"),  # the default
        ("[0, 1]", "'${vars.seeds}'"),
    ],
)
def test_what_is_no_ingredient_leaves_the_keys(toy: Path, old: str, new: str) -> None:
    text = SPEC.replace(old, new).replace("stages:", "vars: {seeds: [0, 1]}\nstages:")
    assert changed(identities(toy), identities(toy, text)) == []


def test_names_of_stages_and_files_leave_the_keys(toy: Path) -> None:
    before = identities(toy)
    (toy / "moved.txt").write_text("3")
    text = SPEC.replace("  start:", "  begin:").replace("number: start", "number: begin")
    after = identities(toy, text.replace("number.txt", "moved.txt"))
    assert [identity.key for identity in before.values()] == [
        identity.key for identity in after.values()
    ]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("start.value=6", ["start[seed=0]", "start[seed=1]", "apply[seed=0]", "apply[seed=1]"]),
        ("apply.operand=3", ["apply[seed=0]", "apply[seed=1]"]),
        ("apply.operation=plus_table", ["apply[seed=0]", "apply[seed=1]"]),
    ],
)
def test_a_parameter_changes_its_cell_and_all_after_it(
    toy: Path, override: str, names: list[str]
) -> None:
    assert changed(identities(toy), identities(toy, SPEC, override)) == [*names, "total"]


def test_an_external_file_enters_by_its_content(toy: Path) -> None:
    before = identities(toy)
    (toy / "number.txt").write_text("4")
    after = identities(toy)
    assert changed(before, after) == ["read"]
    assert explain(before["read"].ingredients, after["read"].ingredients) == [
        "file of params.path changed"
    ]


def test_a_data_digest_enters(toy: Path) -> None:
    found = identities(toy, SPEC, "apply.operation=plus_table")
    assert found["apply[seed=0]"].ingredients["data"] == {"operation": "ab" * 32}


def test_only_the_code_behind_the_names_given_enters(toy: Path) -> None:
    before = identities(toy)
    assert list(before["apply[seed=0]"].ingredients["code"]) == [
        "toy.common",
        "toy.operations.times",
        "toy.stages",
    ]
    plus = toy / "toy/operations/plus.py"
    plus.write_text(plus.read_text().replace("+", "-"))
    assert changed(before, identities(toy)) == []
    times = toy / "toy/operations/times.py"
    times.write_text("# a comment\n" + times.read_text())
    assert changed(before, identities(toy)) == []
    times.write_text(times.read_text().replace("*", "**"))
    after = identities(toy)
    assert changed(before, after) == ["apply[seed=0]", "apply[seed=1]", "total"]
    assert explain(before["apply[seed=0]"].ingredients, after["apply[seed=0]"].ingredients) == [
        "code of toy.operations.times changed"
    ]


def test_the_catalogue_is_no_code(toy: Path) -> None:
    before = identities(toy)
    catalogue = toy / "toy/catalogue.py"
    catalogue.write_text(catalogue.read_text() + "\nNEW = 1\n")
    assert changed(before, identities(toy)) == []


def test_a_users_own_function_enters_with_what_it_imports(toy: Path) -> None:
    (toy / "mine.py").write_text(
        "from helper import f\ndef triple(value, operand): return f(value)"
    )
    (toy / "helper.py").write_text("def f(x): return 3 * x")
    found = identities(toy, SPEC, "apply.operation=mine:triple")
    assert {"mine", "helper"} < set(found["apply[seed=0]"].ingredients["code"])


def test_a_generation_changes_the_key_and_not_the_base(toy: Path) -> None:
    before = identities(toy)
    after = identities(toy, forced={"start[seed=1]": 1})
    assert changed(before, after) == ["start[seed=1]", "apply[seed=1]", "total"]
    assert before["start[seed=1]"].base == after["start[seed=1]"].base


def explained(toy: Path, cell: str, text: str, *overrides: str, **forced: int) -> list[str]:
    before = identities(toy)[cell].ingredients
    return explain(before, identities(toy, text, *overrides, forced=forced)[cell].ingredients)


@pytest.mark.parametrize(
    ("cell", "override", "expected"),
    [
        ("start[seed=0]", "start.value=6", ["params.value: 5 -> 6"]),
        ("apply[seed=0]", "start.value=6", ["upstream start[seed=0] changed"]),
        ("total", "apply.operand=3", ["upstream apply[seed=0], apply[seed=1] changed"]),
        ("total", "apply.seed=[0]", ["upstream apply[seed=1] went out"]),
        ("total", "apply.seed=[1, 0]", ["order of the upstream cells changed"]),
        (
            "apply[seed=0]",
            "apply.operation=plus_table",
            [
                'params.operation: "times" -> "plus_table"',
                "code of toy.operations.plus came in",
                "code of toy.operations.times went out",
                "data behind params.operation came in",
            ],
        ),
    ],
)
def test_changes_are_explained(toy: Path, cell: str, override: str, expected: list[str]) -> None:
    assert explained(toy, cell, SPEC, override) == expected


def test_forcing_and_another_stage_type_are_explained(toy: Path) -> None:
    assert explained(toy, "total", SPEC, total=1) == ["forced"]
    text = SPEC.replace("uses: apply", "uses: add").replace("operation: times", "amount: 2")
    assert explained(toy, "apply[seed=0]", text)[:1] == ["stage type: apply -> add"]


def test_cells_of_equal_ingredients_have_equal_keys(toy: Path) -> None:
    text = SPEC + "  twin: {uses: start, params: {value: 5, seed: 1}}\n"
    found = identities(toy, text)
    assert found["twin"].key == found["start[seed=1]"].key
