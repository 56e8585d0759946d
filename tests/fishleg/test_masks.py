import pytest
import torch
from torch import nn

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.parameters import partition_parameters
from fishleg.pruning import (
    apply_masks,
    check_masks,
    count_masks,
    dense_masks,
    group_masks,
    weight_masks,
)


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


@pytest.fixture
def partition(model):
    return partition_parameters(model)


def test_dense_masks_cover_prunable_groups_with_their_bias_columns(partition):
    masks = dense_masks(partition)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"0": (3, 9), "3": (2, 4)}
    assert all(mask.dtype == torch.bool and mask.all() for mask in masks.values())
    assert count_masks(partition, masks) == (0, 24 + 6)


def test_weight_masks_and_back(partition):
    masks = dense_masks(partition)
    masks["0"][1, 3] = False
    masks["3"][:, 0] = False
    named = weight_masks(partition, masks)
    assert {name: tuple(mask.shape) for name, mask in named.items()} == {
        "0.weight": (3, 2, 2, 2),
        "3.weight": (2, 3),
    }
    assert not named["0.weight"][1, 0, 1, 1]
    assert count_masks(partition, masks) == (3, 30)
    again = group_masks(partition, {name: mask.to(torch.uint8) for name, mask in named.items()})
    assert all(torch.equal(again[name], masks[name]) for name in masks)


def test_no_weight_masks_mean_dense(partition):
    assert count_masks(partition, group_masks(partition, {})) == (0, 30)


def test_apply_masks_zeroes_removed_weights_only(model, partition):
    masks = dense_masks(partition)
    masks["3"][0, 1] = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_masks(model, partition, masks)
    expected = before["3.weight"].clone()
    expected[0, 1] = 0
    before["3.weight"] = expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_kept_weights_have_no_mask(model):
    partition = partition_parameters(model, keep=["0.weight"])
    assert list(dense_masks(partition)) == ["3"]


def test_check_masks_names_what_is_wrong(partition):
    masks = dense_masks(partition)
    with pytest.raises(FishLegError, match="missing \\['3'\\], not prunable \\['1'\\]"):
        check_masks(partition, {"0": masks["0"], "1": masks["3"]})
    with pytest.raises(ShapeMismatch, match="mask of 3: expected bool \\(2, 4\\)"):
        check_masks(partition, masks | {"3": masks["3"].float()})
    masks["3"][0, 3] = False
    with pytest.raises(FishLegError, match="True all down the bias column"):
        check_masks(partition, masks)


def test_group_masks_refuses_unknown_names_and_shapes(partition):
    with pytest.raises(FishLegError, match="1.weight.*no prunable weight"):
        group_masks(partition, {"1.weight": torch.ones(3)})
    with pytest.raises(ShapeMismatch, match="expected \\(2, 3\\), got \\(3, 2\\)"):
        group_masks(partition, {"3.weight": torch.ones(3, 2)})
