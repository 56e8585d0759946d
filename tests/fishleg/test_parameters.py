import pytest
import torch
from torch import nn

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.parameters import partition_parameters
from tests.fishleg.networks import Attention, Mixed, Tied
from tests.reference import group_vector


def test_groups_of_a_mixed_network():
    partition = partition_parameters(Mixed())
    assert {group.name: (group.shape, group.prunable) for group in partition.groups} == {
        "mix": ((6, 5), False),
        "gain": ((1, 1), False),
        "conv": ((4, 18), True),
        "norm": ((4, 2), False),
        "grouped": ((6, 19), True),
        "layer_norm": ((6, 2), False),
        "head": ((3, 6), True),
    }
    assert partition.uncovered == ()
    assert partition["grouped"].kernel == 9
    assert [group.name for group in partition.prunable] == ["conv", "grouped", "head"]


def test_every_parameter_is_in_one_group():
    for model in (Mixed(), Tied(), Attention(batch_first=True)):
        found = [name for group in partition_parameters(model).groups for name in group.tensors]
        assert sorted(found) == sorted(dict(model.named_parameters()))


def test_gather_is_the_reference_and_scatter_undoes_it():
    model = Mixed()
    partition = partition_parameters(model)
    tensors = dict(model.named_parameters())
    matrices = partition.gather(tensors)
    for group in partition.groups:
        expected = group_vector(tensors, (group.weight, group.bias))
        assert torch.equal(matrices[group.name].flatten(), expected)
    for name, tensor in partition.scatter(matrices).items():
        assert torch.equal(tensor, tensors[name])


def test_leading_dimensions_are_kept():
    partition = partition_parameters(Mixed())
    tensors = {
        name: torch.randn(2, 3, *parameter.shape) for name, parameter in Mixed().named_parameters()
    }
    matrices = partition.gather(tensors)
    assert matrices["grouped"].shape == (2, 3, 6, 19)
    for name, tensor in partition.scatter(matrices).items():
        assert torch.equal(tensor, tensors[name])


def test_patterns_choose_what_is_prunable_kept_and_skipped():
    model = Mixed()
    partition = partition_parameters(
        model, prunable=["mix"], keep=["conv.*"], skip=["layer_norm.*"]
    )
    assert [group.name for group in partition.prunable] == ["mix", "grouped", "head"]
    assert dict(partition.uncovered) == {
        "layer_norm.weight": "skipped on request",
        "layer_norm.bias": "skipped on request",
    }


def test_frozen_parameters_are_reported():
    model = Mixed()
    model.conv.weight.requires_grad_(False)
    partition = partition_parameters(model)
    assert partition.uncovered == (("conv.weight", "frozen: requires_grad is False"),)


def test_a_vector_is_never_prunable():
    with pytest.raises(FishLegError, match="norm.weight: fewer than two dimensions"):
        partition_parameters(Mixed(), prunable=["norm.weight"])
    assert not partition_parameters(Mixed(), prunable=["*"])["norm"].prunable


def test_the_root_may_be_a_layer():
    (group,) = partition_parameters(nn.Linear(2, 3)).groups
    assert (group.name, group.weight, group.bias, group.shape) == (
        "weight",
        "weight",
        "bias",
        (3, 3),
    )


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(FishLegError, match="convolution"):
        partition_parameters(Mixed(), keep=["convolution.*"])


def test_wrong_shapes_are_refused():
    group = partition_parameters(Mixed())["head"]
    with pytest.raises(ShapeMismatch, match="head.weight"):
        group.gather({"head.weight": torch.zeros(5, 3), "head.bias": torch.zeros(3)})
    with pytest.raises(ShapeMismatch, match="head"):
        group.scatter(torch.zeros(3, 5))
