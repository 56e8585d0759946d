import pytest
import torch
from torch import nn

from fishleg.blocks.eigen import EigenBlock, invert_factors
from fishleg.calibration import Calibration
from fishleg.errors import FishLegError, NotPositiveDefinite, UnknownName
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.parameters import Partition, partition_parameters
from fishleg.pruning import COMPENSATIONS, NETWORK, compensate, dense_masks
from tests.fishleg.exact import ExactEstimator, exact, group
from tests.reference import constrained_minimiser, dense_fisher, random_spd

EXACT = 1e-10  # float64
TIGHT = 1e-13  # relative residual of conjugate gradients, float64
ROWS, COLUMNS = 3, 4


@pytest.fixture
def hessian():
    return random_spd(ROWS * COLUMNS, seed=0)


@pytest.fixture
def weights():
    return torch.randn(
        ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def mask_without(*removed: int) -> torch.Tensor:
    mask = torch.ones(ROWS * COLUMNS, dtype=torch.bool)
    mask[list(removed)] = False
    return mask.reshape(ROWS, COLUMNS)


# -------------------------------------------------------------------------------- by hand


def test_four_numbers():
    # removing the first of (1, 2) under [[1, 1/2], [1/2, 1]] adds 1/2 to the second
    hessian = torch.block_diag(
        torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]])
    ).double()
    weights = {"a": torch.tensor([[1.0, 2.0], [0.5, 0.5]], dtype=torch.float64)}
    masks = {"a": torch.tensor([[False, True], [False, True]])}
    for method in ("independent", "joint"):
        delta, _ = compensate(exact(hessian, 2, 2), weights, masks, method=method, tolerance=TIGHT)
        torch.testing.assert_close(
            weights["a"] + delta["a"], torch.tensor([[0.0, 2.5], [0.0, 0.5]]).double()
        )


def test_independent_and_joint_differ_where_removed_weights_are_coupled():
    # Q = [[2, 1, 1], [1, 2, 1], [1, 1, 2]], w = 1, P = {0, 1}: x = 1/3 each and d_2 = -2/3 jointly,
    # x = 1/2 each and d_2 = -1 independently
    inverse = torch.eye(3, dtype=torch.float64) + 1
    estimator = ExactEstimator(Partition((group("a", 1, 3),)), {"a": inverse})
    weights = {"a": torch.ones(1, 3, dtype=torch.float64)}
    masks = {"a": torch.tensor([[False, False, True]])}
    moved = {}
    for method in COMPENSATIONS[:3]:
        delta, report = compensate(estimator, weights, masks, method=method, tolerance=TIGHT)
        moved[method] = delta["a"].tolist()
        assert report.method == method
        assert (report.predicted is not None) == (method == "joint")
    assert moved["none"] == [[-1, -1, 0]]
    assert moved["independent"] == [[-1, -1, -1]]
    assert moved["joint"][0] == pytest.approx([-1, -1, -2 / 3])


# --------------------------------------------------------------------- joint, by brute force


@pytest.mark.parametrize("removed", [(3,), (0, 1, 2, 7), tuple(range(11)), tuple(range(12))])
def test_joint_is_the_constrained_minimiser(hessian, weights, removed):
    mask = mask_without(*removed)
    delta, report = compensate(
        exact(hessian, ROWS, COLUMNS), {"a": weights}, {"a": mask}, tolerance=TIGHT
    )
    expected = constrained_minimiser(hessian, weights.flatten(), ~mask.flatten())
    torch.testing.assert_close(delta["a"].flatten(), expected, rtol=0, atol=EXACT)
    assert report.solves["a"].converged
    assert abs(report.predicted - float(0.5 * expected @ hessian @ expected)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0.5, 0.1, 0.02])
