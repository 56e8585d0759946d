"""A pruned model in three lines, equal to what the classes beneath give by hand."""

import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg
from fishleg.damping import RELATIVE_DAMPING
from fishleg.errors import FishLegError, UnknownName, WrongType
from fishleg.pruning import select
from stages.torchvision_import import import_torchvision

METHODS = ["eigen", "fishleg", "obs", "kfac", "ekfac", "mfac", "layer", "diagonal", "magnitude"]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(48, 2, 6, 6, generator=draw), torch.arange(48) % 5


@pytest.fixture
def loader(data):
    return DataLoader(TensorDataset(*data), batch_size=7, shuffle=True)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------ three lines


def test_three_lines_prune_a_network_of_torchvision():
    torch.manual_seed(0)
    model = import_torchvision("models").mobilenet_v3_small(num_classes=10)
    images = torch.randn(12, 3, 32, 32)
    loader = [(images[:6], torch.arange(6)), (images[6:], torch.arange(6))]
    report = fishleg.prune(model, loader, sparsity=0.5)
    weights = [
        module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == report.removed == int(0.5 * sum(weight.numel() for weight in weights) + 0.5)
    assert len(report.layers) == len(weights)
    assert "features.0.0" in str(report)


def test_three_lines_prune_a_module_of_ones_own_by_a_loader(network, loader):
    report = fishleg.prune(network, loader, sparsity=0.9)
    assert report.removed == 83  # floor(0.9 * 92 + 1/2)
    assert int((network.conv.weight == 0).sum() + (network.head.weight == 0).sum()) == 83


def test_the_model_is_changed_in_its_weights_alone(network, loader):
    network.train()
    network.norm.eval()
    before = weights_of(network)
    state = torch.get_rng_state()
    fishleg.prune(network, loader, sparsity=0.9)
    assert network.training
    assert not network.norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.norm.running_mean, before["norm.running_mean"])
    assert torch.equal(network.norm.num_batches_tracked, before["norm.num_batches_tracked"])
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_its_class_used_by_hand(network, data, method):
    kind = fishleg.ESTIMATORS[method]
    by_hand = copy.deepcopy(network)
    partition = fishleg.partition_parameters(by_hand)
    samples = fishleg.Calibration(inputs=data[0], targets=data[1])
    source = fishleg.GradientSource(
        by_hand, fishleg.Categorical(), partition, samples, labels="matched"
    )
    estimator = kind(partition, damping=1e-3)
    estimator.fit(source)
    distribution = "uniform" if method == "layer" else "global"
    expected = fishleg.prune_once(by_hand, estimator, sparsity=0.7, distribution=distribution)
    report = fishleg.prune(network, samples, sparsity=0.7, method=method, damping=1e-3)
    assert same(network.state_dict(), by_hand.state_dict())
    assert report.saliency == expected.saliency


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_pruned_in_it(network, data, dtype):
    for inputs in (data[0], data[0].to(dtype)):
        model = copy.deepcopy(network).to(dtype)
        assert fishleg.prune(model, (inputs, data[1]), sparsity=0.5).removed == 46
        assert model.conv.weight.dtype == dtype


def test_fit_then_prune_is_prune(network, loader):
    at_once = copy.deepcopy(network)
    fishleg.prune(at_once, loader, sparsity=0.9, selection="greedy", seed=3)
    fishleg.fit(network, loader, seed=3).prune(sparsity=0.9, selection="greedy")
    assert same(network.state_dict(), at_once.state_dict())


def test_arguments_reach_the_classes_beneath(network, loader):
    def score(estimator, weights):
        seen.update(options=estimator.options, partition=estimator.partition)
        return {name: w.abs() for name, w in weights.items()}

    seen = {}
    report = fishleg.prune(
        network,
        loader,
        sparsity=0.5,
        keep=["head.weight"],
        options={"shrinkage": 0.25},
        selection=score,
    )
    assert seen["options"] == fishleg.EigenOptions(shrinkage=0.25)
    assert [group.name for group in seen["partition"].prunable] == ["conv"]
    assert list(report.masks) == ["conv"]


def test_a_mistake_is_told_before_anything_is_read(network):
    class Unread:
        def __iter__(self):
            raise AssertionError("read")

    wrong = [
        ({"sparsity": 90}, ValueError),
        ({"sparsity": "0.9"}, WrongType),
        ({"method": "fisleg"}, UnknownName),
        ({"method": fishleg.KFAC}, WrongType),
        ({"damping": "automatic"}, UnknownName),
        ({"damping": None}, WrongType),
        ({"damping": -1.0}, ValueError),
        ({"selection": "gredy"}, UnknownName),
        ({"distribution": "globally"}, UnknownName),
        ({"keep": "head.weight"}, WrongType),
        ({"also_prune": ["nothing"]}, FishLegError),
        ({"options": {"shrinkag": 0.5}}, FishLegError),
        ({"options": ["shrinkage"]}, WrongType),
        ({"samples": 0}, ValueError),
        ({"samples": "all"}, WrongType),
        ({"seed": 0.5}, WrongType),
    ]
    before = weights_of(network)
    for arguments, kind in wrong:
        with pytest.raises(kind):
            fishleg.prune(network, Unread(), **{"sparsity": 0.5, **arguments})
    with pytest.raises(WrongType, match="model: expected a torch.nn.Module"):
        fishleg.prune("resnet20", Unread(), sparsity=0.5)
    assert same(network.state_dict(), before)


