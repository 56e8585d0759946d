"""One suite for all estimators. A new one, or a new option, is one line in `CASES`."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fishleg.errors import CapacityExceeded, FishLegError, NotFitted
from fishleg.estimators import (
    EKFAC,
    ESTIMATORS,
    FLS,
    KFAC,
    MFAC,
    OBS,
    AbstractEstimator,
    DiagonalFisher,
    Eigen,
    FishLeg,
    FitProgress,
    LayerHessian,
    Magnitude,
)
from fishleg.estimators.groupwise import AbstractGroupwiseEstimator
from fishleg.gradients.source import GradientSource
from fishleg.options import BATCHWISE
from fishleg.parameters import Partition, partition_parameters
from tests.fishleg.networks import Tied, mixed_source

KRONECKER: dict[str, Any] = {"structure": "kronecker", "warm_start": "moments"}
STEPS: dict[str, Any] = {"batch": 4, "steps": 6, "refine_steps": 4, "check_every": 2}
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}
DAMPING = 0.01

CASES: dict[str, Callable[[Partition], AbstractEstimator]] = {
    "magnitude": lambda partition: Magnitude(partition, damping=DAMPING),
    "diagonal": lambda partition: DiagonalFisher(partition, damping=DAMPING),
    "woodbury": lambda partition: OBS(partition, damping=DAMPING),
    "woodbury, small": lambda partition: OBS(partition, damping=DAMPING, block_size=5),
    "woodbury, by rows": lambda partition: OBS(partition, damping=DAMPING, by_rows=True),
    "kfac": lambda partition: KFAC(partition, damping=DAMPING),
    "kfac, factors only": lambda partition: KFAC(partition, damping=DAMPING, dense_size=0),
    "ekfac": lambda partition: EKFAC(partition, damping=DAMPING),
    "ekfac, factors only": lambda partition: EKFAC(partition, damping=DAMPING, dense_size=0),
    "mfac": lambda partition: MFAC(partition, damping=DAMPING),
    "mfac, few": lambda partition: MFAC(partition, damping=DAMPING, gradients=4),
    "layer": lambda partition: LayerHessian(partition, damping=DAMPING),
    "fishleg": lambda partition: FishLeg(partition, damping=DAMPING, **KRONECKER),
    "fishleg, kfac": lambda partition: FishLeg(
        partition, damping=DAMPING, structure="kronecker", warm_start="kfac"
    ),
    "fishleg, exact masks": lambda partition: FishLeg(
        partition, damping=DAMPING, mask_fit="exact", **KRONECKER
    ),
    "fishleg, scaled": lambda partition: FishLeg(
        partition,
        damping=DAMPING,
        structure="kronecker_scaled",
        warm_start="moments",
        solver="adam",
        steps=3,
    ),
    "fishleg, tensor": lambda partition: FishLeg(
        partition, damping=DAMPING, structure="tensor", warm_start="moments", solver="adam", steps=3
    ),
    "fishleg, tensor scaled": lambda partition: FishLeg(
        partition,
        damping=DAMPING,
        structure="tensor_scaled",
        warm_start="moments",
        solver="adam",
        steps=3,
    ),
    "eigen": lambda partition: Eigen(partition, damping=DAMPING),
    "eigen, moments": lambda partition: Eigen(partition, damping=DAMPING, basis="moments"),
    "eigen, log-det": lambda partition: Eigen(partition, damping=DAMPING, basis="log_det"),
    "fishleg, block": lambda partition: FishLeg(partition, damping=DAMPING, structure="block"),
    "fishleg, diagonal": lambda partition: FishLeg(
        partition, damping=DAMPING, structure="diagonal"
    ),
    "fishleg, log-det": lambda partition: FishLeg(
        partition,
        damping=DAMPING,
        structure="kronecker",
        warm_start="kfac",
        objective="log_det",
        pull=0.3,
    ),
    "fls": lambda partition: FLS(partition, damping=DAMPING, **STEPS),
    "fls, normal probes, scaled": lambda partition: FLS(
        partition,
        damping=DAMPING,
        directions="normal",
        structure="kronecker_scaled",
        warm_start="diagonal",
        **STEPS,
    ),
    "fls, expected, tensor": lambda partition: FLS(
        partition,
        damping=DAMPING,
        objective="expected",
        structure="tensor",
        warm_start="moments",
        **STEPS,
    ),
    "fls, log-det, tensor scaled": lambda partition: FLS(
        partition,
        damping=DAMPING,
        objective="log_det",
        structure="tensor_scaled",
        warm_start="kfac",
        **STEPS,
    ),
    "fls, nothing held out": lambda partition: FLS(
        partition, damping=DAMPING, held_out=0.0, **STEPS
    ),
    "fishleg, full": lambda partition: FishLeg(partition, damping=DAMPING, structure="full"),
}


def source(dtype: torch.dtype = torch.float64) -> GradientSource:
    return mixed_source(dtype=dtype, labels="enumerated", batch_size=7)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE[expected.dtype])


def random_masks(partition: Partition) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = {
        group.name: torch.rand(group.shape, generator=generator) < 0.6
        for group in partition.prunable
    }
    for group in partition.prunable:
        if group.bias is not None:
            masks[group.name][:, -1] = True
    return masks


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def make(request) -> Callable[[Partition], AbstractEstimator]:
    return request.param


@dataclass
class Fit:
    """A fit and what was seen of it."""

    estimator: AbstractEstimator
    data: GradientSource
    model_before: dict[str, torch.Tensor]
    progress: list[FitProgress]


def fit(make: Callable[[Partition], AbstractEstimator], dtype: torch.dtype) -> Fit:
    data = source(dtype)
    data.model.train()
    before = copy.deepcopy(data.model.state_dict())
    result = Fit(make(data.partition), data, before, [])
    result.estimator.fit(data, result.progress.append)
    return result


@pytest.fixture(scope="module")
def fits(make) -> dict[torch.dtype, Fit]:
    return {dtype: fit(make, dtype) for dtype in TOLERANCE}


@pytest.fixture(params=TOLERANCE, ids=str)
def fitted(request, fits) -> AbstractEstimator:
    return fits[request.param].estimator


@pytest.fixture
def fitted64(fits) -> AbstractEstimator:
    return fits[torch.float64].estimator


def test_every_group_has_a_block_of_its_shape(fitted):
    blocks = fitted.blocks()
    assert list(blocks) == list(fitted.partition.names)
    for group in fitted.partition.groups:
        assert blocks[group.name].shape == group.shape
    assert fitted.masks is None


def test_matvec_is_that_of_the_blocks(fitted):
    dtype = next(iter(fitted.diagonal().values())).dtype
    v = {group.name: torch.randn(2, *group.shape, dtype=dtype) for group in fitted.partition.groups}
    before = copy.deepcopy(v)
    image = fitted.matvec(v)
    assert list(image) == list(v)
    for name, value in v.items():
        assert torch.equal(value, before[name])
        dense = fitted.block(name).dense()
        close(image[name], (value.flatten(1) @ dense.T).reshape(value.shape))


def test_blocks_are_symmetric_and_positive_definite(fitted):
    for block in fitted.blocks().values():
        dense = block.dense().double()
        scale = dense.abs().max()
        assert (dense - dense.T).abs().max() <= 1e-6 * scale
        assert torch.linalg.eigvalsh(dense).min() > 0


def test_diagonal_submatrix_and_trace(fitted):
    for name, diagonal in fitted.diagonal().items():
        block = fitted.block(name)
        dense = block.dense()
        close(diagonal.flatten(), dense.diagonal())
        close(block.trace(), dense.trace())
        index = torch.randperm(len(dense))[:4]
        close(block.submatrix(index), dense[index][:, index])


def test_the_models_dtype_is_kept(fits):
    for dtype, found in fits.items():
        for block in found.estimator.blocks().values():
            assert {tensor.dtype for tensor in block.tensors().values()} == {dtype}


def test_the_model_is_left_as_it_was(fits):
    for found in fits.values():
        for name, tensor in found.data.model.state_dict().items():
            assert torch.equal(tensor, found.model_before[name])
        assert all(module.training for module in found.data.model.modules())


def test_the_callback_sees_the_fit_to_its_end(fits):
    for found in fits.values():
        done = [progress.done for progress in found.progress]
        assert done == sorted(done)
        assert found.progress[-1].done == found.progress[-1].total
        values = [value for progress in found.progress for value in progress.metrics.values()]
        assert all(isinstance(value, float) for value in values)


def test_two_fits_give_the_same_bits(make, fitted64):
    again = make(fitted64.partition)
    again.fit(source())
    for name, block in again.blocks().items():
        for key, tensor in block.tensors().items():
            assert torch.equal(tensor, fitted64.block(name).tensors()[key])


def test_state_goes_through_json_and_goes_on_to_the_same_bits(make, fitted64):
    state = fitted64.state_dict()
    assert all(tensor.is_contiguous() for tensor in state["tensors"].values())
    meta = json.loads(json.dumps(state["meta"]))
    restored, twin = (make(fitted64.partition) for _ in range(2))
    for estimator in (restored, twin):
        estimator.load_state_dict({"tensors": copy.deepcopy(state["tensors"]), "meta": meta})
    assert restored.memory_bytes() == fitted64.memory_bytes()
    for name, block in fitted64.blocks().items():
        assert torch.equal(restored.block(name).dense(), block.dense())

    masks = random_masks(fitted64.partition)
    restored.refine(source(), masks)
    second = make(fitted64.partition)
    second.load_state_dict(restored.state_dict())
    assert (second.masks is None) == (restored.masks is None)
    if restored.masks is not None:
        assert restored.masks.keys() == second.masks.keys()
        assert all(torch.equal(mask, second.masks[name]) for name, mask in restored.masks.items())
    twin.refine(source(), masks)
    for name, block in restored.blocks().items():
        assert torch.equal(twin.block(name).dense(), block.dense())
        assert torch.equal(second.block(name).dense(), block.dense())


@pytest.mark.parametrize("begun", ["fit", "refine"])
def test_what_was_interrupted_goes_on_anywhere_to_the_same_bits(make, fitted64, begun):
    """A state is taken at every word of progress; from some of them, what is left is done."""
    data = source()
    whole, states, seen = make(data.partition), [], []
    masks = random_masks(data.partition)
    if begun == "refine":
        whole.load_state_dict(copy.deepcopy(fitted64.state_dict()))

    def note(progress: FitProgress) -> None:
        seen.append(progress.done)
        states.append(copy.deepcopy(whole.state_dict()))

    if begun == "refine":
        whole.refine(data, masks, note)
    else:
        whole.fit(data, note)
    for number in range(0, len(states), 1 + len(states) // 25):
        again, later = make(data.partition), []
        json.dumps(states[number]["meta"])
        again.load_state_dict(states[number])
        again.fit(source(), lambda progress, later=later: later.append(progress.done), resume=True)
        assert all(one >= seen[number] for one in later)
        # the start of these is made again
        assert (
            isinstance(whole, AbstractGroupwiseEstimator | FLS) or len(later) <= len(seen) - number
        )  # no batch twice
        assert (again.masks is None) == (whole.masks is None)
        for name, block in whole.blocks().items():
            for key, tensor in block.tensors().items():
                assert torch.equal(again.block(name).tensors()[key], tensor)


def test_refine_stays_positive_definite_on_the_survivors(make, fitted64):
    estimator = make(fitted64.partition)
    estimator.load_state_dict(fitted64.state_dict())
    masks = random_masks(fitted64.partition)
    before = copy.deepcopy(masks)
    estimator.refine(source(), masks)
    for name, mask in masks.items():
        assert torch.equal(mask, before[name])
        survivors = mask.flatten()
        dense = estimator.block(name).dense()[survivors][:, survivors]
        close(dense, dense.T)
        assert torch.linalg.eigvalsh(dense).min() > 0
    if estimator.masks is not None:
        assert all(torch.equal(estimator.masks[name], mask) for name, mask in masks.items())


def test_memory_is_what_is_allocated(fitted):
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for block in fitted.blocks().values()
        for tensor in block.tensors().values()
    }
    assert fitted.memory_bytes() == sum(storages.values())


def test_memory_is_known_before_the_fit(make, fits):
    for dtype, found in fits.items():
        data = source(dtype)
        needed = make(data.partition).required_bytes(data)
        assert needed == found.estimator.memory_bytes()
        assert make(data.partition).peak_bytes(data) >= needed


def test_what_does_not_fit_is_refused_before_the_fit(make):
    data = source()
    estimator = make(data.partition)
    estimator.memory_limit = estimator.peak_bytes(data)
    estimator.check_memory(data)
    estimator.memory_limit -= 1
    with pytest.raises(CapacityExceeded, match=f"{estimator.name}: the fit needs about .* choose"):
        estimator.fit(data)
    with pytest.raises(NotFitted):
        estimator.blocks()


def test_use_before_fit_is_an_error(make, fitted64):
    with pytest.raises(NotFitted, match="call fit"):
        make(fitted64.partition).diagonal()


def test_every_registered_estimator_is_in_the_suite():
    names = {make(partition_parameters(Tied())).name for make in CASES.values()}
    assert names == set(ESTIMATORS)
    assert all(estimator.name == name for name, estimator in ESTIMATORS.items())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_damping_must_be_positive(name):
    with pytest.raises(ValueError, match="damping"):
        ESTIMATORS[name](partition_parameters(Tied()), damping=0.0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_states_of_others_are_refused(name):
    data = source()
    options = STEPS if name == "fls" else {}
    estimator = ESTIMATORS[name](data.partition, damping=DAMPING, **options)
    estimator.fit(data)
    state = estimator.state_dict()
    with pytest.raises(FishLegError, match="groups"):
        ESTIMATORS[name](partition_parameters(Tied()), damping=DAMPING).load_state_dict(state)
    state["meta"]["estimator"] = "another"
    with pytest.raises(FishLegError, match="'another'"):
        ESTIMATORS[name](data.partition, damping=DAMPING).load_state_dict(state)


@pytest.mark.parametrize("name", sorted(BATCHWISE))
def test_batches_update_an_estimate(name):
    """Whole passes as batches: the mean of equal batches is the fit itself; states resume it."""
    data = source()
    partition = data.partition
    options = STEPS if name == "fls" else {}
    estimator = ESTIMATORS[name](partition, damping=DAMPING, **options)
    estimator.fit(data)
    before = {key: block.dense() for key, block in estimator.blocks().items()}
    for _ in range(3):
        estimator.learn(data)
    again = ESTIMATORS[name](partition, damping=DAMPING, **options)
    again.load_state_dict(copy.deepcopy(estimator.state_dict()))
    for one in (estimator, again):
        one.learn(data)
        one.settle(data)
    for key, block in estimator.blocks().items():
        assert torch.equal(block.dense(), again.block(key).dense())
        if name != "fls":
            close(block.dense(), before[key])


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - BATCHWISE))
def test_other_estimates_refuse_batches(name):
    data = source()
    with pytest.raises(FishLegError, match="expected a method that batches can update"):
        ESTIMATORS[name](data.partition, damping=DAMPING).learn(data)


@pytest.mark.parametrize("name", sorted(BATCHWISE - {"fls"}))
def test_two_different_batches_have_equal_weights_at_first(name):
    """The mean of the Fishers of two halves is that of the whole."""
    data = source()
    count = len(data.calibration)
    estimator, whole = (ESTIMATORS[name](data.partition, damping=DAMPING) for _ in range(2))
    for half in torch.arange(count).tensor_split(2):
        estimator.learn(data.over(data.calibration.at(half), seed=data.seed))
    estimator.settle(data)
    whole.fit(data)
    assert count % 2 == 0
    for key, block in whole.blocks().items():
        close(estimator.block(key).dense(), block.dense())
