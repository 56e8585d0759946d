"""Networks whose weights are made of others, from training to fine-tuning: counts stay exact."""

from pathlib import Path

import pytest
import torch
from running_stages import run_stage

from fishleg.pruning import removal_count
from stages.model_folder import load_model

NETWORK = """
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def build(num_classes):
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, stride=2)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(196, num_classes)]
    return nn.Sequential(
        *[weight_norm(layer) if hasattr(layer, "weight") else layer for layer in layers]
    )
"""


def test_a_weight_normalised_network_is_pruned_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "normalised_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    network = {"dataset": "digits", "model": "normalised_network:build"}
    dense = run_stage("pretrain", tmp_path / "dense", {**network, "epochs": 1})
    inputs = {"model": dense.output()}
    estimate = run_stage(
        "curvature", tmp_path / "c", {"method": "diagonal", "samples": 20, "damping": 1e-3}, inputs
    )
    inputs["curvature"] = estimate.output("curvature")
    params = {"sparsity": 0.995, "certificate_samples": 20}
    pruned = run_stage("prune_oneshot", tmp_path / "p", params, inputs)
    tuned = run_stage("finetune", tmp_path / "f", {"epochs": 1}, {"model": pruned.output()})
    prunable = 4 * 9 + 4 * 4 * 9 + 196 * 10
    for folder in (pruned.output(), tuned.output()):
        model = load_model(folder, "cpu")
        counts = model.counts()
        assert counts["prunable"] == prunable
        assert counts["nonzero"] == prunable - removal_count(prunable, 0.995)
        weights = [model.network[number].weight for number in (0, 2, 5)]
        assert sum(int(torch.count_nonzero(weight)) for weight in weights) == counts["nonzero"]
        assert all(value.isfinite().all() for value in model.network.state_dict().values())
    before, after = (load_model(one.output(), "cpu").network for one in (pruned, tuned))
    assert not torch.equal(before[5].bias, after[5].bias)
