"""What the backward pass can cheaply have again is not kept: norms, activations, dropout, casts.

Autograd keeps what each operation needs backward. Where a linear layer's adapter needs a normed or activated input, the
value is twice in memory: that input, and what it was made of. Within ``recomputing`` only the latter is kept.
Compiled blocks need none of this: with the switch that ``GPT.compile_blocks`` sets, the compiler decides likewise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Again:
    """In place of a tensor that autograd would keep: how to make it again."""

    def __init__(self, function: Callable[..., Tensor], inputs: list["Tensor | _Saved"]) -> None:
        self.function, self.inputs = function, inputs
        self.n_waiting = 0  # operations that will ask for it
        self.made: Tensor | None = None  # until the last of them has

    def tensor(self) -> Tensor:
        made = self.made
        if made is None:
            with torch.no_grad():
                made = self.function(*map(_unpack, self.inputs))
        self.n_waiting -= 1
        self.made = made if self.n_waiting > 0 else None
        return made


_Saved = tuple[_Again, torch.Size, tuple[int, ...], int]
"""A view of what can be made again: its size, strides and offset."""


class _Session:
    """One block's forward pass: which of the tensors in it can be made again."""

    def __init__(self) -> None:
        self.made: dict[int, _Again] = {}
        self.alive: list[Tensor] = []  # so that none of their places in memory is used again meanwhile

    def note(self, output: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        again = _Again(function, [self.pack(x.detach()) for x in inputs])
        self.made[output.untyped_storage()._cdata] = again
        self.alive.append(output)

    def pack(self, tensor: Tensor) -> "Tensor | _Saved":
        again = self.made.get(tensor.untyped_storage()._cdata)
        if again is None:
            return tensor
        again.n_waiting += 1
        return again, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(saved: "Tensor | _Saved") -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    again, size, stride, offset = saved
    return again.tensor().as_strided(size, stride, offset)


_session: _Session | None = None


@contextmanager
def recomputing() -> Iterator[None]:
    """Within the block, what ``cheaply`` computes is made again backward instead of being kept."""
    global _session
    before, _session = _session, _Session()
    try:
        with saved_tensors_hooks(_session.pack, _unpack):
            yield
    finally:
        _session.made.clear()  # autograd holds on to the hooks, and so to the session
        _session.alive.clear()
        _session = before


def cheaply(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; within ``recomputing`` neither the result nor anything inside is kept, only the inputs.

    ``function`` must give the same again, in new memory; of a module, trainable parameters get their gradients.
    """
    if _session is None or not torch.is_grad_enabled() or isinstance(function, nn.Identity):
        return function(*inputs)
    parameters = [p for p in function.parameters() if p.requires_grad] if isinstance(function, nn.Module) else []
    output = _Recomputed.apply(function, len(inputs), *inputs, *parameters)
    if output.requires_grad:
        _session.note(output, function, inputs)
    return output


def forgetfully(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which the inputs alone are kept, in compiled models too."""
    return _Recomputed.apply(function, len(inputs), *inputs) if torch.is_grad_enabled() else function(*inputs)


class _Recomputed(torch.autograd.Function):
    """Keeps the inputs alone, and runs the function once more for its gradients."""

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], n_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.n_inputs = function, n_inputs
        ctx.save_for_backward(*tensors)
        return function(*tensors[:n_inputs])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        tensors = ctx.saved_tensors
        inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(tensors[: ctx.n_inputs], needed, strict=False)]
        leaves = [*inputs, *tensors[ctx.n_inputs :]]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        found = iter(torch.autograd.grad(output, [x for x, wanted in zip(leaves, needed, strict=True) if wanted], grad))
        return None, None, *(next(found) if wanted else None for wanted in needed)