def test_joint_is_the_minimiser_at_a_damping_of_1e_5_on_either_side(dtype, kept):
    """K-FAC factors of condition 1e5, the few survivors by the inverse's side."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    right = torch.randn(60, 25, dtype=torch.float64, generator=generator).cumsum(1)
    block = invert_factors(left.T[None] @ left / 400, right.T[None] @ right / 600, 1e-5)
    hessian = block.invert().dense()
    scores = torch.rand(8, 25, dtype=torch.float64, generator=generator)
    mask = scores <= scores.flatten().quantile(kept)
    weights = torch.randn(8, 25, dtype=torch.float64, generator=generator)
    estimator = ExactEstimator(Partition((group("a", 8, 25),)), {})
    tensors = {name: one.to(dtype) for name, one in block.tensors().items()}
    estimator._blocks = {"a": EigenBlock.restore(tensors, block.shape)}
    expected = constrained_minimiser(hessian, weights.flatten(), ~mask.flatten())
    cost = float(0.5 * expected @ hessian @ expected)
    delta, report = compensate(estimator, {"a": weights.to(dtype)}, {"a": mask})
    move = delta["a"].double().flatten()
    assert report.solves["a"].converged
    assert report.predicted == pytest.approx(cost, rel=1e-4)
    assert float(0.5 * move @ hessian @ move) == pytest.approx(cost, rel=1e-4)
    assert float((move - expected).norm() / expected.norm()) < 1e-3


def test_no_constrained_move_in_a_fine_search_is_cheaper(hessian, weights):
    mask = mask_without(0, 4, 5)
    delta, report = compensate(
        exact(hessian, ROWS, COLUMNS), {"a": weights}, {"a": mask}, tolerance=TIGHT
    )
    generator = torch.Generator().manual_seed(2)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        others = delta["a"] + scale * mask * torch.randn(
            200, ROWS, COLUMNS, dtype=torch.float64, generator=generator
        )
        costs = 0.5 * torch.einsum("ni,ij,nj->n", *(others.flatten(1), hessian, others.flatten(1)))
        assert (costs >= report.predicted - EXACT).all()


# ------------------------------------------------------------------------------- later steps


def test_two_steps_with_the_full_q_are_one_step_with_the_final_mask(hessian, weights):
    estimator = exact(hessian, ROWS, COLUMNS)
    first, final = {"a": mask_without(0, 5, 6)}, {"a": mask_without(0, 3, 5, 6, 9, 10)}
    delta, _ = compensate(estimator, {"a": weights}, first, tolerance=TIGHT)
    between = weights + delta["a"]
    delta, _ = compensate(estimator, {"a": between}, final, tolerance=TIGHT)
    at_once, _ = compensate(estimator, {"a": weights}, final, tolerance=TIGHT)
    torch.testing.assert_close(between + delta["a"], weights + at_once["a"], rtol=0, atol=EXACT)
    assert (delta["a"][~first["a"]] == 0).all()


def test_second_step_is_the_same_by_the_full_q_and_by_one_of_the_survivors(hessian, weights):
    first, final = mask_without(0, 5, 6), mask_without(0, 3, 5, 6, 9, 10)
    between = {"a": torch.where(first, weights, 0.0)}
    everything = ~final.flatten()
    expected = constrained_minimiser(hessian, between["a"].flatten(), everything)
    for support in (None, first):
        estimator = exact(hessian, ROWS, COLUMNS, support)
        delta, _ = compensate(estimator, between, {"a": final}, tolerance=TIGHT)
        torch.testing.assert_close(delta["a"].flatten(), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("method", COMPENSATIONS[:3])
def test_what_q_says_outside_its_support_does_not_matter(hessian, weights, method):
    first, final = mask_without(0, 5, 6), {"a": mask_without(0, 3, 5, 6, 9, 10)}
    between = {"a": torch.where(first, weights, 0.0)}
    clean = exact(hessian, ROWS, COLUMNS, first)
    outside = ~first.flatten()
    noise = random_spd(ROWS * COLUMNS, seed=3) * (outside[:, None] | outside[None, :])
    noisy = ExactEstimator(
        clean.partition, {"a": clean.block("a").dense() + noise}, masks={"a": first}
    )
    wanted, _ = compensate(clean, between, final, method=method, tolerance=TIGHT)
    got, _ = compensate(noisy, between, final, method=method, tolerance=TIGHT)
    torch.testing.assert_close(got["a"], wanted["a"], rtol=0, atol=EXACT)
    assert (got["a"][~first] == 0).all()


def test_masks_that_disagree_with_the_estimate_are_refused(hessian, weights):
    estimator = exact(hessian, ROWS, COLUMNS, mask_without(0, 5))
    with pytest.raises(FishLegError, match="a: 1 survivors lie outside .* refine or fit"):
        compensate(estimator, {"a": torch.zeros_like(weights)}, {"a": mask_without(0, 3)})
    with pytest.raises(FishLegError, match="a: expected 0 .* got 2 others; apply_masks"):
        compensate(estimator, {"a": weights}, {"a": mask_without(0, 3, 5)})


# --------------------------------------------------------------------------- fisher, and q exact


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()


def source_of(model: nn.Module, inputs: int, seed: int = 0) -> GradientSource:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(20, inputs, dtype=torch.float64, generator=generator)
    return GradientSource(
        model, Categorical(), partition_parameters(model), Calibration(inputs=data), batch_size=7
    )


def network_fisher(source: GradientSource) -> torch.Tensor:
    groups = [(g.weight, g.bias) for g in source.partition.groups]
    return dense_fisher(source.model, source.calibration.inputs, groups)


def matrices(model: nn.Module, partition: Partition) -> dict[str, torch.Tensor]:
    return partition.gather({name: p.detach().clone() for name, p in model.named_parameters()})


def test_fisher_equals_joint_and_the_minimiser_when_q_is_exact():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    source, damping = source_of(model, 4), 1e-2
    partition = source.partition
    weights = matrices(model, partition)
    damped = network_fisher(source)
    damped += damping * torch.eye(len(damped), dtype=damped.dtype)
    estimator = ExactEstimator(partition, {"0": torch.linalg.inv(damped)}, damping=damping)
    masks = dense_masks(partition)
    masks["0"][0, :3] = False
    masks["0"][2, 1] = False
    expected = constrained_minimiser(damped, weights["0"].flatten(), ~masks["0"].flatten())
    for method in ("joint", "fisher"):
        delta, report = compensate(
            estimator, weights, masks, method=method, source=source, tolerance=TIGHT
        )
        torch.testing.assert_close(delta["0"].flatten(), expected, rtol=0, atol=1e-9)
        assert report.predicted == pytest.approx(float(0.5 * expected @ damped @ expected))
    assert delta["0"][1, 4] != 0  # a bias moves too


def test_fisher_is_the_minimiser_over_the_whole_network_whatever_q():
    model, damping = network(5), 1e-2
    source = source_of(model, 3)
    partition = source.partition
    weights = matrices(model, partition)
    masks = dense_masks(partition)
    masks["0"][1:3, :2] = False
    masks["3"][:, 2] = False
    sizes = {g.name: g.rows * g.columns for g in partition.groups}
    identity = {name: torch.eye(size, dtype=torch.float64) for name, size in sizes.items()}
    estimator = ExactEstimator(partition, identity, damping=damping)
    delta, report = compensate(
        estimator, weights, masks, method="fisher", source=source, tolerance=TIGHT
    )
    damped = network_fisher(source)
    damped += damping * torch.eye(len(damped), dtype=damped.dtype)
    removed = torch.cat(
        [
            (~masks[name]).flatten() if name in masks else torch.zeros(size, dtype=torch.bool)
            for name, size in sizes.items()
        ]
    )
    flat = torch.cat([weights[name].flatten() for name in sizes])
    expected = constrained_minimiser(damped, flat, removed)
    got = torch.cat([delta[name].flatten() for name in sizes])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert report.predicted == pytest.approx(float(0.5 * expected @ damped @ expected))
    assert (delta["1"] != 0).all()  # LayerNorm's weight and bias move
    assert list(report.solves) == [NETWORK]


def test_fisher_on_survivors_moves_nothing_outside_its_support():
    model = network(6)
    source = source_of(model, 3)
    partition = source.partition
    before = dense_masks(partition)
    before["0"][0, 0] = False
    after = {name: mask.clone() for name, mask in before.items()}
    after["0"][1, 1] = False
    weights = matrices(model, partition)
    weights["0"][0, 0] = 0.0
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    blocks = {g.name: torch.eye(g.rows * g.columns, dtype=torch.float64) for g in partition.groups}
    moves = {
        kind: compensate(
            ExactEstimator(partition, blocks, masks=support),
            weights,
            after,
            method="fisher",
            source=source,
            tolerance=TIGHT,
        )[0]
        for kind, support in {"full": None, "survivors": before}.items()
    }
    assert moves["survivors"]["0"][0, 0] == 0
    for name in partition.names:
        torch.testing.assert_close(
            moves["survivors"][name], moves["full"][name], rtol=0, atol=EXACT
        )


# ------------------------------------------------------------------------------------- edges


def test_an_early_stop_is_reported_and_zeros_are_exact_all_the_same(hessian, weights):
    mask = mask_without(0, 1, 2, 7, 8)
    delta, report = compensate(
        exact(hessian, ROWS, COLUMNS), {"a": weights}, {"a": mask}, max_iterations=1
    )
    assert not report.solves["a"].converged
    assert report.solves["a"].iterations == 1
    assert ((weights + delta["a"])[~mask] == 0).all()


def test_nothing_to_remove_moves_nothing(hessian, weights):
    estimator = exact(hessian, ROWS, COLUMNS)
    delta, report = compensate(estimator, {"a": weights}, dense_masks(estimator.partition))
    assert torch.equal(delta["a"], torch.zeros_like(weights))
    assert report.predicted == 0.0
    assert report.solves == {}


def test_inputs_are_not_modified(hessian, weights):
    kept, mask = weights.clone(), mask_without(1, 2)
    compensate(exact(hessian, ROWS, COLUMNS), {"a": weights}, {"a": mask})
    assert torch.equal(weights, kept)
    assert torch.equal(mask, mask_without(1, 2))


def test_bad_input_is_named(hessian, weights):
    estimator, masks = exact(hessian, ROWS, COLUMNS), {"a": mask_without(1, 2)}
    with pytest.raises(UnknownName, match="did you mean 'joint'"):
        compensate(estimator, {"a": weights}, masks, method="jiont")
    with pytest.raises(FishLegError, match="'fisher' needs `source`"):
        compensate(estimator, {"a": weights}, masks, method="fisher")
    indefinite = exact(-hessian, ROWS, COLUMNS)
    with pytest.raises(NotPositiveDefinite, match="raise the damping"):
        compensate(indefinite, {"a": weights}, masks)
