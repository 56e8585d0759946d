"""The account of this machine: which CPUs, memory and GPUs are free."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Container
from dataclasses import dataclass, field

from pipeline.base.errors import PipelineError
from pipeline.base.variables import CUDA_DEVICES
from pipeline.executors.base import available_cpus, available_memory_bytes
from pipeline.stage import Resources
from pipeline.worker.system import ask

_GPU_TOOL_S = 30.0


@dataclass(frozen=True)
class Share:
    """The CPUs, bytes of memory, and GPUs that one worker holds."""

    cpus: float
    memory: int
    devices: tuple[str, ...]


@dataclass
class Machine:
    """The account; `gpus` is device -> name."""

    cpus: float = field(default_factory=available_cpus)
    memory: int = field(default_factory=available_memory_bytes)
    gpus: dict[str, str] = field(default_factory=lambda: list_gpus())

    def __post_init__(self) -> None:
        self._free_cpus = self.cpus
        self._free_memory = self.memory
        self._free_gpus = set(self.gpus)

    def lacks(self, wanted: Resources) -> str | None:
        """Return the demand that the whole machine cannot meet, as a sentence's end, or None."""
        count = wanted.workers
        if wanted.num_cpus * count > self.cpus:
            return f"num_cpus: {wanted.num_cpus:g}; this machine has {self.cpus:g}."
        if (wanted.memory_bytes or 0) * count > self.memory:
            return f"memory: {wanted.memory_bytes} bytes; this machine has {self.memory}."
        if not float(wanted.num_gpus).is_integer():
            return (
                f"num_gpus: {wanted.num_gpus:g}; the local executor gives whole GPUs: use a whole "
                "number, or share a GPU by --executor ray."
            )
        fitting = self._fitting(wanted, self.gpus)
        if wanted.num_gpus * count > len(fitting):
            of_type = f" of type {wanted.accelerator_type}" if wanted.accelerator_type else ""
            return f"num_gpus: {wanted.num_gpus:g}{of_type}; this machine has {len(fitting)}."
        return None

    def take(self, wanted: Resources, keep_cpus: float = 0.0) -> list[Share] | None:
        """Take the demands of all workers, or nothing and return None if they are not free.

        Args:
            wanted: the demand of each worker, and their number.
            keep_cpus: CPUs to leave free.
        """
        count, memory, gpus = wanted.workers, wanted.memory_bytes or 0, int(wanted.num_gpus)
        devices = self._fitting(wanted, self._free_gpus)
        if (
            wanted.num_cpus * count > self._free_cpus - keep_cpus
            or memory * count > self._free_memory
            or gpus * count > len(devices)
        ):
            return None
        self._free_cpus -= wanted.num_cpus * count
        self._free_memory -= memory * count
        self._free_gpus.difference_update(devices[: gpus * count])
        return [
            Share(wanted.num_cpus, memory, tuple(devices[gpus * rank : gpus * (rank + 1)]))
            for rank in range(count)
        ]

    def give(self, share: Share) -> None:
        """Take back the share of a worker."""
        self._free_cpus += share.cpus
        self._free_memory += share.memory
        self._free_gpus.update(share.devices)

    def _fitting(self, wanted: Resources, devices: Container[str]) -> list[str]:
        """Return those of the devices that have the wanted type, in order."""
        kind = (wanted.accelerator_type or "").lower()
        return [one for one, name in self.gpus.items() if one in devices and kind in name.lower()]


def list_gpus() -> dict[str, str]:
    """Return device -> name of the NVIDIA GPUs that this process may use, without torch.

    Raises:
        PipelineError: the driver's tool hangs.
    """
    program = shutil.which("nvidia-smi")
    visible = os.environ.get(CUDA_DEVICES.name)  # empty means none
    if program is None or visible == "":
        return {}
    try:
        _, listing = ask(
            [program, "--query-gpu=index,uuid,name", "--format=csv,noheader"], _GPU_TOOL_S
        )
    except subprocess.TimeoutExpired as error:
        raise PipelineError(
            f"{program} gave no answer within {_GPU_TOOL_S:g} s, so the GPUs of this machine are "
            f"not known: expected a list. Repair the driver, or set {CUDA_DEVICES.name} to an "
            "empty text to run without GPUs."
        ) from error
    rows = [[part.strip() for part in line.split(",", 2)] for line in listing.splitlines()]
    names = {key: name for index, uuid, name in rows for key in (index, uuid)}
    if visible is None:
        return {index: name for index, _, name in rows}
    chosen = [device.strip() for device in visible.split(",") if device.strip()]
    return {device: names[device] for device in chosen if device in names}
