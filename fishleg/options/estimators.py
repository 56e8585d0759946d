"""Options of the curvature estimators, by the estimator's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from fishleg.errors import InvalidOption, UnknownName
from fishleg.options.choices import (
    Directions,
    EigenBasis,
    FlsStart,
    LearnedStructure,
    MaskFit,
    Objective,
    SolverName,
    Structure,
    WarmStart,
)
from fishleg.options.earlier import refuse_eigen
from fishleg.options.fields import Options, Range, check, declared

CLOSED_FORM = frozenset({"block", "diagonal", "full"})
"""Structures whose best block has a closed form without a basis."""


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions(Options):
    """Options that every estimator takes beside its own.

    Attributes:
        damping: gamma, added to the Fisher's diagonal, in the Fisher's units.
        memory_limit: bytes that a fit may need at its peak; None for the free memory at the start.
    """

    damping: Annotated[float, Range(gt=0)] = 1e-4
    memory_limit: Annotated[int | None, Range(ge=0, unit="bytes")] = None


@dataclass(frozen=True, kw_only=True)
class GroupwiseOptions(Options):
    """Options of the estimators that hold the gradients of packs of groups.

    Attributes:
        memory_bytes: for gradients held at once; less memory takes more passes. A group that
            exceeds it alone streams a pass of the data each time its gradients are read.
    """

    memory_bytes: Annotated[int, Range(ge=1, unit="bytes")] = 2 << 30


@dataclass(frozen=True, kw_only=True)
class EigenOptions(GroupwiseOptions):
    """Options of EK-FAC with shrinkage.

    Attributes:
        basis: of the eigenvalues. `kfac`: that of the K-FAC factors (for groups without a layer as
            `moments`); `moments`: that of the second moments of the gradients' rows and columns;
            `log_det`: that of factors learned by log-det half-steps from K-FAC's, at a tenth of the
            damping. A refinement under masks takes the moments of masked gradients.
        shrinkage: of measured curvature towards the product of the factors, in [0, 1]; see
            `ClosedFormSolver`. 0 is EK-FAC; 1 keeps K-FAC's eigenvalues, rescaled to the measured
            sum.
        basis_sweeps: pairs of half-steps of the basis `log_det`.

    Raises:
        UnknownName: an option is none of its choices.
        InvalidOption: a value has another type, or is out of range.
    """

    basis: EigenBasis = "kfac"
    shrinkage: Annotated[float, Range(ge=0, le=1)] = 0.5
    basis_sweeps: Annotated[int, Range(ge=1)] = 5


class EigenChanges(TypedDict, total=False):
    """Fields of `EigenOptions` as keywords of a call."""

    basis: EigenBasis
    shrinkage: float
    basis_sweeps: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class FishLegOptions(GroupwiseOptions):
    """Options of FishLeg's fit.

    Attributes:
        structure: form of the inverse's blocks. Vectors (biases and normalisation) of up to 1,024
            parameters get a dense block in place of factors; the tensor structure is for kernels
            larger than one position, other groups are Kronecker.
        solver: `alternating`: exact half-steps for Kronecker blocks without scale, and the closed
            form of the minimiser for block, diagonal and full; `adam`: for all; `auto`: alternating
            where possible, else Adam.
        objective: of the fit. `expected`: J in closed form over samples; `probe`: J by random
            probes (adam); `log_det`: the log-det objective L, which weighs relative errors of Q.
        pull: weight of the K-FAC product in the Fisher that `log_det` half-steps see, in [0, 1]; 1
            fits the factors of the start `kfac` themselves, which it needs. A refinement under
            masks has no pull.
        warm_start: the start of the fit. `kfac`: inverse K-FAC factors (for groups without a layer
            as `moments`); `moments`: inverse second moments of the gradients' rows and columns;
            `diagonal`: inverse diagonal Fisher; `identity`: identity / gamma. Where a scale is
            fitted beside two factors, two alternating sweeps follow, except on the diagonal, which
            is in the scale already.
        sweeps: pairs of half-steps in a fit (alternating).
        refine_sweeps: pairs of half-steps under new masks (alternating).
        mask_fit: the objective of masked half-steps. `exact`: J_M; `damped`: J of the masked
            gradients.
        cg_iterations: of conjugate gradients, at most, in an exact masked half-step.
        block_size: weights in a block (structure block).
        steps: of Adam in a fit (adam).
        refine_steps: of Adam under new masks (adam).
        preconditioned_steps: number of Adam's first steps that are preconditioned (adam). 0 by
            default: from these warm starts plain steps measured better.
        learning_rate: relative size of a step (adam).
        probes: random directions a step (objective probe).
        seed: of the probes.

    Raises:
        UnknownName: an option is none of its choices.
        InvalidOption: a value has another type, is out of range, or does not fit the others.
    """

    structure: Structure = "kronecker"
    solver: SolverName = "auto"
    objective: Objective = "expected"
    pull: Annotated[float, Range(ge=0, le=1)] = 0.0
    warm_start: WarmStart = "kfac"
    sweeps: Annotated[int, Range(ge=1)] = 5
    refine_sweeps: Annotated[int, Range(ge=1)] = 2
    mask_fit: MaskFit = "damped"
    cg_iterations: Annotated[int, Range(ge=1)] = 4
    block_size: Annotated[int, Range(ge=1, unit="weights")] = 64
    steps: Annotated[int, Range(ge=1)] = 200
    refine_steps: Annotated[int, Range(ge=1)] = 80
    preconditioned_steps: Annotated[int, Range(ge=0)] = 0
    learning_rate: Annotated[float, Range(gt=0)] = 0.02
    probes: Annotated[int, Range(ge=1)] = 16
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_eigen(self.structure)
        super().__post_init__()
        if self.preconditioned_steps >= min(self.steps, self.refine_steps):
            raise InvalidOption(
                "preconditioned_steps",
                "expected fewer than steps and refine_steps, so that plain steps come last, got "
                f"{self.preconditioned_steps}",
            )
        self._check_structure()
        self._check_log_det()

    def _check_structure(self) -> None:
        """Check that the solver can make blocks of the structure.

        Raises:
            InvalidOption: it cannot.
        """
        has_alternating = {"kronecker", *CLOSED_FORM}
        if self.solver == "alternating" and self.structure not in has_alternating:
            raise InvalidOption(
                "solver",
                f"no alternating half-steps for the structure {self.structure!r}; use 'adam', or "
                "the structure 'kronecker'",
            )
        if self.solver == "alternating" and self.objective == "probe":
            raise InvalidOption(
                "objective", "'probe' needs the solver 'adam'; half-steps are exact"
            )

    def _check_log_det(self) -> None:
        """Check that the options fit the log-det objective, or the other ones.

        Raises:
            InvalidOption: they do not.
        """
        if self.objective == "log_det":
            if self.mask_fit == "exact":
                raise InvalidOption(
                    "mask_fit",
                    "expected 'damped' with the objective 'log_det', got 'exact': no factors give "
                    "the determinant of the survivors' part",
                )
            if self.preconditioned_steps:
                raise InvalidOption(
                    "preconditioned_steps",
                    "expected 0 with the objective 'log_det', got "
                    f"{self.preconditioned_steps}: preconditioned steps follow J",
                )
        if self.pull:
            wanted = {"objective": "log_det", "structure": "kronecker", "warm_start": "kfac"}
            for name, value in wanted.items():
                if getattr(self, name) != value:
                    raise InvalidOption(
                        "pull", f"expected 0, or the {name} {value!r}, got {self.pull}"
                    )
            if self.solver == "adam":
                raise InvalidOption("pull", f"expected 0 with the solver 'adam', got {self.pull}")


class FishLegChanges(TypedDict, total=False):
    """Fields of `FishLegOptions` as keywords of a call."""

    structure: Structure
    solver: SolverName
    objective: Objective
    pull: float
    warm_start: WarmStart
    sweeps: int
    refine_sweeps: int
    mask_fit: MaskFit
    cg_iterations: int
    block_size: int
    steps: int
    refine_steps: int
    preconditioned_steps: int
    learning_rate: float
    probes: int
    memory_bytes: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class FlsOptions(Options):
    """Options of the FishLeg surgeon as published.

    Attributes:
        structure: form of the inverse's blocks; see `FishLegOptions`.
        objective: that a step of Adam descends. `probe`: J by random directions u; `expected`: J
            averaged over u in closed form; `log_det`: the log-det objective L.
        directions: of the probes: `normal`, N(0, I); or `gradients`, normalised gradients of one
            half of a batch, whose other half gives F.
        warm_start: the start of the descent. `identity`: identity / gamma, as published; `kfac`:
            inverse K-FAC factors; `moments`: inverse second moments of the gradients' rows and
            columns; `diagonal`: inverse diagonal Fisher. All but the first take a pass of the data.
        batch: samples of a step, drawn afresh, with fresh labels.
        steps: of Adam in a fit, at most.
        refine_steps: of Adam under new masks, at most.
        learning_rate: relative size of the first step; it falls to 0 along a cosine over the steps.
        probes: directions u of a step (objective probe).
        held_out: fraction of the samples that no step sees; their objective, J or L, stops the fit.
        check_every: steps between two looks at the held-out samples.
        patience: looks without a lower held-out objective after which a group's fit stops.
        seed: of the batches and the probes.

    Raises:
        UnknownName: an option is none of its choices.
        InvalidOption: a value has another type, or is out of range.
    """

    structure: LearnedStructure = "kronecker"
    objective: Objective = "probe"
    directions: Directions = "gradients"
    warm_start: FlsStart = "identity"
    batch: Annotated[int, Range(ge=1, unit="samples")] = 32
    steps: Annotated[int, Range(ge=1)] = 1000
    refine_steps: Annotated[int, Range(ge=1)] = 200
    learning_rate: Annotated[float, Range(gt=0)] = 0.02
    probes: Annotated[int, Range(ge=1)] = 16
    held_out: Annotated[float, Range(ge=0, lt=1)] = 0.1
    check_every: Annotated[int, Range(ge=1, unit="steps")] = 50
    patience: Annotated[int, Range(ge=1)] = 4
    seed: int = 0


class FlsChanges(TypedDict, total=False):
    """Fields of `FlsOptions` as keywords of a call."""

    structure: LearnedStructure
    objective: Objective
    directions: Directions
    warm_start: FlsStart
    batch: int
    steps: int
    refine_steps: int
    learning_rate: float
    probes: int
    held_out: float
    check_every: int
    patience: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ObsOptions(Options):
    """Options of the dense diagonal blocks.

    Attributes:
        block_size: weights in a diagonal block; a smaller group is one full block.
        by_rows: whether each row of a group (an output, with its bias) is a block, of any length,
            in place of `block_size`.
    """

    block_size: Annotated[int, Range(ge=1, unit="weights")] = 64
    by_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class MfacOptions(Options):
    """Options of the low-rank inverse.

    Attributes:
        gradients: vectors kept, each of samples / gradients gradients.
        seed: of the signs that gradients are summed with.
    """

    gradients: Annotated[int, Range(ge=1)] = 256
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class KfacOptions(Options):
    """Options of the Kronecker factors, with and without measured eigenvalues.

    Attributes:
        dense_size: entries up to which a group without a layer gets its full Fisher.
    """

    dense_size: Annotated[int, Range(ge=0, unit="weights")] = 1024


@dataclass(frozen=True, kw_only=True)
class LayerOptions(Options):
    """Options of the layer Hessian.

    Attributes:
        relative_damping: added to the Hessian's diagonal beside damping, in units of its mean.
    """

    relative_damping: Annotated[float, Range(ge=0)] = 0.01


@dataclass(frozen=True, kw_only=True)
class NoOptions(Options):
    """Options of an estimator that has none of its own."""


ESTIMATOR_OPTIONS: Mapping[str, type[Options]] = {
    "eigen": EigenOptions,
    "fishleg": FishLegOptions,
    "fls": FlsOptions,
    "obs": ObsOptions,
    "mfac": MfacOptions,
    "kfac": KfacOptions,
    "ekfac": KfacOptions,
    "layer": LayerOptions,
    "diagonal": NoOptions,
    "magnitude": NoOptions,
}
"""Name of an estimator -> the class of its own options."""

BATCHWISE = frozenset({"fls", "kfac", "obs", "diagonal"})
"""Estimators that batches can update; see `AbstractEstimator.learn`."""


def mistakes_in(method: str, options: Mapping[str, Any]) -> Iterator[InvalidOption | UnknownName]:
    """Yield an error for each keyword argument that an estimator's constructor would refuse.

    Args:
        method: a name of `ESTIMATOR_OPTIONS`.
        options: all but the partition and the damping.

    >>> [str(one) for one in mistakes_in("kfac", {"dense_siz": 12})]
    ["dense_siz: unknown kfac option 'dense_siz' (did you mean 'dense_size'?); known: dense_size, \
memory_limit."]
    """
    kind: Any = ESTIMATOR_OPTIONS[method]
    common: Any = EstimatorOptions
    known = {field.name: field for field in (*declared(kind), *declared(common))}
    del known["damping"]
    found: list[InvalidOption | UnknownName] = []
    for name, value in options.items():
        if name not in known:
            unknown = UnknownName(f"{method} option", name, known)
            found.append(InvalidOption(name, unknown.reason))
            continue
        try:
            check(known[name], value)
        except (InvalidOption, UnknownName) as error:
            found.append(error)
    yield from found
    if not found:
        try:
            kind(**{name: value for name, value in options.items() if name != "memory_limit"})
        except InvalidOption as error:  # it does not fit the others
            yield error
