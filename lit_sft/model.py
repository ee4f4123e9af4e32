"""The decoder-only GPT, configured by ``ModelConfig`` alone.

Letters of shapes: B batch, T time (tokens), C channels (n_embd), H heads, G key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.attention import cached_attention, packed_attention
from lit_sft.config import ModelConfig
from lit_sft.rope import rotate, rotations


class GPT(nn.Module):
    """Embedding, blocks, final norm, LM head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let head and embedding share one tensor where the config says so; needed again after assigning weights."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, T, vocab_size) of input_ids (B, T) int64; with a cache the tokens continue what it holds."""
        return self.lm_head(self.hidden_states(input_ids, cache=cache))

    def hidden_states(
        self, input_ids: Tensor, lengths: list[int] | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        """The normed states that the head turns into logits.

        Args:
            input_ids: (B, T) int64.
            lengths: tokens of each example that the row is packed from (B is then 1); positions restart at each and
                attention never crosses. None: every row is one example.
            cache: the keys and values of earlier tokens, extended by this call; excludes ``lengths``.

        Returns:
            (B, T, C).
        """
        start = cache.length if cache is not None else 0
        device = input_ids.device
        if lengths is None:
            positions = torch.arange(start, start + input_ids.shape[1], device=device)
        else:
            positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        x = self.wte(input_ids)
        rotation = rotations(self.config, positions, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, lengths, cache.layer(layer) if cache is not None else None)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm_f(x)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], lengths: list[int] | None, cache: "LayerCache | None"
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.attn(self.norm_1(x), rotation, lengths, cache)
        return x + self.mlp(self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention; query, key and value stay separate matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        q_width, kv_width = config.n_head * config.head_size, config.n_query_groups * config.head_size
        self.query = nn.Linear(config.n_embd, q_width, bias=config.qkv_bias)
        self.key = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.value = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.projection = nn.Linear(q_width, config.n_embd, bias=config.projection_bias)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], lengths: list[int] | None, cache: "LayerCache | None"
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, H or G, T, D)
            for linear in (self.query, self.key, self.value)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is None:
            mixed = packed_attention(query, key, value, lengths)
        else:
            mixed = cached_attention(query, *cache.extend(key, value))
        return self.projection(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467), the mean taken in fp32 or better."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class KVCache:
    """Keys and values of the tokens seen so far, for generation: (n_layer, 2, B, G, max_length, D)."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, 2, batch_size, config.n_query_groups, max_length, config.head_size)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def layer(self, index: int) -> "LayerCache":
        """One layer's part; the length moves on when all layers have been extended."""
        return LayerCache(self.memory[index], self.length)


class LayerCache:
    """One layer's keys and values, and where the next tokens go."""

    def __init__(self, memory: Tensor, start: int) -> None:
        self.memory, self.start = memory, start

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value (B, G, T, D) behind what is there; give all so far, (B, G, S, D) each."""
        end = self.start + key.shape[2]
        if end > self.memory.shape[3]:
            raise ValueError(f"the KV cache holds {self.memory.shape[3]} tokens; {end} do not fit")
        self.memory[0, :, :, self.start : end], self.memory[1, :, :, self.start : end] = key, value
        return self.memory[0, :, :, :end], self.memory[1, :, :, :end]
