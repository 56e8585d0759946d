"""What each of the one-pass estimators is, against dense float64 matrices."""

import pytest
import torch
from torch import nn

from fishleg.blocks import DenseBlock, EigenBlock
from fishleg.calibration import Calibration
from fishleg.errors import FishLegError
from fishleg.estimators import (
    EKFAC,
    KFAC,
    MFAC,
    OBS,
    DiagonalFisher,
    Eigen,
    FishLeg,
    LayerHessian,
    Magnitude,
)
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Gaussian
from fishleg.parameters import partition_parameters
from tests.fishleg.networks import Tied, mixed_source, shake, source_of
from tests.reference import (
    chunked_inverse,
    conv_patches,
    damped_inverse,
    dense_fisher,
    kfac_fisher,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DAMPING = 0.01


@pytest.fixture(scope="module")
def source() -> GradientSource:
    return mixed_source(labels="enumerated", batch_size=7)


@pytest.fixture(scope="module")
def fishers(source) -> dict[str, torch.Tensor]:
    """Group name -> the dense Fisher of that group."""
    inputs = source.calibration.inputs
    return {
        group.name: dense_fisher(source.model, inputs, [(group.weight, group.bias)])
        for group in source.partition.groups
    }


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **EXACT)


def random_mask(source: GradientSource, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(source.partition[name].shape, generator=generator) < 0.6


@pytest.mark.parametrize(
    ("estimator", "inverse"),
    [
        (Magnitude, lambda source, fisher: torch.eye(len(fisher), dtype=torch.float64)),
        (
            DiagonalFisher,
            lambda source, fisher: torch.diag(1 / (fisher.diagonal() + DAMPING)),
        ),
        (OBS, lambda source, fisher: chunked_inverse(fisher, DAMPING, 64)),
        (
            KFAC,
            lambda source, fisher: damped_inverse(
                kfac_fisher(source.model, "grouped", source.calibration.inputs), DAMPING
            ),
        ),
        (MFAC, lambda source, fisher: damped_inverse(fisher, DAMPING)),
        (
            lambda partition, damping: FishLeg(partition, damping=damping, structure="full"),
            lambda source, fisher: damped_inverse(fisher, DAMPING),
        ),
    ],
    ids=["identity", "diagonal", "woodbury", "kfac", "mfac", "fishleg"],
)
def test_matvec_on_a_grouped_convolution(source, fishers, estimator, inverse):
    fitted = estimator(source.partition, damping=DAMPING)
    fitted.fit(source)
    v = torch.randn(6, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = inverse(source, fishers["grouped"]) @ v.flatten()
    close(fitted.matvec({"grouped": v})["grouped"].flatten(), expected)


def test_diagonal_is_the_inverse_diagonal(source, fishers):
    estimator = DiagonalFisher(source.partition, damping=DAMPING)
    estimator.fit(source)
    for name, diagonal in estimator.diagonal().items():
        close(diagonal.flatten(), 1 / (fishers[name].diagonal() + DAMPING))


@pytest.mark.parametrize("block_size", [1, 5, 64, 1000])
def test_woodbury_inverts_chunks(source, fishers, block_size):
    estimator = OBS(source.partition, damping=DAMPING, block_size=block_size)
    estimator.fit(source)
    for name, block in estimator.blocks().items():
        close(block.dense(), chunked_inverse(fishers[name], DAMPING, block_size))


def test_woodbury_is_the_recursion_of_woodfisher(source):
    estimator = OBS(source.partition, damping=DAMPING, block_size=1000)
    estimator.fit(source)
    (gradients,) = source.hold(["head"]).values()
    q = torch.eye(18, dtype=torch.float64) / DAMPING
    for g in gradients.flatten(1):
        q = q - torch.outer(q @ g, g @ q) / (1 + g @ q @ g)
    close(estimator.block("head").dense(), q)


def test_woodbury_refines_on_the_restricted_fisher(source, fishers):
    estimator = OBS(source.partition, damping=DAMPING, block_size=1000)
    mask = random_mask(source, "grouped")
    estimator.refine(source, {"grouped": mask})
    alive = mask.flatten()
    dense = estimator.block("grouped").dense()
    restricted = fishers["grouped"][alive][:, alive]
    close(dense[alive][:, alive], damped_inverse(restricted, DAMPING))
    assert (dense[alive][:, ~alive] == 0).all()
    close(dense[~alive][:, ~alive], torch.eye(int((~alive).sum()), dtype=torch.float64) / DAMPING)
    assert list(estimator.masks) == ["grouped"]
    close(estimator.block("conv").dense(), damped_inverse(fishers["conv"], DAMPING))


def test_woodbury_in_float32_with_small_damping():
    estimators = []
    for dtype in (torch.float64, torch.float32):
        data = mixed_source(labels="enumerated", dtype=dtype)
        if estimators:
            data.model.load_state_dict(estimators[0][1].model.state_dict())
            data.calibration.inputs.copy_(estimators[0][1].calibration.inputs)
        estimator = OBS(data.partition, damping=1e-4)
        estimator.fit(data)
        estimators.append((estimator, data))
    (exact, _), (single, _) = estimators
    for name, block in exact.blocks().items():
        error = single.block(name).dense() - block.dense()
        assert error.norm() < 1e-3 * block.dense().norm()


def test_kfac_factors_layers(source):
    estimator = KFAC(source.partition, damping=DAMPING)
    estimator.fit(source)
    inputs = source.calibration.inputs
    for name in ("grouped", "head"):
        assert isinstance(estimator.block(name), EigenBlock)
        expected = damped_inverse(kfac_fisher(source.model, name, inputs), DAMPING)
        close(estimator.block(name).dense(), expected)


def test_kfac_does_not_depend_on_the_batching():
    blocks = []
    for batch_size in (2, 100):  # 2: fewer rows than labels
        data = mixed_source(labels="enumerated", batch_size=batch_size)
        estimator = KFAC(data.partition, damping=DAMPING)
        estimator.fit(data)
        blocks.append(estimator.blocks())
    for name, block in blocks[0].items():
        close(block.dense(), blocks[1][name].dense())


def test_kfac_is_exact_where_the_fisher_is_kronecker():
    model = shake(nn.Linear(4, 3))
    inputs = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = GradientSource(
        model,
        Gaussian(),
        partition_parameters(model),
        Calibration(inputs=inputs),
        labels="enumerated",
    )
    for dense_size in (0, 1024):
        estimator = KFAC(data.partition, damping=DAMPING, dense_size=dense_size)
        seen = []
        estimator.fit(data, seen.append)
        assert seen[-1].done == seen[-1].total
        ones = torch.ones(7, 1, dtype=torch.float64)
        moment = torch.cat([inputs, ones], dim=1).T @ torch.cat([inputs, ones], dim=1) / 7
        fisher = torch.kron(torch.eye(3, dtype=torch.float64), moment)
        close(estimator.block("weight").dense(), damped_inverse(fisher, DAMPING))


def test_kfac_gives_small_groups_without_a_layer_their_full_fisher(source, fishers):
    estimator = KFAC(source.partition, damping=DAMPING)
    estimator.fit(source)
    for name in ("norm", "layer_norm", "mix", "gain"):
        assert isinstance(estimator.block(name), DenseBlock)
        close(estimator.block(name).dense(), damped_inverse(fishers[name], DAMPING))


def test_kfac_factors_large_groups_without_a_layer(source, fishers):
    estimator = KFAC(source.partition, damping=DAMPING, dense_size=0)
    estimator.fit(source)
    (gradients,) = source.hold(["mix"]).values()
    row = sum(g @ g.T for g in gradients)
    column = sum(g.T @ g for g in gradients)
    fisher = torch.kron(row, column) / fishers["mix"].trace()
    close(estimator.block("mix").dense(), damped_inverse(fisher, DAMPING))
    # For a vector the product is the Fisher itself.
    close(estimator.block("gain").dense(), damped_inverse(fishers["gain"], DAMPING))


def test_kfac_refines_on_the_full_fisher(source):
    fitted, refined = (KFAC(source.partition, damping=DAMPING) for _ in range(2))
    fitted.fit(source)
    refined.refine(source, {"grouped": random_mask(source, "grouped")})
    assert refined.masks is None
    for name, block in fitted.blocks().items():
        assert torch.equal(refined.block(name).dense(), block.dense())


def test_a_fisher_of_zero_leaves_the_damping():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[1].weight)
    data = GradientSource(
        model,
        Gaussian(),
        partition_parameters(model),
        Calibration(inputs=torch.randn(3, 3, dtype=torch.float64)),
    )
    for make in (KFAC, OBS, DiagonalFisher):
        estimator = make(data.partition, damping=DAMPING)
        estimator.fit(data)
        close(estimator.block("0").dense(), torch.eye(16, dtype=torch.float64) / DAMPING)


def test_block_size_is_checked(source):
    with pytest.raises(ValueError, match="block_size"):
        OBS(source.partition, damping=DAMPING, block_size=0)


# ----------------------------------------------------------------------------- EK-FAC


def test_ekfac_measures_the_fisher_along_the_basis_of_kfac(source, fishers):
    kfac, ekfac = KFAC(source.partition, damping=DAMPING), EKFAC(source.partition, damping=DAMPING)
    for estimator in (kfac, ekfac):
        estimator.fit(source)
    for name, block in kfac.blocks().items():
        if isinstance(block, DenseBlock):
            assert torch.equal(ekfac.block(name).dense(), block.dense())
            continue
        pairs = zip(block.left, block.right, strict=True)
        basis = torch.block_diag(*(torch.kron(left, right) for left, right in pairs))
        curvature = (basis.T @ fishers[name] @ basis).diagonal()
        expected = basis @ torch.diag(1 / (curvature + DAMPING)) @ basis.T
        close(ekfac.block(name).dense(), expected)


def test_ekfac_is_eigen_without_shrinkage(source):
    ekfac = EKFAC(source.partition, damping=DAMPING)
    unshrunk = Eigen(source.partition, damping=DAMPING, shrinkage=0.0)
    for estimator in (ekfac, unshrunk):
        estimator.fit(source)
    for name in ("conv", "grouped", "head"):
        close(ekfac.block(name).dense(), unshrunk.block(name).dense())


# ------------------------------------------------------------------------------ M-FAC


def test_few_vectors_are_an_unbiased_estimate_of_the_fisher(source, fishers):
    """The mean of a batch of three would give a third of it."""
    draws = 400
    mean = 0.0
    for seed in range(draws):
        estimator = MFAC(source.partition, damping=DAMPING, gradients=source.rows // 3, seed=seed)
        vectors = estimator.vectors(source, ["head"])["head"][0].flatten(1)
        mean = mean + vectors.T @ vectors / draws
    error = (mean - fishers["head"]).norm() / fishers["head"].norm()
    assert error < 0.1  # about 2 / sqrt(draws)


def test_mfac_inverts_the_vectors_it_keeps(source):
    estimator = MFAC(source.partition, damping=DAMPING, gradients=5)
    estimator.fit(source)
    for name, (vectors,) in estimator.vectors(source, source.partition.names).items():
        assert len(vectors) == 5
        low_rank = vectors.flatten(1).T @ vectors.flatten(1)
        close(estimator.block(name).dense(), damped_inverse(low_rank, DAMPING))


def test_mfac_keeps_the_same_vectors_whatever_the_batches():
    found = []
    for batch_size in (3, 100):
        data = mixed_source(labels="sampled", draws=3, batch_size=batch_size)
        estimator = MFAC(data.partition, damping=DAMPING, gradients=4)
        estimator.fit(data)
        found.append(estimator.blocks())
    for name, block in found[0].items():
        close(block.dense(), found[1][name].dense())


def test_mfac_refines_on_the_restricted_fisher(source, fishers):
    estimator = MFAC(source.partition, damping=DAMPING)
    mask = random_mask(source, "grouped")
    estimator.refine(source, {"grouped": mask})
    alive = mask.flatten()
    dense = estimator.block("grouped").dense()[alive][:, alive]
    close(dense, damped_inverse(fishers["grouped"][alive][:, alive], DAMPING))
    with pytest.raises(ValueError, match="gradients"):
        MFAC(source.partition, damping=DAMPING, gradients=0)


# ----------------------------------------------------------------------------- layers


def test_layer_hessian_is_the_second_moment_of_the_patches(source):
    estimator = LayerHessian(source.partition, damping=DAMPING, relative_damping=0.1)
    estimator.fit(source)
    model, inputs = source.model.eval(), source.calibration.inputs
    with torch.no_grad():
        seen = model.act(model.norm(model.conv(inputs)))
    hessians = []
    for head in range(2):
        patches = torch.stack([conv_patches(x, model.grouped, head) for x in seen])
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=2)
        hessians += [torch.einsum("nti,ntj->ij", patches, patches) / len(inputs)] * 3
    hessian = torch.block_diag(*hessians)
    damping = DAMPING + 0.1 * float(hessian.diagonal().mean())
    close(estimator.block("grouped").dense(), damped_inverse(hessian, damping))
    close(
        estimator.block("norm").dense(),
        torch.eye(8, dtype=torch.float64) / DAMPING,
    )
    with pytest.raises(ValueError, match="relative_damping"):
        LayerHessian(source.partition, damping=DAMPING, relative_damping=-1.0)


def test_layer_hessian_refuses_weights_that_are_no_layers():
    data = source_of(shake(Tied()), Calibration(inputs=torch.randn(4, 4, dtype=torch.float64)))
    with pytest.raises(FishLegError, match="first: expected the weight of one linear"):
        LayerHessian(data.partition, damping=DAMPING).fit(data)
