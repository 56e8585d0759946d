"""Selection of the weights to remove: exactly the number asked for, the same on every worker.

All sorts are stable, so of equal scores the lowest flat index goes first, in state-dict
order (groups in partition order, then the weight's own flat index). Removed weights stay removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import ceil
from typing import get_args

import torch
from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.errors import FishLegError, UnknownName
from fishleg.options import Distribution
from fishleg.parameters import ParameterGroup, Partition
from fishleg.parametrised import WHOLE
from fishleg.pruning.conditioning import Conditioned
from fishleg.pruning.masks import Masks, check_masks, count_masks
from fishleg.pruning.saliency import group_saliency

DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


def removal_count(prunable: int, sparsity: float) -> int:
    """Return k = floor(s n + 1/2), in exact arithmetic on the decimal form of s.

    The binary rounding of s does not count: 0.7 of 5 is 3.5 and gives 4, though the float 0.7 lies
    below 7/10.

    Args:
        prunable: n >= 0, number of prunable weights.
        sparsity: s in [0, 1), the fraction to remove.

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparsity: expected a fraction removed in [0, 1), got {sparsity}; 90 % is 0.9."
        )
    return int(Fraction(repr(float(sparsity))) * prunable + Fraction(1, 2))


def select(
    partition: Partition,
    saliencies: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    sparsity: float,
    distribution: str = "global",
    *,
    min_kept: float = 0.0,
) -> Masks:
    """Return the masks after removing the least salient weights up to `sparsity`.

    Exactly k = removal_count(n, s) of all n prunable weights are removed after it. `global` takes
    the k least salient ones of the whole network. `uniform` takes equal fractions of each group:
    the k lowest of (rank + 1/2) / size, rank counted from 0 within the group. So the sets grow
    with s; a group loses s times its size within 1 + groups / 2, the rounding of all groups.

    Args:
        partition: the groups.
        saliencies: group name -> (rows, columns), at least the prunable groups; bias columns and
            weights removed already are ignored.
        masks: group name -> bool (rows, columns): the survivors so far.
        sparsity: in [0, 1), not below that of `masks`.
        distribution: "global" or "uniform".
        min_kept: least fraction of each group, in [0, 1], that survives, rounded up: its most
            salient weights (of equals the last). The total stays k: others are removed instead. Of
            a weight that is divided by norms, one of each slice survives in any case.

    Returns:
        New masks, each on its saliency's device.

    Raises:
        FishLegError: more weights are removed already; fewer may be removed than asked for; no
            weight is prunable; or a saliency is missing or NaN.
        UnknownName: no such distribution.
        ValueError: `sparsity` or `min_kept` is out of range.

    Cost: O(n); O(n log n) with protected weights or `uniform`.
    """
    if distribution not in DISTRIBUTIONS:
        raise UnknownName("distribution", distribution, DISTRIBUTIONS)
    if not 0.0 <= min_kept <= 1.0:
        raise ValueError(f"min_kept: expected a fraction in [0, 1], got {min_kept}.")
    check_masks(partition, masks)
    removed, prunable = count_masks(partition, masks)
    count = removal_count(prunable, sparsity)
    if sparsity > 0.0:
        check_prunable(partition)
    if not partition.prunable:
        return {}
    if count < removed:
        raise FishLegError(
            f"sparsity {sparsity}: expected at least the {removed} of {prunable} weights that are "
            f"removed already, got {count}; removed weights do not come back."
        )
    scores = [_scores(group, saliencies, masks[group.name]) for group in partition.prunable]
    protected = [
        _protected(group, score, min_kept)
        for group, score in zip(partition.prunable, scores, strict=True)
    ]
    safe = {
        group.name: int(one.sum())
        for group, one in zip(partition.prunable, protected, strict=True)
        if one is not None
    }
    if count > prunable - sum(safe.values()):
        raise FishLegError(
            f"sparsity {sparsity}: expected to remove {count} of {prunable} weights, but "
            f"{sum(safe.values())} have to stay ({listed(safe)}), by min_kept={min_kept} and one "
            "in each slice that is divided by its norm; lower sparsity or min_kept."
        )
    if distribution == "uniform":
        scores = [_positions(score) for score in scores]
    return _remove_lowest(partition, scores, protected, count)


