"""Whatever is given to the spec loader: a spec or a clear error, at once."""

import random
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spec_inputs import draw_input, judge, valid_spec

LONGEST_S = 1.0

few = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@few
@given(rng=st.randoms(use_true_random=False))
def test_a_spoilt_spec_gives_clear_errors_at_once(toy: Path, rng: random.Random) -> None:
    assert judge(draw_input(rng), toy / "p.yaml").seconds < LONGEST_S


@few
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_give_clear_errors_at_once(toy: Path, data: bytes) -> None:
    assert judge(data, toy / "p.yaml").seconds < LONGEST_S


def test_the_specs_that_are_spoilt_are_valid_before(toy: Path) -> None:
    for seed in range(20):
        data = yaml.safe_dump(valid_spec(random.Random(seed))).encode()  # noqa: S311 - no secret
        assert judge(data, toy / "p.yaml").kind == "valid"
