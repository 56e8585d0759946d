"""Zeros that are there before a step are masks, and what is removed is 0 where it is used."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError, UnknownName
from fishleg.estimators import EKFAC, OBS, DiagonalFisher, FishLeg, Magnitude
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.parameters import partition_parameters
from fishleg.parametrised import evaluate
from fishleg.pruning import (
    HeldMasks,
    Refinement,
    RefinementOptions,
    compensate,
    count_masks,
    dense_masks,
    prune_once,
    prune_to,
    weight_masks,
    zero_masks,
)
from tests.fishleg.exact import ExactEstimator
from tests.reference import random_spd


def network(kind: str = "plain", *, conv: bool = False) -> nn.Module:
    """A small network of parametrised layers in evaluation mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    if conv:
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64 if conv else 8, 3))
    make = {
        "plain": lambda layer: layer,
        "weight_norm": parametrizations.weight_norm,
        "whole_norm": lambda layer: parametrizations.weight_norm(layer, dim=None),
        "spectral_norm": parametrizations.spectral_norm,
        "old_weight_norm": nn.utils.weight_norm,
        "old_spectral_norm": nn.utils.spectral_norm,
        "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    }[kind]
    for layer in model:
        if hasattr(layer, "weight"):
            make(layer)
    return model.eval()


def source_of(model: nn.Module) -> GradientSource:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 4, 4) if isinstance(model[0], nn.Conv2d) else (6,)
    inputs = torch.randn(24, *shape, generator=generator)
    partition = partition_parameters(model)
    return GradientSource(model, Categorical(), partition, Calibration(inputs=inputs))


def fitted(model: nn.Module, kind: Any = EKFAC) -> Any:
    source = source_of(model)
    estimator = kind(source.partition, damping=1e-3)
    estimator.fit(source)
    return estimator


def used_zeros(model: nn.Module) -> tuple[int, int]:
    """Count (zeros, all) of the weights as the layers read them."""
    weights = [layer.weight.detach() for layer in model if hasattr(layer, "weight")]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


_OLD = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
KINDS = ["weight_norm", "whole_norm", "spectral_norm", "old_weight_norm", "old_spectral_norm"]


# --------------------------------------------------------------------- zeros where they are used


@_OLD
@pytest.mark.parametrize("estimator", [Magnitude, DiagonalFisher, EKFAC])
@pytest.mark.parametrize("kind", [*KINDS, "prune"])
def test_exactly_the_count_is_removed_of_the_weights_as_they_are_used(kind, estimator):
    model = network(kind)
    report = prune_once(model, fitted(model, estimator), sparsity=0.9)
    assert (report.removed, report.prunable) == (122, 136)  # floor(0.9 * 136 + 1/2)
    assert used_zeros(model) == (122, 136)
    assert model(torch.randn(5, 6)).isfinite().all()


def test_nine_tenths_of_all_weights_of_a_convolutional_autoencoder_go():
    model = network(conv=True)
    report = prune_once(model, fitted(model, DiagonalFisher), sparsity=0.9)
    assert report.unprunable == ()
    assert report.removed == used_zeros(model)[0] == round(0.9 * (36 + 144 + 192))


@_OLD
@pytest.mark.parametrize("kind", ["weight_norm", "whole_norm", "old_weight_norm"])
def test_a_weight_normalised_layer_may_lose_everything(kind):
    model = network(kind)
    estimator = fitted(model)
    masks = dense_masks(estimator.partition)
    masks["2"][:, :-1] = False
    report = prune_to(model, estimator, masks=masks)
    assert report.emptied == ("2",)
    assert (model[2].weight == 0).all()
    outputs = model(torch.randn(5, 6))
    assert outputs.isfinite().all()
    assert (outputs - outputs[0]).abs().max() < 1e-6  # nothing of the input passes
    outputs.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@_OLD
