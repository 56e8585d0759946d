"""Two workers reach what one does: training, masks, curvature, and each other's checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_jobs
from running_stages import run_stage
from torch import Tensor, nn

from fishleg.gradients.rank_group import ALONE, RankGroup
from stages.batch_norm import whole_batches
from stages.estimate import load_estimate
from stages.model_folder import load_model, save_model
from stages.tensor_files import load_tensors

RTOL_TRAINING = 1e-4  # of a tensor's norm, after 64 steps
RTOL_CURVATURE = 1e-5
PRETRAIN = {
    "dataset": "digits",
    "model": "smooth_net:smooth_net",
    "epochs": 2,
    "batch_size": 33,  # in two unequal parts
    "lr": 0.05,
}
NATURAL = {
    **PRETRAIN,
    "epochs": 1,
    "optimizer": "fishleg",
    "fishleg_optimizer": {"update_every": 10, "samples": 16},
}
CURVATURE = {"samples": 61, "batch_size": 16, "damping": 1e-2, "certificate_samples": 0}
GRADUAL = {
    "method": "fls",
    "damping": 1e-2,
    "samples": 61,
    "fls": {"steps": 8, "batch": 15, "check_every": 4, "objective": "expected"},
    "curvature": "online",
    "online": {"every": 8, "samples": 15},
    "sparsity": 0.6,
    "steps": 2,
    "epochs": 1,
    "batch_size": 33,
    "lr": 0.02,
}
METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"method": "kfac"},
    "obs": {"method": "obs", "obs": {"block_size": 16}},
    "mfac": {"method": "mfac", "mfac": {"gradients": 16}},
    "eigen": {"method": "eigen", "eigen": {"basis": "moments"}},
    "kronecker": {  # in several packs, the largest streamed
        "method": "fishleg",
        "samples": 450,
        "fishleg": {
            "structure": "kronecker",
            "warm_start": "moments",
            "sweeps": 2,
            "memory_bytes": 1 << 20,
        },
    },
}


INTERRUPTED = ("kfac", "obs", "mfac")


def distances(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Return how far tensors are apart, relative to their norms; integers must be equal."""
    assert expected.keys() == found.keys()
    apart = {}
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            difference = (tensor.double() - found[name].double()).norm()
            apart[name] = float(difference / tensor.double().norm().clamp(min=1e-12))
        else:
            assert torch.equal(tensor, found[name]), name
    return apart


def assert_near(expected: dict[str, Tensor], found: dict[str, Tensor], rtol: float) -> None:
    apart = distances(expected, found)
    assert max(apart.values()) < rtol, apart


def weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / "outputs" / "model" / "model.safetensors")


