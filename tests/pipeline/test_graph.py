from pathlib import Path

import pytest

from pipeline.base.errors import BadInput
from pipeline.spec.cells import Cell, Upstream, resolve
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec

SPEC = """
name: toy
plugins: [toy]
stages:
  report: {uses: report, inputs: {results: [total, totals]}}
  totals: {uses: total, inputs: {numbers: [add, apply]}}
  total: {uses: total, inputs: {numbers: add}}
  add:
    uses: add
    matrix: {seed: [1, 0], amount: [1e-5, 2]}
    inputs: {number: start}
  apply:
    uses: apply
    matrix: {operation: [plus, times], seed: [0]}
    inputs: {number: start}
  start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 5}}
"""


@pytest.fixture
def spec(toy: Path) -> Spec:
    (toy / "p.yaml").write_text(SPEC)
    return load_spec(Path("p.yaml"))


def test_cells_are_in_topological_order_else_in_the_files(spec: Spec) -> None:
    assert list(spec.stages) == ["report", "totals", "total", "add", "apply", "start"]
    assert [cell.name for cell in spec.cells] == [
        "start[seed=0]",
        "start[seed=1]",
        "add[amount=1e-05,seed=1]",
        "add[amount=2,seed=1]",
        "add[amount=1e-05,seed=0]",
        "add[amount=2,seed=0]",
        "total",
        "apply[operation=plus,seed=0]",
        "apply[operation=times,seed=0]",
        "totals",
        "report",
    ]


def cell(spec: Spec, name: str) -> Cell:
    return next(cell for cell in spec.cells if cell.name == name)


def test_inputs_join_by_shared_axes(spec: Spec) -> None:
    assert cell(spec, "add[amount=2,seed=1]").inputs == {
        "number": [Upstream("start[seed=1]", "number")]
    }


def test_a_many_input_gathers_in_the_order_of_stages_then_cells(spec: Spec) -> None:
    assert cell(spec, "totals").sources == [
        "add[amount=1e-05,seed=1]",
        "add[amount=2,seed=1]",
        "add[amount=1e-05,seed=0]",
        "add[amount=2,seed=0]",
        "apply[operation=plus,seed=0]",
        "apply[operation=times,seed=0]",
    ]
    assert cell(spec, "report").inputs == {
        "results": [Upstream("total", "results"), Upstream("totals", "results")]
    }


@pytest.mark.parametrize(
    ("address", "count"),
    [
        ("start", 2),
        ("add", 4),
        ("add[seed=0]", 2),
        ("add[ seed = 0 ]", 2),
        ("add[amount=1e-5]", 2),
        ("add[amount=0.00001,seed=1]", 1),
        ("add[amount=2.0]", 2),
        ("apply[operation=plus,seed=0]", 1),
        ("report", 1),
        ("report[]", 1),
    ],
)
def test_addresses(spec: Spec, address: str, count: int) -> None:
    found = resolve(address, spec.cells)
    assert len(found) == count
    assert {cell.stage for cell in found} == {address.partition("[")[0]}


def test_every_cell_is_addressed_by_its_name(spec: Spec) -> None:
    for one in spec.cells:
        assert resolve(one.name, spec.cells) == [one]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ad", r"unknown stage 'ad' in 'ad' \(did you mean 'add'\?\); stages: start, add, total"),
        ("add[sed=0]", r"unknown axis 'sed' in .* \(did you mean 'seed'\?\); axes: seed, amount"),
        ("total[seed=0]", r"unknown axis 'seed' in 'total\[seed=0\]'; axes: none"),
        ("add[seed=7]", r"no cell has seed=7 in 'add\[seed=7\]'; values: 1, 0"),
        ("add[seed=true]", "no cell has seed=true"),
        ("apply[operation=plsu]", r"did you mean 'plus'\?"),
        ("add[seed=0", r"'add\[seed=0' lacks its closing bracket"),
    ],
)
def test_unknown_addresses_name_the_nearest(spec: Spec, address: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(address, spec.cells)
