"""Eigen: closed form in a Kronecker eigenbasis, shrinkage and masks."""

from typing import get_args

import pytest
import torch
from torch import nn

import fishleg
from fishleg.blocks import EigenBlock
from fishleg.calibration import Calibration
from fishleg.curvature_file import read_curvature, write_curvature
from fishleg.errors import UnknownName
from fishleg.estimators import KFAC, Eigen
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.options import EigenBasis
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


def fitted(source: GradientSource, **options) -> Eigen:
    estimator = Eigen(source.partition, damping=DAMPING, **{"basis": "moments", **options})
    estimator.fit(source)
    return estimator


def objective(block: EigenBlock, gradients: torch.Tensor, mask: torch.Tensor | None = None):
    q = reference.eigen_matrix(**block.tensors())
    return float(reference.objective(q, reference.gradient_fisher(gradients), DAMPING, mask))


@pytest.mark.parametrize("basis", get_args(EigenBasis))
def test_without_shrinkage_no_other_values_in_the_basis_are_better(basis):
    source = make_source()
    estimator = fitted(source, basis=basis, shrinkage=0.0)
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
    estimator = fitted(source, basis="kfac", shrinkage=0.0)
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
            for name, block in fitted(source, basis="kfac", shrinkage=rho).blocks().items()
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
    estimator = fitted(source, basis="kfac")
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


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shrinkage": 1.5}, ValueError, "shrinkage: expected 0 to 1, got 1.5"),
        ({"basis": "identity"}, UnknownName, "Unknown basis 'identity'. Known: kfac, log_det"),
        ({"basis_sweeps": 0}, ValueError, "basis_sweeps: expected at least 1, got 0"),
        ({"structure": "kronecker"}, TypeError, "structure"),
    ],
)
def test_options_are_checked(options, error, words):
    partition = partition_parameters(nn.Linear(2, 2))
    with pytest.raises(error, match=words):
        Eigen(partition, damping=DAMPING, **options)


@pytest.mark.parametrize("partly", [False, True])
def test_the_state_of_fishleg_in_structure_eigen_is_read(partly):
    """Earlier versions had this estimator as a structure of FishLeg."""
    source = make_source()
    states = []
    estimator = Eigen(source.partition, damping=DAMPING, memory_bytes=1 << 20)
    estimator.fit(source, lambda progress: states.append(estimator.state_dict()))
    state = states[len(states) // 2] if partly else estimator.state_dict()
    state["meta"]["estimator"] = "fishleg"
    state["meta"]["options"] = {
        "structure": "eigen",
        "warm_start": "kfac",
        "shrinkage": 0.5,
        "sweeps": 5,
        "steps": 200,
        "memory_bytes": 1 << 20,
    }
    again = Eigen(source.partition, damping=1.0)
    again.load_state_dict(state)
    again.fit(source, resume=True)
    assert again.options == estimator.options
    for name, block in estimator.blocks().items():
        for key, tensor in block.tensors().items():
            assert torch.equal(again.block(name).tensors()[key], tensor)


def test_a_file_of_fishleg_in_structure_eigen_is_loaded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    data = torch.randn(30, 2, 3, 3), torch.randint(3, (30,))
    fitted = fishleg.fit(model, data, damping=DAMPING)
    fitted.save(tmp_path / "file")
    state, facts = read_curvature(tmp_path / "file", torch.device("cpu"))
    options = {"structure": "eigen", "warm_start": "kfac", "shrinkage": 0.5, "steps": 200}
    state["meta"] |= {"estimator": "fishleg", "options": options}
    write_curvature(tmp_path / "file", state, {**facts, "method": "fishleg"})
    loaded = fishleg.Curvature.load(tmp_path / "file", model).estimator
    assert isinstance(loaded, Eigen)
    assert loaded.options == fitted.estimator.options
    for name, block in fitted.estimator.blocks().items():
        assert torch.equal(loaded.block(name).dense(), block.dense())
