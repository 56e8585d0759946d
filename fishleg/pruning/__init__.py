"""Saliency, selection, compensation, refinement, schedules and the surgeon."""

from fishleg.pruning.admm import AdmmReport, admm_masks
from fishleg.pruning.compensation import (
    COMPENSATIONS,
    NETWORK,
    CompensationReport,
    compensate,
    constrained_set,
)
from fishleg.pruning.conditioning import Conditioned, condition
from fishleg.pruning.layerwise import greedy_saliency
from fishleg.pruning.line_search import FRACTIONS, RefinementReport, search_line, search_norms
from fishleg.pruning.masks import (
    HeldMasks,
    Masks,
    apply_masks,
    check_masks,
    count_masks,
    dense_masks,
    group_masks,
    weight_masks,
    zero_masks,
)
from fishleg.pruning.norms import following_norms, reestimate_norms, running_norms
from fishleg.pruning.refinement import (
    Refinement,
    RefinementOptions,
    mean_divergence,
    refine,
)
from fishleg.pruning.report import LayerReport, PruneReport
from fishleg.pruning.saliency import Score, group_saliency, saliency
from fishleg.pruning.schedule import cubic, geometric, linear
from fishleg.pruning.selection import DISTRIBUTIONS, removal_count, select, select_n_of_m
from fishleg.pruning.surgeon import SELECTIONS, ZEROS, check_selection, prune_once, prune_to
from fishleg.pruning.zero_keeping import keep_zeros

__all__ = [
    # saliency
    "Score",
    "saliency",
    "group_saliency",
    "greedy_saliency",
    "Conditioned",
    "condition",
    # selection
    "DISTRIBUTIONS",
    "removal_count",
    "select",
    "select_n_of_m",
    "AdmmReport",
    "admm_masks",
    # compensation
    "COMPENSATIONS",
    "NETWORK",
    "CompensationReport",
    "compensate",
    "constrained_set",
    # schedules
    "cubic",
    "geometric",
    "linear",
    # masks
    "Masks",
    "HeldMasks",
    "dense_masks",
    "check_masks",
    "count_masks",
    "apply_masks",
    "weight_masks",
    "zero_masks",
    "group_masks",
    # batch norms
    "running_norms",
    "reestimate_norms",
    "following_norms",
    # refinement
    "Refinement",
    "RefinementOptions",
    "mean_divergence",
    "refine",
    "FRACTIONS",
    "RefinementReport",
    "search_line",
    "search_norms",
    # the surgeon
    "SELECTIONS",
    "ZEROS",
    "LayerReport",
    "PruneReport",
    "check_selection",
    "prune_once",
    "prune_to",
    # training afterwards
    "keep_zeros",
]
