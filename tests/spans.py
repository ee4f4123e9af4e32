"""A stand-in for the kernel that takes all segments at once: compiled blocks can be looked at on a CPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_sft import attention, model


def parts(query: Tensor, key: Tensor, value: Tensor, ends: tuple[Tensor, Tensor]) -> Iterator[tuple]:
    """Of each segment the places of its queries and of its keys, and both with the values, (H, n, D) in fp32 or better.

    The last query is aligned with the last key; weights are those of a softmax.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    bounds = [zip(part.tolist()[:-1], part.tolist()[1:], strict=True) for part in ends]
    for queries, keys in zip(*bounds, strict=True):
        places = slice(*queries), slice(*keys)
        q, k, v = (
            x[p].transpose(0, 1).to(wide) for x, p in zip((query, key, value), (*places, places[1]), strict=True)
        )
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        yield *places, q, k, v


def weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return (q @ k.mT * scale).masked_fill(~allowed, -torch.inf).softmax(-1)


@torch.library.custom_op("lit_sft_tests::varlen", mutates_args=())
def varlen(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float) -> Tensor:
    mixed = torch.empty(query.shape, dtype=query.dtype)
    for queries, _, q, k, v in parts(query, key, value, (query_ends, key_ends)):
        mixed[queries] = (weights(q, k, scale) @ v).transpose(0, 1).to(query.dtype)
    return mixed


@varlen.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("lit_sft_tests::varlen_backward", mutates_args=())
def varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.zeros(x.shape, dtype=wide) for x in (query, key, value)]
    for queries, keys, q, k, v in parts(query, key, value, (query_ends, key_ends)):
        own, upstream = weights(q, k, scale), grad[queries].transpose(0, 1).to(wide)
        of_weights = upstream @ v.mT
        of_scores = own * (of_weights - (of_weights * own).sum(-1, keepdim=True)) * scale
        found = of_scores @ k, of_scores.mT @ q, own.mT @ upstream
        for total, place, part in zip(grads, (queries, keys, keys), found, strict=True):
            total[place] += part.unflatten(0, (total.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(total.to(query.dtype) for total in grads)


@varlen_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)  # flash attention keeps its result as well


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, _ = ctx.saved_tensors
    return *varlen_backward(grad, *tensors, ctx.scale), None, None, None


varlen.register_autograd(_backward, setup_context=_keep)


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    assert window_size == (-1, 0)
    return varlen(query, key, value, cu_seq_q, cu_seq_k, scale)


@pytest.fixture
def spans_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows take the way that they take on a GPU: one operation over all segments, inside the compiled block."""
    for module in (attention, model):
        monkeypatch.setattr(module, "takes_spans", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
