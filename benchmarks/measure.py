"""Clocks and memory, the same for every side."""

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

STARTED = "BENCHMARK_STARTED"  # environment: when the process was started, by the clock of time.time()


def since_start() -> float:
    """Seconds since whoever started this process did so, imports included."""
    return time.time() - float(os.environ[STARTED])


def synchronize(device: torch.device | str) -> None:
    """Wait until ``device`` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    """The card's name, or cpu."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def seconds_of(work: Callable[[], object], device: torch.device | str, repeats: int = 7) -> float:
    """Median duration of ``work`` after two calls to warm up."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def resident() -> float:
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def settle(weights: Iterable[torch.Tensor]) -> float:
    """Begin to measure memory once a model is loaded; gives what is resident now, in MB.

    Mapped weights are read, so that they count as resident; what loading left over goes back to the system, and the
    peak of the process is set to what is resident now. So loading does not count, on any side.
    """
    for tensor in weights:
        tensor.detach().reshape(-1)[:: 1024 // tensor.element_size()].sum()  # every page of it
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak() -> float:
    """Most memory of this process since ``settle``, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def draw_weight(name: str, size: torch.Size, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A random weight that follows from its name in transformers: both sides draw the same on the same device.

    Matrices have the deviation 1 / √in, with which a LoRA can learn through a frozen head; norms are 1, biases 0.
    """
    if len(size) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(size, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(size, generator=generator, device=device, dtype=dtype) * size[1] ** -0.5


def start(command: list[object], environment: dict[str, str]) -> dict:
    """One run in a process of its own: the JSON object that it printed last, or ``failed`` with its last words."""
    load = os.getloadavg()[0]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | environment
    environment[STARTED] = str(time.time())
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr or f"exit status {done.returncode}")[-1500:], "load_before": load}
    return json.loads(done.stdout.splitlines()[-1]) | {"load_before": load}


Run = Callable[[Path, str, int, int], dict]


def work(runs: dict[str, Run]) -> None:
    """The other end of ``start``: make the run that the command line names, print what it gives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", choices=runs, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--micro_batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    result = runs[args.tool](args.folder, args.precision, args.micro_batch, args.steps)
    print("\n" + json.dumps(result | {"threads": torch.get_num_threads()}))
