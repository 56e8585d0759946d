"""The curvature of a model in one object, which is fitted, certified, saved, and used to prune.

`fit` chooses the arguments of the classes beneath, by the defaults that measured best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishleg.calibration import Labels, Samples
from fishleg.calling import PLAIN, Calling, model_device
from fishleg.certificate import certify
from fishleg.checks import check_number, check_type
from fishleg.curvature_file import read_curvature, write_curvature
from fishleg.damping import auto_damping
from fishleg.drawing import draw_samples
from fishleg.errors import FishLegError, UnknownName
from fishleg.estimators import ESTIMATORS, AbstractEstimator, FitProgress, LayerHessian, Magnitude
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Gaussian, Likelihood, check_targets
from fishleg.likelihoods.choice import (
    choose_likelihood,
    describe_likelihood,
    restore_likelihood,
)
from fishleg.loading import checksum
from fishleg.network import find_network
from fishleg.options import Compensation, Distribution, PruningOptions, Selection
from fishleg.options.earlier import present_method
from fishleg.parameters import Partition, partition_parameters
from fishleg.progress import ProgressLine
from fishleg.pruning import PruneReport, Score, prune_once

_LABELS: Labels = "matched"
_TRIED = 8  # samples whose outputs determine the likelihood


class Curvature:
    """An estimate of a model's inverse curvature, with all that its use needs.

    `fit` and `Curvature.load` make one.

    Attributes:
        model: the network, at the weights that the estimate is for.
        estimator: fitted; one of the classes in `ESTIMATORS`.
        likelihood: the meaning of the outputs; None where a file does not have it.
        samples: those of the fit; None after `load`.
        keep: as `fit` was given it.
        also_prune: likewise.
        seed: of the samples and of their labels.
        batch_size: gradient rows computed at once.
        calling: how the model is called.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: AbstractEstimator,
        *,
        likelihood: Likelihood | None,
        samples: Samples | None = None,
        keep: Sequence[str] = (),
        also_prune: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 128,
        calling: Calling = PLAIN,
    ):
        check_type("model", model, nn.Module, "a torch.nn.Module")
        check_type("estimator", estimator, AbstractEstimator, "an estimator, such as FishLeg")
        self.model = model
        self.estimator = estimator
        self.likelihood = likelihood
        self.samples = samples
        self.keep = tuple(keep)
        self.also_prune = tuple(also_prune)
        self.seed = seed
        self.batch_size = batch_size
        self.calling = calling
        self._weights = _checksum(model)

    def __repr__(self) -> str:
        return f"Curvature({type(self.model).__name__}, {self.estimator!r})"

    @property
    def partition(self) -> Partition:
        """The groups that the estimate covers, and the parameters left out, with the reasons."""
        return self.estimator.partition

    def certify(self, held_out: Any, *, samples: int | None = 1000) -> dict[str, Any]:
        """Judge the estimate on data that it was not fitted on; see `fishleg.certify`.

        Args:
            held_out: data in any form that `fit` takes.
            samples: number of samples drawn from them by the seed; None takes all.

        A FishLegError if the weights have moved since the fit, or the likelihood is not known.
        """
        self._check_weights()
        source = self._source(draw_samples(held_out, samples, self.seed))
        return certify(self.estimator, source, seed=self.seed)

    def prune(
        self,
        *,
        sparsity: float,
        selection: Selection | Score = PruningOptions.selection,
        distribution: Distribution | None = PruningOptions.distribution,
        min_kept: float = PruningOptions.min_kept,
        compensation: Compensation = PruningOptions.compensation,
    ) -> PruneReport:
        """Prune the model in place; see `prune_once`.

        Args:
            sparsity: fraction of all prunable weights removed afterwards, in [0, 1).
            selection: "single", "greedy", or a function that scores the weights.
            distribution: "global" or "uniform"; None is the method's own, which is uniform for the
                layer Hessian and global for all others.
            min_kept: least fraction of each layer that survives, in [0, 1].
            compensation: "none", "independent", "joint" or "fisher".

        A FishLegError if the weights have moved since the fit, as by pruning: fit again.
        """
        self._check_weights()
        source = None
        if compensation == "fisher" and self.samples is not None:
            source = self._source(self.samples)
        return prune_once(
            self.model,
            self.estimator,
            sparsity=sparsity,
            selection=selection,
            distribution=distribution,
            min_kept=min_kept,
            compensation=compensation,
            source=source,
        )

    def save(self, path: str | Path) -> None:
        """Write the estimate to a safetensors file; the model and the samples stay out of it."""
        facts = {
            "method": self.estimator.name,
            "keep": self.keep,
            "also_prune": self.also_prune,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "likelihood": describe_likelihood(self.likelihood),
            "weights": self._weights,
        }
        write_curvature(Path(path), self.estimator.state_dict(), facts)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        *,
        likelihood: Any = None,
        calling: Calling = PLAIN,
    ) -> Curvature:
        """Return the curvature that `save` wrote, for the same model at the same weights.

        Args:
            path: of the file.
            model: its weights must be those of the fit, bit by bit.
            likelihood: an object; needed by `certify` where the one of the fit was the user's own.
            calling: how the model is called, as in the fit.

        Raises:
            FishLegError: the file is no curvature, or the model has other weights.
        """
        check_type("model", model, nn.Module, "a torch.nn.Module")
        state, facts = read_curvature(Path(path), model_device(model))
        if facts["weights"] != _checksum(model):
            raise FishLegError(
                f"{path}: expected the model at the weights of the fit, got others; load the "
                "weights of the fit first, or fit again."
            )
        partition = partition_parameters(model, prunable=facts["also_prune"], keep=facts["keep"])
        method, _ = present_method(facts["method"], state["meta"].get("options", {}))
        estimator = ESTIMATORS[method](partition, damping=1.0)
        estimator.load_state_dict(state)
        return cls(
            model,
            estimator,
            likelihood=likelihood or restore_likelihood(facts["likelihood"]),
            keep=facts["keep"],
            also_prune=facts["also_prune"],
            seed=facts["seed"],
            batch_size=facts["batch_size"],
            calling=calling,
        )

    def _source(self, samples: Samples) -> GradientSource:
        """Return the gradients on some samples.

        Raises:
            FishLegError: the likelihood is not known.
        """
        if self.likelihood is None:
            raise FishLegError(
                "likelihood: expected one, but the file holds none, since it was an object of the "
                "user's own; give it, Curvature.load(path, model, likelihood=...)."
            )
        return _gradients(
            self.model,
            self.likelihood,
            self.partition,
            samples,
            seed=self.seed,
            batch_size=self.batch_size,
            calling=self.calling,
        )

    def _check_weights(self) -> None:
        """Check that the model has the weights of the fit.

        Raises:
            FishLegError: it has others.
        """
        if _checksum(self.model) != self._weights:
            raise FishLegError(
                "curvature: expected the model at the weights of the fit, got others, since it has "
                "been pruned or trained; fit again."
            )


