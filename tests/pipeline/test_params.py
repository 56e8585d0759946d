from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from pipeline.spec.params import Marked, issues_of, marked
from pipeline.stage import Entry, ExternalFile, Params, Registry

COLOURS = Registry(kind="colour", entries={"red": Entry(target="toy:red")})
FILE = ExternalFile()


class Inner(Params):
    colour: Annotated[str, COLOURS] = "red"
    size: int = 1


class Outer(Params):
    one: Annotated[str, COLOURS]
    maybe: Annotated[str, COLOURS] | None = None
    several: list[Annotated[str, FILE]] = []
    named: dict[str, Annotated[str, COLOURS]] = {}
    inner: Inner = Inner()
    inners: list[Inner] = []
    plain: str = "red"
    either: int | str = 1
    positive: float = Field(1, gt=0)


def test_marked_strings_are_found_wherever_they_are() -> None:
    params = Outer.model_validate(
        {
            "one": "a",
            "maybe": "b",
            "several": ["c", "d"],
            "named": {"x": "e"},
            "inners": [{"colour": "f"}],
        }
    )
    assert list(marked(params)) == [
        Marked(("one",), COLOURS, "a"),
        Marked(("maybe",), COLOURS, "b"),
        Marked(("several", 0), FILE, "c"),
        Marked(("several", 1), FILE, "d"),
        Marked(("named", "x"), COLOURS, "e"),
        Marked(("inner", "colour"), COLOURS, "red"),
        Marked(("inners", 0, "colour"), COLOURS, "f"),
    ]


def test_a_model_made_of_what_is_right_can_be_searched() -> None:
    params = Outer.model_construct(maybe="b")
    assert [mark.value for mark in marked(params)] == ["b", "red"]


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({}, (), "missing key 'one'"),
        ({"one": "a", "inner": {"colur": "b"}}, ("inner", "colur"), "unknown key 'colur' (did you"),
        (
            {"one": "a", "inners": [{}, {"xyz": 1}]},
            ("inners", 1, "xyz"),
            "unknown key 'xyz'; known: colour, size",
        ),
        (
            {"one": "a", "inner": {"size": "x"}},
            ("inner", "size"),
            'inner.size: expected integer, got the string "x"',
        ),
        ({"one": "a", "inner": 3}, ("inner",), "inner: expected mapping, got the integer 3"),
        ({"one": None}, ("one",), "one: expected string, got nothing"),
        ({"one": "a", "either": []}, ("either",), "either: expected integer, got the list []"),
        (
            {"one": "a", "positive": 0},
            ("positive",),
            "positive: expected greater than 0, got the integer 0",
        ),
        ({"one": ["x" * 99]}, ("one",), 'one: expected string, got the list ["' + "x" * 55 + "..."),
    ],
)
def test_mistakes_in_words(values: dict[str, Any], path: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Outer.model_validate(values)
    issue = issues_of(raised.value, Outer, values)[0]
    assert issue.path == path
    assert issue.message.startswith(message)
