"""Causal attention that never crosses an example."""

import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sft.recompute import cheaply, forgetfully

CHUNK_QUERIES = 512  # where a mask is needed: most of its rows that are in memory at once
SHORT = 512  # tokens a segment


@dataclass(frozen=True)
class Scoring:
    """How a layer turns query · key into weights."""

    scale: float
    window: int | None = None
    """Keys that a query sees, its own included; None: all up to its own."""
    softcap: float | None = None
    """c: scores s become c · tanh(s / c)."""
    alibi: bool = False
    """The score of the key at position j gains scale · slope · j, with each head's slope."""


@dataclass(frozen=True)
class Layout:
    """How a row is made of segments: whole examples, or stretches of them that continue one that others share."""

    lengths: list[int]
    """Tokens of each segment, adding up to the row's."""
    parents: list[int | None] | None = None
    """The segment that each continues, always an earlier one; None: it begins an example. None for all: as it says."""
    _spans: dict[torch.device, "Spans"] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def chains(self) -> list[list[int]]:
        """For each segment those that a position in it sees: the ones it continues, first to last, and itself."""
        chains: list[list[int]] = []
        for number, parent in enumerate(self.parents or [None] * len(self.lengths)):
            chains.append([number] if parent is None else [*chains[parent], number])
        return chains

    def positions(self) -> Tensor:
        """(T,) int64: each token's place in its example."""
        starts = [sum(self.lengths[i] for i in chain[:-1]) for chain in self.chains]
        return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, self.lengths, strict=True)])

    def totals(self) -> Tensor:
        """(T,) int64: how many tokens the example of each token has; the longest of those that share it."""
        totals = [sum(self.lengths[i] for i in chain) for chain in self.chains]
        for chain in self.chains:
            for number in chain:
                totals[number] = max(totals[number], totals[chain[-1]])
        return torch.tensor(totals).repeat_interleave(torch.tensor(self.lengths))

    def spans(self, device: torch.device) -> "Spans":
        """Where queries and keys of each segment are, for kernels that take all of them at once."""
        if device not in self._spans:
            n_keys = [sum(self.lengths[i] for i in chain) for chain in self.chains]
            starts = list(accumulate(self.lengths, initial=0))
            keys = None
            if self.parents:
                places = [torch.arange(starts[i], starts[i + 1]) for chain in self.chains for i in chain]
                keys = torch.cat(places).to(device)
            ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (self.lengths, n_keys)]
            self._spans[device] = Spans(*ends, max(self.lengths), max(n_keys), keys)
        return self._spans[device]


class Spans(NamedTuple):
    """Segments as offsets into the row."""

    query_ends: Tensor
    """(N + 1,) int32: where each segment's queries begin, and the last one's end."""
    key_ends: Tensor
    """(N + 1,) int32: the same for the keys that they see."""
    most_queries: int
    most_keys: int
    keys: Tensor | None
    """(K,) int64: the row's position of each key; None: the keys are the row as it is."""


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scoring: Scoring) -> Tensor:
    """Causal self-attention within each of the examples that a row holds.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D), G dividing H (grouped-query attention).
        value: (B, G, T, D).
        layout: where the examples are; None: the row is one example.
        scoring: how scores become weights.

    Returns:
        (B, H, T, D).

    On a GPU all segments are one call of torch's variable-length flash attention, where that computes what is asked
    for; otherwise each is its own call of fused attention: isolated by construction, and on a CPU 6 to 13 times faster
    than one call with a block-diagonal mask. Raises ValueError where examples could not be kept apart.
    """
    if layout is None:
        return causal_attention(query, key, value, scoring)
    if query.shape[0] != 1 or sum(layout.lengths) != query.shape[2]:
        raise ValueError(f"segments of {sum(layout.lengths)} tokens are no layout of a row of {tuple(query.shape)}")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # norms may have left queries and keys in fp32
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if _varlen_fits(query, scoring):
        return _varlen_attention(query, key, value, layout, scoring)
    if len(layout.lengths) == 1:
        return causal_attention(query, key, value, scoring)
    dtype = query.dtype
    if not query.is_cuda and dtype == torch.bfloat16 and query.shape[2] < SHORT * len(layout.lengths):
        # a CPU's attention of few tokens is slow in bfloat16, mostly backward
        query, key, value = (cheaply(Tensor.float, x) for x in (query, key, value))
    # split, not slices: its backward is one concatenation instead of a row-sized sum per example
    queries, keys, values = (x.split(layout.lengths, dim=2) for x in (query, key, value))
    mixed = []
    for own, chain in enumerate(layout.chains):
        seen = [cheaply(_join, *(x[i] for i in chain)) if len(chain) > 1 else x[own] for x in (keys, values)]
        mixed.append(causal_attention(queries[own], *seen, scoring))
    return cheaply(partial(_join_as, dtype), *mixed)


