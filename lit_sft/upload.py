"""Tensors in one flat buffer, and so to a GPU in one transfer, which the host does not wait for."""

from math import prod

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes between the tensors of one transfer: kernels read aligned memory faster


def upload(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors to ``device``; on a GPU all of them at once, from pinned memory, without waiting.

    A blocking copy of each would stop the host about ten times a row while the GPU runs dry.

    Args:
        tensors: of any dtypes and shapes, on the CPU.
        device: where they are wanted.

    Returns:
        The same names; on a GPU views of one buffer, each aligned to ``ALIGNMENT`` bytes.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return unpack(pack(tensors, pinned=True).to(device, non_blocking=True), tensors)


def _starts(tensors: dict[str, Tensor]) -> list[int]:
    """Offsets of the tensors in the buffer, and the buffer's length last, in bytes."""
    starts = [0]
    for tensor in tensors.values():
        n_bytes = tensor.numel() * tensor.element_size()
        starts.append(starts[-1] + -(-n_bytes // ALIGNMENT) * ALIGNMENT)
    return starts


def pack(tensors: dict[str, Tensor], device: str | torch.device = "cpu", pinned: bool = False) -> Tensor:
    """Copy all tensors into one buffer, (bytes,) uint8; ``pinned``: where a GPU copies from without the host."""
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
    for view, tensor in zip(unpack(buffer, tensors).values(), tensors.values(), strict=True):
        view.copy_(tensor)
    return buffer


def unpack(buffer: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of the buffer with the names, dtypes and shapes of ``like``."""
    views = {}
    for start, (name, tensor) in zip(_starts(like), like.items(), strict=False):
        n_bytes = prod(tensor.shape) * tensor.element_size()
        views[name] = buffer[start : start + n_bytes].view(tensor.dtype).view(tensor.shape)
    return views