def bits(folder: Path) -> bytes:
    return (folder / "outputs/curvature/curvature.safetensors").read_bytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that is compared: `X` was made by one worker, `two-X` by two."""
    root = tmp_path_factory.mktemp("runs")
    dense = root / "pretrain" / "outputs" / "model"
    jobs: list[dict[str, Any]] = [
        {"name": "pretrain", "folder": "pretrain", "params": PRETRAIN, "checkpoint_every_s": 0},
        {"name": "pretrain", "folder": "natural", "params": NATURAL},
        {
            "name": "prune_gradual",
            "folder": "gradual",
            "params": GRADUAL,
            "inputs": {"model": dense},
            "checkpoint_every_s": 0,
        },
        {
            "name": "finetune",
            "folder": "finetune",
            "params": {"epochs": 1, "batch_size": 32, "lr": 0.02},
            "inputs": {"model": root / "pruned", "teacher": dense},
        },
    ]
    jobs += [
        {
            "name": "curvature",
            "folder": name,
            "params": {**CURVATURE, **method},
            "inputs": {"model": dense},
            "checkpoint_every_s": 0,
        }
        for name, method in METHODS.items()
    ]
    for job in jobs:
        if job["folder"] == "finetune":
            remove_weights(dense, root / "pruned")
        folder, every_s = root / job["folder"], job.get("checkpoint_every_s", 30)

        def keep_first(event: dict[str, Any], folder: Path = folder) -> None:
            if event["type"] == "checkpoint" and event["number"] == 1:
                target = folder.with_name(f"two-grown-{folder.name}") / "checkpoints/000001"
                shutil.copytree(folder / "checkpoints/000001", target)

        ran = run_stage(
            job["name"],
            folder,
            job["params"],
            job.get("inputs"),
            checkpoint_every_s=every_s,
            watch=keep_first,
        )
        (folder / "events.json").write_text(json.dumps(ran.events))
    oldest = min((root / "pretrain" / "checkpoints").iterdir())
    shutil.copytree(oldest, root / "two-resumed" / "checkpoints" / oldest.name)
    jobs.append({"name": "pretrain", "folder": "resumed", "params": PRETRAIN})
    for job in [job for job in jobs if job["folder"] in INTERRUPTED]:
        again = f"again-{job['folder']}"
        jobs.append({**job, "folder": again, "checkpoint_every_s": 30})
        jobs.append({**job, "folder": f"grown-{job['folder']}", "checkpoint_every_s": 30})
        job["first_checkpoint"] = root / f"two-{again}" / "checkpoints" / "000001"
    gradual = next(job for job in jobs if job["folder"] == "gradual")
    jobs.append({**gradual, "folder": "again-gradual", "checkpoint_every_s": 30})
    gradual["first_checkpoint"] = root / "two-again-gradual" / "checkpoints" / "000001"
    jobs.append({"name": "compare bits", "folder": "bits"})
    run_jobs([{**job, "folder": root / f"two-{job['folder']}"} for job in jobs], size=2)
    return root


def remove_weights(dense: Path, folder: Path) -> None:
    """Write the model without two thirds of one kernel."""
    model = load_model(dense, "cpu")
    weight = model.network.get_parameter("conv2.weight")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)
    model.masks["conv2.weight"] = mask
    folder.mkdir()
    save_model(folder, model.with_facts(target=0.1, method="magnitude", mode="oneshot"))


@pytest.mark.parametrize("name", ["pretrain", "natural", "finetune", "gradual"])
def test_two_workers_train_as_one(root: Path, name: str) -> None:
    assert_near(weights(root / name), weights(root / f"two-{name}"), RTOL_TRAINING)


def test_the_metrics_are_those_of_one_worker(root: Path) -> None:
    series = []
    for name in ("pretrain", "two-pretrain"):
        events = json.loads((root / name / "events.json").read_text())
        series.append([event["values"]["train/loss"] for event in events if event.get("step")])
    assert len(series[0]) == 2
    assert series[1] == pytest.approx(series[0], rel=1e-5)


def test_masks_are_kept(root: Path) -> None:
    masks = [
        load_tensors(root / name / "outputs" / "model" / "masks.safetensors")
        for name in ("finetune", "two-finetune")
    ]
    assert masks[0]
    assert distances(*masks) == {}  # equal, being integers
    tuned = weights(root / "two-finetune")["conv2.weight"]
    assert torch.equal(tuned != 0, masks[1]["conv2.weight"].bool())


def test_online_curvature_over_two_workers_prunes_as_one_and_resumes_to_the_same_bits(
    root: Path,
) -> None:
    masks = [
        load_tensors(root / name / "outputs" / "model" / "masks.safetensors")
        for name in ("gradual", "two-gradual", "two-again-gradual")
    ]
    assert distances(masks[0], masks[1]) == {}
    whole, again = (root / name for name in ("two-gradual", "two-again-gradual"))
    events = json.loads((again / "events.json").read_text())
    pruned = [e for e in events if "pruned/sparsity" in e.get("values", {})]
    assert len(pruned) <= 2
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_workers_that_differ_in_a_bit_are_noticed_by_all(root: Path) -> None:
    for rank in (0, 1):
        said = json.loads((root / "two-bits" / f"{rank}.json").read_text())
        assert said[0] == "equal"
        assert "no longer hold the same weights and masks" in said[1]


@pytest.mark.parametrize("name", METHODS)
def test_two_workers_estimate_as_one(root: Path, name: str) -> None:
    """As operators: eigenvectors, for one, are known up to their sign."""
    model = load_model(root / "pretrain" / "outputs" / "model", "cpu")
    partition = model.facts.partition(model.network)
    images, diagonals = [], []
    for folder in (root / name, root / f"two-{name}"):
        estimator = load_estimate(folder / "outputs" / "curvature", partition, "cpu").estimator
        draw = torch.Generator().manual_seed(0)
        shapes = {group.name: group.shape for group in partition.groups}
        probes = {key: torch.randn(3, *shape, generator=draw) for key, shape in shapes.items()}
        images.append(estimator.matvec(probes))
        diagonals.append(estimator.diagonal())
    assert_near(*images, rtol=RTOL_CURVATURE)
    assert_near(*diagonals, rtol=RTOL_CURVATURE)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_two_workers_go_on_within_a_pass_to_the_same_bits(root: Path, name: str) -> None:
    whole, again = root / f"two-{name}", root / f"two-again-{name}"
    begun = json.loads((again / "checkpoints/000001/checkpoint.json").read_text())["states"]
    assert begun["estimator"]["under_way"] | {"sums": None} == {
        "passes_done": 0,
        "rounds": 1,
        "processes": 2,
        "whole": False,
        "sums": None,
    }
    events = json.loads((again / "events.json").read_text())
    assert "resuming an unfinished fit" in [event.get("text") for event in events]
    assert bits(again) == bits(whole)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_another_number_of_workers_begins_the_pass_anew(root: Path, name: str) -> None:
    """From the middle of the pass: their parts of the data are others."""
    grown, whole = root / f"two-grown-{name}", root / f"two-{name}"
    assert bits(grown) == bits(whole)
    fewer = root / f"fewer-{name}"
    shutil.copytree(root / f"two-again-{name}" / "checkpoints", fewer / "checkpoints")
    params = {**CURVATURE, **METHODS[name]}
    ran = run_stage("curvature", fewer, params, {"model": root / "pretrain" / "outputs" / "model"})
    assert "resuming an unfinished fit" in ran.texts()
    assert bits(fewer) == bits(root / name)


def test_two_workers_curvature_prunes_to_the_same_masks(root: Path) -> None:
    dense, masks = root / "pretrain" / "outputs" / "model", []
    for folder in (root / "eigen", root / "two-eigen"):
        inputs = {"model": dense, "curvature": folder / "outputs" / "curvature"}
        ran = run_stage("prune_oneshot", folder / "pruned", {"sparsity": 0.7}, inputs)
        masks.append(load_tensors(ran.output() / "masks.safetensors"))
    assert masks[0]
    assert distances(*masks) == {}


def test_each_goes_on_from_the_others_checkpoint(root: Path) -> None:
    expected = weights(root / "pretrain")
    assert_near(expected, weights(root / "two-resumed"), RTOL_TRAINING)
    events = json.loads((root / "two-resumed" / "events.json").read_text())
    texts = [event["text"] for event in events if event["type"] == "text"]
    assert texts == ["resuming from epoch 1, batch 31"]
    folder = root / "two-pretrain"
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    alone = run_stage("pretrain", folder, PRETRAIN)
    assert "resuming from epoch 1, batch 31" in alone.texts()
    assert_near(expected, weights(folder), RTOL_TRAINING)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_a_rank_group_is_torchs_own(affine: bool) -> None:
    """With two ranks that hold the same inputs, so that their sums are doubled."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 3, 4, generator=draw, dtype=torch.float64)
    slopes = torch.randn(6, 3, 4, generator=draw, dtype=torch.float64)
    norms = [nn.BatchNorm1d(3, affine=affine, momentum=0.3).double() for _ in range(2)]
    outcomes = []
    for norm, rank_group in zip(norms, (ALONE, _Twins(0, 2)), strict=True):
        copies = 2 if rank_group.size == 1 else 1
        leaf = torch.cat([inputs] * copies).requires_grad_()
        with whole_batches(norm, rank_group):
            outputs = norm(leaf)
        (outputs * torch.cat([slopes] * copies)).sum().backward()
        assert leaf.grad is not None
        gradients = {name: p.grad / copies for name, p in norm.named_parameters()}
        outcomes.append(
            {
                "y": outputs[:6].detach(),
                "dx": leaf.grad[:6],
                **gradients,
                **dict(norm.named_buffers()),
            }
        )
        assert "forward" not in vars(norm)
    assert_near(*outcomes, rtol=1e-12)


class _Twins(RankGroup):
    """Two ranks in one process: what the other one holds is the same."""

    def sum(self, tensors: Any) -> None:
        for tensor in tensors:
            tensor.mul_(2)
