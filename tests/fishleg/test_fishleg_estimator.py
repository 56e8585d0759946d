"""The FishLeg estimator: every structure on a model of every kind of parameter."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from fishleg.calibration import Calibration
from fishleg.errors import NotFitted, UnknownName
from fishleg.estimators import FishLeg
from fishleg.gradients.memory import held_bytes, pack_groups
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical, Gaussian
from fishleg.options import Structure, WarmStart
from fishleg.parameters import Partition, partition_parameters
from tests import reference

DAMPING = 0.01
KRONECKER_EXACT = 1e-6  # relative error of Q where F_g is Kronecker


class Everything(nn.Module):
    """Plain and grouped convolution, both norms, a linear layer, a bare matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2, bias=False)
        self.mix = nn.Parameter(torch.randn(4, 3) / 2)
        self.layer_norm = nn.LayerNorm(3)
        self.shift = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).tanh()
        x = self.grouped(x).tanh().mean((2, 3)) @ self.mix
        return self.head(self.layer_norm(x) + self.shift)


def make_source(dtype: torch.dtype = torch.float64, **options) -> GradientSource:
    torch.manual_seed(0)
    model = Everything().to(dtype).eval()
    inputs = torch.randn(30, 2, 4, 4).to(dtype)
    partition = partition_parameters(model)
    calibration = Calibration(inputs=inputs)
    return GradientSource(
        model, Categorical(), partition, calibration, **{"batch_size": 12, **options}
    )


