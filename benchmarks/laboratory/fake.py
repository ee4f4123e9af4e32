"""Tensors of a GPU that have a shape and no contents; what stays on the CPU is computed as ever.

Where the code under test asks for the contents, a host would wait for its GPU: those places are noted.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FREE = (
    "prim.",
    "aten.detach",
    "aten.empty",
    "aten.new_empty",
    "aten.lift",
    "aten.sym_",
    "aten.alias",
    "aten._unsafe_view",
)
"""Operations that start no kernel, by the beginnings of their names; views are recognised by themselves."""
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous", "aten.cat", "aten.repeat_interleave")


class FakeGPU(FakeTensorMode):
    """A mode in which tensors on "cuda" are fake, and those on the CPU are not."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str]] = Counter()
        """(what, the line of the project) → how often the host had to wait."""
        self.n_uploads = 0
        """Copies from the CPU to the GPU."""
        self.note_operation: Callable[[str], None] | None = None
        """Told of each operation that would start a kernel, by its name."""
        self._pinned: set[int] = set()
        FakeTensor.tolist = lambda tensor: self._tolist(tensor)  # torch's would ask for each element

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = str(func)
        if name.startswith(("aten._pin_memory", "aten.pin_memory")):
            pinned = args[0].clone()
            self._pinned.add(pinned.data_ptr())
            return pinned
        if kwargs.pop("pin_memory", False):
            pinned = func(*args, **kwargs)
            self._pinned.add(pinned.data_ptr())
            return pinned
        if name.startswith("aten.is_pinned"):
            return False
        if not self._on_gpu(args, kwargs):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait("item")
            return 0.5 if args[0].is_floating_point() else 1
        if name.startswith("aten.nonzero"):
            self._wait("nonzero")
            return self._some_of(args[0])
        if name.startswith(("aten._unique", "aten.unique", "aten.masked_select", "aten.bincount")):
            self._wait(name)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            self._note_transfer(args, kwargs, out)
        if self.note_operation is not None and not func.is_view and not name.startswith(FREE):
            self.note_operation(name)
        return out

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        """The mode, and backward passes in the thread that has it."""
        with self, torch.autograd.set_multithreading_enabled(False):
            yield

    @staticmethod
    def _on_gpu(args: tuple, kwargs: dict) -> bool:
        device = kwargs.get("device")
        wanted = device is not None and torch.device(device).type == "cuda"
        return wanted or any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))

    def _some_of(self, mask: Tensor) -> Tensor:
        """In place of nonzero: an eighth of the places, as if a router spread tokens evenly over experts."""
        with self:
            return torch.zeros(max(1, mask.numel() // 8), mask.dim(), dtype=torch.int64, device=mask.device)

    def _note_transfer(self, args: tuple, kwargs: dict, out: Tensor) -> None:
        source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
        if source.device.type == out.device.type:
            return
        up = out.device.type == "cuda"
        self.n_uploads += up
        pinned = not isinstance(source, FakeTensor) and source.data_ptr() in self._pinned
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        if not (up and pinned and non_blocking):
            self._wait("copy to the GPU" if up else "copy to the CPU")

    def _tolist(self, tensor: Tensor) -> list:
        if tensor.device.type == "cuda":
            self._wait("tolist")
        value = 0.5 if tensor.is_floating_point() else 1
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    def _wait(self, what: str) -> None:
        self.waits[what, line_of_project()] += 1


def line_of_project() -> str:
    """The innermost line of lit_sft on the stack, as file:line."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.name == "lit_sft":
            return f"{path.name}:{frame.lineno}"
    return "elsewhere"
