"""Sums over per-sample gradients and layer signals that estimators build their blocks from.

Products are formed in the gradients' own dtype, sums are kept in float64: with small damping the
inverse magnifies the rounding of a long sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fishleg.blocks.dense import cut_chunks
from fishleg.gradients.layers import LayerSignals
from fishleg.gradients.running_sums import Progress, RunningSums, Sums, add_parts
from fishleg.gradients.source import GradientSource

Moments = Callable[[Tensor], tuple[Tensor, ...]]


def accumulate(
    source: GradientSource,
    moments: Moments | Mapping[str, Moments],
    *,
    groups: Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    running: RunningSums | None = None,
    progress: Progress | None = None,
) -> Sums:
    """Return group name -> float64 sums of the moments over all gradients, in one pass.

    A rank group shares the pass, and each of its processes gets the sums over all samples.

    Args:
        source: of scaled gradients.
        moments: maps gradients (n, rows, columns) to sums of statistics over n; or group name ->
            such a map.
        groups: names; default all.
        masks: group name -> bool (rows, columns); gradients of removed weights count as zero.
        running: sums of an interrupted pass, which is resumed; holds the sums.
        progress: is given the gradient rows done so far.
    """

    def add(sums: Sums, batch: Mapping[str, Tensor], first_row: int) -> int:
        rows = 0
        for name, gradients in batch.items():
            rows = len(gradients)
            if masks is not None and name in masks:
                gradients = gradients * masks[name]
            add_parts(sums, name, (moments if callable(moments) else moments[name])(gradients))
        return rows

    running = running or RunningSums()
    running.run(source, lambda part: part.stream(groups), add, progress)
    return running.sums


def squares(gradients: Tensor) -> tuple[Tensor]:
    """Return sum_n G_n o G_n, the diagonal of F, (rows, columns)."""
    return (gradients.square().sum(0),)


def chunk_products(gradients: Tensor, block_size: int) -> tuple[Tensor]:
    """Return F's diagonal chunks (k, b, b) along the row-major vector, the last padded with zeros.

    b is `block_size`, or the group's size if that is less.

    Cost: 2 n rows columns b FLOPs, as one batched matrix product.
    """
    block_size = min(block_size, gradients[0].numel())
    chunks = cut_chunks(gradients, block_size).transpose(0, 1)
    return (chunks.mT @ chunks,)


def kronecker_products(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_n G_n G_n^T, (rows, rows), and sum_n G_n^T G_n, (columns, columns).

    Cost: 2 n rows columns (rows + columns) FLOPs.
    """
    wide = gradients.transpose(0, 1).flatten(1)
    tall = gradients.flatten(0, 1)
    return wide @ wide.mT, tall.mT @ tall


def as_factors(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Gamma (1, r, r), A (1, c, c)) with F ~ Gamma (x) A, from `kronecker_products`.

    F ~ E[G G^T] (x) E[G^T G] / tr F is F itself for vectors, and wherever F is a Kronecker product.
    """
    trace = column.trace().clamp(min=torch.finfo(column.dtype).tiny)  # F may be zero
    return row[None], column[None] / trace


def layer_moments(
    source: GradientSource,
    groups: Sequence[str],
    *,
    running: RunningSums | None = None,
    progress: Progress | None = None,
) -> Sums:
    """Return group name -> K-FAC factors [Gamma, A] of linear and convolution layers, float64.

    F ~ Gamma (x) A with, over T positions, Gamma = (1/T) E[sum_t g_t g_t^T] and
    A = E[sum_t a_t a_t^T] (Martens and Grosse 2015; Grosse and Martens 2016), one pair for each of
    h convolution groups.

    Args:
        source: of layer signals.
        groups: names; those without signals are missing in the result.
        running: sums of an interrupted pass, which is resumed; holds the sums.
        progress: is given the gradient rows done so far.

    Returns:
        Gamma (h, rows / h, rows / h) and A (h, columns, columns).

    Cost: a pass of `source.layers`, and 2 T (rows^2 / h + h columns^2) FLOPs a sample and group.
    """

    def moments(signals: LayerSignals) -> tuple[Tensor, ...]:
        return signal_moments(signals, source.rows)

    return _accumulate_signals(source, moments, groups, running, progress)


def signal_moments(signals: LayerSignals, rows: int) -> tuple[Tensor, Tensor]:
    """Return the contribution of a batch to the K-FAC factors Gamma and A of `layer_moments`.

    Args:
        signals: of the batch.
        rows: gradient rows of the whole pass.
    """
    g = signals.output_gradients
    return _second_moments(g.flatten(0, 1)) / g.shape[3], _inputs(signals, rows)


def input_moments(
    source: GradientSource,
    groups: Sequence[str],
    *,
    running: RunningSums | None = None,
    progress: Progress | None = None,
) -> Sums:
    """Return group name -> [A] with A = E[sum_t a_t a_t^T], (h, columns, columns).

    As in `layer_moments`. Cost: a pass of `source.layers`, whose backward half is not needed here,
    and 2 T h columns^2 FLOPs a sample and group.
    """

    def moments(signals: LayerSignals) -> tuple[Tensor, ...]:
        return (_inputs(signals, source.rows),)

    return _accumulate_signals(source, moments, groups, running, progress)


def _accumulate_signals(
    source: GradientSource,
    moments: Callable[[LayerSignals], tuple[Tensor, ...]],
    groups: Sequence[str],
    running: RunningSums | None,
    progress: Progress | None,
) -> Sums:
    """Return group name -> float64 sums of the moments of layer signals; shared as above."""

    def add(sums: Sums, batch: Mapping[str, LayerSignals | None], first_row: int) -> int:
        rows = 0
        for name, signals in batch.items():
            if signals is not None:
                rows = signals.output_gradients.shape[0] * signals.output_gradients.shape[1]
                add_parts(sums, name, moments(signals))
        return rows

    running = running or RunningSums()
    running.run(source, lambda part: part.layers(groups), add, progress)
    return running.sums


def _inputs(signals: LayerSignals, rows: int) -> Tensor:
    """Return the contribution of a batch to A; `rows` are the gradient rows of the whole pass.

    Every label of a sample has the same input: it is counted by the share of labels here.
    """
    return _second_moments(signals.activations) * (signals.output_gradients.shape[1] / rows)


def _second_moments(x: Tensor) -> Tensor:
    """Return sum_nt x_nt x_nt^T for each of h groups, (h, c, c), of x (n, h, T, c)."""
    if x.shape[2] == 1:
        rows = x.squeeze(2).transpose(0, 1)
        return rows.mT @ rows
    # Sample by sample: patches (n, T, c) are a transposed view, which one large product would copy.
    zero = x.new_zeros(x.shape[3], x.shape[3])
    return torch.stack([torch.addbmm(zero, part.mT, part) for part in x.unbind(1)])
