"""Networks by name, checkpoints in and out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running_stages import TINY, Ran, run_stage
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.stage import StageError
from stages.catalogue import MODELS, ImportParams, PretrainParams
from stages.data.source import DataSource, load_data
from stages.exporter import export, load
from stages.metrics import NotFinite, measure
from stages.model_folder import load_model
from stages.models.resnet_cifar import resnet20
from stages.reference import refer
from stages.tensor_files import load_into, load_metadata, load_tensors, save_tensors


@pytest.mark.parametrize("name", MODELS.entries)
def test_the_catalogue_knows_each_networks_size(name: str) -> None:
    network = refer(PretrainParams(dataset="digits", model=name), "model").load()(10)
    size = sum(parameter.numel() for parameter in network.parameters())
    assert size == MODELS.entries[name].sizes["parameters"]


def reference_to(model: str) -> nn.Module:
    return refer(ImportParams(model=model, dataset="digits", path="-"), "model").load()(
        num_classes=3
    )


def test_torchvision_models_come_by_name() -> None:
    network = reference_to("torchvision/resnet18")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(StageError, match="did you mean torchvision/resnet18"):
        reference_to("torchvision/resnet81")


@pytest.mark.parametrize("name", ["mnasnet0_5", "squeezenet1_1"])
def test_a_network_comes_back_from_a_file_whatever_its_modules_versions(
    name: str, tmp_path: Path
) -> None:
    network = reference_to(f"torchvision/{name}").eval()
    save_tensors(tmp_path / "model.safetensors", network.state_dict())
    again = reference_to(f"torchvision/{name}").eval()
    load_into(again, load_tensors(tmp_path / "model.safetensors"))
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(again(images), network(images))


def test_equal_tensors_with_equal_texts_make_equal_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {'a "name" of é': torch.arange(3.0), "b": torch.zeros(2, dtype=torch.uint8)}
    texts = {"masked": '["é\\n"]', "note": "x", "other": ""}
    files = set()
    for _ in range(20):
        save_tensors(path, tensors, texts)
        files.add(path.read_bytes())
    assert len(files) == 1
    assert load_metadata(path) == {"format": "pt", **texts}
    assert all(torch.equal(load_tensors(path)[name], value) for name, value in tensors.items())


def test_a_network_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\n\ndef build(num_classes):\n    return nn.Linear(64, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert reference_to("my_network:build").out_features == 3
    with pytest.raises(StageError, match="no_such_module"):
        reference_to("no_such_module:build")


class PlainBlock(nn.Module):
    """He et al.'s basic block, written without this project."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if before != width:
            skip = nn.Conv2d(before, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (x + skip).relu()


class PlainResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[PlainBlock(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(
            PlainBlock(16, 32, 2), PlainBlock(32, 32, 1), PlainBlock(32, 32, 1)
        )
        self.layer3 = nn.Sequential(
            PlainBlock(32, 64, 2), PlainBlock(64, 64, 1), PlainBlock(64, 64, 1)
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def test_an_exported_resnet20_is_a_plain_pytorch_network(
    assets: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported, pruned to a half, exported, and loaded into a network that knows nothing of us."""
    monkeypatch.setenv("FISHLEG_DATA", str(published))
    dense = run_stage(
        "import_checkpoint",
        tmp_path / "dense",
        {
            "path": str(assets / "checkpoints" / "resnet20_cifar10.safetensors"),
            "model": "resnet20",
            "keep": ["*.downsample.0.weight"],
            "dataset": "cifar10",
            "subset": 500,
        },
    )
    inputs = {"model": dense.output()}
    params = {"method": "magnitude", "samples": 10, "certificate_samples": 0}
    estimate = run_stage("curvature", tmp_path / "curvature", params, inputs)
    inputs["curvature"] = estimate.output("curvature")
    params = {"sparsity": 0.5, "certificate_samples": 0}
    pruned = run_stage("prune_oneshot", tmp_path / "pruned", params, inputs)
    export(pruned.output(), tmp_path / "exported")

    facts = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert (facts["prunable"], facts["nonzero"]) == (268_336, 134_168)
    plain = PlainResNet20().eval()
    plain.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
    dataset, _ = load_data(DataSource.from_json(facts["data"]))
    ours = resnet20(10).eval()
    ours.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        outputs = plain((dataset.test.inputs / 255 - 0.5) / 0.5)
    accuracy = 100 * (outputs.argmax(-1) == dataset.test.labels).double().mean().item()
    assert accuracy == measure(ours, dataset, dataset.test)["accuracy"]
    assert 82 < accuracy < 95  # 88.4 % on all test images


def import_file(path: Path, folder: Path) -> Ran:
    params = {"path": str(path), "model": "digits_resnet", "dataset": "digits"}
    return run_stage("import_checkpoint", folder, params)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no such file"):
        import_file(tmp_path / "nothing.safetensors", tmp_path)
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(StageError, match="expected a safetensors file, got .*save_file"):
        import_file(tmp_path / "text.safetensors", tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(StageError, match="does not fit the network: The file lacks"):
        import_file(tmp_path / "other.safetensors", tmp_path)


def test_patterns_that_match_nothing_are_an_error(tmp_path: Path) -> None:
    params = {"model": "digits_resnet", "dataset": "digits", "epochs": 1, "keep": ["head.*"]}
    with pytest.raises(StageError, match=r"'head\.\*' matches no parameter.*fc2\.weight"):
        run_stage("pretrain", tmp_path, params)


def test_a_model_becomes_a_program_that_takes_any_number_of_samples(tmp_path: Path) -> None:
    params = {**TINY, "epochs": 1, "batch_size": 128}
    made = run_stage("pretrain", tmp_path, params).output()
    network, example = load(made)
    assert (example.shape, str(example.dtype)) == ((2, 1, 8, 8), "float32")
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(network, (torch.from_numpy(example),), dynamic_shapes=shapes)
    inputs = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = load_model(made, "cpu").network(inputs)
    torch.testing.assert_close(program.module()(inputs), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet20"}, r"cannot classify samples of the data set, float32 \(2, 1, 8, 8\)"),
        (
            {"model": "test_models:too_few"},
            r"makes \(2, 3\) of samples .* the data set's 10 classes",
        ),
        ({"model": "test_models:too_many_sides"}, r"makes \(2, 10, 8, 8\) of samples"),
    ],
)
def test_a_network_that_does_not_go_with_the_data_is_told_before_it_trains(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    params = {"dataset": "digits", "epochs": 1, **changes}
    with pytest.raises(StageError, match=message):
        run_stage("pretrain", tmp_path, params)


def too_few(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def too_many_sides(num_classes: int) -> nn.Module:
    return nn.Conv2d(1, num_classes, 1)


def test_a_network_whose_outputs_are_not_finite_has_no_accuracy() -> None:
    """The failing case: nan counts as the largest output, so that it had one class's share."""
    params = PretrainParams(dataset="digits", model="mlpnet")
    dataset, _ = load_data(DataSource.from_params(params))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert 0 < measure(network, dataset, dataset.test)["accuracy"] < 40
    with torch.no_grad():
        network[1].bias[3] = -float("inf")  # rules class 3 out
    others = dataset.test.take((dataset.test.labels != 3).nonzero().flatten())
    assert measure(network, dataset, others)["nll"] < 10
    with pytest.raises(NotFinite, match=f"for {len(dataset.test) - len(others)} of 355 samples"):
        measure(network, dataset, dataset.test)
    with torch.no_grad():
        network[1].weight[3] = float("nan")
    with pytest.raises(NotFinite, match=r"not finite .* for 355 of 355 samples, the first .* 0"):
        measure(network, dataset, dataset.test)
