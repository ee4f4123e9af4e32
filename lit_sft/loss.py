"""Cross-entropy as a sum over labelled positions, never holding the logits of a whole row."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100
CHUNK_ROWS = 256  # logits alive at once: 256 × vocab_size


def cross_entropy_sum(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the labelled positions, and how many there are.

    Args:
        hidden: (T, C), the final hidden states in the model's dtype.
        head: maps (N, C) to logits (N, vocab_size); may be frozen, trained or carry an adapter.
        labels: (T,) int64, the id each position must predict; IGNORE_INDEX where there is none.

    Returns:
        The sum, a scalar in fp32 (fp64 for fp64 logits) through which gradients flow to ``hidden`` and to the
        head's trainable parameters, and the number of labelled positions. Never a mean: the caller divides once.
    """
    rows = (labels != IGNORE_INDEX).nonzero(as_tuple=True)[0]
    trainable = [p for p in head.parameters() if p.requires_grad]
    total = _ChunkedCrossEntropy.apply(head, labels[rows], hidden[rows], *trainable)
    return total, rows.numel()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Runs the head forward and backward chunk by chunk in ``forward``; ``backward`` only scales what was kept."""

    @staticmethod
    def forward(ctx, head: Callable[[Tensor], Tensor], labels: Tensor, hidden: Tensor, *parameters: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for start in range(0, len(labels), CHUNK_ROWS):
            chunk = hidden[start : start + CHUNK_ROWS].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(chunk)
                loss = F.cross_entropy(logits.to(total.dtype), labels[start : start + CHUNK_ROWS], reduction="sum")
            total += loss.detach()
            if wanted:
                grad_chunk, *grad_parameters = torch.autograd.grad(loss, [chunk, *parameters])
                grad_hidden[start : start + CHUNK_ROWS] = grad_chunk
                for grad, part in zip(grads, grad_parameters, strict=True):
                    grad += part
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        return None, None, *(None if g is None else (g * grad_total).to(g.dtype) for g in (grad_hidden, *grads))