def _join(*parts: Tensor) -> Tensor:
    """Parts of a row, (B, H, n, D) each, one behind the other: in memory as well, so that heads flatten as a view."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _join_as(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    return _join(*parts).to(dtype)


def _varlen_fits(query: Tensor, scoring: Scoring) -> bool:
    """Whether torch's variable-length attention takes these queries, and computes what ``scoring`` asks for."""
    small = query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] <= 256 and query.shape[3] % 8 == 0
    plain = scoring.softcap is None and not scoring.alibi
    return query.is_cuda and small and plain and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scoring: Scoring) -> Tensor:
    """One kernel over all segments; the last query of each is aligned with the last key that it sees."""
    from torch.nn.attention.varlen import varlen_attn  # whose import takes a second

    spans = layout.spans(query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    if spans.keys is not None:
        key, value = (_Gather.apply(x, spans.keys) for x in (key, value))
    grouped = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch 2.11
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    left = -1 if scoring.window is None else scoring.window - 1
    ends = spans.query_ends, spans.key_ends, spans.most_queries, spans.most_keys
    mixed = varlen_attn(query, key, value, *ends, scale=scoring.scale, window_size=(left, 0), **grouped)
    return mixed.transpose(0, 1)[None]


class _Gather(torch.autograd.Function):
    """Rows of x (T, G, D) at ``index`` (K,), some more than once; their gradients are added up in fp32, in order."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
        # sorted by torch, unlike index_add: the same bits each time on a GPU
        return total.index_put_((index,), grad.to(total.dtype), accumulate=True).to(grad.dtype), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention of the last T positions of one example over all its S positions so far.

    Args:
        query: (B, H, T, D), the newest T of S positions.
        key: (B, G, S, D).
        value: (B, G, S, D).
        scoring: how scores become weights.

    Returns:
        (B, H, T, D).
    """
    T, S = query.shape[2], key.shape[2]
    window = scoring.window or S
    fused = scoring.softcap is None and not scoring.alibi
    if fused and window >= S and T in (1, S):
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=T > 1, scale=scoring.scale, enable_gqa=grouped
        )
    # scores that no fused kernel computes are made again backward rather than kept
    run = forgetfully if scoring.softcap is not None else lambda function, *inputs: function(*inputs)
    pieces, start = [], S - T
    for chunk in query.split(CHUNK_QUERIES, dim=2):
        end = start + chunk.shape[2]
        first = max(0, start + 1 - window)  # the first key that the chunk's first query sees
        attend = partial(_masked_attention, start=start, first=first, scoring=scoring)
        pieces.append(run(attend, chunk, key[:, :, first:end], value[:, :, first:end]))
        start = end
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, start: int, first: int, scoring: Scoring) -> Tensor:
    """Attention of queries at positions ``start`` … over keys at positions ``first`` …, with an explicit mask."""
    q = torch.arange(start, start + query.shape[2], device=query.device)[:, None]
    k = torch.arange(first, first + key.shape[2], device=query.device)
    allowed = (k <= q) if scoring.window is None else (k <= q) & (k > q - scoring.window)
    bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(~allowed, -math.inf)
    if scoring.alibi:
        # slope times position in bf16, as the published implementations of such models compute it
        steps = alibi_slopes(query.shape[1]).to(query.device, torch.bfloat16)[:, None, None] * k
        bias = bias + steps.to(query.dtype) * scoring.scale
    if scoring.softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scoring.scale, enable_gqa=grouped
        )
    grouped_query = query.unflatten(1, (key.shape[1], -1))  # (B, G, H/G, T, D)
    scores = grouped_query @ key[:, :, None].transpose(-1, -2) * scoring.scale
    scores = scoring.softcap * torch.tanh(scores / scoring.softcap) + bias
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)


def alibi_slopes(n_head: int) -> Tensor:
    """ALiBi's slopes (Press et al. 2021, arXiv 2108.12409): (H,) float32, a geometric sequence.

    Where ``n_head`` is no power of two, the odd members of the sequence of twice as many heads fill up.
    """
    nearest = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / nearest) for i in range(nearest)]
    slopes += [2 ** (-4 * (2 * i + 1) / nearest) for i in range(n_head - nearest)]
    return torch.tensor(slopes)
