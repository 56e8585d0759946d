import textwrap
from pathlib import Path

import pytest

from pipeline.base.errors import BadInput, SpecError
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec


def load(folder: Path, stages: str, *overrides: str, head: str = "") -> Spec:
    text = f"name: toy\nplugins: [toy]\n{textwrap.dedent(head)}stages:\n"
    (folder / "p.yaml").write_text(text + textwrap.indent(textwrap.dedent(stages), "  "))
    return load_spec(Path("p.yaml"), overrides)


def problems(folder: Path, stages: str, *overrides: str, head: str = "") -> list[str]:
    with pytest.raises(SpecError) as raised:
        load(folder, stages, *overrides, head=head)
    assert raised.value.exit_code == 2
    return str(raised.value).splitlines()


START = "start: {uses: start, params: {value: 5}}\n"


def test_resources_that_are_null_are_as_the_stage_declares_them(toy: Path) -> None:
    text = "num_cpus: null, num_gpus: null, memory: null, accelerator_type: null"
    spec = load(toy, f"start: {{uses: start, params: {{value: 5}}, resources: {{{text}}}}}\n")
    assert spec.stages["start"].resources == load(toy, START).stages["start"].resources


def test_a_spec_with_all_its_parts(toy: Path) -> None:
    spec = load(
        toy,
        """
        start:
          uses: start
          matrix: {seed: [0, 1]}
          params: {value: 5}
          resources: {num_cpus: 2, memory: 1.5GB, accelerator_type: H100}
          retries: 0
          timeout_s: 1.5
        add: {uses: add, matrix: {seed: [0, 1]}, inputs: {number: start}}
        """,
        head="storage: results\nmlflow: {tracking_uri: 'sqlite:///x.db'}\n",
    )
    assert spec.name == "toy"
    assert spec.path == Path("p.yaml")
    assert [plugin.module for plugin in spec.plugins] == ["toy.catalogue"]
    assert spec.storage == str(toy / "results")
    assert (spec.mlflow.experiment, spec.mlflow.tracking_uri) == ("toy", "sqlite:///x.db")
    start, add = spec.stages["start"], spec.stages["add"]
    assert (start.retries, start.timeout_s) == (0, 1.5)
    assert start.resources.num_cpus == 2
    assert start.resources.memory_bytes == 1_500_000_000
    assert start.resources.accelerator_type == "H100"
    assert add.resources == add.declaration.resources
    cell = spec.cells[3]
    assert (cell.name, cell.params.seed, cell.params.amount) == ("add[seed=1]", 1, 1.0)


def test_defaults_and_remote_storage(toy: Path) -> None:
    assert load(toy, START).storage == str(toy / ".fls")
    assert load(toy, START, head="storage: memory://x\n").storage == "memory://x"
    assert load(toy, START, head="mlflow: {experiment: other}\n").mlflow.experiment == "other"


@pytest.mark.parametrize(
    ("size", "size_bytes"), [("4GB", 4 * 10**9), ("512 MiB", 2**29), (1024, 1024), ("1.5KB", 1500)]
)
def test_sizes_of_memory(toy: Path, size: object, size_bytes: int) -> None:
    spec = load(toy, f"s: {{uses: start, params: {{value: 1}}, resources: {{memory: {size}}}}}")
    assert spec.stages["s"].resources.memory_bytes == size_bytes


# ------------------------------------------------------------------------------------ mistakes


