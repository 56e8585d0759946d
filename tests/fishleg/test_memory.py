"""What there is, what is needed, and what is refused before it is allocated."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fishleg.calibration import Calibration
from fishleg.errors import CapacityExceeded, NotFitted
from fishleg.estimators import MFAC, OBS, DiagonalFisher, FishLeg
from fishleg.gradients.memory import pass_bytes
from fishleg.gradients.source import GradientSource
from fishleg.memory import Footprint, available_bytes, peak
from stages.models.resnet_cifar import resnet20
from tests.fishleg.networks import source_of

CPU = torch.device("cpu")
GIGABYTE = 10**9


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(root: Path, kilobytes: int) -> None:
    write(root, **{"proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable:  {kilobytes} kB\n"})


def test_the_machine_tells_what_is_available(tmp_path):
    machine(tmp_path, 1000)
    assert available_bytes(CPU, tmp_path) == 1000 * 1024


def test_nobody_knows_where_there_is_no_proc(tmp_path):
    assert available_bytes(CPU, tmp_path) is None


@pytest.mark.parametrize("inner", [2_000, "max"])
def test_the_tightest_control_group_counts(tmp_path, inner):
    machine(tmp_path, 1000)
    folder = "sys/fs/cgroup"
    write(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/a/b\n",
            f"{folder}/a/b/memory.max": f"{inner}\n",
            f"{folder}/a/b/memory.current": "1500\n",
            f"{folder}/a/b/memory.stat": "anon 7\ninactive_file 300\n",
            f"{folder}/a/memory.max": "5000\n",
            f"{folder}/a/memory.current": "4100\n",
        },
    )
    assert available_bytes(CPU, tmp_path) == (800 if inner == 2_000 else 900)


def test_control_groups_of_version_one(tmp_path):
    machine(tmp_path, 1000)
    folder = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n",
            f"{folder}/job/memory.limit_in_bytes": "3000\n",
            f"{folder}/job/memory.usage_in_bytes": "3500\n",
            f"{folder}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 600\n",
            f"{folder}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{folder}/memory.usage_in_bytes": "3500\n",
        },
    )
    assert available_bytes(CPU, tmp_path) == 100


def test_a_peak_is_what_stands_and_the_largest_work():
    parts = [Footprint(held=3, sums=5, work=7), Footprint(held=4, sums=2, work=9)]
    assert peak(parts) == 5 + 4 + 9
    assert peak([]) == 0


@pytest.fixture(scope="module")
def resnet() -> GradientSource:
    """ResNet20 and a hundred thousand images that take no memory."""
    images = torch.randn(1, 3, 32, 32).expand(100_000, -1, -1, -1)
    return source_of(resnet20(10), Calibration(inputs=images), batch_size=2)


@pytest.mark.parametrize(
    ("kind", "options", "needed", "remedy"),
    [
        (FishLeg, {"structure": "full"}, 30, "a structure with smaller factors"),
        (OBS, {"block_size": 10**6}, 30, "a smaller block_size"),
        (MFAC, {"gradients": 100_000}, 100, "fewer gradients"),
    ],
)
def test_what_is_too_large_for_a_network_is_refused(
    resnet, monkeypatch, kind, options, needed, remedy
):
    """A full block a layer: five of them have 36,864 weights, 5.4 GB each."""
    estimator = kind(resnet.partition, damping=1e-4, **options)
    assert estimator.required_bytes(resnet) > needed * GIGABYTE
    monkeypatch.setattr("fishleg.estimators.base.available_bytes", lambda device: 30 * GIGABYTE)
    with pytest.raises(CapacityExceeded, match=f"expected at most the 30 GB .* choose {remedy}"):
        estimator.fit(resnet)
    with pytest.raises(NotFitted):
        estimator.blocks()


def test_a_fit_goes_on_where_the_free_memory_is_unknown(resnet, monkeypatch):
    monkeypatch.setattr("fishleg.estimators.base.available_bytes", lambda device: None)
    DiagonalFisher(resnet.partition, damping=1e-4).check_memory(resnet)


def test_the_passes_of_a_batch_by_hand():
    """8 numbers a sample saved for the backward pass: the input and the output of tanh."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    inputs = Calibration(inputs=torch.randn(20, 3, dtype=torch.float64))
    numbers = (3 + 5) + (3 + 5) + 2 * (5 + 2)  # saved, inputs of layers, gradients of two batches
    assert pass_bytes(source_of(model, inputs, batch_size=10)) == 10 * 8 * numbers
    labels = {"labels": "enumerated", "batch_size": 10}  # five samples, two labels each
    numbers = (3 + 5) + (3 + 5) + 2 * 2 * (5 + 2)
    assert pass_bytes(source_of(model, inputs, **labels)) == 5 * 8 * numbers


@pytest.mark.parametrize("kind", [DiagonalFisher, OBS, MFAC, FishLeg])
def test_a_batch_that_the_samples_do_not_fill_needs_memory_for_the_samples_only(kind):
    """A batch that the samples do not fill takes their room, not its own."""
    model = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2))
    inputs = Calibration(inputs=torch.randn(2, 3))
    small, large = (source_of(model, inputs, batch_size=size) for size in (2, 100_000))
    estimator = kind(small.partition, damping=1e-4)
    assert estimator.peak_bytes(large) == estimator.peak_bytes(small)
