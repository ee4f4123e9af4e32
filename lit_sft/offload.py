"""LoRA on a small GPU: the blocks' frozen weights stay in the host's memory and come to the device as they are needed.

Two places on the device hold one block's weights each. While the block in one is computed, the next block's weights are
copied into the other, so that a row that is long enough hides the copy. In training every block is computed twice, in
the forward pass without gradients and again in the backward pass, and keeps only its input, on the host as well.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lit_sft.joined import Joined
from lit_sft.model import GPT, Block
from lit_sft.quantize import QuantizedLinear
from lit_sft.upload import pack, unpack

Part = nn.Linear | QuantizedLinear | Joined


def stream_blocks(model: GPT, host: str = "cpu") -> "StreamedBlocks":
    """Let ``model`` keep its blocks' frozen linear weights on ``host`` and stream them to its device, in place.

    Call it after adapters were added and products joined, before compiling. Norms, biases, routers, adapters, embedding
    and head stay on the device, which is that of the embedding.
    """
    model.streamed = StreamedBlocks(model, host)
    return model.streamed


class StreamedBlocks:
    """Computes a model's blocks, each with its frozen weights brought to the device before."""

    def __init__(self, model: GPT, host: str) -> None:
        self.model, self.host, self.device = model, host, model.wte.weight.device
        self.pinned = self.device.type == "cuda"
        self.blocks = [HostBlock(block, host, self.pinned) for block in model.blocks]
        largest = max(block.buffer.numel() for block in self.blocks)
        self.here, self.other = Place(largest, self.device), Place(largest, self.device)
        self.copies = Copies(self.device)

    def __call__(self, number: int, run: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        """Compute ``run(x, *others)``, the block of this number; with gradients, only x is kept, on the host.

        Args:
            number: of the block, from 0.
            run: the block, or its forward method.
            x: (B, T, C), which requires a gradient where gradients are enabled.
            others: the block's other arguments, which need no gradient.

        Returns:
            (B, T, C).
        """
        compute = partial(self._compute, number, run)
        if not torch.is_grad_enabled():
            return compute(x, *others)
        # reentrant: run without gradients now, so that nothing refers to a place whose weights are gone by then
        with saved_tensors_hooks(self._to_host, self._to_device):
            return checkpoint(compute, x, *others, use_reentrant=True, preserve_rng_state=False)

    def _compute(self, number: int, run: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        self.visit(number)
        return run(x, *others)

    def visit(self, number: int) -> None:
        """Bring a block's weights to the device, unless they are there, and start to bring those of the next block."""
        if self.here.block != number:
            self.here, self.other = self.other, self.here
        if self.here.block != number:
            self._load(number, self.here)
        following = self._next(number)
        if following not in (None, number, self.other.block):
            self._load(following, self.other)  # all that was computed with the weights in it is queued by now
        self.copies.wait(self.here.copied)
        self.blocks[number].hold(self.here.buffer)

    def _next(self, number: int) -> int | None:
        """The block that is computed after this one; None where both places hold what comes next."""
        if torch.is_grad_enabled():  # of the backward pass
            return number - 1 if number else None
        last = number == len(self.blocks) - 1
        if last and self.model.training:  # the backward pass begins with this block and the one before
            return None
        return 0 if last else number + 1

    def _load(self, number: int, place: "Place") -> None:
        """Start to copy a block's weights into a place; the block that was there computes with the host's again."""
        if place.block is not None:
            before = self.blocks[place.block]
            place.block = None
            before.hold(before.buffer)
        source = self.blocks[number].buffer
        place.copied = self.copies.start(place.buffer[: source.numel()], source)
        place.block = number

    # a block's input goes both ways in the order of the computation: no other stream may use its memory meanwhile

    def _to_host(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=self.host, pin_memory=self.pinned).copy_(x, non_blocking=True)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


class HostBlock:
    """One block's frozen weights in the host's memory, and the layers that compute with them.

    The layers always refer to right values: to those in a place while it holds the block, else to the host's.
    """

    def __init__(self, block: Block, host: str, pinned: bool) -> None:
        """``host``: the device of the copies; ``pinned``: in memory that a GPU copies from by itself."""
        self.parts = _parts(block)
        before = [_frozen(part) for part in self.parts]
        self.sizes = [len(tensors) for tensors in before]
        named = {str(index): tensor for index, tensor in enumerate(chain(*before))}
        self.buffer = pack(named, host, pinned)
        self.tensors = unpack(self.buffer, named)
        self.hold(self.buffer)
        for part, tensors in zip(self.parts, before, strict=True):
            if isinstance(part, Joined):
                _follow(part, tensors)

    def hold(self, buffer: Tensor) -> None:
        """Let the layers compute with the weights as they lie in ``buffer``, the host's or a copy, (bytes,) uint8."""
        tensors = iter(unpack(buffer, self.tensors).values())
        for part, size in zip(self.parts, self.sizes, strict=True):
            _hold(part, [next(tensors) for _ in range(size)])


class Place:
    """A buffer on the device for one block's weights.

    Attributes:
        buffer: (bytes,) uint8.
        block: the number of the block that is in it or on the way.
        copied: what to wait for until it is there.
    """

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.copied: torch.cuda.Event | None = None


class Copies:
    """Copies that a GPU makes beside its computation; on another device each is done when ``start`` returns."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy ``source`` to ``target`` once all that is queued so far is computed; gives what to wait for."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Let what is queued from now on begin when a copy is there."""
        if copied is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(copied)


# --- the layers ---


def _parts(block: Block) -> list[Part]:
    """The linear layers of a block, those that compute as one product together; without a router, which is small."""
    fast = [module.joined for module in block.modules() if getattr(module, "joined", None) is not None]
    joined = [product for way in fast for product in way.products]
    inside = [base for product in joined for base in product.bases]
    linears = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and not name.endswith("router")
    ]
    return [*joined, *(module for module in linears if not any(module is base for base in inside))]


def _frozen(part: Part) -> list[Tensor]:
    if isinstance(part, Joined):
        return list(part.frozen)
    return [part.weight.detach()] if isinstance(part, nn.Linear) else part.frozen()


def _hold(part: Part, frozen: list[Tensor]) -> None:
    """Let a part compute with other copies of what ``_frozen`` gives."""
    if isinstance(part, Joined):
        part.frozen[:] = frozen
    elif isinstance(part, nn.Linear):
        part.weight = nn.Parameter(frozen[0], requires_grad=False)
    else:
        part.hold(frozen)


def _follow(joined: Joined, before: list[Tensor]) -> None:
    """Let the layers that were joined be views of what the product holds now, as they were of ``before``."""
    moved = {old.untyped_storage()._cdata: (old, new) for old, new in zip(before, joined.frozen, strict=True)}
    for base in joined.bases:
        tensors = []
        for tensor in _frozen(base):
            old, new = moved.get(tensor.untyped_storage()._cdata, (tensor, tensor))
            start = new.storage_offset() + tensor.storage_offset() - old.storage_offset()
            tensors.append(new.as_strided(tensor.shape, tensor.stride(), start))
        _hold(base, tensors)