def test_three_mistakes_are_reported_together_in_file_order(toy: Path) -> None:
    stages = """
        start:
          uses: start
          params: {value: five}
        add:
          uses: add
          inputs: {number: strat}
          parms: {amount: 2}
    """
    assert problems(toy, stages) == [
        'p.yaml:7:21: value: expected integer, got the string "five"',
        "p.yaml:10:22: 'add' depends on a missing stage: 'strat' (did you mean 'start'?)",
        "p.yaml:11:5: unknown key 'parms' (did you mean 'params'?)",
    ]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("a: {uses: strat}", "4:13: unknown stage type 'strat' (did you mean 'start'?); known: "),
        ("a: 3", "4:6: expected mapping, got the integer 3"),
        ("a: {}", "4:3: missing key 'uses'"),
        (
            "a b: {uses: start, params: {value: 1}}",
            "4:3: expected a name of letters, digits, '-' and '_', got 'a b'",
        ),
        ("a: {uses: start}", "4:3: missing key 'value'"),
        (
            "a: {uses: start, params: {value: 1, sead: 2}}",
            "4:39: unknown key 'sead' (did you mean 'seed'?)",
        ),
        (
            "a: {uses: start, params: {value: 1, seed: -1}}",
            "4:45: seed: expected greater than or equal to 0, got the integer -1",
        ),
        (
            "a: {uses: start, matrix: {seed: [0, x]}, params: {value: 1}}",
            '4:39: seed: expected integer, got the string "x"',
        ),
        (
            "a: {uses: start, matrix: {sed: [0]}, params: {value: 1}}",
            "4:29: axis 'sed' is no parameter of 'start' (did you mean 'seed'?)",
        ),
        (
            "a: {uses: start, matrix: {seed: [0]}, params: {value: 1, seed: 3}}",
            "4:29: 'seed' is given in 'params' too; keep one",
        ),
        (
            "a: {uses: start, matrix: {seed: []}, params: {value: 1}}",
            "4:35: matrix.seed: expected at least one value",
        ),
        (
            "a: {uses: start, matrix: {seed: [1, 2, 1]}, params: {value: 1}}",
            "4:35: matrix.seed: 1 is listed more than once",
        ),
        (
            "a: {uses: start, matrix: {seed: [[1]]}, params: {value: 1}}",
            "4:35: matrix.seed: expected plain values: strings, numbers, booleans or null",
        ),
        (
            "a: {uses: start, matrix: {seed: ['1,2']}, params: {value: 1}}",
            "4:35: matrix.seed: '1,2' cannot name a cell: no spaces, nor any of [ ] , =",
        ),
        (
            "a: {uses: start, params: {value: 1}, resources: {num_gpus: 1.5}}",
            "4:62: resources.num_gpus: expected a share of one GPU, or a whole number, got 1.5",
        ),
        (
            "a: {uses: start, params: {value: 1}, resources: {memory: 4XB}}",
            "4:60: resources.memory: expected bytes, or a size such as 4GB or 512MiB, got '4XB'",
        ),
        (
            "a: {uses: start, params: {value: 1}, retries: true}",
            "4:49: retries: expected integer, got the boolean true",
        ),
        ("a: {uses: add}", "4:3: missing input 'number': a 'number'"),
        ("a: {uses: read, params: {path: no.txt}}", "4:34: path: no file 'no.txt' (searched from"),
        (
            "a: {uses: fail, params: {how: usr}}",
            "4:33: how: expected 'user', 'bug', 'outage', 'exit' or 'nothing', got the string "
            "\"usr\" (did you mean 'user'?)",
        ),
    ],
)
def test_one_mistake(toy: Path, stages: str, expected: str) -> None:
    found = problems(toy, stages)
    assert found[0].startswith(f"p.yaml:{expected}")
    assert len(found) == 1


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            "a: {uses: add, inputs: {numbr: start}}",
            [
                "5:18: missing input 'number': a 'number'",
                "5:27: 'add' has no input 'numbr' (did you mean 'number'?)",
            ],
        ),
        (
            "a: {uses: add, inputs: {number: [start, start]}}",
            [
                "5:35: input 'number' takes one stage, got 2",
                "5:43: 'start' is listed more than once",
            ],
        ),
        (
            "a: {uses: report, inputs: {results: start}}",
            [
                "5:39: the input takes a 'results', but 'start' (uses start) gives 'number'",
            ],
        ),
        (
            "a: {uses: apply, inputs: {number: start}, params: {operation: tims}}",
            [
                "5:65: operation: unknown operation 'tims' (did you mean 'times'?); known: plus, "
                "times, plus_table, or package.module:function",
            ],
        ),
        (
            "a: {uses: apply, inputs: {number: start}, params: {operation: toy.common:nope}}",
            ["5:65: 'toy.common:nope': 'toy.common' has no 'nope'"],
        ),
        (  # names are checked though another parameter is wrong
            "a: {uses: apply, inputs: {number: start}, params: {operation: tims, operand: x}}",
            [
                "5:65: operation: unknown operation 'tims' (did you mean 'times'?); known: plus, "
                "times, plus_table, or package.module:function",
                '5:80: operand: expected integer, got the string "x"',
            ],
        ),
    ],
)
def test_mistakes_in_connections_and_names(toy: Path, stages: str, expected: list[str]) -> None:
    assert problems(toy, START + stages) == [f"p.yaml:{line}" for line in expected]


def test_a_cycle_is_shown_as_a_cycle(toy: Path) -> None:
    stages = """
        a: {uses: add, inputs: {number: c}}
        b: {uses: add, inputs: {number: a}}
        c: {uses: add, inputs: {number: b}}
        d: {uses: add, inputs: {number: d}}
    """
    assert problems(toy, stages) == [
        "p.yaml:5:35: the stages form a cycle: a -> b -> c -> a",
        "p.yaml:8:35: the stages form a cycle: d -> d",
    ]


