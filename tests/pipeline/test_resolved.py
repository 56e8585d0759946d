"""The file that repeats what ran."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import fls, ran, run_here, write_spec

from pipeline.base.errors import SpecError
from pipeline.spec.load import load_spec
from pipeline.spec.resolved import to_yaml
from pipeline.spec.yaml_loader import load

CHARACTERS = st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(CHARACTERS)
    | st.sampled_from(["on", "1e-3", "0o10", "~", "a: b", "# x", "- a", "<<", "null", "\ufffe", ""])
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(CHARACTERS), inner),
    max_leaves=9,
)
SPEC = """
    start:
      uses: start
      matrix: {seed: "${vars.seeds}"}
      params: {value: "${env.START_VALUE:-5}"}
    add: {uses: add, matrix: {seed: "${vars.seeds}", amount: [1, 2]}, inputs: {number: start}}
    total: {uses: total, inputs: {numbers: [start, add]}}
"""


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(CHARACTERS), NESTED, max_size=4))
def test_yaml_is_read_as_what_was_written(value: dict[str, Any]) -> None:
    value.pop("<<", None)  # as a key without quotes it would merge; a spec cannot hold it
    document = load(to_yaml({"a": value}), "f.yaml")
    assert not document.problems
    assert json.dumps(document.value) == json.dumps({"a": value})


def write_with_vars(storage: str = ".fls") -> Path:
    path = write_spec(SPEC, storage=storage)
    path.write_text(path.read_text() + "vars: {seeds: [0, 1]}\n")
    return path


def test_the_resolved_spec_repeats_a_run_without_its_options_and_environment(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_with_vars()
    monkeypatch.setenv("START_VALUE", "7")
    options = ["vars.seeds=[3]", "add.amount=[1, 4]"]
    spec = load_spec(path, options)
    assert dict(spec.environment) == {"START_VALUE": "7"}
    assert run_here(overrides=options)[0] == 0
    done = ran()
    assert set(done) == {"start[seed=3]", "add[amount=1,seed=3]", "add[amount=4,seed=3]", "total"}

    monkeypatch.delenv("START_VALUE")
    Path("elsewhere").mkdir()
    other = Path("elsewhere") / "resolved.yaml"
    other.write_text(spec.resolved)
    code, output, _ = fls("run", str(other), "--executor", "local", "--tracking", "jsonl")
    assert (code, output.splitlines()[0]) == (0, "Nothing to do: all 4 cells are in the store.")
    assert ran() == done
    again = load_spec(other)
    assert again.resolved.partition("\n")[2] == spec.resolved.partition("\n")[2]


def test_a_default_of_the_environment_is_recorded_as_what_it_was(toy: Path) -> None:
    assert load_spec(write_with_vars()).environment == {"START_VALUE": "5"}


@pytest.mark.parametrize("variable", ["PLACE", "FISHLEG_STORAGE"])
def test_an_address_with_a_password_stays_a_reference(
    toy: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    address = "s3://me:hushhushhush@bucket/x"
    monkeypatch.setenv(variable, address)
    monkeypatch.setenv("SERVER", "http://me:hushhushhush@host")
    path = write_with_vars(storage='"${env.PLACE:-.fls}"')
    path.write_text(path.read_text() + 'mlflow: {tracking_uri: "${env.SERVER}"}\n')
    spec = load_spec(path)
    assert "hush" not in spec.resolved + str(spec.environment)
    Path("resolved.yaml").write_text(spec.resolved)
    again = load_spec(Path("resolved.yaml"))
    assert again.storage == address
    assert again.mlflow.tracking_uri == "http://me:hushhushhush@host"


def test_a_reference_inside_of_the_environment_is_a_mistake(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("START_VALUE", "${vars.seeds}")
    with pytest.raises(SpecError, match=r"START_VALUE holds '\$\{'"):
        load_spec(write_with_vars())
