"""From a trained model to a pruned one in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fishleg.calling import PLAIN, Calling
from fishleg.checks import check_number, check_type
from fishleg.curvature import fit
from fishleg.errors import UnknownName
from fishleg.options import Distribution, PruningOptions, Selection
from fishleg.pruning import DISTRIBUTIONS, PruneReport, Score, check_selection, removal_count


def prune(
    model: nn.Module,
    data: Any,
    *,
    sparsity: float,
    method: str = "eigen",
    likelihood: Any = None,
    samples: int | None = 1000,
    damping: float | str = "auto",
    keep: Sequence[str] = (),
    also_prune: Sequence[str] = (),
    distribution: Distribution | None = PruningOptions.distribution,
    selection: Selection | Score = PruningOptions.selection,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    calling: Calling = PLAIN,
    progress: bool | None = None,
) -> PruneReport:
    """Remove weights of a model in place, and move the others to compensate.

    Args:
        model: a trained network; its weights are changed, and nothing else.
        data: calibration data: a tensor, (inputs, targets), a data set, or an iterable of batches
            such as a DataLoader; see `draw_samples`.
        sparsity: fraction of all prunable weights removed afterwards, in [0, 1). Weights that are
            0 already count; see `prune_once`.
        method: see `fit`, as for all arguments that are not named here.
        likelihood: the loss that the model was trained with, as torch has it.
        samples: number of calibration samples, drawn by the seed.
        damping: a number, or "auto".
        keep: names, or `fnmatch` patterns, of weights that stay dense.
        also_prune: likewise, weights of other layers to prune.
        distribution: "global" or "uniform"; None is the method's own.
        selection: "single", "greedy", or a function that scores the weights; see `prune_once`.
        seed: of the samples and of their labels.
        options: of the method's class.
        batch_size: gradients computed at once.
        calling: how the model is called.
        progress: whether to show a progress line; None: where standard error is a terminal.

    Returns:
        A report; `print` shows it as a table.

    Raises:
        UnknownName: there is no such distribution.

    Other errors are those of `fit` and `prune_once`, and leave the model unchanged.
    """
    check_number("sparsity", sparsity)
    removal_count(0, sparsity)  # out of range is an error before the fit, not after it
    check_selection(selection)
    if distribution is not None:
        check_type("distribution", distribution, str, "a name")
        if distribution not in DISTRIBUTIONS:
            raise UnknownName("distribution", distribution, DISTRIBUTIONS)
    curvature = fit(
        model,
        data,
        method=method,
        likelihood=likelihood,
        samples=samples,
        damping=damping,
        keep=keep,
        also_prune=also_prune,
        seed=seed,
        options=options,
        batch_size=batch_size,
        calling=calling,
        progress=progress,
    )
    return curvature.prune(sparsity=sparsity, selection=selection, distribution=distribution)