def make_masks(partition: Partition, density: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for group in partition.prunable:
        masks[group.name] = torch.rand(group.shape, generator=generator) < density
        if group.bias is not None:
            masks[group.name][:, -1] = True
    return masks


def make(source: GradientSource, **options) -> FishLeg:
    options = {"structure": "kronecker", "warm_start": "moments", **options}
    return FishLeg(source.partition, damping=DAMPING, **options)


def fitted(source: GradientSource, **options) -> FishLeg:
    estimator = make(source, **options)
    estimator.fit(source)
    return estimator


def objective(estimator: FishLeg, source: GradientSource, masks=None) -> float:
    """Return the sum of J, or J_M, over the groups, by dense matrices."""
    total = 0.0
    for name, gradients in source.hold(source.partition.names).items():
        block = estimator.block(name)
        size = block.shape[0] * block.shape[1]
        q = reference.block_matrix(type(block).__name__, block.tensors(), size)
        fisher = gradients.flatten(1).T @ gradients.flatten(1)
        total += float(reference.objective(q, fisher, DAMPING, (masks or {}).get(name)))
    return total


def bounds(source: GradientSource) -> tuple[float, float]:
    """Return the sums over the groups of the least J, and of the best multiple of I's."""
    least = identity = 0.0
    for gradients in source.hold(source.partition.names).values():
        fisher = gradients.flatten(1).T @ gradients.flatten(1)
        least += float(reference.least_objective(fisher, DAMPING))
        size = len(fisher)
        identity -= size**2 / (2 * (float(fisher.trace()) + DAMPING * size))
    return least, identity


def assert_same(first: FishLeg, second: FishLeg) -> None:
    for name, block in first.blocks().items():
        for key, tensor in block.tensors().items():
            assert torch.equal(second.block(name).tensors()[key], tensor), (name, key)


# ------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "alternating"},
        {"solver": "adam", "steps": 250, "learning_rate": 0.1},
        {"solver": "adam", "steps": 250, "learning_rate": 0.1, "preconditioned_steps": 60},
        {"structure": "full"},
    ],
)
@pytest.mark.parametrize("warm_start", ["identity", "moments"])
def test_finds_the_inverse_of_a_linear_gaussian_model(options, warm_start):
    """There F_g = I (x) (E[x x^T] + gamma I), Kronecker even with damping."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    inputs = torch.randn(20, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    source = GradientSource(
        model,
        Gaussian(),
        partition_parameters(model),
        Calibration(inputs=inputs),
        labels="enumerated",
    )
    options = {"refine_steps": 100, "warm_start": warm_start, **options}
    (block,) = fitted(source, **options).blocks().values()
    fisher = torch.kron(torch.eye(3), inputs.T @ inputs / len(inputs)).double()
    inverse = reference.damped_inverse(fisher, DAMPING)
    tolerance = 0.02 if options.get("solver") == "adam" else KRONECKER_EXACT
    assert (block.dense() - inverse).norm() < tolerance * inverse.norm()


@pytest.mark.parametrize("structure", get_args(Structure))
def test_every_structure_covers_every_group_and_beats_a_multiple_of_the_identity(structure):
    source = make_source()
    estimator = fitted(source, structure=structure, steps=60, refine_steps=30, block_size=7)
    assert tuple(estimator.blocks()) == source.partition.names
    for name, block in estimator.blocks().items():
        assert block.shape == source.partition[name].shape
        assert torch.linalg.eigvalsh(block.dense())[0] > 0
    told = sum(entry["objective"] for entry in estimator.report.values())
    found = objective(estimator, source)
    assert told == pytest.approx(found, rel=1e-9)
    least, identity = bounds(source)
    assert least * (1 + 1e-9) <= found < 1.1 * identity < 0
    if structure == "full":
        assert found == pytest.approx(least, rel=1e-9)


def test_vectors_get_their_full_curvature():
    source = make_source()
    estimator = fitted(source)
    held = source.hold(["norm", "layer_norm", "shift"])
    for name, gradients in held.items():
        fisher = gradients.flatten(1).T @ gradients.flatten(1)
        inverse = reference.damped_inverse(fisher, DAMPING)
        torch.testing.assert_close(estimator.block(name).dense(), inverse)


@pytest.mark.parametrize("structure", ["kronecker", "tensor_scaled"])
def test_warm_starts_lead_to_about_the_same_objective(structure):
    source = make_source()
    options = {"structure": structure, "sweeps": 10, "steps": 100, "learning_rate": 0.05}
    values = [
        objective(fitted(source, warm_start=warm_start, **options), source)
        for warm_start in get_args(WarmStart)
    ]
    assert max(values) - min(values) < 0.02 * abs(min(values))


@pytest.mark.parametrize("structure", ["kronecker", "block"])
def test_streamed_groups_give_the_bits_of_held_ones(structure):
    source = make_source()
    options = {"structure": structure, "block_size": 7}
    held = fitted(source, **options)
    sizes = [source.rows * 8 * g.rows * g.columns for g in source.partition.groups]
    packs = pack_groups(source, source.partition.names, sum(sizes) // 2)
    assert 1 < len(packs) < len(sizes)
    assert_same(held, fitted(source, memory_bytes=sum(sizes) // 2, **options))
    tight = max(sizes) - 1
    assert not all(held_bytes(source, name) <= tight for name in source.partition.names)
    assert_same(held, fitted(source, memory_bytes=tight, **options))


def test_probe_objective_is_near_the_expected_one():
    source = make_source()
    values = [
        objective(fitted(source, solver="adam", objective=form, steps=150), source)
        for form in ("expected", "probe")
    ]
    assert values[1] == pytest.approx(values[0], rel=0.02)


# --------------------------------------------------------------------------------- refinement


@pytest.mark.parametrize("structure", ["kronecker", "tensor_scaled", "block"])
@pytest.mark.parametrize("mask_fit", ["damped", "exact"])
def test_refine_improves_on_the_survivors(structure, mask_fit):
    source = make_source()
    estimator = fitted(source, structure=structure, mask_fit=mask_fit, steps=80, refine_sweeps=4)
    masks = make_masks(source.partition)
    before = objective(estimator, source, masks)
    assert estimator.masks is None
    estimator.refine(source, masks)
    after = objective(estimator, source, masks)
    assert after < before
    assert set(estimator.masks) == set(masks)
    if mask_fit == "exact" or structure == "block":
        told = sum(entry["objective"] for entry in estimator.report.values())
        assert told == pytest.approx(after, rel=1e-6)


def test_refine_goes_on_from_the_present_factors():
    source = make_source()
    masks = make_masks(source.partition)
    estimator = fitted(source, mask_fit="exact")
    estimator.refine(source, masks)
    first = estimator.report["conv"]["objective"]
    estimator.refine(source, masks)
    assert estimator.report["conv"]["before"] <= first


def test_a_group_without_survivors_keeps_its_block():
    source = make_source()
    masks = make_masks(source.partition)
    masks["grouped"] = torch.zeros_like(masks["grouped"])
    estimator = fitted(source)
    before = estimator.block("grouped").b.clone()
    estimator.refine(source, masks)
    assert torch.equal(estimator.block("grouped").b, before)
    assert "grouped" not in estimator.report


def test_refine_needs_a_fit():
    source = make_source()
    with pytest.raises(NotFitted):
        FishLeg(source.partition, damping=DAMPING).refine(source, {})


# --------------------------------------------------------------------------- state and resuming


class Interrupted(Exception):
    """Raised by a callback that plays the part of a kill."""


def saved(estimator: FishLeg) -> dict:
    """Return the state as it comes back from disk."""
    state = estimator.state_dict()
    tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    return {"tensors": tensors, "meta": json.loads(json.dumps(state["meta"]))}


def interrupted_state(estimator: FishLeg, run, calls: int) -> dict:
    """Return the state saved in call number `calls` of the callback, where the run ends."""
    states = []

    def callback(progress) -> None:
        states.append(saved(estimator))
        if len(states) == calls:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(callback)
    return states[-1]


@pytest.mark.parametrize("calls", [1, 4, 9, 14])
@pytest.mark.parametrize(
    "options",
    [
        {"sweeps": 2},
        {"structure": "tensor_scaled", "steps": 25, "preconditioned_steps": 8},
        {"sweeps": 2, "memory_bytes": 8_000},
    ],
)
def test_an_interrupted_fit_resumes_to_the_same_bits(options, calls):
    source = make_source(torch.float32)
    whole = fitted(source, **options)
    broken = make(source, **options)
    state = interrupted_state(broken, lambda callback: broken.fit(source, callback), calls)
    again = FishLeg(source.partition, damping=1.0)
    again.load_state_dict(state)
    again.fit(source, resume=True)
    assert_same(whole, again)
    assert again.report == whole.report
    assert again.damping == DAMPING


@pytest.mark.parametrize("mask_fit", ["damped", "exact"])
@pytest.mark.parametrize("calls", [1, 6])
def test_an_interrupted_refinement_resumes_to_the_same_bits(mask_fit, calls):
    source = make_source(torch.float32)
    masks = make_masks(source.partition)
    whole = fitted(source, mask_fit=mask_fit)
    state = saved(whole)
    whole.refine(source, masks)
    broken = FishLeg(source.partition, damping=DAMPING)
    broken.load_state_dict(state)
    state = interrupted_state(
        broken, lambda callback: broken.refine(source, masks, callback), calls
    )
    again = FishLeg(source.partition, damping=DAMPING)
    again.load_state_dict(state)
    again.fit(source, resume=True)
    assert_same(whole, again)
    assert all(torch.equal(again.masks[name], mask) for name, mask in masks.items())


def test_resuming_a_finished_fit_changes_nothing():
    source = make_source()
    estimator = fitted(source)
    state = saved(estimator)
    again = FishLeg(source.partition, damping=DAMPING)
    again.load_state_dict(state)
    calls = []
    again.fit(source, calls.append, resume=True)
    assert calls == []
    assert_same(estimator, again)


def test_progress_moves_to_the_end_and_tells_j():
    source = make_source()
    told = []
    estimator = make(source, sweeps=2)
    estimator.fit(source, told.append)
    steps = [progress.done for progress in told if progress.metrics]
    assert steps == sorted(set(steps))
    assert len(steps) < len(told)  # heard of while gradients are gathered, too
    assert steps[-1] == told[-1].total == 4 * 4 + 3  # four Kronecker groups and three vectors
    found = objective(estimator, source)
    assert told[-1].metrics["objective"] == pytest.approx(found, rel=1e-9)


def test_model_is_left_as_it_was():
    source = make_source()
    source.model.train()
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    fitted(source)
    assert all(module.training for module in source.model.modules())
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, before[name])


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"structure": "kroneker"}, UnknownName, "did you mean 'kronecker'"),
        ({"warm_start": "previous"}, UnknownName, "warm_start"),
        ({"sweeps": 0}, ValueError, "sweeps: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: expected > 0"),
        ({"preconditioned_steps": 80}, ValueError, "plain steps come last"),
        ({"structure": "tensor", "solver": "alternating"}, ValueError, "use 'adam'"),
        (
            {"structure": "kronecker", "solver": "alternating", "objective": "probe"},
            ValueError,
            "needs the solver 'adam'",
        ),
        ({"structure": "eigen"}, ValueError, "fishleg.estimators.Eigen"),
        ({"shrinkage": 0.5}, TypeError, "shrinkage"),
        ({"sweep": 3}, TypeError, "sweep"),
    ],
)
def test_options_are_checked(options, error, words):
    partition = partition_parameters(nn.Linear(2, 2))
    with pytest.raises(error, match=words):
        FishLeg(partition, damping=DAMPING, **options)