def test_an_axis_that_only_the_upstream_has_lists_its_cells(toy: Path) -> None:
    stages = """
        start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 1}}
        add: {uses: add, inputs: {number: start}}
    """
    assert problems(toy, stages) == [
        "p.yaml:6:37: 'add' has no axis 'seed', so which cell of 'start' it takes is not said "
        "(start[seed=0], start[seed=1]); add the axis to its matrix"
    ]


def test_cells_that_find_no_upstream_are_listed(toy: Path) -> None:
    stages = """
        start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 1}}
        add: {uses: add, matrix: {seed: [0, 2, 3]}, inputs: {number: start}}
    """
    assert problems(toy, stages) == [
        "p.yaml:6:64: 'start' has no cell with the seed of add[seed=2], add[seed=3]"
    ]


def test_wrong_axes_do_not_bring_mistakes_that_only_follow_from_them(toy: Path) -> None:
    stages = """
        start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 1}}
        add: {uses: add, matrix: {sede: [0, 1]}, inputs: {number: start}}
    """
    assert len(problems(toy, stages)) == 1


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("nmae: 3\n", "3:1: unknown key 'nmae' (did you mean 'name'?)"),
        ("name: x\n", "3:1: duplicate key 'name', first given at p.yaml:1:1"),
        ("storage: 3\n", "3:10: storage: expected string, got the integer 3"),
        (
            f"mlflow: {{experiment: {'x' * 251}}}\n",
            "3:22: mlflow.experiment: expected a name of at most 250 characters, got 251",
        ),
        ("mlflow: {experimnt: x}\n", "3:10: unknown key 'experimnt' (did you mean 'experiment'?)"),
        ("keep: results\n", "3:1: unknown key 'keep'; it is a key of a stage"),
        ("autoscaling: true\n", "3:1: unknown key 'autoscaling'; it is a key of `cluster:`"),
    ],
)
def test_mistakes_at_the_top(toy: Path, head: str, expected: str) -> None:
    assert problems(toy, START, head=head) == [f"p.yaml:{expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["p.yaml:1:1: expected a mapping with 'name', 'plugins' and 'stages'"]),
        (
            "name: x",
            ["p.yaml:1:1: missing key 'plugins'", "p.yaml:1:1: missing key 'stages'"],
        ),
        (
            "name: x\nplugins: [nowhere]\nstages: {a: {uses: start}}",
            ["p.yaml:2:11: cannot import plugin 'nowhere': ModuleNotFoundError: No module named "],
        ),
        (
            "name: x\nplugins: [toy.common]\nstages: {a: {uses: start}}",
            ["p.yaml:2:11: plugin 'toy.common' has no CATALOGUE, nor has toy.common.catalogue"],
        ),
        ("name: x\n  y: [", ["p.yaml:2:4: no valid YAML: mapping values are not allowed here"]),
    ],
)
def test_files_that_are_no_spec(toy: Path, text: str, expected: list[str]) -> None:
    (toy / "p.yaml").write_text(text)
    with pytest.raises(SpecError) as raised:
        load_spec(Path("p.yaml"))
    found = str(raised.value).splitlines()
    assert [line[: len(want)] for line, want in zip(found, expected, strict=True)] == expected


def test_two_plugins_with_the_same_stage_are_refused(toy: Path) -> None:
    (toy / "second.py").write_text("from toy.catalogue import CATALOGUE")
    (toy / "p.yaml").write_text("name: x\nplugins: [toy, second]\nstages: {a: {uses: total}}")
    with pytest.raises(SpecError, match="another plugin has a stage 'start' too"):
        load_spec(Path("p.yaml"))


