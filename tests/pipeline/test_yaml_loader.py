import pytest

from pipeline.base.errors import SpecError
from pipeline.spec.yaml_loader import load, read_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2", -2),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        ("1e999", "1e999"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)
    assert load(f"key: {text}", "f").value == {"key": value}


def test_quoted_scalars_and_blocks_are_strings() -> None:
    text = "a: '1'\nb: \"true\"\nc: |\n  1\nd: !!str 1\n"
    assert load(text, "f").value == {"a": "1", "b": "true", "c": "1\n", "d": "1"}


def test_every_key_and_value_has_its_position() -> None:
    document = load("a:\n  b: [1, two]\nc: {d: 3}\n", "f.yaml")
    places = {path: str(position) for path, position in document.values.items()}
    assert places == {
        (): "f.yaml:1:1",
        ("a",): "f.yaml:2:3",
        ("a", "b"): "f.yaml:2:6",
        ("a", "b", 0): "f.yaml:2:7",
        ("a", "b", 1): "f.yaml:2:10",
        ("c",): "f.yaml:3:4",
        ("c", "d"): "f.yaml:3:8",
    }
    assert str(document.position(("c", "d"), key=True)) == "f.yaml:3:5"
    assert str(document.position(("c", "d", 5, "x"))) == "f.yaml:3:8"  # the nearest ancestor


def test_duplicate_keys_are_reported_with_both_positions_and_the_first_counts() -> None:
    document = load("a: 1\nb: 2\na: 3\n", "f")
    assert [str(problem) for problem in document.problems] == [
        "f:3:1: duplicate key 'a', first given at f:1:1"
    ]
    assert document.value == {"a": 1, "b": 2}


def test_anchors_and_merge_keys() -> None:
    document = load("base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}\nboth: {<<: [*b, {z: 4}]}", "f")
    assert document.value["use"] == {"y": 3, "x": 1}
    assert document.value["both"] == {"x": 1, "y": 2, "z": 4}
    assert str(document.position(("use", "x"))) == "f:1:14"  # where the value is written
    assert not document.problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: !!python/object:os.system x",
            "f:1:4: tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("a: !mine {b: 1}", "f:1:4: tag '!mine' is not supported"),
        ("1: a", "f:1:1: expected a string as the key, got 1; quote it"),
        ("[a]: b", "f:1:1: expected a string as the key"),
        ("a: &x [*x]", "f:1:4: an alias to a mapping or list that contains it"),
        ("a: {<<: 3}", "f:1:9: expected a mapping, or a list of them, after '<<'"),
    ],
)
def test_what_is_no_plain_data_is_a_problem(text: str, problem: str) -> None:
    assert [str(found)[: len(problem)] for found in load(text, "f").problems] == [problem]


@pytest.mark.parametrize("text", ["a: [1\nb: 2", "a: b: c", "\ta: 1", "a: *nowhere", "a: \x07"])
def test_broken_yaml_is_one_problem_with_a_position(text: str) -> None:
    with pytest.raises(SpecError, match=r"^f:\d+:\d+: no valid YAML: ") as raised:
        load(text, "f")
    assert len(raised.value.problems) == 1


def test_an_empty_document_has_no_value() -> None:
    assert load("# nothing\n", "f").value is None
