"""Causal attention that never crosses an example."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_QUERIES = 512  # where a mask is needed: most of its rows that are in memory at once


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


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scoring: Scoring) -> Tensor:
    """Causal self-attention within each of the examples that a row holds.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D), G dividing H (grouped-query attention).
        value: (B, G, T, D).
        layout: where the examples are; None: the row is one example.
        scoring: how scores become weights.

    Returns:
        (B, H, T, D). Each segment is its own call of torch's fused attention: isolated by construction, and on a CPU
        6 to 13 times faster than one call with a block-diagonal mask.
    """
    if layout is None or len(layout.lengths) == 1:
        return causal_attention(query, key, value, scoring)
    # split, not slices: its backward is one concatenation instead of a row-sized sum per example
    queries, keys, values = (x.split(layout.lengths, dim=2) for x in (query, key, value))
    mixed = []
    for own, chain in enumerate(layout.chains):
        seen = [torch.cat([x[i] for i in chain], dim=2) if len(chain) > 1 else x[own] for x in (keys, values)]
        mixed.append(causal_attention(queries[own], *seen, scoring))
    return torch.cat(mixed, dim=2)


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
    pieces, start = [], S - T
    for chunk in query.split(CHUNK_QUERIES, dim=2):
        end = start + chunk.shape[2]
        first = max(0, start + 1 - window)  # the first key that the chunk's first query sees
        pieces.append(_masked_attention(chunk, key[:, :, first:end], value[:, :, first:end], start, first, scoring))
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