def test_an_unreadable_file_is_bad_input(toy: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read gone\.yaml"):
        load_spec(Path("gone.yaml"))


# ------------------------------------------------------------------ variables and --set


def test_references_keep_types_and_join_text(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_VALUE", "7")
    monkeypatch.setenv("TOY_NAME", "010")
    spec = load(
        toy,
        """
        start: {uses: start, matrix: {seed: "${vars.seeds}"}, params: {value: "${env.TOY_VALUE}"}}
        slow: {uses: fail, params: {counter: "n${env.TOY_NAME}-${vars.a.b}-${env.NOPE:-x}"}}
        """,
        head='vars: {seeds: [0, 1], a: {b: "${vars.seed}"}, seed: 3}\n',
    )
    assert [cell.name for cell in spec.cells] == ["start[seed=0]", "start[seed=1]", "slow"]
    assert spec.cells[0].params.value == 7
    assert spec.cells[2].params.counter == "n010-3-x"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${vars.seedz}", "unknown variable vars.seedz (did you mean 'seeds'?); known: seeds, "),
        ("${vars.seeds.x}", "vars.seeds has no entries, so there is no ${vars.seeds.x}"),
        ("${env.NOPE}", "the environment variable NOPE is not set; set it, or write ${env.NOPE:-"),
        (
            "${what}",
            "unknown reference ${what}: expected ${vars.NAME}, ${env.NAME} or ${env.NAME:-",
        ),
        ("x${vars.seeds}", "${vars.seeds} is a list, which cannot stand inside text"),
        ("x${vars.seeds", "'${' without its '}' in 'x${vars.seeds'"),
    ],
)
def test_references_to_nothing(toy: Path, value: str, expected: str) -> None:
    stages = f'a: {{uses: start, params: {{value: "{value}"}}}}'
    found = problems(toy, stages, head="vars: {seeds: [0, 1], ring: 3}\n")
    assert len(found) == 1
    assert found[0].startswith(f"p.yaml:5:36: {expected}")


def test_variables_that_form_a_cycle_are_reported_where_they_are(toy: Path) -> None:
    head = 'vars: {a: "${vars.b}", b: "${vars.a}"}\n'
    found = problems(toy, 'a: {uses: start, params: {value: "${vars.a}"}}', head=head)
    assert found == [
        "p.yaml:3:11: variables form a cycle: vars.b -> vars.a -> vars.b",
        "p.yaml:3:27: variables form a cycle: vars.a -> vars.b -> vars.a",
    ]


SET_STAGES = """
    start: {uses: start, matrix: {seed: "${vars.seeds}"}, params: {value: 5}}
    add: {uses: add, matrix: {seed: "${vars.seeds}"}, inputs: {number: start}}
"""
SET_HEAD = "vars: {seeds: [0, 1]}\n"


@pytest.mark.parametrize(
    ("options", "names", "value", "amount"),
    [
        (["start.value=6"], ["start[seed=0]", "start[seed=1]"], 6, 1),
        (["vars.seeds=[4]"], ["start[seed=4]"], 5, 1),
        (["vars.seeds=4"], ["start[seed=4]"], 5, 1),
        (["start.seed=[1, 2, 3]", "add.seed=2"], [f"start[seed={i}]" for i in (1, 2, 3)], 5, 1),
        (["add.amount=1e-3"], ["start[seed=0]", "start[seed=1]"], 5, 1e-3),
        (["start.value=${vars.seeds}", "vars.seeds=9"], ["start[seed=9]"], 9, 1),
    ],
)
def test_set_changes_parameters_axes_and_variables(
    toy: Path, options: list[str], names: list[str], value: int, amount: float
) -> None:
    spec = load(toy, SET_STAGES, *options, head=SET_HEAD)
    assert [cell.name for cell in spec.cells if cell.stage == "start"] == names
    assert spec.cells[0].params.value == value
    assert spec.cells[-1].params.amount == amount


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("start.valeu=6", "unknown key 'valeu' (did you mean 'value'?)"),
        ("start.value=x", 'value: expected integer, got the string "x"'),
        ("strat.value=6", "unknown stage 'strat' (did you mean 'start'?)"),
        ("vars.seedz=6", "the file has no variable vars.seedz (did you mean 'seeds'?)"),
        ("vars.seeds.x=6", "the file has no variable vars.seeds.x"),
        ("value=6", "expected stage.parameter=value, stage.axis=[values] or vars.name=value"),
        ("start.value", "expected stage.parameter=value, stage.axis=[values] or vars.name=value"),
        ("start.value=[", "no valid YAML: "),
        ("start.value={a: 1, a: 2}", "duplicate key 'a'"),
        ("start.value=${vars.x}", "unknown variable vars.x"),
    ],
)
def test_mistakes_in_set_name_the_option(toy: Path, option: str, expected: str) -> None:
    found = problems(toy, SET_STAGES, option, head=SET_HEAD)
    assert len(found) == 1
    assert found[0].startswith(f"--set {option}: {expected}")


def test_problems_of_the_file_come_before_those_of_options(toy: Path) -> None:
    found = problems(toy, SET_STAGES + "    b: {uses: nope}\n", "start.value=x", head=SET_HEAD)
    assert [line.partition(":")[0] for line in found] == ["p.yaml", "--set start.value=x"]
