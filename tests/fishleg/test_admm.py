"""Selection by ADMM, against a search through all masks of a few weights, in float64."""

from functools import partial
from itertools import combinations
from statistics import median

import pytest
import torch

from fishleg.errors import FishLegError
from fishleg.estimators import KFAC
from fishleg.options import AdmmOptions
from fishleg.pruning import admm_masks, dense_masks, prune_once, removal_count, saliency, select
from tests.fishleg.exact import exact
from tests.fishleg.networks import mixed_source
from tests.reference import constrained_minimiser, random_spd

ROWS, COLUMNS = 3, 4
SIZE = ROWS * COLUMNS


def cost(hessian: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> float:
    """The least 1/2 d^T H d of any d that gives zeros outside `mask`."""
    move = constrained_minimiser(hessian, weights.flatten(), ~mask.flatten())
    return float(0.5 * move @ hessian @ move)


def search(hessian, weights, removed: int, held: tuple[int, ...] = ()) -> float:
    """The least cost of all masks with `removed` zeros, among them `held`."""
    free = [one for one in range(SIZE) if one not in held]
    found = []
    for gone in combinations(free, removed - len(held)):
        mask = torch.ones(SIZE, dtype=torch.bool)
        mask[[*gone, *held]] = False
        found.append(cost(hessian, weights, mask))
    return min(found)


def run(hessian, weights, sparsity, before=None, options=None, callback=None):
    estimator = exact(hessian, ROWS, COLUMNS)
    before = before or dense_masks(estimator.partition)
    rule = partial(
        lambda scores, masks: select(estimator.partition, scores, masks, sparsity), masks=before
    )
    singles = saliency(estimator, {"a": weights}, before)
    return admm_masks(
        estimator, {"a": weights}, singles, rule, before=before, options=options, callback=callback
    )


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Hessian of strong couplings, and weights."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(SIZE, 5, dtype=torch.float64, generator=generator)
    weights = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    return root @ root.T + 0.05 * random_spd(SIZE, seed=seed), weights


@pytest.mark.parametrize(
    ("sparsity", "ours", "alone"), [(0.25, 1.001, 0.999), (0.5, 1.2, 4.0), (0.75, 1.5, 7.0)]
)
def test_the_mask_is_near_the_best_of_all_and_no_worse_than_single(sparsity, ours, alone):
    """The medians over problems of the cost, in units of the least one."""
    excess, singles = [], []
    for seed in range(12):
        hessian, weights = case(seed)
        masks, report = run(hessian, weights, sparsity)
        removed = removal_count(SIZE, sparsity)
        assert int((~masks["a"]).sum()) == removed
        best = search(hessian, weights, removed)
        found = cost(hessian, weights, masks["a"])
        assert report.after == pytest.approx(found, rel=2e-3)
        assert report.after <= report.before
        excess.append(found / best)
        singles.append(report.before / best)
    assert median(excess) < ours
    assert median(singles) > alone


def test_without_couplings_the_mask_is_that_of_single_weights():
    _, weights = case(0)
    hessian = torch.diag(0.1 + torch.rand(SIZE, dtype=torch.float64))
    masks, report = run(hessian, weights, 0.5)
    alone = 0.5 * hessian.diagonal() * weights.flatten().square()
    assert set(alone.argsort()[:6].tolist()) == set(
        (~masks["a"]).flatten().nonzero()[:, 0].tolist()
    )
    assert report.best == 0
    assert report.after == report.before == pytest.approx(float(alone.sort()[0][:6].sum()))


def test_earlier_zeros_are_constraints_and_stay():
    excess = []
    for seed in range(8):
        hessian, weights = case(seed)
        before = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
        before.flatten()[[1, 6, 8]] = False
        weights = torch.where(before, weights, 0.0)
        masks, report = run(hessian, weights, 0.5, {"a": before})
        assert not (masks["a"] & ~before).any()
        found = cost(hessian, weights, masks["a"])
        assert report.after == pytest.approx(found, rel=2e-3)
        excess.append(found / search(hessian, weights, 6, (1, 6, 8)))
    assert median(excess) < 1.1


def test_a_group_that_has_lost_every_weight_stays_so():
    hessian, _ = case(0)
    before = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    weights = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    estimator = exact(hessian, ROWS, COLUMNS)
    masks, report = admm_masks(
        estimator,
        {"a": weights},
        {"a": weights},
        lambda scores: {"a": before & (scores["a"] >= 0)},
        before={"a": before},
    )
    assert not masks["a"].any()
    assert report.after == report.before == 0.0
    assert report.primal == 0.0


def test_the_iterations_end_where_the_mask_has_settled():
    hessian, weights = case(3)
    told = []
    _, report = run(hessian, weights, 0.5, callback=lambda done, total: told.append((done, total)))
    assert report.settled
    assert report.iterations < 200
    assert len(report.flips) == report.iterations
    assert report.flips[-10:] == (0,) * 10
    assert report.flips[-11] > 0
    assert told == [(n + 1, 200) for n in range(report.iterations)]
    _, cut = run(hessian, weights, 0.5, options=AdmmOptions(iterations=3))
    assert (cut.iterations, cut.settled) == (3, False)


def test_weights_and_values_agree_at_the_end():
    hessian, weights = case(5)
    _, report = run(hessian, weights, 0.5, options=AdmmOptions(check_every=40))
    assert report.primal < 1e-3
    assert report.dual < 0.05


def test_an_estimate_on_survivors_is_refused_with_the_remedy():
    hessian, weights = case(0)
    support = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    support[0, 0] = False
    estimator = exact(hessian, ROWS, COLUMNS, support)
    with pytest.raises(FishLegError, match="carry: reestimate"):
        admm_masks(estimator, {"a": weights}, {}, dict, before={"a": support})


@pytest.mark.parametrize(("distribution", "least"), [("global", 1.001), ("uniform", 1.0)])
def test_a_step_by_admm_removes_the_exact_number_and_costs_less(distribution, least):
    predicted, counts = {}, {}
    for selection in ("single", "admm"):
        source = mixed_source(24)
        estimator = KFAC(source.partition, damping=1e-3)
        estimator.fit(source)
        report = prune_once(
            source.model, estimator, sparsity=0.6, selection=selection, distribution=distribution
        )
        predicted[selection], counts[selection] = report.predicted, report.removed
        assert (report.admm is None) == (selection == "single")
    assert counts["single"] == counts["admm"]
    assert predicted["admm"] * least <= predicted["single"]


def test_the_same_step_gives_the_same_bits():
    weights = []
    for _ in range(2):
        source = mixed_source(24)
        estimator = KFAC(source.partition, damping=1e-3)
        estimator.fit(source)
        prune_once(source.model, estimator, sparsity=0.6, selection="admm")
        weights.append([p.clone() for p in source.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
