"""How a rank group divides data and blocks; tests with several processes are in tests/stages."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fishleg.errors import FishLegError
from fishleg.gradients.rank_group import ALONE, RankGroup
from fishleg.moments import accumulate, squares
from tests.fishleg.networks import mixed_source


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_parts_are_all_of_it_once_and_nearly_equal(count: int, size: int) -> None:
    parts = [range(count)[RankGroup(rank, size).part(count)] for rank in range(size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_dearest_are_dealt_first() -> None:
    costs = {"a": 1.0, "b": 8.0, "c": 3.0, "d": 4.0, "e": 1.0}
    owners = RankGroup(1, 2).assign(costs)
    assert owners == RankGroup(0, 2).assign(costs)
    loads: Counter[int] = Counter()
    for name, rank in owners.items():
        loads[rank] += int(costs[name])
    assert owners["b"] == 0
    assert sorted(loads.values()) == [8, 9]
    assert set(ALONE.assign(costs).values()) == {0}


def test_alone_nobody_talks() -> None:
    tensor = torch.ones(2)
    ALONE.sum([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.broadcast({"x": tensor}, [1]) == ({"x": tensor}, [1])


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_a_pass_are_the_pass(size: int) -> None:
    source = mixed_source(labels="sampled", draws=2)
    names, found, row = source.partition.names, [], 0
    for rank in range(size):
        source.rank_group = RankGroup(rank, size)
        part = source.shared()
        assert part.first_row == row
        pieces = [{name: batch[name] for name in names} for batch in part.stream(names)]
        row += sum(len(piece[names[0]]) for piece in pieces)
        found += pieces
    assert row == source.rows
    whole = source.alone().hold(names)
    for name in names:
        torch.testing.assert_close(torch.cat([piece[name] for piece in found]), whole[name])


def test_a_sample_for_each_is_needed() -> None:
    source = mixed_source()
    source.rank_group = RankGroup(0, len(source.calibration) + 1)
    with pytest.raises(FishLegError, match="Expected a calibration sample for each of the"):
        source.shared()


class Doubled(RankGroup):
    """The first of two processes, whose other one says that it has other samples, or the same."""

    others = False

    def sum(self, tensors):
        """Add what the other process would."""
        for tensor in tensors:
            tensor *= 2

    def any(self, flag):
        """Tell what either says."""
        return flag or self.others

    def broadcast(self, tensors, meta=None, *, owner=0, device="cpu"):
        """Pass on what is given."""
        return dict(tensors), meta


class Different(Doubled):
    """The same with other samples."""

    others = True


def test_a_team_with_samples_of_its_own_each_is_refused() -> None:
    source = mixed_source()
    source.rank_group = Doubled(0, 2)
    sums = accumulate(source, squares)
    assert sums.keys() == set(source.partition.names)
    source.rank_group = Different(0, 2)
    with pytest.raises(FishLegError, match="the same ones in the same order in all processes"):
        accumulate(source, squares)
