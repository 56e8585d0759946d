"""Stage `import_checkpoint`: takes a trained network from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fishleg.parameters import ParameterGroup, Partition
from fishleg.pruning import count_masks, weight_masks, zero_masks
from pipeline.stage import Context
from stages.checkpoint_file import load_weights
from stages.data.source import DataSource, load_data
from stages.determinism import compute_deterministically
from stages.expectation import require_accuracy
from stages.metrics import accuracy_text, log_validation, measure, require_classifier
from stages.model_folder import Facts, Model, save_model

if TYPE_CHECKING:
    from stages.catalogue import ImportParams


def import_checkpoint(ctx: Context) -> None:
    """Load the file into the network, look at its accuracy, and write output `model`.

    Zeros that the file brings are a mask, unless `zeros` is free. The validation split is looked at
    always, and the test split where the accuracy on it is expected: published accuracies are of
    test images, and nothing is chosen by it. One that is not as expected is a StageError.
    """
    params: ImportParams = ctx.params
    compute_deterministically(ctx.device)
    dataset, source = load_data(DataSource.from_params(params))
    facts = Facts.from_params("import_checkpoint", params, dataset, source)
    network = facts.build()
    loaded = load_weights(network, Path(params.path))
    for note in (*dataset.notes, *loaded.notes):
        ctx.say(note)
    network.to(ctx.device).eval()
    require_classifier(network, dataset)
    found = log_validation(ctx, network, dataset)
    accuracies = {"validation": found["accuracy"]}
    if params.expect_accuracy is not None and params.expect_split == "test":
        accuracies["test"] = measure(network, dataset, dataset.test)["accuracy"]
    ctx.say(f"accuracy as imported: {accuracy_text(accuracies)}")
    if params.expect_accuracy is not None:
        split = params.expect_split
        require_accuracy(
            params, accuracies[split], split, dataset, str(Path(params.path).absolute())
        )
    model = Model(network=network, masks={}, facts=facts).with_facts(dense_accuracy=accuracies)
    save_model(ctx.output("model"), _with_zeros(ctx, model, loaded.masks))


def _with_zeros(ctx: Context, model: Model, given: Mapping[str, Tensor]) -> Model:
    """Return the model with the zeros that it came with as masks, and say what was found.

    Args:
        ctx: its parameter `zeros` decides.
        model: as it was imported, without masks.
        given: state-dict name -> masks that the file held beside the weights.
    """
    params: ImportParams = ctx.params
    partition = model.facts.partition(model.network)
    masks = zero_masks(model.network, partition)
    masked = set(given)
    for group in partition.prunable:
        for name in masked.intersection(group.names):
            kept = given[name].to(masks[group.name].device)
            _survivors(group, masks).logical_and_(kept.reshape(group.rows, -1))
            masked.remove(name)
    if masked:
        names = ", ".join(sorted(masked))
        ctx.say(f"masks of tensors that are not prunable are not kept when they train: {names}")
    removed, prunable = count_masks(partition, masks)
    if not removed:
        return model
    share = removed / prunable
    stay = "stay so" if params.zeros == "keep" else "may be trained again"
    ctx.say(
        f"zeros: {params.zeros}: {removed:,} of {prunable:,} prunable weights ({share:.2%}) are 0 "
        f"and {stay}: {_layers(partition, masks)}"
    )
    empty = [group.name for group in partition.prunable if not _survivors(group, masks).any()]
    if empty and params.zeros == "keep":
        ctx.say(
            f"zeros: {', '.join(empty)}: every weight is 0, so that nothing of it can be trained; "
            "where that is how the layer begins, and not what was pruned, set `zeros: free`"
        )
    imported = model.with_facts(method="imported", mode="imported")
    if params.zeros == "free":
        return imported
    return replace(imported.with_facts(target=share), masks=weight_masks(partition, masks))


def _layers(partition: Partition, masks: Mapping[str, Tensor]) -> str:
    """Return how many weights of each layer are removed, and of how many."""
    found = []
    for group in partition.prunable:
        removed = int((~_survivors(group, masks)).sum())
        if removed:
            found.append(f"{group.name} {removed:,} of {group.rows * group.weight_columns:,}")
    return ", ".join(found)


def _survivors(group: ParameterGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Return the mask of a group's weights, without the column of its bias."""
    return masks[group.name][:, : group.weight_columns]
