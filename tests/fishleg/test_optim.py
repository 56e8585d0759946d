"""The FishLeg optimiser: Newton's solution, the learned inverse, masks, state, schedules."""

import copy
from typing import Any

import pytest
import torch
from networks import Mixed, shake
from torch import Tensor, nn

from fishleg.blocks import KroneckerBlock
from fishleg.calibration import Calibration
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.gradients.layers import LayerSignals
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical, Gaussian
from fishleg.moments import layer_moments
from fishleg.objective import (
    curvature_and_trace,
    gradient_product,
    outer_directional,
    outer_product,
    outer_square,
)
from fishleg.optim import FishLeg
from fishleg.optim.natural_gradient import _batch_statistics, _is_due, _updates_before
from fishleg.optim.tracking import TrackedInverse, TrackingOptions, objective_terms, update
from fishleg.parameters import partition_parameters
from fishleg.rng import SampleGenerator
from fishleg.solvers.descent import assemble, compose, relative_slope

EXACT = 1e-10


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draw(seed))


def positive(n: int, seed: int) -> Tensor:
    root = randn(n, n, seed=seed)
    return root @ root.mT + torch.eye(n, dtype=torch.float64)


def train(
    model: nn.Module, optimizer: FishLeg, inputs: Tensor, targets: Tensor, steps: int
) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.observe(inputs)
        optimizer.zero_grad()
        loss = optimizer.likelihood.nll(model(inputs), targets).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def classification(**options: Any) -> tuple[nn.Module, FishLeg, Tensor, Tensor]:
    """A network with every kind of parameter, in float32, its optimiser and a batch."""
    torch.manual_seed(0)
    model = shake(Mixed(), dtype=torch.float32)
    inputs = torch.randn(8, 2, 5, 5, generator=draw())
    optimizer = FishLeg(model, Categorical(), **{"update_every": 3, **options})
    return model, optimizer, inputs, torch.arange(8) % 3


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------- natural gradient


def test_a_linear_gaussian_model_reaches_newtons_solution_in_a_few_steps() -> None:
    """Columns of sizes 1 to 30: gradient descent would need thousands of steps."""
    inputs = randn(400, 5) * torch.tensor([1.0, 3, 10, 30, 1])
    targets = randn(400, 2, seed=1)
    model = nn.Linear(5, 2).double()
    optimizer = FishLeg(
        model, Gaussian(), lr=1.0, momentum=0.0, damping=1e-6, trust=None, update_every=1
    )
    train(model, optimizer, inputs, targets, 15)
    design = torch.cat([inputs, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, targets).solution
    torch.testing.assert_close(model.weight.detach(), solution[:-1].mT, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.bias.detach(), solution[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"start": "moments"},
        {"start": "identity", "directions": "gradients", "learning_rate": 0.03},
        {"start": "identity", "directions": "normal", "learning_rate": 0.03},
    ],
)
def test_q_approaches_the_inverse_fisher(options: dict[str, Any]) -> None:
    """At fixed weights F = I (x) E[x x^T]; from the identity on, all is learned by Adam."""
    inputs = randn(256, 3) @ torch.diag(torch.tensor([0.5, 1.0, 2.0]).double())
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = FishLeg(model, Gaussian(), lr=0.0, damping=0.1, update_every=1, **options)
    fisher = torch.kron(torch.eye(2, dtype=torch.float64), inputs.mT @ inputs / 256)
    (name,) = optimizer.partition.names
    train(model, optimizer, inputs, torch.zeros(256, 2, dtype=torch.float64), 50)
    eye = torch.eye(6, dtype=torch.float64)
    product = optimizer.inverse(name).inverse().dense() @ (fisher + 0.1 * eye)
    assert (product - eye).norm() < 0.25 * eye.norm()


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_the_start_kfac_is_the_damped_inverse_of_running_layer_factors(decay: float) -> None:
    """Two batches of a layer of three positions, without learning; Q up to its scale."""
    damping, group = 0.2, partition_parameters(nn.Linear(2, 3)).groups[0]
    options = TrackingOptions(start="kfac", damping=damping, decay=decay, learning_rate=0.0)
    factors = []
    tracked = TrackedInverse()
    for age, weight in enumerate((1.0, max(1 - decay, 0.5))):
        a = torch.cat([randn(5, 3, 2, seed=age), torch.ones(5, 3, 1).double()], dim=2)
        g = randn(5, 3, 3, seed=10 + age) / 5**0.5  # scaled by the number of samples
        signals = LayerSignals(a[:, None], g[:, None, None])
        gamma = sum(torch.outer(g[n, t], g[n, t]) for n in range(5) for t in range(3)) / 3
        inputs = sum(torch.outer(a[n, t], a[n, t]) for n in range(5) for t in range(3)) / 5
        factors.append((weight, gamma, inputs))
        gradients = torch.einsum("ntr,ntc->nrc", g, a)
        tracked = update(tracked, group, gradients, options, age=age, signals=signals)
    (_, gamma, inputs), (weight, gamma_2, inputs_2) = factors
    gamma = (1 - weight) * gamma + weight * gamma_2
    inputs = (1 - weight) * inputs + weight * inputs_2
    split = (inputs.trace() / 3 / (gamma.trace() / 3)) ** 0.5
    eye = torch.eye(3, dtype=torch.float64)
    expected = torch.kron(
        torch.linalg.inv(gamma + damping**0.5 / split * eye),
        torch.linalg.inv(inputs + damping**0.5 * split * eye),
    )
    found = tracked.inverse().dense()
    torch.testing.assert_close(
        found / found.norm(), expected / expected.norm(), rtol=EXACT, atol=EXACT
    )