def fit(
    model: nn.Module,
    data: Any,
    *,
    method: str = "eigen",
    likelihood: Any = None,
    samples: int | None = 1000,
    damping: float | str = "auto",
    keep: Sequence[str] = (),
    also_prune: Sequence[str] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    calling: Calling = PLAIN,
    progress: bool | None = None,
) -> Curvature:
    """Estimate the inverse curvature of a model on calibration data.

    Args:
        model: the network, in any mode and dtype; it is left as it is.
        data: a tensor, (inputs, targets), a data set, or an iterable of batches such as a
            DataLoader; see `draw_samples`.
        method: "eigen", "fls", "fishleg", "obs", "kfac", "ekfac", "mfac", "layer", "diagonal" or
            "magnitude".
        likelihood: nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss() or nn.MSELoss(), the name
            "cross_entropy", "bce_with_logits" or "mse", or an object; see `Likelihood`. None is
            cross-entropy where the targets are class numbers, and an error elsewhere ("layer" and
            "magnitude" need none).
        samples: number of samples, drawn from the data by the seed; None takes all.
        damping: added to the curvature's diagonal before it is inverted, > 0; "auto" is 0.3 times
            the mean curvature of the prunable weights, see `auto_damping`.
        keep: names, or `fnmatch` patterns, of weights that stay dense.
        also_prune: likewise, weights of other layers to prune; see `partition_parameters`.
        seed: of the samples and of their labels.
        options: of the method's class, such as {"shrinkage": 0.3}.
        batch_size: gradients computed at once.
        calling: how the model is called, and which of its outputs counts.
        progress: whether to show a progress line; None: where standard error is a terminal.

    Raises:
        UnknownName: `damping` is a name other than "auto".

    Other errors are those of `partition_parameters`, `draw_samples`, `choose_likelihood`,
    `GradientSource` and the method's class. Cost: of the method, and one pass of the gradients
    for the damping.
    """
    kind = _method(method)
    if isinstance(damping, str):
        if damping != "auto":
            raise UnknownName("damping", damping, ["auto"])
    else:
        check_number("damping", damping)
    partition = partition_parameters(model, prunable=also_prune, keep=keep)
    first = 1.0 if isinstance(damping, str) else damping
    estimator = _build(kind, partition, damping=first, options={} if options is None else options)
    with ProgressLine(progress) as line:
        line.tell("drawing samples")
        drawn = draw_samples(data, samples, seed)
        meaning = _likelihood(model, likelihood, drawn, calling, kind)
        source = _gradients(
            model, meaning, partition, drawn, seed=seed, batch_size=batch_size, calling=calling
        )
        if isinstance(damping, str):
            line.tell("choosing the damping")
            estimator.damping = auto_damping(kind, source)

        def report(progress: FitProgress) -> None:
            line.tell("fitting the curvature", progress.done, progress.total)

        estimator.fit(source, report)
    return Curvature(
        model,
        estimator,
        likelihood=meaning,
        samples=drawn,
        keep=keep,
        also_prune=also_prune,
        seed=seed,
        batch_size=batch_size,
        calling=calling,
    )


