"""What code holds in memory, without holding it: tensors that have shapes only, and their bytes counted while alive."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Within it, tensors are made without memory (they say they are on the CPU), and ``now`` and ``peak`` count bytes.

    Every operation of the code runs, forward, backward and optimizer, so what is counted is what the code keeps, not
    what a formula says. Missing is what an operation takes and gives back inside itself. Values do not exist: a number
    read from a tensor is 0, and where a shape would depend on values it is what ``n_tokens`` and ``n_expert`` say.

    Attributes:
        now: bytes of the storages that are alive.
        peak: the most that ``now`` has been; may be set back to it.
    """

    def __init__(self, n_tokens: int, n_expert: int = 1) -> None:
        """``n_tokens``: of the row that is computed; of the tokens, ``n_expert`` experts get equal shares."""
        super().__init__()
        self.n_tokens, self.n_expert = n_tokens, n_expert
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}
        self.shapes_only = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "LiveBytes":
        self.shapes_only.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.shapes_only.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation, and see which storages are new."""
        result = self._without_values(function, args)
        if result is None:
            result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return result

    def _without_values(self, function: Any, args: tuple) -> Any:
        """What an operation gives whose result hangs on values; None for any other."""
        if function is aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if function is aten.repeat_interleave.Tensor:  # segment → tokens
            return torch.empty(self.n_tokens, dtype=torch.int64)
        if function is aten.nonzero.default:  # the tokens of an expert
            return torch.empty(-(-args[0].numel() // self.n_expert), args[0].dim(), dtype=torch.int64)
        return None

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
