"""The processes: device, precision, signals, what they tell each other. All of Lightning Fabric before the loop."""

from __future__ import annotations  # Fabric, whose import takes three seconds, is named in signatures only

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from subprocess import Popen
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lit_sft.args import TrainArgs
from lit_sft.errors import EXIT_CODES, InputError, RunFailed, stops, words

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# what torch's library for a CPU's bfloat16 products (oneDNN) keeps for each shape it has met: 1,024 times of megabytes
# by default, and rows have many lengths; read when the first product is computed
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# rows have many lengths: what is freed of one then serves the next, whatever their sizes; read when CUDA starts
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

T = TypeVar("T")
BASE_DTYPE = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
started: list[Popen] = []
"""The other processes of this run, where this one started them."""


def pick_device(wanted: str) -> str:
    """``auto`` → cuda, mps or cpu, whichever is there first; InputError when the one asked for is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in present.items() if there)
    if not present[wanted]:
        raise InputError(f"--device {wanted}: this machine has none that torch can use; try --device auto")
    return wanted


def default_precision(device: str) -> str:
    """The precision of a run that names none: 16 bits on a GPU, bfloat16 where it multiplies them."""
    if device != "cuda":
        return "32-true"
    # older ones, T4 and V100 among them, have float16 alone, whose small gradients have to be scaled
    return "bf16-true" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"


def launch(args: TrainArgs) -> Fabric:
    """Start Fabric on the devices and in the precision asked for; with several devices this starts the processes.

    Raises InputError for a precision the device cannot do, or when the number of processes is not the one asked for.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    device = pick_device(args.device)
    precision = args.precision or default_precision(device)
    if precision == "16-mixed" and device == "cpu":
        raise InputError("--precision 16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU")
    if device == "mps" and precision == "64-true":
        raise InputError("--precision 64-true is not to be had on mps; use 32-true")
    strategy = "auto" if args.devices == 1 else DDPStrategy(timeout=timedelta(minutes=args.timeout_minutes))
    fabric = Fabric(accelerator=device, devices=args.devices, strategy=strategy, precision=precision)
    fabric.launch()
    started.extend(getattr(fabric.strategy.launcher, "procs", ()))
    if fabric.world_size != args.devices:
        raise InputError(f"--devices {args.devices} was asked for, but {fabric.world_size} processes run")
    return fabric


def precision(fabric: Fabric) -> str:
    """The name of the precision Fabric was started with."""
    return fabric.strategy.precision.precision


def base_dtype(fabric: Fabric) -> torch.dtype:
    """The dtype that the base weights are held in under the precision Fabric was started with."""
    return BASE_DTYPE[precision(fabric)]


def is_mixed(fabric: Fabric) -> bool:
    """True where products are computed in fewer bits than the weights are held in."""
    return "mixed" in precision(fabric)


def autocast(fabric: Fabric) -> AbstractContextManager:
    """Around a forward pass: the casts of mixed precision.

    None under the others, for which Fabric would set torch's default dtype: all tensors here have an explicit one, and
    what is compiled would be compiled anew for a backward pass outside.
    """
    return fabric.autocast() if is_mixed(fabric) else nullcontext()


@contextmanager
def exchange() -> Iterator[None]:
    """Around what waits for other processes; RunFailed when one is gone, or silent for ``timeout_minutes``."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # Gloo's and NCCL's
        raise RunFailed(
            f"another process of the run has died or does not answer ({str(error).splitlines()[0][:200]}); "
            "the same command goes on from the last saved state"
        ) from error


@torch.no_grad()
def reduce_gradients(fabric: Fabric, parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of all processes, in one flat all-reduce; a process without rows contributes zeros."""
    if fabric.world_size == 1:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    with exchange():
        flat = fabric.all_reduce(flat, reduce_op="sum")
    for parameter, grad in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = grad.view_as(parameter)


def reduce(fabric: Fabric, operation: str, *values: float) -> list[float]:
    """Each value summed over all processes (``operation`` "sum"), or the largest of them ("max"); in fp64 if it can."""
    if fabric.world_size == 1:
        return list(values)
    dtype = torch.float32 if fabric.device.type == "mps" else torch.float64
    with exchange():
        return fabric.all_reduce(torch.tensor(values, dtype=dtype, device=fabric.device), reduce_op=operation).tolist()


def on_first(fabric: Fabric, action: Callable[[], T]) -> T:
    """What ``action`` gives on the first process, on all; so is its refusal, or the others would wait for ever.

    It returns when all have it: the first may end then.
    """
    result = refusal = None
    if fabric.is_global_zero:
        try:
            result = action()
        except (InputError, OSError) as error:
            refusal = words(error), getattr(error, "details", ())
    with exchange():
        result, refusal = fabric.broadcast((result, refusal))
        fabric.barrier()
    if refusal:
        raise InputError(*refusal)
    return result


class StopSignals:
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask for the current step to be finished and saved; a second exits at once.

    A terminal that closes may send SIGHUP twice, and ``nohup`` has it ignored.
    """

    def __enter__(self) -> StopSignals:
        self.received: int | None = None
        wanted = [n for n in EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == number == signal.SIGHUP:
            return
        if self.received is not None:
            os._exit(EXIT_CODES[number])
        self.received = number

    @property
    def exit_code(self) -> int:
        """What the run must exit with: 130, 143, 75 or 129, or 0 when no signal came."""
        return EXIT_CODES.get(self.received, stops[-1] if stops else 0)