def _remove_lowest(
    partition: Partition, scores: Sequence[Tensor], protected: Sequence[Tensor | None], count: int
) -> Masks:
    """Return the masks without the `count` weights of least score, none of them protected."""
    everything = torch.cat(list(scores))
    if any(one is not None for one in protected):
        free = ~torch.cat(
            [
                torch.zeros_like(score, dtype=torch.bool) if one is None else one
                for score, one in zip(scores, protected, strict=True)
            ]
        )
        survives = torch.ones_like(free)
        survives[free] = ~_lowest(everything[free], count)
    else:
        survives = ~_lowest(everything, count)
    out: Masks = {}
    parts = survives.split([score.numel() for score in scores])
    for group, part in zip(partition.prunable, parts, strict=True):
        mask = torch.ones(group.shape, dtype=torch.bool, device=part.device)
        mask[:, : group.weight_columns] = part.reshape(group.rows, -1)
        out[group.name] = mask
    return out


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` least of some scores (n) are; of equals, the first.

    Cost: O(n), a tenth of that of a sort.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    found = scores < limit
    equals = (scores == limit).nonzero().flatten()
    found[equals[: count - int(found.sum())]] = True
    return found


def check_prunable(partition: Partition) -> None:
    """Check that a network has a prunable weight.

    Raises:
        FishLegError: it has none; the message names the candidates.
    """
    if partition.prunable:
        return
    found = "; ".join(f"{name} ({reason})" for name, reason in partition.unprunable)
    remedy = (
        f"Its weights with two or more dimensions: {found}. Name some of them in `prunable` of "
        "partition_parameters, or take them out of `keep` or `skip`."
        if found
        else "It has no weight with two or more dimensions."
    )
    raise FishLegError(
        "No weight of the network is prunable, so nothing can be removed; expected one at least. "
        + remedy
    )


def listed(counts: Mapping[str, int], most: int = 5) -> str:
    """Return the largest of some counts, for messages."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    rest = ", ..." if len(names) > most else ""
    return ", ".join(f"{name} {counts[name]}" for name in names[:most]) + rest


def _protected(group: ParameterGroup, score: Tensor, min_kept: float) -> Tensor | None:
    """Return the weights of a group that must survive, flat; None where none must.

    One of each slice that is divided by its norm, and then the most salient ones up to `min_kept`.

    Raises:
        FishLegError: fewer survive already.
    """
    wanted = ceil(Fraction(repr(float(min_kept))) * score.numel())
    if not wanted and group.norm_dim is None:
        return None
    alive = score != -torch.inf
    if int(alive.sum()) < wanted:
        raise FishLegError(
            f"{group.name}: min_kept={min_kept} keeps {wanted} of its {score.numel()} weights, but "
            f"only {int(alive.sum())} are left; removed weights do not come back."
        )
    order = torch.sort(score, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(score.numel(), device=score.device)
    best = torch.zeros_like(alive)
    if group.norm_dim is not None:
        ranks = rank.reshape(group.weight_shape)
        if group.norm_dim != WHOLE:
            ranks = ranks.movedim(group.norm_dim, 0).flatten(1)
            best[order[ranks.amax(1)]] = True
        else:
            best[order[-1]] = True
        best &= alive
    # above all others, in their own order
    first = torch.where(best, rank + score.numel(), rank)
    best[torch.sort(first, descending=True).indices[:wanted]] = True
    return best


def _scores(group: ParameterGroup, saliencies: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Return the group's flat scores without the bias column: -inf for weights removed already.

    Raises:
        FishLegError: the group's saliency is missing or NaN.
    """
    if group.name not in saliencies:
        raise FishLegError(f"No saliency for the prunable group {group.name!r}.")
    score = saliencies[group.name][:, : group.weight_columns]
    mask = mask[:, : group.weight_columns].to(score.device)
    score = score.masked_fill(~mask, -torch.inf).flatten()
    if score.isnan().any():
        raise FishLegError(
            f"{group.name}: {int(score.isnan().sum())} saliencies are NaN; check the weights and "
            "the curvature for overflow."
        )
    return score


def _positions(score: Tensor) -> Tensor:
    """Return the position of each entry in its group's order, in (0, 1); -inf stays -inf."""
    order = torch.sort(score, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(score.numel(), device=score.device)
    position = (rank.double() + 0.5) / score.numel()
    return position.masked_fill(score == -torch.inf, -torch.inf)


def select_n_of_m(
    group: ParameterGroup, block: AbstractBlock | Conditioned, weights: Tensor, n: int, m: int
) -> Tensor:
    """Return a mask of a group with n survivors, at most, in every m consecutive inputs.

    Consecutive inputs share the output and the kernel position, as sparse tensor cores need.
    Of each m, the m - n weights of least joint saliency 1/2 w_q^T (Q_qq)^-1 w_q are removed; of
    equal subsets the one of lowest indices.

    Args:
        group: a prunable group; in/groups is divisible by m.
        block: its block of Q; where earlier steps have removed weights, and the estimate is of the
            full Fisher, `condition(estimator, name, masks)`.
        weights: its matrix (rows, columns).
        n: survivors of each m, 1 <= n < m.
        m: number of consecutive inputs that share a choice.

    Returns:
        The mask, bool (rows, columns).

    Raises:
        FishLegError: n or m is out of range, or the inputs do not divide by m.

    Cost: O(rows columns / m) Cholesky factors of size m - n for each of the C(m, n) subsets.
    """
    inputs = group.weight_columns // group.kernel
    if group.transposed:
        inputs = group.rows // group.conv_groups
    if not 1 <= n < m or inputs % m:
        raise FishLegError(
            f"{group.name}: {n}:{m} needs 1 <= n < m and inputs divisible by m, got {inputs} "
            "inputs; leave the weight dense by `keep=` of partition_parameters."
        )
    flat = torch.arange(group.rows * group.columns, device=weights.device).reshape(group.shape)
    index = flat[:, : group.weight_columns]
    if group.transposed:  # the inputs are the rows
        index = index.reshape(group.rows // m, m, group.weight_columns)
    else:
        index = index.reshape(group.rows, inputs // m, m, group.kernel)
    index = index.mT.reshape(-1, m)
    subsets = torch.tensor(list(combinations(range(m), m - n)), device=weights.device)
    scores = [group_saliency(block, weights, index[:, subset]) for subset in subsets]
    best = subsets[torch.stack(scores).argmin(dim=0)]
    mask = torch.ones(flat.numel(), dtype=torch.bool, device=weights.device)
    mask[index.gather(1, best)] = False
    return mask.reshape(group.shape)
