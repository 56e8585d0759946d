"""A model as it passes between stages: a network, the masks of its weights, and facts about it.

On disk, a folder: `model.safetensors` (the network's own state dict, zeros in place),
`masks.safetensors` (weight name -> uint8 0 or 1 in the weight's shape; no tensor when dense) and
`model.json` (the facts, and the counts derived from the weights).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fishleg.errors import FishLegError
from fishleg.parameters import Partition, partition_parameters, used_weight
from pipeline.stage import Context, StageError, write_json
from stages.data.dataset import DataSet
from stages.data.source import DataSource
from stages.reference import Reference, refer, require_options
from stages.tensor_files import MASKED, load_into, load_tensors, save_tensors

if TYPE_CHECKING:
    from stages.catalogue import ImportParams, PretrainParams


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a model besides its weights.

    Attributes:
        network: what builds the network.
        network_args: options of the builder.
        num_classes: number of outputs.
        data: what it was trained on.
        keep: patterns of weights that are never pruned.
        also_prune: patterns of further parameters that are.
        method: what chose the removed weights: "dense", a curvature method's name, or "imported",
            where they were 0 in the file that the network came from.
        mode: "dense", "imported", "oneshot" (one step), "multistep" (several, nothing between),
            "refined" (several, refined without labels) or "gradual" (several, trained between).
        finetuned: trained after the last pruning step by a fine-tuning stage.
        sparsity: the fraction of prunable weights removed, as requested, in [0, 1).
        seed: of the model's training, or of the calibration samples for an imported one.
        damping: of the curvature, or None for a dense model.
        structure: of the curvature's blocks where the method has several, or None.
        dense_accuracy: split -> accuracy in percent, on it, of the network that everything began
            with, as it was trained or imported: "validation", and "test" where that was measured.
    """

    network: Reference
    network_args: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int
    data: DataSource
    keep: tuple[str, ...] = ()
    also_prune: tuple[str, ...] = ()
    method: str = "dense"
    mode: Literal["dense", "imported", "oneshot", "multistep", "refined", "gradual"] = "dense"
    finetuned: bool = False
    sparsity: float = 0.0
    seed: int = 0
    damping: float | None = None
    structure: str | None = None
    dense_accuracy: Mapping[str, float] = field(default_factory=dict)

    def dense_accuracy_on(self, split: str) -> float | None:
        """Return the dense network's accuracy on `split`, or else on validation, where known."""
        return self.dense_accuracy.get(split, self.dense_accuracy.get("validation"))

    @classmethod
    def from_params(
        cls, params: PretrainParams | ImportParams, dataset: DataSet, source: DataSource
    ) -> Facts:
        """Return the facts of the dense network that a stage's parameters describe."""
        return cls(
            network=refer(params, "model"),
            network_args=params.model_args,
            num_classes=dataset.num_classes,
            data=source,
            keep=tuple(params.keep),
            also_prune=tuple(params.also_prune),
            seed=params.seed,
        )

    def build(self) -> nn.Module:
        """Return the network with fresh weights from torch's global generator, on the CPU.

        Raises:
            StageError: what the name stands for builds something else, or has other options.
        """
        builder = self.network.load()
        options = {"num_classes": self.num_classes, **self.network_args}
        require_options(builder, self.network, "model_args", (), options)
        network = builder(**options)
        if not isinstance(network, nn.Module):
            raise StageError(
                f"{self.network.target} returned {type(network).__name__}; expected a "
                "torch.nn.Module."
            )
        return network

    def partition(self, network: nn.Module) -> Partition:
        """Return the parameter groups of the network, `keep` and `also_prune` taken into account.

        Raises:
            StageError: a pattern matches no parameter.
        """
        try:
            return partition_parameters(network, prunable=self.also_prune, keep=self.keep)
        except FishLegError as error:
            names = ", ".join(name for name, _ in network.named_parameters())
            raise StageError(f"keep, also_prune: {error} Parameters: {names}.") from error


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with its masks and facts.

    Attributes:
        network: the module, on some device.
        masks: weight name -> bool in the weight's own shape, True for survivors; empty when dense.
        facts: see `Facts`.
    """

    network: nn.Module
    masks: dict[str, Tensor]
    facts: Facts

    def counts(self) -> dict[str, int]:
        """Return `nonzero` and `prunable`, over prunable weights, and `parameters`, over all.

        A parametrised weight is counted as the forward pass reads it.
        """
        groups = self.facts.partition(self.network).prunable
        weights = [used_weight(self.network, group) for group in groups]
        return {
            "nonzero": sum(int(torch.count_nonzero(weight)) for weight in weights),
            "prunable": sum(weight.numel() for weight in weights),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
        }

    def with_facts(self, **changes: Any) -> Model:
        """Return the same model with some facts changed."""
        return replace(self, facts=replace(self.facts, **changes))


def save_model(folder: Path, model: Model) -> None:
    """Write a model folder."""
    masked = sorted(name for name, mask in model.masks.items() if not mask.all())
    about = {MASKED: json.dumps(masked)} if masked else {}  # an exported file knows its masks
    save_tensors(folder / "model.safetensors", model.network.state_dict(), about)
    masks = {name: mask.to(torch.uint8) for name, mask in model.masks.items()}
    save_tensors(folder / "masks.safetensors", masks)
    facts = model.facts
    write_json(
        folder / "model.json",
        {
            "model": facts.network.name,
            "model_args": dict(facts.network_args),
            "dataset": facts.data.reference.name,
            "method": facts.method,
            "mode": facts.mode,
            "finetuned": facts.finetuned,
            "sparsity": facts.sparsity,
            "seed": facts.seed,
            "damping": facts.damping,
            "structure": facts.structure,
            "dense_accuracy": dict(facts.dense_accuracy),
            "keep": list(facts.keep),
            "also_prune": list(facts.also_prune),
            "num_classes": facts.num_classes,
            "network": asdict(facts.network),
            "data": facts.data.to_json(),
            **model.counts(),
        },
    )


def load_facts(folder: Path) -> Facts:
    """Return the facts in a model folder."""
    value = json.loads((folder / "model.json").read_text("utf-8"))
    plain = ("method", "mode", "finetuned", "sparsity", "seed", "damping", "structure")
    return Facts(
        network=Reference(**value["network"]),
        network_args=value["model_args"],
        data=DataSource.from_json(value["data"]),
        num_classes=value["num_classes"],
        keep=tuple(value["keep"]),
        also_prune=tuple(value["also_prune"]),
        dense_accuracy=value.get("dense_accuracy", {}),  # models made before it was kept lack it
        **{name: value[name] for name in plain},
    )


def load_model(folder: Path, device: str) -> Model:
    """Return the model of a folder, on `device`, in eval mode."""
    facts = load_facts(folder)
    network = facts.build()
    load_into(network, load_tensors(folder / "model.safetensors"))
    masks = load_tensors(folder / "masks.safetensors", device)
    return Model(
        network=network.to(device).eval(),
        masks={name: mask.bool() for name, mask in masks.items()},
        facts=facts,
    )


def input_model(ctx: Context, name: str) -> Model:
    """Return the model connected to input `name`, on the stage's device."""
    folder = cast(Path, ctx.input(name).path)  # `input` has refused an upstream without a result
    return load_model(folder, ctx.device)
