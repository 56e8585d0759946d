"""All random numbers follow from a seed and their purpose; no generator keeps a state.

So a resumed run needs its cursor alone, and sees the same batches, crops and dropout.
"""

from __future__ import annotations

import hashlib
import os

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, such as `derive_seed(0, "epoch", 3)`."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose; its numbers are the same for every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def compute_deterministically(device: str) -> None:
    """Make torch choose deterministic algorithms, in full float32 outside autocast.

    On a GPU, an operation without such an algorithm warns only: a user's network may need one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    # The same switch as torch.use_deterministic_algorithms, without its three seconds of imports.
    torch.set_deterministic_debug_mode("warn" if device == "cuda" else "error")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