def test_the_start_kfac_tracks_the_factors_of_every_layer() -> None:
    model, optimizer, inputs, targets = classification(start="kfac", lr=0.0)
    train(model, optimizer, inputs, targets, 1)
    with _batch_statistics(model, inputs, optimizer.calling):
        source = optimizer._source
        assert source is not None
        layers = next(source.layers())
        factors = layer_moments(source, list(source.partition.names))
    assert {name for name, signals in layers.items() if signals is not None} >= {*factors}
    plain = [name for name, (gamma, _) in factors.items() if len(gamma) == 1]
    assert len(plain) > 1
    for name in source.partition.names:
        moments = optimizer.inverse(name).moments
        if name not in plain:
            assert "gamma" not in moments
            continue
        gamma, a = factors[name]
        torch.testing.assert_close(moments["gamma"].double(), gamma[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments["a"].double(), a[0], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- rank one


def outer_gradients(n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = randn(n, 4, seed=1), randn(n, 3, seed=2)
    return rows, columns, rows[:, :, None] * columns[:, None, :]


def test_factors_give_what_the_gradients_give() -> None:
    rows, columns, gradients = outer_gradients()
    block = KroneckerBlock(positive(4, 3), positive(3, 4))
    v = randn(5, 4, 3, seed=5)
    torch.testing.assert_close(
        outer_product(rows, columns, v), gradient_product(gradients, v), rtol=EXACT, atol=EXACT
    )
    curvature, trace = curvature_and_trace(block, [gradients], 0.3)
    found = outer_square(block, rows, columns) + 0.3 * block.squared_norm()
    torch.testing.assert_close(found, curvature, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(trace, block.dense().trace(), rtol=EXACT, atol=EXACT)


def test_directions_of_rank_one_give_what_dense_ones_give() -> None:
    rows, columns, gradients = outer_gradients()
    s, t = randn(6, 4, seed=6), randn(6, 3, seed=7)
    block = KroneckerBlock(positive(4, 3), positive(3, 4))
    flat, u = gradients.flatten(1), (s[:, :, None] * t[:, None, :]).flatten(1)
    damped = flat.mT @ flat + 0.3 * torch.eye(12, dtype=torch.float64)
    q = block.dense()
    curvature, linear = outer_directional(block, (s, t), rows, columns, 0.3)
    expected = (q @ damped @ q @ u.mT @ u).trace()
    torch.testing.assert_close(curvature, expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(linear, (q @ u.mT @ u).trace(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("directions", ["gradients", "normal"])
def test_the_closed_form_is_what_probes_average_to(directions: Any) -> None:
    rows, columns, gradients = outer_gradients(8)
    signals = LayerSignals(columns[:, None, None], rows[:, None, None, None])
    block = KroneckerBlock(positive(4, 3), positive(3, 4))
    options = TrackingOptions(damping=0.3, directions=directions)
    probes = 20_000
    generator = SampleGenerator(0, torch.arange(probes))
    closed = torch.stack(objective_terms(block, signals, options, generator))
    for evidence, scale in (
        (gradients, None),
        (signals, torch.ones(4, 3, dtype=torch.float64)),
    ):
        generator = SampleGenerator(0, torch.arange(probes))
        other = KroneckerBlock(block.b, block.c, scale)
        drawn = torch.stack(objective_terms(other, evidence, options, generator))
        torch.testing.assert_close(drawn, closed, rtol=0.05, atol=0)


def test_a_scale_has_no_closed_form() -> None:
    rows, columns, _ = outer_gradients()
    block = KroneckerBlock(positive(4, 3), positive(3, 4), torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(ShapeMismatch, match="without scale"):
        outer_square(block, rows, columns)


def test_a_source_gives_factors_for_plain_linear_layers_only() -> None:
    model = shake(Mixed())
    inputs = randn(6, 2, 5, 5)
    partition = partition_parameters(model)
    source = GradientSource(model, Categorical(), partition, Calibration(inputs=inputs))
    (whole,), (parts,) = source.stream(), source.factored()
    assert {name for name in parts if isinstance(parts[name], LayerSignals)} == {"head"}
    for name, gradients in whole.items():
        found = parts[name]
        if isinstance(found, LayerSignals):
            r, c = found.output_gradients[:, 0, 0, 0], found.activations[:, 0, 0]
            found = r[:, :, None] * c[:, None, :]
        torch.testing.assert_close(found, gradients, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["b", "values"])
def test_moves_are_relative(name: str) -> None:
    """dJ/dy at y = 0 agrees with autograd, and two moves make one correction."""
    tensor = positive(4, 0) if name == "b" else positive(4, 0).abs()
    kind = {"b": lambda t: KroneckerBlock(t, torch.ones(1, 1, dtype=torch.float64))}
    start = (
        kind["b"](tensor)
        if name == "b"
        else KroneckerBlock(
            torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), tensor
        )
    )
    key = name if name == "b" else "scale"
    slope = randn(4, 4, seed=1)
    change = {k: torch.zeros_like(x) for k, x in start.tensors().items()}
    move = change[key] = torch.zeros_like(tensor).requires_grad_()
    moved = assemble(start, change).tensors()[key]
    (expected,) = torch.autograd.grad((moved * slope).sum(), move)
    torch.testing.assert_close(relative_slope(key, tensor, slope), expected, rtol=EXACT, atol=EXACT)
    first, second = (
        {k: 0.1 * randn(*x.shape, seed=s) for k, x in start.tensors().items()} for s in (2, 3)
    )
    both = {k: compose(k, first[k], second[k]) for k in first}
    after, at_once = assemble(assemble(start, first), second), assemble(start, both)
    torch.testing.assert_close(after.dense(), at_once.dense(), rtol=EXACT, atol=EXACT)


# ---------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("structure", "start"),
    [
        ("kronecker", "moments"),
        ("kronecker", "diagonal"),
        ("kronecker", "kfac"),
        ("kronecker_scaled", "kfac"),
        ("kronecker_scaled", "moments"),
        ("kronecker_scaled", "identity"),
        ("diagonal", "moments"),
    ],
)
def test_the_loss_falls(structure: Any, start: Any) -> None:
    model, optimizer, inputs, targets = classification(structure=structure, start=start, trust=0.03)
    losses = train(model, optimizer, inputs, targets, 10)
    assert losses[-1] < 0.8 * losses[0]


def test_no_step_is_longer_than_the_trust_region() -> None:
    inputs, targets = randn(16, 3), randn(16, 2, seed=1)
    model = nn.Linear(3, 2).double()
    optimizer = FishLeg(model, Gaussian(), lr=10.0, trust=0.01)
    before = weights(model)
    train(model, optimizer, inputs, targets, 1)
    group = optimizer.partition.groups[0]
    step = group.gather({name: p - before[name] for name, p in weights(model).items()}).flatten()
    q = optimizer.inverse(group.name).inverse().dense()
    predicted = 0.5 * step @ torch.linalg.solve(q, step)
    torch.testing.assert_close(float(predicted), 0.01, rtol=1e-8, atol=0)


def test_removed_weights_are_zero_and_the_others_take_the_masked_step() -> None:
    inputs, targets = randn(32, 4), randn(32, 3, seed=1)
    mask = torch.rand(3, 4, generator=draw(2)) < 0.5
    model = nn.Linear(4, 3).double()
    optimizer = FishLeg(model, Gaussian(), lr=0.5, momentum=0.0, trust=None, masks={"weight": mask})
    with torch.no_grad():
        model.weight.masked_fill_(~mask, 0)
    before = weights(model)
    train(model, optimizer, inputs, targets, 1)
    (group,) = optimizer.partition.groups
    assert model.weight.grad is not None and model.bias.grad is not None
    gradient = group.gather({"weight": model.weight.grad * mask, "bias": model.bias.grad})
    move = group.scatter(optimizer.inverse(group.name).inverse().matvec(gradient))
    expected = before["weight"] - 0.5 * move["weight"] * mask
    torch.testing.assert_close(model.weight.detach(), expected, rtol=EXACT, atol=EXACT)
    train(model, optimizer, inputs, targets, 5)
    assert torch.equal(model.weight != 0, mask)


def test_a_run_goes_on_from_its_state_to_the_same_bits() -> None:
    model, optimizer, inputs, targets = classification(weight_decay=0.01)
    train(model, optimizer, inputs, targets, 4)
    other, resumed, *_ = classification(weight_decay=0.01)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = [train(m, o, inputs, targets, 6) for m, o in ((model, optimizer), (other, resumed))]
    assert losses[0] == losses[1]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_depends_on_its_seed_and_on_no_global_generator() -> None:
    found = []
    for seed, noise in ((0, 0), (0, 5), (1, 0)):
        model, optimizer, inputs, targets = classification(seed=seed)
        torch.manual_seed(noise)
        found.append(train(model, optimizer, inputs, targets, 4))
    assert found[0] == found[1] != found[2]


def test_schedulers_set_the_learning_rate() -> None:
    model, optimizer, inputs, targets = classification()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    for _ in range(2):
        before = weights(model)
        train(model, optimizer, inputs, targets, 1)
        scheduler.step()
        assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    before = weights(model)
    train(model, optimizer, inputs, targets, 2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_what_has_no_curvature_moves_by_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    partition = partition_parameters(model, skip=["1.bias"])
    optimizer = FishLeg(
        model, Gaussian(), momentum=0.0, fallback_lr=0.25, lr=0.1, partition=partition
    )
    assert optimizer.uncovered == (("1.bias", "skipped on request"),)
    before = weights(model)["1.bias"]
    train(model, optimizer, randn(8, 3), randn(8, 2, seed=1), 1)
    bias = model[1].bias
    assert bias.grad is not None
    torch.testing.assert_close(bias.detach(), before - 0.25 * bias.grad, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("directions", ["gradients", "normal"])
def test_a_layer_without_gradients_stays(directions: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    before = weights(model)
    train(model, FishLeg(model, Gaussian(), directions=directions), randn(8, 3), randn(8, 2), 3)
    after = weights(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert after["2.bias"].isfinite().all() and not torch.equal(after["2.bias"], before["2.bias"])


def test_an_update_leaves_batch_norms_as_they_were() -> None:
    model, optimizer, inputs, targets = classification(lr=0.0)
    model.train()
    Categorical().nll(model(inputs), targets).mean().backward()
    before = copy.deepcopy(model.norm.state_dict())
    optimizer.observe(inputs)
    optimizer.step()
    assert model.norm.training and model.norm.momentum == 0.1
    for name, tensor in model.norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_curvature_is_that_of_the_batch_norm_in_training() -> None:
    """Running statistics that mean nothing yet do not enter Q."""
    found = []
    for garbage in (1.0, 1e4):
        model, optimizer, inputs, targets = classification(lr=0.0)
        model.train()
        model.norm.running_var.fill_(garbage)
        train(model, optimizer, inputs, targets, 1)
        found.append(optimizer.inverse("conv").inverse().diagonal())
    assert torch.equal(*found)


def test_a_closure_makes_the_gradients() -> None:
    model = nn.Linear(3, 2).double()
    optimizer = FishLeg(model, Gaussian(), damping=1.0)
    inputs, targets = randn(8, 3), randn(8, 2, seed=1)
    optimizer.observe(inputs)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = Gaussian().nll(model(inputs), targets).mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first


@pytest.mark.parametrize("every", [1, 2, 3, 7, 8, 10])
def test_updates_are_dense_at_first_and_counted(every: int) -> None:
    due = [step for step in range(40) if _is_due(step, every)]
    assert due[0] == 0
    assert set(range(0, 40, every)) | {1, 2, 4, 8} & set(range(every)) == set(due)
    for done in range(40):
        assert _updates_before(done, every) == sum(step < done for step in due)


def test_mistakes_are_told() -> None:
    model = nn.Linear(3, 2)
    optimizer = FishLeg(model, Gaussian())
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(FishLegError, match=r"call optimizer\.observe\(inputs\)"):
        optimizer.step()
    for wrong in ({"trust": 0.0}, {"update_every": 0}, {"samples": 0}, {"damping": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            FishLeg(model, Gaussian(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="momentum"):
        FishLeg(model, Gaussian(), momentum=1.0)
    for wrong in ({"labels": "empirical"}, {"structure": "kroneker"}, {"directions": "uniform"}):
        with pytest.raises(UnknownName, match="Known"):
            FishLeg(model, Gaussian(), **wrong)  # type: ignore[arg-type]
