"""FishLeg in a Kronecker eigenbasis: closed form, shrinkage and masks."""

import pytest
import torch
from torch import nn

from fishleg.blocks import EigenBlock
from fishleg.calibration import Calibration
from fishleg.estimators import KFAC, FishLeg
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.parameters import partition_parameters
from fishleg.solvers.base import SolverState
from fishleg.solvers.closed import ClosedFormSolver
from tests import reference

EXACT = 1e-10  # float64
DAMPING = 0.01


def make_source() -> GradientSource:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.Flatten()
    ).double()
    inputs = torch.randn(30, 2, 3, 3, dtype=torch.float64)
    partition = partition_parameters(model)
    return GradientSource(model, Categorical(), partition, Calibration(inputs=inputs))


def fitted(source: GradientSource, **options) -> FishLeg:
    estimator = FishLeg(
        source.partition,
        damping=DAMPING,
        **{"structure": "eigen", "warm_start": "moments", **options},
    )
    estimator.fit(source)
    return estimator


def objective(block: EigenBlock, gradients: torch.Tensor, mask: torch.Tensor | None = None):
    q = reference.eigen_matrix(**block.tensors())
    return float(reference.objective(q, reference.gradient_fisher(gradients), DAMPING, mask))


@pytest.mark.parametrize("warm_start", ["kfac", "moments"])
def test_without_shrinkage_no_other_values_in_the_basis_are_better(warm_start):
    source = make_source()
    estimator = fitted(source, warm_start=warm_start, shrinkage=0.0)
    generator = torch.Generator().manual_seed(1)
    for name, gradients in source.hold(source.partition.names).items():
        block = estimator.block(name)
        least = objective(block, gradients)
        assert estimator.report[name]["objective"] == pytest.approx(least, rel=EXACT)
        for scale in (1e-3, 1e-1):
            noise = torch.randn(block.values.shape, dtype=torch.float64, generator=generator)
            other = EigenBlock(block.left, block.right, block.values * (scale * noise).exp())
            assert objective(other, gradients) > least


def test_beats_kfac_in_its_own_basis():
    source = make_source()
    estimator = fitted(source, warm_start="kfac", shrinkage=0.0)
    kfac = KFAC(source.partition, damping=DAMPING)
    kfac.fit(source)
    for name, gradients in source.hold(source.partition.names).items():
        assert torch.equal(estimator.block(name).left, kfac.block(name).left)
        assert objective(estimator.block(name), gradients) < objective(kfac.block(name), gradients)


def test_shrinkage_goes_from_what_was_measured_to_the_product_of_the_factors():
    source = make_source()
    kfac = KFAC(source.partition, damping=DAMPING)
    kfac.fit(source)
    curvatures = {
        rho: {
            name: 1 / block.values - DAMPING
            for name, block in fitted(source, warm_start="kfac", shrinkage=rho).blocks().items()
        }
        for rho in (0.0, 0.5, 1.0)
    }
    for name in source.partition.names:
        measured, mean, model = (curvatures[rho][name] for rho in (0.0, 0.5, 1.0))
        product = 1 / kfac.block(name).values - DAMPING
        torch.testing.assert_close(model, product * (measured.sum() / product.sum()))
        torch.testing.assert_close(mean, (measured + model) / 2)


def test_a_group_without_gradients_gets_the_inverse_damping():
    start = EigenBlock(torch.eye(2)[None], torch.eye(3)[None], torch.full((1, 2, 3), 1 / DAMPING))
    solver = ClosedFormSolver(DAMPING, shrinkage=0.5)
    (state,) = solver.run([torch.zeros(2, 5, 3)], SolverState(block=start))
    torch.testing.assert_close(state.block.values, start.values)


def test_refine_is_a_fit_to_masked_gradients():
    source = make_source()
    estimator = fitted(source, warm_start="kfac")
    masks = {
        group.name: torch.rand(group.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        for group in source.partition.prunable
    }
    masks["0"][:, -1] = True
    estimator.refine(source, masks)
    assert set(estimator.masks) == set(masks)
    for name, gradients in source.hold(source.partition.names).items():
        left, masked = estimator.block(name).left[0], gradients * masks[name]
        told = estimator.report[name]["objective"]
        assert told == pytest.approx(objective(estimator.block(name), masked), rel=EXACT)
        moment = left.mT @ torch.einsum("nij,nkj->ik", masked, masked) @ left
        torch.testing.assert_close(moment, moment.diagonal().diag(), rtol=0, atol=EXACT)