@pytest.mark.parametrize("kind", ["spectral_norm", "old_spectral_norm"])
def test_a_weight_divided_by_its_norm_may_not_and_the_model_stays_as_it_was(kind):
    model = network(kind)
    estimator = fitted(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = dense_masks(estimator.partition)
    masks["2"][:, :-1] = False
    with pytest.raises(FishLegError, match="2.weight: expected zeros .* divided by its norm"):
        prune_to(model, estimator, masks=masks)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_select_leaves_one_of_what_is_divided_by_its_norm():
    model = network("spectral_norm")
    report = prune_once(model, fitted(model, Magnitude), sparsity=0.975)  # 3 of 136 stay
    assert report.emptied == ()
    assert used_zeros(model) == (133, 136)
    with pytest.raises(FishLegError, match=r"remove 134 of 136 weights, but 3 have to stay"):
        prune_once(model, fitted(model, Magnitude), sparsity=0.985)


class Rescaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * x

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 100


def test_magnitude_is_that_of_the_weights_as_they_are_used():
    plain, scaled = network(), network()
    parametrize.register_parametrization(scaled[0], "weight", Rescaled())
    for model in (plain, scaled):
        prune_once(model, fitted(model, Magnitude), sparsity=0.5)
    for number in (0, 2, 4):
        assert torch.equal(plain[number].weight == 0, scaled[number].weight == 0)


def test_masks_are_put_back_after_a_step_of_an_optimiser():
    model = network("weight_norm")
    partition = partition_parameters(model)
    masks = dense_masks(partition)
    masks["0"][0, :-1] = False  # a whole row
    masks["2"][0, :3] = False
    held = HeldMasks(model, weight_masks(partition, masks))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        held.apply()
        assert used_zeros(model)[0] == 6 + 3
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert model[0].weight.isfinite().all()


def test_refinement_keeps_the_zeros_of_weight_normalised_layers():
    dense, model = network("weight_norm"), network("weight_norm")
    report = prune_once(model, fitted(model), sparsity=0.9)
    refinement = Refinement(
        model,
        dense,
        Categorical(),
        partition_parameters(model),
        report.masks,
        steps=4,
        options=RefinementOptions(),
    )
    for _ in range(4):
        refinement.step(torch.randn(8, 6))
    assert used_zeros(model) == (122, 136)


# ----------------------------------------------------------------------------- zeros that are found


def test_zeros_count_from_one_percent_of_a_tensor_on():
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 20))
    with torch.no_grad():
        model[0].weight[0, :2] = 0  # 1 % of 200
        model[1].weight[0, 0] = 0  # 0.5 %
        model[0].bias.zero_()
    partition = partition_parameters(model)
    masks = zero_masks(model, partition)
    assert count_masks(partition, masks) == (2, 400)
    assert not masks["0"][0, :2].any()
    assert count_masks(partition, zero_masks(model, partition, at_least=0.005)) == (3, 400)
    assert count_masks(partition, zero_masks(model, partition, at_least=0.011)) == (0, 400)