def _method(name: Any) -> type[AbstractEstimator]:
    """Return the class of a method.

    Raises:
        UnknownName: there is none of that name.
    """
    check_type("method", name, str, "the name of a method")
    if name not in ESTIMATORS:
        raise UnknownName("method", name, ESTIMATORS)
    return ESTIMATORS[name]


def _build(
    kind: type[AbstractEstimator],
    partition: Partition,
    *,
    damping: float,
    options: Mapping[str, Any],
) -> AbstractEstimator:
    """Return an estimator with these options.

    Raises:
        FishLegError: the class has no such option.
    """
    check_type("options", options, Mapping, "a dict of options")
    try:
        return kind(partition, damping=damping, **options)
    except FishLegError:
        raise
    except TypeError as error:
        raise FishLegError(f"options of {kind.name}: {error}.") from error


def _likelihood(
    model: nn.Module,
    given: Any,
    samples: Samples,
    calling: Calling,
    kind: type[AbstractEstimator],
) -> Likelihood:
    """Return the likelihood, checked on the outputs and targets of a few samples."""
    batch = next(samples.batches(_TRIED, model_device(model)))
    if given is None and issubclass(kind, LayerHessian | Magnitude):
        return Gaussian()  # they look at no label
    network = find_network(model, Gaussian(), calling, lambda: batch)  # any likelihood would do
    with network.computing(), torch.no_grad():
        outputs = network.outputs(network.prepare(batch))
    targets = getattr(samples, "targets", batch.targets)  # all of them, where they are held
    chosen = choose_likelihood(given, outputs, targets)
    if batch.targets is not None:
        check_targets(chosen, outputs, batch.targets)
        chosen.nll(outputs, batch.targets)
    return chosen


def _gradients(
    model: nn.Module, likelihood: Likelihood, partition: Partition, samples: Samples, **how: Any
) -> GradientSource:
    labels = _LABELS if hasattr(likelihood, "match") else "sampled"
    return GradientSource(model, likelihood, partition, samples, labels=labels, **how)


def _checksum(model: nn.Module) -> int:
    """Return a number that depends on each bit of the model's parameters."""
    return checksum({name: value.detach() for name, value in model.named_parameters()})
