"""Random numbers that depend on their purpose, not on when they are drawn.

A counter-based generator, Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011): number j of draw k for sample i under seed s is a fixed function of
(s, i, k, j). So every pass, worker and resumed run sees the same labels, for any batching.
Written in 64-bit integer tensor operations, hence the same bits on every device.
"""

from __future__ import annotations

from math import pi, prod

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


class SampleGenerator:
    """Draws random numbers for a batch of samples, each from its own stream.

    Successive calls continue each sample's stream; a new object with equal arguments starts over.

    Args:
        seed: any Python integer; its lowest 64 bits are the key.
        indices: (n,) int64, the samples' own numbers, >= 0; results live on its device.
        draw: number of the draw, 0 <= draw < 2^32, for several labels a sample.
    """

    def __init__(self, seed: int, indices: Tensor, draw: int = 0):
        self._key = (seed & _WORD, seed >> 32 & _WORD)
        self._indices = indices.to(torch.int64)
        self._draw = draw
        self._used = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return (n, *shape) float64, uniform on the open interval (0, 1), with 52 random bits."""
        count = prod(shape)
        blocks = (count + 1) // 2  # one block of four words makes two numbers
        counter = torch.arange(self._used, self._used + blocks, device=self._indices.device)
        self._used += blocks
        index, block = torch.broadcast_tensors(self._indices[:, None], counter)
        draw = torch.full_like(block, self._draw)
        words = philox((block, draw, index & _WORD, index >> 32 & _WORD), self._key)
        pairs = torch.stack([_to_unit(words[0], words[1]), _to_unit(words[2], words[3])], dim=-1)
        return pairs.flatten(1)[:, :count].reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return (n, *shape) float64, standard normal, by Box and Muller's transform.

        The logarithm and cosine are the device's own, so the last bit may differ between devices.
        """
        first, second = self.uniform(2, *shape).unbind(1)
        return (-2 * first.log()).sqrt() * (2 * pi * second).cos()


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox-4x32-10 of a counter: four words of 32 bits, held in int64.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2^32).
        key: two integers in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around in int64, but its 64 bits are the right ones.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _to_unit(high: Tensor, low: Tensor) -> Tensor:
    """Return two words as (x + 1/2) 2^-52: exact in float64, never 0 nor 1."""
    bits = (high << 20) | (low >> 12)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52