def test_a_pruned_network_that_is_loaded_and_pruned_again_counts_the_whole(tmp_path):
    model = network()
    first = prune_once(model, fitted(model), sparsity=0.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = network()
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    second = prune_once(loaded, fitted(loaded), sparsity=0.8)
    assert (second.removed, second.prunable) == (109, 136)  # floor(0.8 * 136 + 1/2)
    assert used_zeros(loaded) == (109, 136)
    assert all(not (second.masks[name] & ~first.masks[name]).any() for name in first.masks)
    assert sum(second.zeros.values()) == first.removed == 68
    assert "68 weights were exactly 0 before the step and count as removed" in second.warnings[0]


def test_zeros_that_are_found_do_not_come_back():
    model = network()
    prune_once(model, fitted(model), sparsity=0.5)
    with pytest.raises(FishLegError, match=r"expected at least 0.5, .* 68 of 136 .* zeros='free'"):
        prune_once(model, fitted(model), sparsity=0.25)
    report = prune_once(model, fitted(model), sparsity=0.25, zeros="free")
    assert (report.removed, report.zeros) == (34, {})
    assert count_masks(partition_parameters(model), report.masks) == (34, 136)
    with pytest.raises(UnknownName, match="zeros"):
        prune_once(model, fitted(model), sparsity=0.5, zeros="drop")


def test_masks_that_are_given_are_taken_as_they_are():
    model = network()
    prune_once(model, fitted(model), sparsity=0.5)
    estimator = fitted(model)
    masks = dense_masks(estimator.partition)
    report = prune_once(model, estimator, sparsity=0.0, masks=masks)
    assert (report.removed, report.zeros) == (0, {})


def test_the_masks_of_torch_are_masks_however_few():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
    mask = torch.ones(20, 20)
    mask[3, 4] = 0
    prune.custom_from_mask(model[0], "weight", mask)
    assert model[0].weight_orig[3, 4] != 0
    source = GradientSource(
        model, Categorical(), partition_parameters(model), Calibration(inputs=torch.randn(8, 20))
    )
    estimator = DiagonalFisher(source.partition, damping=1e-3)
    estimator.fit(source)
    report = prune_once(model, estimator, sparsity=0.5)
    assert report.zeros == {"0": 1}
    assert not report.masks["0"][3, 4]
    assert used_zeros(model) == (230, 460)
    assert used_zeros(model) == (230, 460)
    prune.remove(model[0], "weight")
    assert used_zeros(model) == (230, 460)


@_OLD
@pytest.mark.parametrize("kind", KINDS)
def test_a_parametrised_network_is_pruned_again(kind, tmp_path):
    model = network(kind)
    first = prune_once(model, fitted(model), sparsity=0.8)
    loaded = network(kind)
    loaded.load_state_dict(model.state_dict())
    found = zero_masks(loaded, partition_parameters(loaded))
    assert all(torch.equal(found[name], first.masks[name]) for name in found)
    second = prune_once(loaded, fitted(loaded), sparsity=0.9)
    assert second.removed == 122
    assert used_zeros(loaded) == (122, 136)


@pytest.mark.parametrize("selection", ["single", "greedy"])
def test_zeros_that_are_found_are_constraints_of_the_full_curvature(selection):
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    hessian = random_spd(12, seed=3)
    weight = model[0].weight
    with torch.no_grad():
        weight[:, 1] = 0
        weight[0, 2] = 0
    old = weight.detach().clone().flatten()
    estimator = ExactEstimator(partition_parameters(model), {"0": torch.linalg.inv(hessian)})
    report = prune_once(model, estimator, sparsity=0.5, selection=selection, tolerance=1e-12)
    assert report.removed == 6
    # least 1/2 d^T H d with d_P = -w_P, P all six zeros: d_r = H_rr^-1 H_rP w_P
    gone = ~report.masks["0"].flatten()
    assert gone[old == 0].all()
    move = torch.zeros_like(old)
    move[gone] = -old[gone]
    move[~gone] = torch.linalg.solve(hessian[~gone][:, ~gone], hessian[~gone][:, gone] @ old[gone])
    torch.testing.assert_close(weight.detach().flatten(), old + move, rtol=1e-9, atol=1e-9)
    assert report.predicted == pytest.approx(0.5 * float(move @ hessian @ move))


def test_the_hidden_weights_of_torchs_masks_do_not_enter_the_compensation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    plain = nn.Sequential(nn.Linear(4, 3)).double()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).expand(3, 4)
    plain.load_state_dict(model.state_dict())
    plain[0].weight.data *= mask
    prune.custom_from_mask(model[0], "weight", mask)
    inverse = torch.linalg.inv(random_spd(15, seed=3))
    for one in (plain, model):
        prune_once(one, ExactEstimator(partition_parameters(one), {"0": inverse}), sparsity=0.6)
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=1e-12, atol=1e-12)


