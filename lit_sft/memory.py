"""What this process holds in memory, held, and may come to hold."""

import os
import resource
import sys
from pathlib import Path

import torch

TIDY_HEAP = "MALLOC_MMAP_THRESHOLD_"
"""The variable with which glibc's heap takes little more than what it holds, and more time."""


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on the GPU, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Bytes of this process in memory now; where the system does not say, the most there were."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return peak_memory(torch.device("cpu"))


def free_memory(device: str) -> int:
    """Bytes that this process may come to hold: what is free on a GPU; elsewhere its own and 9/10 of those free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free, meminfo, group = 2**63, Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        values = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(values["MemAvailable"].split()[0]) * 1024
    elif hasattr(os, "sysconf"):
        free = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    used, limit = group / "memory.current", group / "memory.max"  # a container's own limit
    if used.is_file() and limit.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return resident_memory() + free * 9 // 10


def ran_out(error: BaseException) -> bool:
    """True where an error says that a GPU's memory did not suffice; while compiling it comes inside another one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            return True
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return False
