"""Refinement: divergences, steps that solve quadratics, zeros kept, state, mistakes."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError, UnknownName
from fishleg.estimators import FishLeg, Magnitude
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import AbstractLikelihood, Categorical, Gaussian
from fishleg.parameters import Partition, partition_parameters
from fishleg.pruning import (
    Masks,
    Refinement,
    RefinementOptions,
    dense_masks,
    mean_divergence,
    refine,
)

SAMPLES = 60


def make_inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def linear_problem() -> tuple[nn.Module, nn.Module, Tensor, Partition, Masks]:
    """A dense linear network, the same with a third of its weights removed, and inputs."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 3)).double()
    pruned = copy.deepcopy(dense)
    partition = partition_parameters(pruned)
    masks = dense_masks(partition)
    masks["0"][:, :4] = torch.arange(12).reshape(3, 4) % 3 > 0
    with torch.no_grad():
        pruned[0].weight.mul_(masks["0"][:, :4])
        pruned[0].bias.add_(0.5)
    return dense, pruned, make_inputs(SAMPLES, 4), partition, masks


def full_estimate(model: nn.Module, partition: Partition, inputs: Tensor, masks: Masks) -> FishLeg:
    source = GradientSource(
        model, Gaussian(), partition, Calibration(inputs=inputs), labels="enumerated"
    )
    estimator = FishLeg(partition, damping=1e-9, structure="full")
    estimator.fit(source)
    estimator.refine(source, masks)
    return estimator


def least_squares(dense: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    """Return the best masked (3, 5) weights, row by row."""
    design = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    with torch.no_grad():
        wanted = dense(inputs)
    best = torch.zeros(3, 5, dtype=inputs.dtype)
    for row in range(3):
        kept = mask[row].nonzero().flatten()
        best[row, kept] = torch.linalg.lstsq(design[:, kept], wanted[:, row]).solution
    return best


@pytest.mark.parametrize("method", ["natural", "gauss_newton"])
def test_one_step_solves_a_masked_quadratic(method: Any) -> None:
    dense, pruned, inputs, partition, masks = linear_problem()
    estimator = full_estimate(pruned, partition, inputs, masks)
    refinement = Refinement(
        pruned,
        dense,
        Gaussian(),
        partition,
        masks,
        steps=1,
        options=RefinementOptions(
            method=method, learning_rate=1.0, trust=1e6, cg_iterations=50, momentum=0.0
        ),
        estimator=estimator,
    )
    refinement._rate = lambda: 1.0  # the schedule's warm-up would shorten a run of one step
    refinement.step(inputs)
    found = torch.cat([pruned[0].weight, pruned[0].bias[:, None]], 1)
    best = least_squares(dense, inputs, masks["0"])
    torch.testing.assert_close(found.detach(), best, rtol=1e-3, atol=1e-4)


def test_a_natural_step_is_no_longer_than_the_trust_region() -> None:
    dense, pruned, inputs, partition, masks = linear_problem()
    estimator = full_estimate(pruned, partition, inputs, masks)
    before = torch.cat([pruned[0].weight, pruned[0].bias[:, None]], 1).detach().clone()
    options = RefinementOptions(method="natural", learning_rate=1.0, trust=1e-4, momentum=0.0)
    refinement = Refinement(
        pruned,
        dense,
        Gaussian(),
        partition,
        masks,
        steps=1,
        options=options,
        estimator=estimator,
    )
    refinement._rate = lambda: 1.0
    refinement.step(inputs)
    move = torch.cat([pruned[0].weight, pruned[0].bias[:, None]], 1).detach() - before
    design = torch.cat([inputs, torch.ones(SAMPLES, 1, dtype=inputs.dtype)], 1)
    length = 0.5 * (design @ move.T).square().sum() / SAMPLES
    assert length.item() == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize("statistics", ["running", "batch", "frozen"])
def test_adam_lowers_the_divergence_and_keeps_zeros(statistics: Any) -> None:
    dense, pruned, partition, masks, inputs = classifier()
    mean = pruned[1].running_mean.clone()
    options = RefinementOptions(learning_rate=1e-2, statistics=statistics)
    refinement = Refinement(
        pruned, dense, Categorical(), partition, masks, steps=60, options=options
    )
    with torch.no_grad():
        before = refinement.divergence(inputs).item()
    reports = list(refine(refinement, [inputs] * 60))
    with torch.no_grad():
        after = refinement.divergence(inputs).item()
    assert after < 0.3 * before
    assert len(reports) == 3
    assert not pruned[0].weight[~masks["0"][:, :-1]].any()
    assert torch.equal(pruned[1].running_mean, mean) == (statistics == "frozen")
    assert not any(module.training for module in pruned.modules())
    assert not any(module._forward_pre_hooks for module in pruned.modules())


def classifier() -> tuple[nn.Module, nn.Module, Partition, Masks, Tensor]:
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    dense.eval()
    with torch.no_grad():
        dense[3].weight.mul_(4.0)
    pruned = copy.deepcopy(dense)
    partition = partition_parameters(pruned)
    masks = dense_masks(partition)
    masks["0"][::2, :6] = False
    with torch.no_grad():
        pruned[0].weight.mul_(masks["0"][:, :6])
    return dense, pruned, partition, masks, make_inputs(SAMPLES, 6)


def test_a_run_goes_on_from_its_state_to_the_same_bits() -> None:
    def run(stop: int | None) -> nn.Module:
        dense, pruned, partition, masks, inputs = classifier()
        batches = [inputs[start : start + 20] for start in (0, 20, 40)] * 4

        def begin(model: nn.Module) -> Refinement:
            return Refinement(
                model,
                dense,
                Categorical(),
                partition,
                masks,
                steps=12,
                options=RefinementOptions(),
            )

        first = begin(pruned)
        if stop is None:
            list(refine(first, batches))
            return pruned
        for batch in batches[:stop]:
            first.step(batch)
        again = copy.deepcopy(pruned)
        second = begin(again)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        list(refine(second, batches[stop:]))
        return again

    whole, resumed = run(None).state_dict(), run(5).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(variance=2.0)])
