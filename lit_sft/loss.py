"""Cross-entropy as a sum over labelled positions, never holding the logits of a whole row."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHUNK_ROWS = 256  # logits alive at once: 256 × vocab_size


def cross_entropy_sum(
    hidden: Tensor, head: nn.Module, labels: Tensor, counts: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Sum of the cross-entropies of labelled positions.

    Args:
        hidden: (N, C), the final hidden states of the labelled positions, in the model's dtype.
        head: maps (N, C) to logits (N, vocab_size); may be frozen, trained or carry an adapter.
        labels: (N,) int64, the id each must predict.
        counts: (N,) int64, how many examples a label stands for; None: one each.
        softcap: c where logits z become c · tanh(z / c).

    Returns:
        A scalar in fp32 (fp64 for fp64 logits) through which gradients flow to ``hidden`` and to the head's trainable
        parameters. Never a mean: the caller divides once.
    """
    trainable = [p for p in head.parameters() if p.requires_grad]
    return _ChunkedCrossEntropy.apply(head, labels, counts, softcap, hidden, *trainable)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Runs the head forward and backward chunk by chunk in ``forward``; ``backward`` only scales what was kept."""

    @staticmethod
    def forward(
        ctx,
        head: Callable[[Tensor], Tensor],
        labels: Tensor,
        counts: Tensor | None,
        softcap: float | None,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for start in range(0, len(labels), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            chunk = hidden[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(chunk)
            weights = None if counts is None else counts[rows].to(total.dtype)
            losses, grad_logits = _losses(logits.detach(), labels[rows], weights, softcap, wanted)
            total += losses
            if wanted:
                grad_chunk, *more = torch.autograd.grad(logits, [chunk, *parameters], grad_logits.to(logits.dtype))
                grad_hidden[rows] = grad_chunk
                for grad, part in zip(grads, more, strict=True):
                    grad += part
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        return (
            None,
            None,
            None,
            None,
            *(None if g is None else (g * grad_total).to(g.dtype) for g in (grad_hidden, *grads)),
        )


def _losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, softcap: float | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted sum of one chunk's losses and, if ``wanted``, its gradient with respect to the logits (N, vocab_size).

    By hand, because it is bound by memory: softmax is the only pass that writes, and its result becomes the gradient.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores = softcap * capped
    gradient = scores.softmax(1)
    # log of the normaliser, from the likeliest entry, whose probability cannot underflow
    normaliser = scores.amax(1) - gradient.amax(1).log()
    losses = normaliser - scores.gather(1, labels[:, None])[:, 0]
    total = losses.sum() if weights is None else losses @ weights
    if not wanted:
        return total, None
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    if weights is not None:
        gradient *= weights[:, None]
    if softcap is not None:
        gradient *= 1 - capped.square()
    return total, gradient