# ---------------------------------------------------------------------------------------- damping


class Times100(fishleg.Categorical):
    """A hundred times the loss of another likelihood."""

    def nll(self, outputs, targets):
        return 100 * super().nll(outputs, targets)

    def fisher_product(self, outputs, v):
        return 1e4 * super().fisher_product(outputs, v)


@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_times_the_loss_changes_no_mask(network, data, method):
    network, data = network.double(), (data[0].double(), data[1])
    masks = [
        fishleg.prune(
            copy.deepcopy(network), data, sparsity=0.6, method=method, likelihood=likelihood
        ).masks
        for likelihood in (fishleg.Categorical(), Times100())
    ]
    assert same(*masks)


def test_the_damping_is_a_fraction_of_the_mean_curvature(network, data):
    curvature = fishleg.fit(network, data, method="diagonal")
    damping = curvature.estimator.damping
    diagonal = {name: 1 / q - damping for name, q in curvature.estimator.diagonal().items()}
    names = [group.name for group in curvature.partition.prunable]
    mean = torch.cat([diagonal[name].flatten() for name in names]).mean()
    assert damping == pytest.approx(RELATIVE_DAMPING * float(mean), rel=1e-4)


def test_a_network_without_curvature_has_no_automatic_damping(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1e4, 0, 0, 0, 0]))
    with pytest.raises(FishLegError, match="give a number"):
        fishleg.fit(model, data)


# --------------------------------------------------------------------------------- the level below


def test_a_certificate_is_that_of_the_class_beneath(network, data):
    curvature = fishleg.fit(network, data, samples=32)
    held_out = fishleg.Calibration(inputs=data[0][:16], targets=data[1][:16])
    source = fishleg.GradientSource(
        network, fishleg.Categorical(), curvature.partition, held_out, labels="matched"
    )
    assert curvature.certify(held_out) == fishleg.certify(curvature.estimator, source)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_curvature_prunes_like_the_one_that_was_fitted(network, loader, method, tmp_path):
    curvature = fishleg.fit(network, loader, method=method, keep=["head.weight"], samples=20)
    curvature.save(tmp_path / "curvature.safetensors")
    other = copy.deepcopy(network)
    loaded = fishleg.Curvature.load(tmp_path / "curvature.safetensors", other)
    assert loaded.estimator.damping == curvature.estimator.damping
    if method not in ("layer", "magnitude"):
        assert loaded.certify(loader)["network"] == pytest.approx(
            curvature.certify(loader)["network"], rel=1e-5
        )
    assert loaded.prune(sparsity=0.5).removed == curvature.prune(sparsity=0.5).removed
    assert same(other.state_dict(), network.state_dict())


def test_a_file_is_of_one_model_at_one_point(network, loader, tmp_path):
    path = tmp_path / "curvature.safetensors"
    curvature = fishleg.fit(network, loader)
    with pytest.raises(FishLegError, match="make it first"):
        curvature.save(tmp_path / "none" / "curvature.safetensors")
    curvature.save(path)
    with torch.no_grad():
        network.head.weight[0, 0] += 1e-6
    with pytest.raises(FishLegError, match="expected the model at the weights of the fit"):
        fishleg.Curvature.load(path, network)
    with pytest.raises(FishLegError, match="got no file"):
        fishleg.Curvature.load(tmp_path / "none", network)
    path.write_bytes(b"something else")
    with pytest.raises(FishLegError, match="expected a safetensors file"):
        fishleg.Curvature.load(path, network)


def test_a_likelihood_of_ones_own_is_given_again_to_a_file(network, loader, tmp_path):
    path = tmp_path / "curvature.safetensors"
    curvature = fishleg.fit(network, loader, likelihood=Times100())
    curvature.save(path)
    with pytest.raises(FishLegError, match="likelihood=..."):
        fishleg.Curvature.load(path, network).certify(loader)
    loaded = fishleg.Curvature.load(path, network, likelihood=Times100())
    assert loaded.certify(loader)["network"] == pytest.approx(
        curvature.certify(loader)["network"], rel=1e-5
    )


def test_a_curvature_serves_the_weights_of_its_fit_alone(network, loader):
    curvature = fishleg.fit(network, loader)
    curvature.prune(sparsity=0.5)
    with pytest.raises(FishLegError, match="fit again"):
        curvature.prune(sparsity=0.9)
    with pytest.raises(FishLegError, match="fit again"):
        curvature.certify(loader)


def test_the_layer_hessian_is_uniform_by_layer_unless_told_otherwise(network, loader):
    curvature = fishleg.fit(network, loader, method="layer")
    partition = curvature.partition
    dense = fishleg.pruning.dense_masks(partition)
    parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
    matrices = partition.gather(parameters)
    scores = fishleg.saliency(
        curvature.estimator, {group.name: matrices[group.name] for group in partition.prunable}
    )
    assert same(
        curvature.prune(sparsity=0.5).masks, select(partition, scores, dense, 0.5, "uniform")
    )


# --------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(network, loader, monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        fishleg.fit(network, loader)
        text = stream.getvalue()
        assert ("fishleg: drawing samples" in text) is shown
        assert ("fitting the curvature" in text) is shown
        assert "\n" not in text
        assert text == "" or text.rsplit("\r", 1)[1] == ""
