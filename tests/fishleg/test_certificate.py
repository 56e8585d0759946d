"""The certificate, of Q and of a pruning, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fishleg.calibration import Calibration
from fishleg.certificate import certify, pruning_certificate
from fishleg.errors import ShapeMismatch
from fishleg.estimators import DiagonalFisher, FishLeg
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical, Gaussian
from fishleg.parameters import partition_parameters
from tests import reference
from tests.fishleg.networks import Tied, shake, source_of

DAMPING = 0.02
EXACT = 1e-8
GROUPS = [("0.weight", "0.bias"), ("2.weight", "2.bias")]
SMALL = 1e-3  # size of a change of the weights for which the quadratic model is good


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def make_source(
    model: nn.Module, likelihood=None, *, seed: int = 0, labels: str = "enumerated", targets=True
) -> GradientSource:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(3, (12,), generator=generator)
    return GradientSource(
        model,
        likelihood or Categorical(),
        partition_parameters(model),
        Calibration(inputs=inputs, targets=classes if targets else None),
        labels=labels,
        batch_size=9,
    )


def dense_fishers(source: GradientSource) -> dict[str, torch.Tensor]:
    return {
        name: reference.dense_fisher(source.model, source.calibration.inputs, [group])
        for name, group in zip(("0", "2"), GROUPS, strict=True)
    }


@pytest.mark.parametrize("masked", [False, True])
def test_numbers_are_those_of_dense_matrices(masked):
    model = make_model()
    fitted_on, held_out = make_source(model, seed=0), make_source(model, seed=1)
    estimator = FishLeg(
        fitted_on.partition,
        damping=DAMPING,
        structure="kronecker",
        warm_start="moments",
        mask_fit="exact",
    )
    estimator.fit(fitted_on)
    masks = {}
    if masked:
        generator = torch.Generator().manual_seed(2)
        masks = {
            g.name: torch.rand(g.shape, generator=generator) < 0.6
            for g in fitted_on.partition.groups
        }
        estimator.refine(fitted_on, masks)
    found = certify(estimator, held_out, probes=4)
    totals = torch.zeros(3, dtype=torch.float64)
    for name, fisher in dense_fishers(held_out).items():
        numbers, mask = found["groups"][name], masks.get(name)
        q = reference.kronecker_matrix(estimator.block(name).b, estimator.block(name).c)
        keep = torch.ones(len(q)).double() if mask is None else mask.flatten().double()
        q = q * keep * keep[:, None]
        damped = fisher + DAMPING * torch.eye(len(q), dtype=torch.float64)
        curvature, trace = torch.trace(q @ damped @ q), torch.trace(q)
        best = (keep / damped.diagonal()).sum()
        assert numbers["objective"] == pytest.approx(float(curvature / 2 - trace), rel=EXACT)
        assert numbers["best_scale"] == pytest.approx(float(trace / curvature), rel=EXACT)
        assert numbers["diagonal_objective"] == pytest.approx(-float(best) / 2, rel=EXACT)
        rescaled = reference.objective(q * trace / curvature, fisher, DAMPING)
        assert numbers["rescaled_objective"] == pytest.approx(float(rescaled), rel=EXACT)
        totals += torch.stack([curvature, trace, best])
        assert ("log_det_objective" in numbers) == (mask is None)
        if mask is None:
            log_det = float((q * damped).sum() - torch.linalg.slogdet(q)[1])
            assert numbers["log_det_objective"] == pytest.approx(log_det, rel=EXACT)
    network = found["network"]
    curvature, trace, best = totals.tolist()
    assert network["objective"] == pytest.approx(curvature / 2 - trace, rel=EXACT)
    if not masked:
        parts = [numbers["log_det_objective"] for numbers in found["groups"].values()]
        assert network["log_det_objective"] == pytest.approx(sum(parts), rel=EXACT)
    assert network["best_scale"] == pytest.approx(trace / curvature, rel=EXACT)
    assert network["diagonal_objective"] == pytest.approx(-best / 2, rel=EXACT)


def test_residual_vanishes_for_the_inverse_and_is_one_for_nothing():
    model = nn.Linear(3, 3).double()
    source = make_source(model)
    estimator = FishLeg(source.partition, damping=DAMPING, structure="full")
    estimator.fit(source)
    found = certify(estimator, source)
    assert found["network"]["residual"] < EXACT
    assert found["network"]["best_scale"] == pytest.approx(1.0, rel=EXACT)
    name = source.partition.names[0]
    assert found["groups"][name]["residual"] < EXACT
    estimator.block(name).matrices.mul_(1e-9)
    found = certify(estimator, source)
    assert found["network"]["residual"] == pytest.approx(1.0, abs=1e-6)
    assert found["groups"][name]["residual"] == pytest.approx(1.0, abs=1e-6)


def test_residual_of_the_network_sees_what_blocks_leave_out():
    """Each block is exact, so only the curvature between the layers is missing."""
    source = make_source(make_model())
    estimator = FishLeg(source.partition, damping=DAMPING, structure="full")
    estimator.fit(source)
    found = certify(estimator, source)
    assert max(numbers["residual"] for numbers in found["groups"].values()) < EXACT
    assert found["network"]["residual"] > 0.1


def test_no_diagonal_estimate_beats_the_baseline():
    source = make_source(make_model())
    estimator = DiagonalFisher(source.partition, damping=DAMPING)
    estimator.fit(source)
    for numbers in certify(estimator, source)["groups"].values():
        assert numbers["objective"] == pytest.approx(numbers["diagonal_objective"], rel=EXACT)
    held_out = certify(estimator, make_source(make_model(), seed=1))
    for numbers in held_out["groups"].values():
        assert numbers["objective"] > numbers["diagonal_objective"]


def changed(model: nn.Module, size: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: p.detach() + size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def test_predictions_are_the_dense_quadratic_forms():
    source = make_source(make_model())
    after = changed(source.model, SMALL)
    found = pruning_certificate(source, after)
    change = {name: after[name] - p.detach() for name, p in source.model.named_parameters()}
    fisher = reference.dense_fisher(source.model, source.calibration.inputs, GROUPS)
    d = reference.flat_vector(change, GROUPS)
    assert found["predicted_kl"] == pytest.approx(float(d @ fisher @ d) / 2, rel=EXACT)
    blocks = sum(
        float(v @ f @ v) / 2
        for group, f in zip(GROUPS, dense_fishers(source).values(), strict=True)
        for v in [reference.group_vector(change, group)]
    )
    assert found["predicted_kl_blocks"] == pytest.approx(blocks, rel=EXACT)
    assert blocks != pytest.approx(found["predicted_kl"], rel=0.01)
    loss = nn.functional.cross_entropy(
        source.model(source.calibration.inputs), source.calibration.targets
    )
    slope = reference.gradient(source.model, loss, GROUPS) @ d
    wanted = float(slope) + found["predicted_kl"]
    assert found["predicted_loss_change"] == pytest.approx(wanted, rel=EXACT)


@pytest.mark.parametrize("size", [SMALL, 1.0])
def test_measurements_are_measured(size):
    source = make_source(make_model())
    after = changed(source.model, size)
    found = pruning_certificate(source, after)
    other = make_model()
    other.load_state_dict(after)
    inputs, targets = source.calibration.inputs, source.calibration.targets
    before, later = (m(inputs).log_softmax(-1).detach() for m in (source.model, other))
    divergence = (before.exp() * (before - later)).sum(-1).mean()
    assert found["measured_kl"] == pytest.approx(float(divergence), rel=EXACT)
    rise = (before - later)[torch.arange(len(targets)), targets].mean()
    assert found["measured_loss_change"] == pytest.approx(float(rise), rel=EXACT)


def test_prediction_meets_measurement_for_a_small_change():
    source = make_source(make_model())
    found = pruning_certificate(source, changed(source.model, SMALL))
    assert found["predicted_kl"] == pytest.approx(found["measured_kl"], rel=0.02)
    rise = found["measured_loss_change"]
    assert found["predicted_loss_change"] == pytest.approx(rise, rel=0.02)


@pytest.mark.parametrize("enumerates", [False, True])
def test_gaussian_divergence_is_exact_even_when_labels_are_drawn(enumerates):
    class Drawing(Gaussian):
        def enumerate(self, outputs):
            return super().enumerate(outputs) if enumerates else None

    source = make_source(make_model(), Drawing(variance=0.5), labels="sampled", targets=False)
    after = changed(source.model, 1.0)
    other = make_model()
    other.load_state_dict(after)
    inputs = source.calibration.inputs
    moved = (other(inputs) - source.model(inputs)).detach().square().sum(-1).mean() / (2 * 0.5)
    found = pruning_certificate(source, after)
    assert found["measured_kl"] == pytest.approx(float(moved), rel=EXACT)
    assert "measured_loss_change" not in found
    assert "predicted_loss_change" not in found


def test_leaves_the_model_alone_and_takes_part_of_the_weights():
    source = make_source(make_model())
    before = {name: p.detach().clone() for name, p in source.model.named_parameters()}
    found = pruning_certificate(source, {"2.bias": before["2.bias"] + 0.1})
    assert found["measured_kl"] == pytest.approx(0.0, abs=1e-12)  # softmax ignores a shift
    for name, p in source.model.named_parameters():
        assert torch.equal(p, before[name])


def test_refuses_a_wrong_shape():
    source = make_source(make_model())
    with pytest.raises(ShapeMismatch, match="2.bias: expected \\(3,\\), got \\(4,\\)"):
        pruning_certificate(source, {"2.bias": torch.zeros(4)})


def test_a_tied_parameter_may_go_by_either_name():
    torch.manual_seed(0)
    model = shake(Tied())
    source = source_of(model, Calibration(inputs=torch.randn(5, 4, dtype=torch.float64)))
    after = model.first.weight.detach() * 1.1
    one, other = (
        pruning_certificate(source, {name: after}) for name in ("first.weight", "second.weight")
    )
    assert one == other
    assert one["predicted_kl_blocks"] > 0