def test_a_divergence_is_the_enumerated_one(likelihood: AbstractLikelihood) -> None:
    reference, outputs = make_inputs(2, 7, 5)
    found = likelihood.divergence(reference, outputs)
    if isinstance(likelihood, Categorical):
        expected = AbstractLikelihood.divergence(likelihood, reference, outputs)
    else:
        dense = [torch.distributions.Normal(one, 2.0**0.5) for one in (reference, outputs)]
        expected = torch.distributions.kl_divergence(*dense).sum(-1)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()


@pytest.mark.parametrize(("method", "expected"), [("adam", 0.5), ("sgd", 2.0)])
def test_rate_of_adam_is_scaled_by_the_root_of_the_divergence(method: Any, expected: float) -> None:
    dense, pruned, partition, masks, _ = classifier()
    options = RefinementOptions(method=method, learning_rate=2.0)
    given: dict[str, Any] = {"steps": 3, "options": options, "begin": 1 / 16}
    run = Refinement(pruned, dense, Categorical(), partition, masks, **given)
    assert run.peak_rate == expected
    level = Refinement(pruned, dense, Categorical(), partition, masks, **given | {"begin": -1e-9})
    assert level.peak_rate == (0.0 if method == "adam" else 2.0)  # below 0 by rounding
    again = Refinement(pruned, dense, Categorical(), partition, masks, **given | {"begin": 9.0})
    assert again.peak_rate == 2.0
    again.load_state_dict(run.state_dict())
    assert again.peak_rate == expected


def test_mean_divergence_is_over_all_inputs_in_evaluation_mode() -> None:
    dense, pruned, _, _, inputs = classifier()
    pruned.train()
    found = mean_divergence(pruned, dense, Categorical(), inputs.split(7))
    assert not pruned.training
    with torch.no_grad():
        target, other = (net(inputs).log_softmax(-1) for net in (dense, pruned))
    expected = (target.exp() * (target - other)).sum(-1).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_named() -> None:
    dense, pruned, partition, masks, inputs = classifier()
    with pytest.raises(UnknownName, match="method"):
        RefinementOptions(method="momentum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature"):
        RefinementOptions(temperature=0.0)
    given: dict[str, Any] = {"steps": 3}
    natural = RefinementOptions(method="natural")
    with pytest.raises(FishLegError, match="needs `estimator`"):
        Refinement(pruned, dense, Categorical(), partition, masks, options=natural, **given)
    adam = RefinementOptions()
    run = Refinement(pruned, dense, Categorical(), partition, masks, options=adam, **given)
    with pytest.raises(FishLegError, match="ended after step 1 of 3"):
        list(refine(run, [inputs]))
    with pytest.raises(FishLegError, match="divergence became nan"):
        list(refine(run, [inputs * torch.nan] * 3))