def test_an_estimate_on_survivors_and_new_zeros_within_them():
    """Zeros within the support are constraints, what lies outside it is not looked at."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    hessian = random_spd(12, seed=5)
    weight = model[0].weight
    support = torch.ones(3, 4, dtype=torch.bool)
    support[:, 0] = False
    with torch.no_grad():
        weight[:, :2] = 0
    inside = support.flatten()
    inverse = torch.zeros_like(hessian)
    inverse[inside[:, None] & inside] = torch.linalg.inv(hessian[inside][:, inside]).flatten()
    estimator = ExactEstimator(partition_parameters(model), {"0": inverse}, masks={"0": support})
    old = weight.detach().clone().flatten()
    report = prune_once(model, estimator, sparsity=0.75, tolerance=1e-12)
    assert report.zeros == {"0": 3}
    assert report.removed == 9
    kept = report.masks["0"].flatten()
    gone = inside & ~kept
    move = torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, gone] @ old[gone])
    torch.testing.assert_close(weight.detach().flatten()[kept], old[kept] + move)


# -------------------------------------------------------------------------------------- warnings


def test_an_emptied_layer_is_named_and_min_kept_leaves_none():
    torch.manual_seed(0)
    depthwise = [
        layer
        for _ in range(3)
        for layer in (nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    ]
    build = nn.Sequential(nn.Conv2d(1, 8, 3), *depthwise, nn.Flatten(), nn.Linear(32, 3))
    with torch.no_grad():
        for layer in build:
            if isinstance(layer, nn.Conv2d) and layer.groups == 8:
                layer.weight.mul_(0.01)
    state = {name: value.clone() for name, value in build.state_dict().items()}
    partition = partition_parameters(build)
    estimator = Magnitude(partition, damping=1.0)
    estimator.fit(
        GradientSource(build, Categorical(), partition, Calibration(inputs=torch.ones(1, 1, 4, 4)))
    )
    report = prune_once(build, estimator, sparsity=0.9)
    assert {"1", "4", "7"} <= set(report.emptied)
    assert f"lost every weight: {', '.join(report.emptied)};" in report.warnings[0]
    build.load_state_dict(state)
    kept = prune_once(build, estimator, sparsity=0.9, min_kept=0.05)
    assert kept.emptied == kept.warnings == ()
    assert kept.removed == report.removed
    for group in partition.prunable:
        survivors = int(kept.masks[group.name][:, : group.weight_columns].sum())
        assert survivors >= 0.05 * group.rows * group.weight_columns


def test_a_solve_that_stops_short_is_a_warning():
    model = network()
    report = prune_once(model, fitted(model, OBS), sparsity=0.9, max_iterations=1)
    assert any("conjugate gradients stopped" in warning for warning in report.warnings)
    assert len(report.warnings) == sum(not solve.converged for solve in report.solves.values())


def test_a_network_without_prunable_weights_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
    partition = partition_parameters(model, keep=["1.weight"])
    estimator = ExactEstimator(partition, {g.name: torch.eye(g.size) for g in partition.groups})
    wanted = r"0.weight \(an embedding; .*; 1.weight \(kept dense on request\)"
    with pytest.raises(FishLegError, match=wanted):
        prune_once(model, estimator, sparsity=0.9)
    with pytest.raises(FishLegError, match=wanted):
        prune_to(model, estimator, masks={})
    assert prune_once(model, estimator, sparsity=0.0).removed == 0


def test_a_move_that_is_not_finite_is_refused_and_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    estimator = ExactEstimator(partition_parameters(model), {"0": torch.eye(6)})
    estimator.block("0").matrix[1, 0] = torch.inf
    before = model[0].weight.clone()
    masks = {"0": torch.tensor([[True, False, True], [True, True, True]])}
    with pytest.raises(FishLegError, match="0.weight: expected finite weights after the step"):
        prune_to(model, estimator, masks=masks, compensation="independent")
    assert torch.equal(before, model[0].weight)


def test_what_is_asked_of_compensate_alone_is_a_constraint_too():
    """The deltas of `compensate` keep every zero of the masks, whatever the method."""
    model = network()
    prune_once(model, fitted(model), sparsity=0.5)
    estimator = fitted(model)
    weights = estimator.partition.gather({n: p.detach() for n, p in model.named_parameters()})
    masks = zero_masks(model, estimator.partition)
    for method in ("none", "independent", "joint"):
        deltas, _ = compensate(estimator, weights, masks, method=method)
        for name, mask in masks.items():
            assert ((weights[name] + deltas[name])[~mask] == 0).all()


def test_what_is_used_is_evaluated_without_a_power_iteration():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3)).train()
    model = nn.Sequential(layer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, "0.weight")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert layer.training


def test_an_estimate_without_curvature_is_a_warning():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e4)  # tanh is flat there
    report = prune_once(model, fitted(model, DiagonalFisher), sparsity=0.5)
    assert any("curvature vanishes" in warning for warning in report.warnings)
    assert "0.001 in 0: their weights are judged by magnitude alone" in report.warnings[-1]
    assert prune_once(network(), fitted(network(), DiagonalFisher), sparsity=0.5).warnings == ()
    assert fitted(model, Magnitude).warnings == ()


def test_a_fit_that_did_less_than_asked_is_a_warning():
    model = network()
    source = source_of(model)
    estimator = FishLeg(
        source.partition,
        damping=1e-3,
        structure="kronecker",
        solver="adam",
        steps=4,
        learning_rate=50.0,
    )
    estimator.fit(source)
    assert any("phases of Adam did not lower J" in warning for warning in estimator.warnings)
