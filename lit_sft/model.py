"""The decoder-only GPT, configured by ``ModelConfig`` alone.

Letters of shapes: B batch, T time (tokens), C channels (n_embd), H heads, G key/value heads, D head size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_sft.attention import Layout, Scoring, Spans, causal_attention, packed_attention, takes_spans
from lit_sft.config import ModelConfig
from lit_sft.recompute import cheaply, recomputing
from lit_sft.rope import rotate, rotations, turned_anew

Rotation = tuple[Tensor, Tensor]
RECOMPILE_LIMIT = 32


class GPT(nn.Module):
    """Embedding, blocks, final norm, LM head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.checkpoint_every = 0
        """In training one of so many blocks keeps only its input, and is computed again backward; 0: none does."""
        self.compiled = False
        self.streamed: Callable[..., Tensor] | None = None
        """Computes a block whose weights are elsewhere: (number, block, the block's arguments) → its result."""
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let head and embedding share one tensor where the config says so; needed again after assigning weights."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def compile_blocks(self) -> None:
        """Compile the blocks for rows of any length.

        Blocks are alike, so all of them run what is compiled for one: with the attention of all segments inside it
        where one kernel computes that, else in two parts around it. Generation with a cache runs as it is written.
        So do mixtures of experts in a loop: how many tokens go where is known only while they run.
        """
        if any(isinstance(block.mlp, MoE) and block.mlp.grouped is None for block in self.blocks):
            return
        import torch._dynamo
        import torch._functorch.config

        # kinds of layers times shared segments or none, training or not: more graphs than the default of 8 allows
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        torch._dynamo.config.specialize_float = True  # a layer's scale is no input that changes
        # else norms and activations are kept for the backward pass, a third more memory, though made again cheaply
        torch._functorch.config.ban_recompute_materialized_backward = False
        for block in self.blocks:
            block.attn.attend_apart = torch.compiler.disable(packed_attention)
            block.compile(dynamic=True)
        self.compiled = True

    def forward(self, input_ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, T, vocab_size) of input_ids (B, T) int64; with a cache the tokens continue what it holds."""
        return self.logits(self.hidden_states(input_ids, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, vocab_size)."""
        return soft_cap(self.lm_head(hidden), self.config.logits_softcap)

    def hidden_states(self, input_ids: Tensor, layout: Layout | None = None, cache: "KVCache | None" = None) -> Tensor:
        """The normed states that the head turns into logits.

        Args:
            input_ids: (B, T) int64.
            layout: the segments that the row is packed from (B is then 1); positions restart with each example and
                attention never crosses. None: every row is one example.
            cache: the keys and values of earlier tokens, extended by this call; excludes ``layout``.

        Returns:
            (B, T, C).
        """
        x = self.wte(input_ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # rounded, as where it was trained
        if (self.compiled or self.streamed) and x.is_leaf and torch.is_grad_enabled():
            x.requires_grad_()  # of a frozen embedding: else the first block is compiled apart, for no gradient of x
        turns, local_turns = self._rotations(x, layout, cache)
        segments = self._segments(x, layout)
        keep_less = nullcontext if self.compiled or not self.training else recomputing
        for layer, block in enumerate(self.blocks):
            rotation = local_turns if block.attn.scoring.window else turns
            own_cache = cache.layer(layer) if cache is not None else None
            run = block.forward if self.compiled and cache is not None else block
            if self.streamed is not None:
                x = self.streamed(layer, run, x, rotation, segments, own_cache)
            elif self.checkpoint_every and self.training and layer % self.checkpoint_every == 0:
                x = checkpoint(block, x, rotation, segments, own_cache, use_reentrant=False, preserve_rng_state=False)
            else:
                with keep_less():
                    x = run(x, rotation, segments, own_cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm_f(x)

    def _segments(self, x: Tensor, layout: Layout | None) -> Layout | Spans | None:
        """The layout in the form that the row's attention takes."""
        if layout is None:
            return None
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        scoring = self.blocks[0].attn.scoring
        if takes_spans(x.device, dtype, self.config.head_size, scoring):
            layout.check(tuple(x.shape[:2]))  # offsets alone do not say how long the row is
            return layout.on(x.device).spans
        return layout

    def _rotations(self, x: Tensor, layout: Layout | None, cache: "KVCache | None") -> tuple[Rotation, Rotation]:
        """What turns queries and keys in the ordinary layers, and in those with a window."""
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if start and turned_anew(self.config, start, end):
            raise ValueError(f"past {self.config.rope_original_block_size} tokens all are turned anew: empty the cache")
        if layout is None:
            positions = torch.arange(start, end, device=x.device)
            whole = torch.full((x.shape[1],), end, device=x.device)
        else:
            positions, whole, _ = layout.on(x.device)
            longest = max(layout.n_keys())
            if self.config.rope_type == "longrope" and layout.shares and longest > self.config.rope_original_block_size:
                raise ValueError(
                    "with longrope a token of a long example turns otherwise than the same one of a short one"
                )
        dtype = torch.promote_types(x.dtype, torch.float32) if self.config.round_late else x.dtype
        make = partial(rotations, self.config, positions, whole, dtype)
        turns = make()
        return turns, make(local=True) if self.config.rope_local_theta else turns


class Block(nn.Module):
    """Attention and MLP, normed before or after, added to the residual stream one after the other or at once."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = partial(make_norm, config, config.n_embd)
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_norm
        self.norm_1 = norm() if config.pre_norm else nn.Identity()
        self.attn = CausalSelfAttention(config, layer)
        self.post_norm_1 = norm() if config.post_norm else nn.Identity()
        self.norm_2 = norm() if config.pre_norm and not config.shared_norm else nn.Identity()
        self.mlp = MoE(config) if config.n_expert else MLP(config)
        self.post_norm_2 = norm() if config.post_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotation: Rotation, layout: Layout | Spans | None, cache: "LayerCache | None"
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        normed = cheaply(self.norm_1, x)
        attended = cheaply(self.post_norm_1, self.attn(normed, rotation, layout, cache))
        if self.parallel:
            normed = normed if self.shared_norm else cheaply(self.norm_2, x)
            return x + (attended + cheaply(self.post_norm_2, self.mlp(normed)))
        x = x + attended
        return x + cheaply(self.post_norm_2, self.mlp(cheaply(self.norm_2, x)))


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention; query, key and value stay separate matrices."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_size, self.has_rope = config.head_size, config.has_rope(layer)
        q_width, kv_width = config.n_head * config.head_size, config.n_query_groups * config.head_size
        self.query = nn.Linear(config.n_embd, q_width, bias=config.qkv_bias)
        self.key = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.value = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.projection = nn.Linear(q_width, config.n_embd, bias=config.projection_bias)
        self.full_norm = config.qk_norm == "full"
        self.query_norm = make_qk_norm(config, config.n_head)
        self.key_norm = make_qk_norm(config, config.n_query_groups)
        self.scoring = Scoring(
            scale=config.attention_scale or config.head_size**-0.5,
            window=config.window(layer),
            softcap=config.attention_softcap,
            alibi=config.alibi,
        )
        self.joined: Callable[[Tensor, Rotation], tuple[Tensor, Tensor, Tensor]] | None = None
        """The same as ``heads`` from one product, where ``join_products`` has made one."""
        self.attend_apart = packed_attention

    def forward(
        self, x: Tensor, rotation: Rotation, layout: Layout | Spans | None, cache: "LayerCache | None"
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        heads = self.heads if self.joined is None else self.joined
        query, key, value = heads(x, rotation)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        if cache is not None:
            mixed = causal_attention(query, *cache.extend(key, value), self.scoring)
        elif isinstance(layout, Spans):
            mixed = packed_attention(query, key, value, layout, self.scoring)
        else:
            mixed = self.attend_apart(query, key, value, layout, self.scoring)
        return self.projection(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, C), each (B, T, its heads, D), turned to their positions."""
        return self.turned(self.query(x), self.key(x), self.value(x), rotation)

    def turned(self, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what the linear layers give, (B, T, their heads · D)."""
        if self.full_norm:
            query, key = cheaply(self.query_norm, query), cheaply(self.key_norm, key)
        query, key, value = (y.unflatten(-1, (-1, self.head_size)) for y in (query, key, value))
        if not self.full_norm:
            query, key = cheaply(self.query_norm, query), cheaply(self.key_norm, key)
        if self.has_rope:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value


class MLP(nn.Module):
    """Two linear layers around an activation, which a third may gate (GLU variants: Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.intermediate_size, config.mlp_bias) if config.gated_mlp else None
        self.up = nn.Linear(config.n_embd, config.intermediate_size, config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.n_embd, config.mlp_bias)
        self.activation = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[
            config.activation
        ]
        self.activation_name = config.activation
        self.joined: Callable[[Tensor], Tensor] | None = None
        """The same in fewer products, where ``join_products`` has made them."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        if self.joined is not None:
            return self.joined(x)
        if self.gate is None:
            return self.down(cheaply(self.activation, self.up(x)))
        return self.down(cheaply(self._gated, self.gate(x), self.up(x)))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


class MoE(nn.Module):
    """A mixture of experts: each token goes through the few MLPs that a router chooses for it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_chosen, self.normalize = config.n_expert_per_token, config.normalize_experts
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_expert))
        self.tokens_of: list[Tensor] = []
        """(n,) int64 for each expert: which tokens of the last row went through it."""
        self.grouped: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """The experts as grouped products, where ``group_experts`` has made them so."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        flat = x.flatten(0, 1)
        shares, chosen = (
            self.router(flat).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).topk(self.n_chosen)
        )
        if self.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares.to(x.dtype)
        if self.grouped is not None:
            return self.grouped(flat, shares, chosen).view_as(x)
        picks = [(chosen == number).nonzero(as_tuple=True) for number in range(len(self.experts))]
        self.tokens_of = [tokens for tokens, _ in picks]
        out = torch.zeros_like(flat)
        for expert, (tokens, place) in zip(self.experts, picks, strict=True):
            if len(tokens):
                own = cheaply(partial(torch.index_select, dim=0, index=tokens), flat)
                out = out.index_add(0, tokens, expert(own) * shares[tokens, place, None])
        return out.view_as(x)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467), the mean taken in fp32 or better."""

    def __init__(self, size: int, eps: float, unit_offset: bool, round_late: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps, self.unit_offset, self.round_late = eps, unit_offset, round_late

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.unit_offset or self.round_late:
            return (normed * (self.weight.to(wide.dtype) + self.unit_offset)).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class EachHeadNorm(nn.Module):
    """Layer norm of each head with a weight of its own."""

    def __init__(self, n_head: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_head, head_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, D) → (B, T, H, D)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # rounded once, as layer norms with a weight are
        return (F.layer_norm(wide, x.shape[-1:], eps=self.eps) * self.weight.to(wide.dtype)).to(x.dtype)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """A norm over the last ``size`` channels, of the kind the config names."""
    if config.norm == "rms":
        return RMSNorm(size, config.norm_eps, config.norm_unit_offset, config.round_late)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


def make_qk_norm(config: ModelConfig, n_head: int) -> nn.Module:
    """The norm of queries or keys."""
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "each_head":
        return EachHeadNorm(n_head, config.head_size, config.norm_eps)
    return make_norm(config, config.head_size * (n_head if config.qk_norm == "full" else 1))


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap · tanh(x / cap)``, which keeps x within ±cap; None: x."""
    return x if cap is None else cap * torch.tanh(x / cap)


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
