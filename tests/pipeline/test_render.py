from pathlib import Path

import pytest

from pipeline.spec.cells import Cell
from pipeline.spec.load import load_spec
from pipeline.spec.render import Drawing, cell_drawing, dot, mermaid, stage_drawing

SPEC = """
name: toy
plugins: [toy]
stages:
  start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 5}}
  total: {uses: total, inputs: {numbers: start}}
"""


@pytest.fixture
def cells(toy: Path) -> list[Cell]:
    (toy / "p.yaml").write_text(SPEC)
    return list(load_spec(Path("p.yaml")).cells)


def test_stages_as_mermaid(cells: list[Cell]) -> None:
    assert mermaid(stage_drawing(cells)) == (
        'flowchart LR\n    n0["start<br/>2 cells: seed"]\n    n1["total"]\n    n0 --> n1\n'
    )


def test_cells_as_dot(cells: list[Cell]) -> None:
    assert dot(cell_drawing(cells)).splitlines()[3:] == [
        '    "start[seed=0]" [label="start[seed=0]"];',
        '    "start[seed=1]" [label="start[seed=1]"];',
        '    "total" [label="total"];',
        '    "start[seed=0]" -> "total";',
        '    "start[seed=1]" -> "total";',
        "}",
    ]


def test_quotes_are_escaped() -> None:
    drawing = Drawing({'a "b"': ['a "b"', "c"]}, [('a "b"', 'a "b"')])
    assert r'"a \"b\"" [label="a \"b\"\nc"];' in dot(drawing)
    assert 'n0["a #quot;b#quot;<br/>c"]' in mermaid(drawing)
