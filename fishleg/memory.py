"""Memory: the needs of a group's fit, and the memory available."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that the fit of one group needs.

    Attributes:
        held: of its block, once it is fitted.
        sums: of the sums or gradients held for it during the fit, until its block replaces them.
        work: beside both, temporarily: its share of a batch, or workspace while its block is made.
    """

    held: int
    sums: int
    work: int


def peak(footprints: Iterable[Footprint]) -> int:
    """Return the bytes of a fit that sums for all groups at once, then makes block by block."""
    found = list(footprints)
    standing = sum(max(one.held, one.sums) for one in found)
    return standing + max((one.work for one in found), default=0)


def available_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated on `device`; None where that is not known.

    On a GPU the free memory and torch's cache. Elsewhere MemAvailable of Linux or, if that is less,
    the room under the limits of the control groups (version 1 or 2).

    Args:
        device: where the fit computes.
        root: of the file system that holds proc/ and sys/.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    rooms = [*_machine(root), *_control_groups(root)]
    return max(min(rooms), 0) if rooms else None


def _machine(root: Path) -> Iterator[int]:
    """Yield the machine's available memory, if known."""
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """Yield the room under each memory limit above this process; cached files count as free."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, cached = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for part in (inside, *inside.parents):
            folder = root / "sys/fs/cgroup" / mount / part
            limits = [value for value in _lines(folder / limit) if value.isdecimal()]
            for value, used in zip(limits, _lines(folder / usage), strict=False):
                files = [one.split() for one in _lines(folder / "memory.stat")]
                yield int(value) - int(used) + sum(int(n) for key, n in files if key == cached)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, none where it cannot be read."""
    try:
        return path.read_text("utf-8").splitlines()
    except OSError:
        return []


def show_bytes(count: int) -> str:
    """Return a number of bytes as text, in MB or GB (decimal)."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
