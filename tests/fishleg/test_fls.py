"""The surgeon as published: fresh batches keyed by step, masks in the objective, carried lambda."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fishleg.blocks import KroneckerBlock
from fishleg.calibration import Calibration
from fishleg.certificate import certify
from fishleg.estimators import FLS, FishLeg
from fishleg.fresh import FreshBatches, step_seed
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.options import FlsOptions
from fishleg.parameters import Partition, partition_parameters
from fishleg.solvers.batch_objective import BatchObjective
from fishleg.streaming import StreamedCalibration
from tests import reference

DAMPING = 0.05


def inputs(count: int = 200) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def source(model: nn.Module, partition: Partition, samples=None, **changes) -> GradientSource:
    samples = Calibration(inputs=inputs()) if samples is None else samples
    return GradientSource(model, Categorical(), partition, samples, **{"batch_size": 50} | changes)


def fitted(**changes) -> tuple[FLS, GradientSource]:
    model = network()
    partition = partition_parameters(model)
    data = source(model, partition)
    given = {"steps": 400, "batch": 20, "check_every": 20, "patience": 20, "learning_rate": 0.05}
    estimator = FLS(partition, damping=DAMPING, **given | changes)
    estimator.fit(data)
    return estimator, data


def network_objective(estimator, data: GradientSource, name: str = "objective") -> float:
    return certify(estimator, data.over(data.calibration, seed=99))["network"][name]


# -- batches


def test_a_batch_depends_on_its_step_alone():
    samples = Calibration(inputs=inputs(50))
    forward = FreshBatches(samples, 8, seed=3)
    found = {step: forward.batch(step).indices.tolist() for step in range(20)}
    for step in (17, 3, 11, 0):
        assert FreshBatches(samples, 8, seed=3).batch(step).indices.tolist() == found[step]
    assert found != {
        step: FreshBatches(samples, 8, seed=4).batch(step).indices.tolist() for step in range(20)
    }


def test_each_round_has_each_sample_once_in_another_order():
    batches = FreshBatches(Calibration(inputs=inputs(50)), 7, seed=0, held_out=8)
    drawn = torch.cat([batches.batch(step).indices for step in range(12)])
    first, second = drawn[:42], drawn[42:84]
    unseen = set(batches.held_out().indices.tolist())
    assert len(unseen) == 8
    for one in (first, second):
        assert set(one.tolist()) == set(range(50)) - unseen
    assert not torch.equal(first, second)


def test_a_small_set_fills_its_batch():
    batches = FreshBatches(Calibration(inputs=inputs(5)), 32, seed=0)
    assert sorted(batches.batch(3).indices.tolist()) == [0, 1, 2, 3, 4]


def test_streamed_samples_come_in_their_order_without_the_held_out_ones():
    loader = [inputs(50)[start : start + 10] for start in range(0, 50, 10)]
    batches = FreshBatches(StreamedCalibration(loader), 9, seed=0, held_out=14)
    assert batches.held_out().indices.tolist() == list(range(14))
    found = [batches.batch(step).indices.tolist() for step in range(6)]
    assert found[0] == list(range(14, 23))
    assert found[4] == found[0]  # the second round
    again = FreshBatches(StreamedCalibration(loader), 9, seed=0, held_out=14)
    assert again.batch(2).indices.tolist() == found[2]
    assert again.batch(5).indices.tolist() == found[5]


def test_each_step_has_views_of_its_own():
    keys = []

    def augment(images: Tensor, key: int) -> Tensor:
        keys.append(key)
        return images + 1

    samples = Calibration(inputs=inputs(40), augment=augment)
    batches = FreshBatches(samples, 10, seed=0, held_out=10)
    plain = batches.held_out().inputs
    assert not keys  # held-out samples are as they are
    assert any(torch.equal(plain[0], row) for row in samples.inputs)
    for step in (0, 1, 4, 1):
        batches.batch(step)
    assert len(set(keys)) == 3 and keys[1] == keys[3]


def test_step_seeds_differ():
    seeds = {step_seed(seed, step) for seed in (0, 1, 2) for step in range(50)}
    assert len(seeds) == 150


# -- learning


@pytest.mark.parametrize("structure", ["kronecker", "kronecker_scaled"])
def test_learning_from_the_identity_approaches_the_inverse(structure):
    estimator, data = fitted(structure=structure, directions="normal", warm_start="identity")
    start = FLS(estimator.partition, damping=DAMPING, steps=1, learning_rate=1e-9)
    start.fit(data)
    least = sum(
        -0.5 * float(reference.damped_inverse(fisher, DAMPING).trace())
        for fisher in group_fishers(data).values()
    )
    before, after = network_objective(start, data), network_objective(estimator, data)
    assert after < before
    assert (after - least) < 0.35 * (before - least)


def test_learning_along_gradients_lowers_j_along_gradients():
    """J with u u^T ~ F, dense: 1/2 tr(F Q F_g Q) - tr(F Q), each group scaled by tr F."""
    estimator, data = fitted(directions="gradients")
    start = FLS(estimator.partition, damping=DAMPING, steps=1, learning_rate=1e-9)
    start.fit(data)
    for name, fisher in group_fishers(data).items():
        damped = fisher + DAMPING * torch.eye(len(fisher), dtype=fisher.dtype)

        def along(q: Tensor, fisher: Tensor = fisher, damped: Tensor = damped) -> float:
            return float(0.5 * (fisher @ q @ damped * q).sum() - (fisher * q).sum())

        least = along(torch.linalg.inv(damped))
        before, after = along(start.block(name).dense()), along(estimator.block(name).dense())
        assert after - least < 0.35 * (before - least)


def group_fishers(data: GradientSource) -> dict[str, Tensor]:
    whole = source(data.model, data.partition, labels="enumerated")
    held = whole.hold(list(data.partition.names))
    return {name: reference.gradient_fisher(gradients) for name, gradients in held.items()}


def test_log_det_learning_lowers_l_on_unseen_labels():
    estimator, data = fitted(objective="log_det", structure="kronecker")
    swept = FishLeg(
        estimator.partition,
        damping=DAMPING,
        structure="kronecker",
        objective="log_det",
        sweeps=20,
    )
    swept.fit(data)
    start = FLS(
        estimator.partition, damping=DAMPING, objective="log_det", steps=1, learning_rate=1e-9
    )
    start.fit(data)
    name = "log_det_objective"
    assert network_objective(estimator, data, name) < network_objective(start, data, name)
    gained = network_objective(start, data, name) - network_objective(estimator, data, name)
    possible = network_objective(start, data, name) - network_objective(swept, data, name)
    assert gained > 0.9 * possible


def test_held_out_samples_stop_a_fit_that_does_not_improve():
    estimator, _ = fitted(learning_rate=5.0, patience=2, check_every=5)
    assert max(entry["steps"] for entry in estimator.report.values()) < 400
    blocks = estimator.blocks().values()
    assert all(torch.isfinite(block.diagonal()).all() for block in blocks)


def test_a_group_that_never_improves_keeps_its_start_and_says_so():
    model = network()
    partition = partition_parameters(model)
    estimator = FLS(partition, damping=DAMPING, steps=20, check_every=5, learning_rate=50.0)
    estimator.fit(source(model, partition))
    assert any(entry["steps"] == 0 for entry in estimator.report.values())
    assert any("No step lowered" in text for text in estimator.warnings)


def test_labels_are_drawn_anew_in_each_step():
    seeds = []
    model = network()
    partition = partition_parameters(model)
    data = source(model, partition)
    over = GradientSource.over

    def note(self, calibration, *, seed):
        seeds.append(seed)
        return over(self, calibration, seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSource, "over", note)
        FLS(partition, damping=DAMPING, steps=7, held_out=0.0).fit(data)
    assert len(set(seeds)) == 7


def test_no_refinement_sees_the_batches_of_another_fit():
    seen: list[int] = []
    estimator, data = fitted(steps=5, refine_steps=4, held_out=0.0)
    over = GradientSource.over

    def note(self, calibration, *, seed):
        seen.append(seed)
        return over(self, calibration, seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSource, "over", note)
        estimator.refine(data, masks_of(estimator.partition))
        other = FLS(estimator.partition, damping=DAMPING)
        other.load_state_dict(estimator.state_dict())
        other.refine(data, masks_of(estimator.partition))
    assert seen == [step_seed(data.seed, step) for step in range(5, 13)]


# -- the objective over several batches


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", ["expected", "log_det"])
def test_the_value_over_batches_is_the_dense_objective(objective, masked):
    """And at its best scale no other scale is better."""
    data = source(network(), partition_parameters(network()), labels="enumerated")
    name = data.partition.names[0]
    rows, columns = data.partition[name].shape
    draw = torch.Generator().manual_seed(2)
    roots = [torch.randn(n, n, generator=draw).double() for n in (rows, columns)]
    block = KroneckerBlock(*(one @ one.T + torch.eye(len(one)).double() for one in roots))
    mask = torch.rand(rows, columns, generator=draw) < 0.6 if masked else None
    judge = BatchObjective(FlsOptions(objective=objective), DAMPING)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in data.stream([name]):
        gradients = batch[name]
        sums += judge.terms(block, gradients, len(gradients) / data.rows, mask)
    fisher = group_fishers(data)[name]

    def dense(q: Tensor) -> float:
        if objective == "expected":
            return float(reference.objective(q, fisher, DAMPING, mask))
        kept = torch.ones(len(q)).double() if mask is None else mask.flatten().double()
        seen = fisher * kept * kept[:, None] + DAMPING * torch.eye(len(q), dtype=q.dtype)
        return float((q * seen).sum() - torch.linalg.slogdet(q)[1])

    value, scale = judge.value(block, sums, mask)
    assert value == pytest.approx(dense(block.dense()))
    for other in (0.99 * scale, 1.01 * scale):
        assert dense(scale * block.dense()) < dense(other * block.dense())


def test_the_value_along_gradients_is_that_of_the_dense_fisher():
    """Of one batch: u the normalised gradients of its first half, F of its second half."""
    data = source(network(), partition_parameters(network()), batch_size=200)
    name = data.partition.names[0]
    gradients = data.hold([name])[name]
    size = gradients[0].numel()
    block = KroneckerBlock(
        *(2 * torch.eye(n, dtype=torch.float64) for n in data.partition[name].shape)
    )
    judge = BatchObjective(FlsOptions(objective="probe", directions="gradients"), DAMPING)
    value, _ = judge.value(block, judge.terms(block, gradients, 1.0))
    half = len(gradients) // 2
    u = gradients[:half].flatten(1)
    u = u * size**0.5 / u.norm(dim=1, keepdim=True)
    fisher = 2 * reference.gradient_fisher(gradients[half:])
    damped, q = fisher + DAMPING * torch.eye(size, dtype=u.dtype), block.dense()
    wanted = (0.5 * ((u @ q @ damped @ q) * u).sum() - ((u @ q) * u).sum()) / half
    assert value == pytest.approx(float(wanted))


# -- masks


def masks_of(partition: Partition) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    masks = {}
    for group in partition.prunable:
        masks[group.name] = torch.rand(group.shape, generator=draw) < 0.6
        masks[group.name][:, group.weight_columns :] = True
    return masks


def masked_objective(estimator: FLS, fishers: dict[str, Tensor], masks) -> float:
    return sum(
        float(reference.objective(block.dense(), fishers[name], DAMPING, masks.get(name)))
        for name, block in estimator.blocks().items()
    )


@pytest.mark.parametrize("how", ["refine", "learn"])
def test_the_mask_enters_the_objective(how):
    """Q carried to a mask has a lower J of M o Q o M than the Q of the full Fisher."""
    estimator, data = fitted(refine_steps=200, objective="expected")
    masks, fishers = masks_of(estimator.partition), group_fishers(data)
    before = masked_objective(estimator, fishers, masks)
    if how == "refine":
        estimator.refine(data, masks)
    else:
        batches = FreshBatches(data.calibration, 50, seed=7)
        for step in range(100):
            estimator.learn(data.over(batches.batch(step), seed=step_seed(7, step)), masks)
    assert masked_objective(estimator, fishers, masks) < before
    assert all(torch.equal(estimator.masks[name], mask) for name, mask in masks.items())


def test_learning_on_given_batches_resumes_to_the_same_bits():
    estimator, data = fitted(steps=10)
    masks = masks_of(estimator.partition)
    batches = FreshBatches(data.calibration, 20, seed=7)

    def learn(one: FLS, steps: range) -> None:
        for step in steps:
            one.learn(data.over(batches.batch(step), seed=step_seed(7, step)), masks)

    learn(estimator, range(4))
    other = FLS(estimator.partition, damping=DAMPING)
    other.load_state_dict(estimator.state_dict())
    learn(estimator, range(4, 9))
    learn(other, range(4, 9))
    for name, block in estimator.blocks().items():
        for key, tensor in block.tensors().items():
            assert torch.equal(tensor, other.block(name).tensors()[key])


class Stop(Exception):
    """Interrupts a fit."""


@pytest.mark.parametrize("warm_start", ["kfac", "moments", "diagonal"])
def test_an_interrupted_pass_of_the_start_is_resumed_where_it_was(warm_start):
    model = network()
    partition = partition_parameters(model)
    data = source(model, partition, batch_size=16)
    options = {"warm_start": warm_start, "steps": 3, "held_out": 0.2}
    whole = FLS(partition, damping=DAMPING, **options)
    told: list[int] = []
    whole.fit(data, lambda progress: told.append(progress.done))
    passes = told.count(0)
    assert passes > 3

    states = []

    def interrupt(progress):
        states.append(estimator.state_dict())
        if len(states) == 2:
            raise Stop

    estimator = FLS(partition, damping=DAMPING, **options)
    with pytest.raises(Stop):
        estimator.fit(data, interrupt)
    other = FLS(partition, damping=1.0)
    other.load_state_dict(states[-1])
    again: list[int] = []
    other.fit(data, lambda progress: again.append(progress.done), resume=True)
    assert again.count(0) == passes - 2
    for name, block in whole.blocks().items():
        for key, tensor in block.tensors().items():
            assert torch.equal(tensor, other.block(name).tensors()[key])


def test_a_step_is_adams_on_the_dense_objective():
    """One step from a known block, against autograd of the dense J."""
    model = network()
    partition = partition_parameters(model)
    data = source(model, partition, labels="enumerated")
    rate = 0.01
    estimator = FLS(
        partition, damping=DAMPING, objective="expected", learning_rate=rate, steps=5, held_out=0.0
    )
    estimator.fit(data)
    before = {name: block.dense() for name, block in estimator.blocks().items()}
    blocks = dict(estimator.blocks())
    estimator.learn(data)
    fishers = group_fishers(data)
    for name, block in blocks.items():
        x = torch.zeros_like(block.b).requires_grad_()
        eye = torch.eye(len(block.b), dtype=block.b.dtype)
        b = (eye + x) @ block.b @ (eye + x).T
        value = reference.objective(torch.kron(b, block.c), fishers[name], DAMPING)
        (slope,) = torch.autograd.grad(value, x)
        root = eye - rate * len(block.b) ** -0.5 * slope.sign()  # Adam's first step
        found = estimator.block(name).b
        torch.testing.assert_close(found, root @ block.b @ root.T, rtol=1e-6, atol=1e-9)
    assert any(
        not torch.equal(before[name], block.dense()) for name, block in estimator.blocks().items()
    )
