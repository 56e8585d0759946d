from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fishleg.errors import FishLegError, UnknownName
from fishleg.parameters import ParameterGroup, Partition, partition_parameters
from fishleg.pruning import count_masks, dense_masks, removal_count, select, select_n_of_m
from tests.fishleg.exact import ExactBlock, group
from tests.reference import random_spd


def removed_flat(partition: Partition, masks: dict[str, torch.Tensor]) -> list[tuple[str, int]]:
    """List the removed weights as (group, flat index in the weight), in state-dict order."""
    return [
        (g.name, index)
        for g in partition.prunable
        for index in (~masks[g.name][:, : g.weight_columns]).flatten().nonzero().flatten().tolist()
    ]


# ---------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("prunable", "sparsity", "count"),
    [(4, 0.5, 2), (5, 0.5, 3), (5, 0.7, 4), (5, 0.1, 1), (10, 0.04, 0), (10, 0.05, 1), (7, 0.0, 0)]
    + [(268336, 0.9, 241502), (0, 0.5, 0), (3, 0.999, 3)],
)
def test_removal_count_by_hand(prunable, sparsity, count):
    assert removal_count(prunable, sparsity) == count


@given(prunable=st.integers(0, 10**9), thousandths=st.integers(0, 999))
def test_removal_count_is_exact_on_decimals(prunable, thousandths):
    exact = Fraction(thousandths, 1000) * prunable + Fraction(1, 2)
    assert removal_count(prunable, thousandths / 1000) == floor(exact)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 90.0, float("nan")])
def test_removal_count_refuses_what_is_no_fraction(sparsity):
    with pytest.raises(ValueError, match="fraction removed in \\[0, 1\\)"):
        removal_count(10, sparsity)


# -------------------------------------------------------------------------------------- which


def test_four_numbers():
    partition = Partition((group("a", 2, 2),))
    masks = select(
        partition, {"a": torch.tensor([[3.0, 1.0], [2.0, 4.0]])}, dense_masks(partition), 0.5
    )
    assert masks["a"].tolist() == [[True, False], [False, True]]


def test_the_bias_column_is_never_removed_nor_counted():
    partition = Partition((group("a", 2, 1, bias=True), group("b", 1, 2)))
    saliencies = {"a": torch.tensor([[5.0, 0.0], [6.0, 0.0]]), "b": torch.tensor([[1.0, 2.0]])}
    masks = select(partition, saliencies, dense_masks(partition), 0.75)
    assert masks["a"].tolist() == [[False, True], [True, True]]
    assert masks["b"].tolist() == [[False, False]]


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_ties_go_to_the_lowest_flat_index_in_state_dict_order(distribution):
    partition = Partition((group("b", 2, 3, bias=True), group("a", 3, 2)))
    saliencies = {name: torch.ones(partition[name].shape) for name in ("a", "b")}
    masks = select(partition, saliencies, dense_masks(partition), 0.5, distribution)
    expected = {
        "global": [("b", index) for index in range(6)],
        "uniform": [("b", 0), ("b", 1), ("b", 2), ("a", 0), ("a", 1), ("a", 2)],
    }
    assert removed_flat(partition, masks) == expected[distribution]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=4
    ),
    thousandths=st.tuples(st.integers(0, 999), st.integers(0, 999)).map(sorted),
    distribution=st.sampled_from(["global", "uniform"]),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_sets_grow_and_repeat(shapes, thousandths, distribution, seed):
    partition = Partition(
        tuple(
            group(f"g{i}", rows, columns, bias=bias)
            for i, (rows, columns, bias) in enumerate(shapes)
        )
    )
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that ties are the rule
    saliencies = {
        g.name: torch.randint(0, 4, g.shape, generator=generator).float() for g in partition.groups
    }
    masks = dense_masks(partition)
    for part in thousandths:
        before, sparsity = masks, part / 1000
        masks = select(partition, saliencies, before, sparsity, distribution)
        again = select(partition, saliencies, before, sparsity, distribution)
        removed, prunable = count_masks(partition, masks)
        assert removed == removal_count(prunable, sparsity)
        for g in partition.groups:
            assert torch.equal(masks[g.name], again[g.name])
            assert not (masks[g.name] & ~before[g.name]).any()
            if distribution == "uniform":
                share = float((~masks[g.name]).sum())
                rounding = 1 + len(shapes) / 2
                assert abs(share - sparsity * g.rows * g.weight_columns) <= rounding


