"""A model as stages exchange it: a network, the masks of its weights, and facts about it.

On disk, a folder: `model.safetensors` (the network's own state dict, zeros in place),
`masks.safetensors` (weight name -> uint8 0 or 1 in the weight's shape; no tensor when dense) and
`model.json` (the facts, and the counts derived from the weights).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fishleg.errors import FishLegError
from fishleg.parameters import Partition, partition_parameters, used_weight
from pipeline.stage import Context, StageError, write_json
from stages.columns import target_of
from stages.data.dataset import DataSet
from stages.data.source import DataSource
from stages.lineage import Step
from stages.reference import Reference, refer, require_options
from stages.tensor_files import MASKED, load_into, load_tensors, save_tensors

if TYPE_CHECKING:
    from stages.catalogue import ImportParams, PretrainParams

_OF_PRUNING = ("method", "mode", "finetuned", "target", "seed", "damping", "structure")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts about a model besides its weights.

    Attributes:
        network: the network's builder.
        network_args: options of the builder.
        num_classes: number of outputs.
        data: the training data.
        keep: patterns of weights that are never pruned.
        also_prune: patterns of further parameters that are.
        method: the name of the curvature method that chose the removed weights; "dense", or
            "imported" where they were 0 in the file of the network.
        mode: "dense", "imported", "oneshot" (one step), "multistep" (several, nothing between),
            "refined" (several, refined without labels) or "gradual" (several, trained between).
        finetuned: trained after the last pruning step by a fine-tuning stage.
        target: the fraction of prunable weights that was asked to be removed, in [0, 1); the
            measured one is in `model.json`, too.
        seed: of the model's training, or of the calibration samples for an imported one.
        damping: of the curvature, or None for a dense model.
        structure: of the curvature's blocks where the method has several, or None.
        dense_accuracy: split -> accuracy in percent of the dense network, as trained or imported:
            "validation", and "test" where that was measured.
        lineage: the stages before, with their parameters.
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
    target: float = 0.0
    seed: int = 0
    damping: float | None = None
    structure: str | None = None
    dense_accuracy: Mapping[str, float] = field(default_factory=dict)
    lineage: tuple[Step, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the steps to the model, a sentence each."""
        return tuple(dict.fromkeys(text for step in self.lineage for text in step.warnings))

    def dense_accuracy_on(self, split: str) -> float | None:
        """Return the dense network's accuracy on `split`, or else on validation, if known."""
        return self.dense_accuracy.get(split, self.dense_accuracy.get("validation"))

    def of_pruning(self) -> dict[str, Any]:
        """Return the facts about how the model was pruned, which rows of results have too."""
        return {name: getattr(self, name) for name in _OF_PRUNING}

    @classmethod
    def from_params(
        cls, stage: str, params: PretrainParams | ImportParams, dataset: DataSet, source: DataSource
    ) -> Facts:
        """Return the facts of a dense network from the parameters of its stage."""
        return cls(
            network=refer(params, "model"),
            network_args=params.model_args,
            num_classes=dataset.num_classes,
            data=source,
            keep=tuple(params.keep),
            also_prune=tuple(params.also_prune),
            seed=params.seed,
            lineage=(Step.of(stage, params),),
        )

    def build(self) -> nn.Module:
        """Return the network with fresh weights from torch's global generator, on the CPU.

        Raises:
            StageError: the builder returns something else, or has other options.
        """
        builder = self.network.load(self.network_args)
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
        """Return the parameter groups of the network, by `keep` and `also_prune`.

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

    def findings(self) -> dict[str, Any]:
        """Return facts measured on the weights, as JSON; rows of results have them too.

        Returns:
            The `counts`; `sparsity`, the fraction of prunable weights that are 0; `unprunable`,
            weight -> why it is not prunable, for all with two or more dimensions; `emptied`, the
            layers without any weight left; and `warnings` about the steps to the model.
        """
        counts = self.counts()
        partition = self.facts.partition(self.network)
        removed = counts["prunable"] - counts["nonzero"]
        return {
            **counts,
            "sparsity": removed / counts["prunable"] if counts["prunable"] else 0.0,
            "unprunable": dict(partition.unprunable),
            "emptied": [
                group.name
                for group in partition.prunable
                if group.weight in self.masks and not self.masks[group.weight].any()
            ],
            "warnings": list(self.facts.warnings),
        }

    def with_facts(self, **changes: Any) -> Model:
        """Return the same model with some facts changed."""
        return replace(self, facts=replace(self.facts, **changes))

    def after(self, *steps: Step, **changes: Any) -> Model:
        """Return the same model with further steps in its lineage, and some facts changed."""
        return self.with_facts(lineage=(*self.facts.lineage, *steps), **changes)


def save_model(folder: Path, model: Model, warnings: Sequence[str] = ()) -> None:
    """Write a model folder.

    Args:
        folder: its place, which exists.
        model: the model.
        warnings: about the model itself, which later stages do not inherit.
    """
    masked = sorted(name for name, mask in model.masks.items() if not mask.all())
    about = {MASKED: json.dumps(masked)} if masked else {}  # so an exported file has its masks
    save_tensors(folder / "model.safetensors", model.network.state_dict(), about)
    masks = {name: mask.to(torch.uint8) for name, mask in model.masks.items()}
    save_tensors(folder / "masks.safetensors", masks)
    facts, found = model.facts, model.findings()
    write_json(
        folder / "model.json",
        {
            "model": facts.network.name,
            "model_args": dict(facts.network_args),
            "dataset": facts.data.reference.name,
            **facts.of_pruning(),
            "dense_accuracy": dict(facts.dense_accuracy),
            "keep": list(facts.keep),
            "also_prune": list(facts.also_prune),
            "num_classes": facts.num_classes,
            "network": asdict(facts.network),
            "data": facts.data.to_json(),
            "lineage": [step.to_json() for step in facts.lineage],
            **found,
            "warnings": [*found["warnings"], *warnings],
        },
    )


def add_step(folder: Path, step: Step, **notes: Any) -> None:
    """Append a step that does not change the model to the lineage in its folder.

    Args:
        folder: of the model.
        step: its warnings become the model's.
        notes: further facts.
    """
    facts = load_facts(folder)
    known = json.loads((folder / "model.json").read_text("utf-8"))
    lineage = [one.to_json() for one in (*facts.lineage, step)]
    warnings = [*known.get("warnings", []), *step.warnings]
    write_json(folder / "model.json", {**known, "lineage": lineage, "warnings": warnings, **notes})


def load_facts(folder: Path) -> Facts:
    """Return the facts in a model folder; also in one from before there were lineages."""
    value = json.loads((folder / "model.json").read_text("utf-8"))
    value["target"] = target_of(value)
    lineage = value.get("lineage")
    return Facts(
        network=Reference(**value["network"]),
        network_args=value["model_args"],
        data=DataSource.from_json(value["data"]),
        num_classes=value["num_classes"],
        keep=tuple(value["keep"]),
        also_prune=tuple(value["also_prune"]),
        dense_accuracy=value.get("dense_accuracy", {}),
        lineage=(_unknown_past(value),) if lineage is None else tuple(map(Step.from_json, lineage)),
        **{name: value[name] for name in _OF_PRUNING},
    )


def _unknown_past(value: Mapping[str, Any]) -> Step:
    """Return a step in place of all steps to a model, as far as its facts tell them."""
    params = [name for name in _OF_PRUNING if name not in {"target", "seed"}]
    return Step(
        stage="unknown",
        params={name: value[name] for name in ("model", "model_args", "dataset", *params)},
        seeds={"seed": value["seed"]},
        target={"sparsity": value["target"]},
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
    folder = cast(Path, ctx.input(name).path)  # `input` refuses an upstream without a result
    return load_model(folder, ctx.device)
