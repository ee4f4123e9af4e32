"""Cross-entropy as a sum over labelled positions, never holding the logits of a whole row."""

import torch
from torch import Tensor, nn

CHUNK_ROWS = 256  # of logits alive at once, at least; more where these are fewer elements:
CPU_LOGITS = 25 * 2**20  # of long rows, so that its products have the rows they are fast with
CUDA_LOGITS = 2**26  # fewer, larger products and kernels
CHUNKS = 8  # of a long row on a CPU, at least: short rows are there to save memory
STRIP_ROWS = 16  # of a chunk, what a CPU's cache holds while softmax reads and writes it


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
    return _ChunkedCrossEntropy.apply(head, labels, counts, softcap, torch.is_grad_enabled(), hidden, *trainable)


def chunk_rows(n_labels: int, vocab_size: int, cuda: bool = False) -> int:
    """Rows of logits to make at once: all chunks alike, since a small rest takes a slow product.

    On two cores, 50,304 × 256 in fp32, forward and backward in GFLOP/s: 256 rows 137 and 166, 512 rows 148 and 182.
    Of the first CHUNKS such chunks alone, as many rows are made at once as of all.
    """
    most = max(CHUNK_ROWS, CUDA_LOGITS // vocab_size if cuda else min(CPU_LOGITS // vocab_size, n_labels // CHUNKS))
    n_chunks = -(-n_labels // most)
    return -(-n_labels // n_chunks) if n_chunks else most


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Runs the head forward and backward chunk by chunk in ``forward``; ``backward`` only scales what was kept."""

    @staticmethod
    def forward(
        ctx,
        head: nn.Module,
        labels: Tensor,
        counts: Tensor | None,
        softcap: float | None,
        wanted: bool,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = wanted and any(ctx.needs_input_grad)  # which are as they were given, also under no_grad
        # a frozen matrix alone: its products need no graph, and share one buffer
        plain = type(head) is nn.Linear and head.bias is None and not parameters
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        n_rows = chunk_rows(len(labels), head.out_features, hidden.is_cuda)
        buffer = hidden.new_empty(min(n_rows, len(labels)), head.out_features) if plain else None
        for start in range(0, len(labels), n_rows):
            rows = slice(start, start + n_rows)
            if plain:
                logits = torch.mm(hidden[rows], head.weight.T, out=buffer[: len(labels[rows])])
            else:
                chunk = hidden[rows].detach().requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    logits = head(chunk)
            weights = None if counts is None else counts[rows].to(total.dtype)
            total += _losses(logits.detach(), labels[rows], weights, softcap, wanted)
            if wanted and plain:
                torch.mm(logits, head.weight, out=grad_hidden[rows])
            elif wanted:
                grad_chunk, *more = torch.autograd.grad(logits, [chunk, *parameters], logits.detach())
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
            None,
            *(None if g is None else (g * grad_total).to(g.dtype) for g in (grad_hidden, *grads)),
        )


def _losses(logits: Tensor, labels: Tensor, weights: Tensor | None, softcap: float | None, wanted: bool) -> Tensor:
    """Weighted sum of one chunk's losses; if ``wanted``, their gradient takes the place of the logits (N, vocab_size).

    By hand, because it is bound by memory: a strip at a time, softmax is the only pass that writes, and its result
    becomes the gradient.
    """
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for start in range(0, len(labels), len(labels) if logits.is_cuda else STRIP_ROWS):
        rows = slice(start, None if logits.is_cuda else start + STRIP_ROWS)
        strip, ids = logits[rows], labels[rows, None]
        scores = strip.to(total.dtype)
        if softcap is not None:
            capped = torch.tanh(scores / softcap)
            scores = softcap * capped
        scores_of_labels = scores.gather(1, ids)[:, 0]
        highest = scores.amax(1)
        gradient = torch.softmax(scores, 1, out=scores)
        # log of the normaliser, from the likeliest entry, whose probability cannot underflow
        losses = highest - gradient.amax(1).log() - scores_of_labels
        total += losses.sum() if weights is None else (losses * weights[rows]).sum()
        if not wanted:
            continue
        gradient.scatter_add_(1, ids, gradient.new_full(ids.shape, -1.0))
        if weights is not None:
            gradient *= weights[rows, None]
        if softcap is not None:
            gradient *= 1 - capped.square()
        if gradient.data_ptr() != strip.data_ptr():
            strip.copy_(gradient)
    return total