def test_uniform_respects_an_earlier_uneven_removal():
    partition = Partition((group("a", 1, 4), group("b", 1, 4)))
    masks = dense_masks(partition)
    masks["a"][0, :3] = False
    saliencies = {name: torch.arange(1.0, 5.0).reshape(1, 4) for name in ("a", "b")}
    after = select(partition, saliencies, masks, 0.5, "uniform")
    assert removed_flat(partition, after) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]


def test_removed_weights_do_not_come_back():
    partition = Partition((group("a", 1, 4),))
    masks = {"a": torch.tensor([[True, False, False, True]])}
    saliencies = {"a": torch.tensor([[1.0, 9.0, 9.0, 2.0]])}
    assert select(partition, saliencies, masks, 0.75)["a"].tolist() == [[False, False, False, True]]
    with pytest.raises(FishLegError, match="2 of 4 weights .* removed already, got 1"):
        select(partition, saliencies, masks, 0.25)


def test_bad_input_is_named():
    partition = Partition((group("a", 1, 2),))
    masks, fine = dense_masks(partition), {"a": torch.ones(1, 2)}
    with pytest.raises(UnknownName, match="did you mean 'uniform'"):
        select(partition, fine, masks, 0.5, "unifrom")
    with pytest.raises(FishLegError, match="a: 1 saliencies are NaN"):
        select(partition, {"a": torch.tensor([[1.0, torch.nan]])}, masks, 0.5)
    with pytest.raises(FishLegError, match="No saliency for the prunable group 'a'"):
        select(partition, {}, masks, 0.5)


def test_nothing_prunable_is_an_error_that_names_what_could_be_named():
    partition = partition_parameters(nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3)))
    assert select(partition, {}, {}, 0.0) == {}
    with pytest.raises(FishLegError, match=r"0.weight \(an embedding.*Name some .* `prunable`"):
        select(partition, {}, {}, 0.5)
    with pytest.raises(FishLegError, match="no weight with two or more dimensions"):
        select(partition_parameters(nn.LayerNorm(3)), {}, {}, 0.5)


# ---------------------------------------------------------------------------------------- N:M


def test_two_of_four_with_identity_is_magnitude():
    dense = group("a", 1, 8)
    weights = torch.tensor([[1.0, -4.0, 2.0, 3.0, 8.0, 7.0, 0.5, 6.0]])
    mask = select_n_of_m(dense, ExactBlock(torch.eye(8), (1, 8)), weights, 2, 4)
    assert mask.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]


def test_two_of_four_takes_the_cheapest_pair_by_brute_force():
    dense = group("a", 2, 4, bias=True)
    inverse = random_spd(10, seed=1)
    weights = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = select_n_of_m(dense, ExactBlock(inverse, (2, 5)), weights, 2, 4)
    for row in range(2):
        costs = {}
        for first in range(4):
            for second in range(first + 1, 4):
                q = torch.tensor([5 * row + first, 5 * row + second])
                w = weights.flatten()[q]
                costs[first, second] = float(w @ torch.linalg.inv(inverse[q][:, q]) @ w)
        assert tuple((~mask[row]).nonzero().flatten().tolist()) == min(costs, key=costs.get)
        assert mask[row, 4]


def test_n_of_m_runs_along_input_channels_at_one_kernel_position():
    conv = ParameterGroup(
        name="c", weight="c.weight", bias=None, weight_shape=(1, 4, 1, 2), prunable=True
    )
    weights = torch.tensor([[1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0]])
    mask = select_n_of_m(conv, ExactBlock(torch.eye(8), (1, 8)), weights, 1, 4)
    # channel by kernel position: (1 2 3 4) and (9 8 7 6)
    assert mask.int().reshape(4, 2).tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]


def test_n_of_m_refuses_inputs_that_do_not_divide():
    with pytest.raises(FishLegError, match="a: 2:4 needs .* got 3 inputs"):
        select_n_of_m(group("a", 1, 3), ExactBlock(torch.eye(3), (1, 3)), torch.ones(1, 3), 2, 4)


