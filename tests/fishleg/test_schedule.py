import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishleg.pruning import cubic, linear


def test_cubic_by_hand():
    assert cubic(0.0, 0.8, 2) == pytest.approx([0.8 * (1 - 1 / 8), 0.8])
    assert cubic(0.5, 0.9, 1) == [0.9]


def test_linear_by_hand():
    assert linear(0.1, 0.4, 3) == pytest.approx([0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", [cubic, linear])
@given(
    bounds=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(sorted),
    steps=st.integers(1, 40),
)
def test_never_falls_and_ends_exactly(schedule, bounds, steps):
    initial, final = bounds
    sparsities = schedule(initial, final, steps)
    assert len(sparsities) == steps
    assert sparsities[-1] == final
    assert all(initial <= sparsity <= final for sparsity in sparsities)
    assert sparsities == sorted(sparsities)


@pytest.mark.parametrize("arguments", [(0.5, 0.4, 2), (0.0, 1.0, 2), (-0.1, 0.5, 2), (0.0, 0.5, 0)])
def test_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="xpected"):
        cubic(*arguments)
