"""Batch norms: statistics measured anew against the definition, and statistics that follow."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fishleg.pruning import following_norms, reestimate_norms, running_norms


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(5), nn.Dropout(0.5)).double()
    model(images(2))
    return model.eval()


def images(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return 2 + 3 * torch.randn(count, 3, 6, 6, generator=draw, dtype=torch.float64)


def test_one_batch_gives_its_own_moments_layer_by_layer() -> None:
    model, inputs = network(), images(40)
    others = {name: one.clone() for name, one in model.named_parameters()}
    reestimate_norms(model, [inputs])
    with torch.no_grad():
        values = model[0](inputs).transpose(0, 1).flatten(1)
        torch.testing.assert_close(model[1].running_mean, values.mean(1))
        torch.testing.assert_close(model[1].running_var, values.var(1))
        hidden = model[0](inputs)
        mean, variance = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), keepdim=True)
        normal = (hidden - mean) / (variance * (1 - 1 / values.shape[1]) + 1e-5).sqrt()
        scale, shift = (one.reshape(1, 4, 1, 1) for one in (model[1].weight, model[1].bias))
        outputs = model[4](torch.relu(normal * scale + shift).flatten(1))
        torch.testing.assert_close(model[5].running_mean, outputs.mean(0))
        torch.testing.assert_close(model[5].running_var, outputs.var(0))
    assert all(torch.equal(one, others[name]) for name, one in model.named_parameters())
    assert not any(module.training for module in model.modules())


def test_the_first_norm_has_the_moments_of_all_values_however_they_are_cut() -> None:
    inputs, found = images(50), []
    for parts in (inputs.split(50), inputs.split(8)):
        model = network()
        reestimate_norms(model, parts)
        found.append((model[1].running_mean, model[1].running_var))
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole)


def test_a_dense_network_keeps_its_outputs_while_its_norms_follow() -> None:
    """Batch statistics would change them; this is what the following kind is for."""
    model, inputs = network(), images(60)
    reestimate_norms(model, [inputs])
    model[5].reset_running_stats()  # the second norm's are exact for running ones before it
    with torch.no_grad():
        values = model[:5](inputs)
        model[5].running_mean.copy_(values.mean(0))
        model[5].running_var.copy_(values.var(0))
        before = model(inputs)
        with following_norms(model):
            after = model(inputs)
    torch.testing.assert_close(after, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_following_statistics_move_by_the_momentum() -> None:
    model, inputs = network(), images(30)
    model[1].momentum = 0.25
    before = model[1].running_mean.clone()
    with torch.no_grad(), following_norms(model):
        model(inputs)
    mean = model[0](inputs).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, 0.75 * before + 0.25 * mean.detach())


def test_gradients_pass_a_following_norm_as_an_affine_map() -> None:
    model, inputs = network(), images(8)
    with following_norms(model):
        outputs = model(inputs)
        outputs.square().sum().backward()
    frozen = copy.deepcopy(model)
    frozen.zero_grad()
    frozen(inputs).square().sum().backward()
    for one, other in zip(model.parameters(), frozen.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("tracks", [True, False])
def test_what_keeps_no_statistics_is_left_alone(tracks: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=tracks))
    assert len(running_norms(model)) == int(tracks)
    if not tracks:
        reestimate_norms(model, iter([torch.ones(1)]))  # not read: it has the wrong shape
        assert model[1].running_mean is None


def test_a_norm_that_no_batch_reaches_keeps_what_it_has() -> None:
    model = network()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    reestimate_norms(model, [])
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