def test_what_a_model_does_not_support_is_said_once_a_run(caplog: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).double()
    dense, partition = copy.deepcopy(model), partition_parameters(model)
    with torch.no_grad():
        model[0].bias.add_(0.5)
    estimator = Magnitude(partition, damping=0.1)
    inputs = make_inputs(SAMPLES, 4)
    estimator.fit(GradientSource(model, Gaussian(), partition, Calibration(inputs=inputs)))
    run = Refinement(
        model,
        dense,
        Gaussian(),
        partition,
        dense_masks(partition),
        steps=3,
        options=RefinementOptions(method="gauss_newton"),
        estimator=estimator,
    )
    with caplog.at_level(logging.WARNING, "fishleg"):
        list(refine(run, inputs.split(SAMPLES // 3)))
    assert caplog.text.count("supports no forward-mode derivative") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "statistics"),
    [("adam", "running"), ("adam", "batch"), ("sgd", "frozen"), ("natural", "frozen")],
)
def test_half_precision_is_refined_as_float32_is_and_rounded(
    method: Any, statistics: Any, dtype: torch.dtype
) -> None:
    """Steps are smaller than the rounding of weights: summed up in these, they would be lost."""
    dense, pruned, partition, masks, inputs = classifier()
    inputs = inputs.to(dtype).float()
    start = [copy.deepcopy(model).to(dtype) for model in (dense, pruned)]
    wide = [copy.deepcopy(model).float() for model in start]
    rates = {"adam": 1e-4, "sgd": 1e-3, "natural": 1e-3}
    options = RefinementOptions(method=method, statistics=statistics, learning_rate=rates[method])
    found, ends = {}, {}
    for name, (reference, model) in {"half": start, "full": wide}.items():
        run = Refinement(
            model,
            reference,
            Categorical(),
            partition,
            masks,
            steps=40,
            options=options,
            estimator=Magnitude(partition, damping=1.0),
        )
        run.estimator.fit(
            GradientSource(model, Categorical(), partition, Calibration(inputs=inputs))
        )
        given = inputs.to(dtype) if name == "half" else inputs
        ends[name] = list(refine(run, [given] * 40))[-1]
        found[name] = run._wide
        assert {one.dtype for one in model.parameters()} == {
            dtype if name == "half" else torch.float32
        }
    assert ends["half"] == pytest.approx(
        ends["full"],
        rel=1e-2 if statistics == "running" else 1e-3,  # buffers are rounded after each step
    )
    for name, wanted in wide[1].named_parameters():
        if statistics == "running":
            torch.testing.assert_close(found["half"][name].data, wanted.data, rtol=2e-3, atol=2e-4)
        else:
            assert torch.equal(start[1].get_parameter(name), wanted.to(dtype))
    assert not start[1][0].weight[~masks["0"][:, :-1]].any()


def test_a_run_in_half_precision_goes_on_to_the_same_bits() -> None:
    dense, pruned, partition, masks, inputs = classifier()
    inputs, ends = inputs.float(), []
    for stop in (6, 3):
        model, reference = copy.deepcopy(pruned).bfloat16(), copy.deepcopy(dense).bfloat16()

        def start(model: nn.Module, reference: nn.Module = reference) -> Refinement:
            options = RefinementOptions(learning_rate=1e-3)
            return Refinement(
                model, reference, Categorical(), partition, masks, steps=6, options=options
            )

        run = start(model)
        for _ in range(stop):
            run.step(inputs)
        state, weights = copy.deepcopy(run.state_dict()), copy.deepcopy(model.state_dict())
        model = copy.deepcopy(pruned).bfloat16()
        model.load_state_dict(weights)
        run = start(model)
        run.load_state_dict(state)
        for _ in range(6 - stop):
            run.step(inputs)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_steps_below_the_smallest_half_precision_number_add_up() -> None:
    dense, pruned, partition, masks, inputs = classifier()
    dense, pruned = dense.half(), pruned.half()
    with torch.no_grad():
        pruned[3].bias.zero_()  # 40 steps of 1e-8 each are above half of 6e-8
    options = RefinementOptions(learning_rate=1e-8, statistics="frozen")
    run = Refinement(pruned, dense, Categorical(), partition, masks, steps=40, options=options)
    run._rate = lambda: 1e-8
    for _ in range(40):
        run.step(inputs.half())
    assert pruned[3].bias.count_nonzero() == 4
    assert not run._wide["0.weight"][~masks["0"][:, :-1]].any()