def test_n_of_m_of_a_transposed_weight_runs_along_its_rows():
    """In a transposed convolution the first dimension is the inputs'."""
    (transposed, _) = partition_parameters(nn.ConvTranspose1d(4, 1, 2)).groups
    weights = torch.tensor([[1.0, 9.0], [2.0, 8.0], [3.0, 7.0], [4.0, 6.0]])
    mask = select_n_of_m(transposed, ExactBlock(torch.eye(8), (4, 2)), weights, 1, 4)
    assert mask.int().tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]
    (grouped, _) = partition_parameters(nn.ConvTranspose1d(4, 2, 2, groups=2)).groups
    mask = select_n_of_m(grouped, ExactBlock(torch.eye(8), (4, 2)), weights, 1, 2)
    assert mask.int().tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    with pytest.raises(FishLegError, match="weight: 2:4 needs .* got 2 inputs"):
        select_n_of_m(grouped, ExactBlock(torch.eye(8), (4, 2)), weights, 2, 4)


# ----------------------------------------------------------------------------------- min_kept


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    thousandths=st.integers(0, 999),
    hundredths=st.integers(0, 60),
    distribution=st.sampled_from(["global", "uniform"]),
    seed=st.integers(0, 99),
)
def test_each_group_keeps_its_share_and_the_count_stays_exact(
    shapes, thousandths, hundredths, distribution, seed
):
    partition = Partition(tuple(group(f"g{i}", r, c) for i, (r, c) in enumerate(shapes)))
    generator = torch.Generator().manual_seed(seed)
    saliencies = {
        g.name: torch.randint(0, 4, g.shape, generator=generator).float() for g in partition.groups
    }
    dense, sparsity, share = dense_masks(partition), thousandths / 1000, hundredths / 100
    sizes = {g.name: g.size for g in partition.groups}
    wanted = {name: -(-size * hundredths // 100) for name, size in sizes.items()}
    count, total = removal_count(sum(sizes.values()), sparsity), sum(sizes.values())
    if count > total - sum(wanted.values()):
        with pytest.raises(FishLegError, match=f"remove {count} of {total} weights, but"):
            select(partition, saliencies, dense, sparsity, distribution, min_kept=share)
        return
    masks = select(partition, saliencies, dense, sparsity, distribution, min_kept=share)
    assert count_masks(partition, masks)[0] == count
    plain = select(partition, saliencies, dense, sparsity, distribution)
    for name, mask in masks.items():
        assert int(mask.sum()) >= wanted[name]
        kept, gone = saliencies[name][mask], saliencies[name][~mask]
        assert not len(gone) or not len(kept) or kept.min() >= gone.max()
        if hundredths == 0:
            assert torch.equal(mask, plain[name])


def test_min_kept_by_hand():
    partition = Partition((group("a", 1, 4), group("b", 1, 4)))
    saliencies = {"a": torch.tensor([[1.0, 4.0, 3.0, 2.0]]), "b": torch.tensor([[5.0, 6, 7, 8]])}
    masks = select(partition, saliencies, dense_masks(partition), 0.5)
    assert removed_flat(partition, masks) == [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    masks = select(partition, saliencies, dense_masks(partition), 0.5, min_kept=0.26)
    assert removed_flat(partition, masks) == [("a", 0), ("a", 3), ("b", 0), ("b", 1)]
    ties = {"a": torch.ones(1, 4), "b": torch.full((1, 4), 2.0)}
    masks = select(partition, ties, dense_masks(partition), 0.5, min_kept=0.25)
    assert removed_flat(partition, masks) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]


def test_min_kept_that_cannot_be_is_refused_with_the_numbers():
    partition = Partition((group("a", 1, 4), group("b", 1, 4)))
    saliencies, masks = {name: torch.ones(1, 4) for name in "ab"}, dense_masks(partition)
    with pytest.raises(FishLegError, match=r"remove 6 of 8 weights, but 4 have to stay \(a 2, b 2"):
        select(partition, saliencies, masks, 0.75, min_kept=0.5)
    with pytest.raises(ValueError, match="min_kept: expected a fraction"):
        select(partition, saliencies, masks, 0.5, min_kept=5)
    masks["a"][0, :3] = False
    with pytest.raises(FishLegError, match="a: min_kept=0.5 keeps 2 of its 4 weights, but only 1"):
        select(partition, saliencies, masks, 0.5, min_kept=0.5)
