"""The architectures and switches that the tests of families go through, each with what turns its switches off."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import stablelm_alpha  # noqa: F401  a model that transformers lacks

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass
class Variant:
    """One architecture with one set of switches."""

    model_type: str
    """transformers' name, which its AutoConfig knows."""
    config: dict = field(default_factory=dict)
    """On top of SHAPE."""
    off: dict[str, dict] = field(default_factory=dict)
    """Switch → fields of our ModelConfig that turn it off again: the logits must move by 100 tolerances."""
    edit: Callable[[dict], dict] | None = None
    """What the config.json becomes after saving (an older spelling)."""
    attention: str = "eager"
    """transformers' implementation: the one that has every switch, right."""


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def refined_web(config: dict, kind: str, **fields: object) -> dict:
    """A Falcon's config.json as its first revisions spelled it."""
    kept = ("vocab_size", "hidden_size", "layer_norm_epsilon", "bos_token_id", "eos_token_id")
    shape = {"n_head": config["num_attention_heads"], "n_layer": config["num_hidden_layers"]}
    rest = {"alibi": False, "bias": False, "apply_residual_connection_post_layernorm": False}
    return (
        {k: config[k] for k in kept} | shape | rest | fields | {"model_type": kind, "architectures": ["RWForCausalLM"]}
    )


def longrope(pairs: int, **fields: object) -> dict:
    """Factors of their own for each pair."""
    short, long = [1.0 + i / 3 for i in range(pairs)], [2.0 + i * 2 for i in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long} | fields


VARIANTS = {
    "neox": Variant(
        "gpt_neox",
        {"hidden_act": "gelu", "rotary_pct": 0.25},
        {
            "parallel residual": {"parallel_residual": False},
            "rotary share": {"rotary_size": None},
            "exact gelu": {"activation": "silu"},
        },
    ),
    "neox sequential": Variant(
        "gpt_neox",
        {"use_parallel_residual": False, "rotary_pct": 1.0},
        {"sequential": {"parallel_residual": True}},
    ),
    # NeoX, Falcon, StableLM, Mistral, Mixtral, Phi-3
    "neox of transformers 4": Variant(
        "gpt_neox",
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "hidden_act": "gelu_new", "tie_word_embeddings": True},
        {
            "theta": {"rope_theta": 1e4},
            "tied": {"tie_embeddings": False},
            "gelu": {"activation": "silu"},
            "biases of attention": {"qkv_bias": False, "projection_bias": False},
            "biases of the MLP": {"mlp_bias": False},
            "biases of norms": {"norm_bias": False},
            "mean of norms": {"norm": "rms"},
        },
        lambda config: without(config, "rope_parameters") | {"rotary_pct": 0.5, "rotary_emb_base": 500},
    ),
    "neox without biases of attention": Variant(
        "gpt_neox",
        {"attention_bias": False, "num_hidden_layers": 3},
        {"rotary share": {"rotary_size": None}},
    ),
    "falcon 7b": Variant(
        "falcon",
        {"num_kv_heads": 4},
        {
            "parallel": {"parallel_residual": False, "shared_norm": False},
            "exact gelu": {"activation": "gelu_tanh"},
            "tied": {"tie_embeddings": False},
            "mean of norms": {"norm": "rms"},
        },
    ),
    "falcon 7b of RefinedWebModel": Variant(
        "falcon",
        {},
        {"biases of norms": {"norm_bias": False}},
        lambda config: refined_web(config, "RefinedWebModel", multi_query=True, parallel_attn=True),
    ),
    "falcon 40b": Variant(
        "falcon",
        {"num_kv_heads": 2, "new_decoder_architecture": True},
        {"norm of the MLP": {"shared_norm": True}, "parallel": {"parallel_residual": False}},
    ),
    "falcon 40b of RefinedWeb": Variant(
        "falcon",
        {"num_kv_heads": 2, "new_decoder_architecture": True},
        {},
        lambda config: refined_web(config, "RefinedWeb", parallel_attn=True, n_head_kv=2),
    ),
    "falcon 11b": Variant(
        "falcon",
        {
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 80,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
        },
        {"shared norm": {"shared_norm": False}, "theta": {"rope_theta": 1e4}},
    ),
    "falcon rw": Variant(
        "falcon",
        {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "hidden_size": 96}
        | {"num_attention_heads": 6},
        {
            "alibi": {"alibi": False},
            "rotary instead": {"alibi": False, "rotary_size": None},
            "biases": {"qkv_bias": False, "projection_bias": False, "mlp_bias": False},
            "sequential": {"parallel_residual": True},
        },
        attention="sdpa",  # the eager one of transformers 5.23 adds alibi twice
    ),
    "falcon with rotary, sequential, multi-head": Variant(
        "falcon", {"multi_query": False, "parallel_attn": False}, {"rotary": {"rotary_size": 0}}
    ),
    "stablelm 3b": Variant(
        "stablelm",
        {"num_key_value_heads": 4},
        {
            "rotary share": {"rotary_size": None},
            "biases of norms": {"norm_bias": False},
            "mean of norms": {"norm": "rms"},
            "sequential": {"parallel_residual": True},
        },
    ),
    "stablelm of stablelm_epoch": Variant(
        "stablelm",
        {"num_key_value_heads": 4, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e3}}
        | {"layer_norm_eps": 1e-2},
        {"eps": {"norm_eps": 1e-5}, "theta": {"rope_theta": 1e4}},
        lambda config: (
            without(config, "rope_parameters", "layer_norm_eps")
            | {"model_type": "stablelm_epoch", "architectures": ["StableLMEpochForCausalLM"], "norm_eps": 1e-2}
            | {"rope_pct": 0.5, "rope_theta": 1000, "rotary_scaling_factor": 1.0, "num_heads": 4}
        ),
    ),
    "stablelm 2 1.6b": Variant(
        "stablelm",
        {"num_key_value_heads": 2, "use_qkv_bias": True, "tie_word_embeddings": True},
        {"biases of query, key and value": {"qkv_bias": False}, "tied": {"tie_embeddings": False}},
    ),
    "stablelm 2 12b": Variant(
        "stablelm",
        {"num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True},
        {
            "norms of queries and keys": {"qk_norm": "none"},
            "parallel": {"parallel_residual": False, "shared_norm": False},
            "shared norm": {"shared_norm": False},
        },
    ),
    "stablelm 2, norms of queries and keys, sequential": Variant(
        "stablelm",
        {"num_key_value_heads": 2, "qk_layernorm": True},
        {"norms of queries and keys": {"qk_norm": "none"}},
    ),
    "stablelm alpha v2": Variant(
        "stablelm_alpha",
        {"num_heads": 4},
        {
            "rotary share": {"rotary_size": None},
            "parallel": {"parallel_residual": False, "shared_norm": False},
            "shared norm": {"shared_norm": False},
            "biases of norms": {"norm_bias": False},
            "mean of norms": {"norm": "rms"},
            "silu": {"activation": "gelu"},
        },
    ),
    "mistral 0.1": Variant(
        "mistral",
        {"num_key_value_heads": 2, "sliding_window": 8},
        {
            "window": {"sliding_window": None, "sliding_layers": ()},
            "window's width": {"sliding_window": 9},
            "window in the second layer": {"sliding_layers": (True, False)},
        },
    ),
    "mistral 0.3": Variant(
        "mistral",
        {"num_key_value_heads": 2, "sliding_window": None, "rope_parameters": {"rope_theta": 1e6}},
        {"theta": {"rope_theta": 1e4}},
        lambda config: without(config, "rope_parameters", "architectures") | {"rope_theta": 1000000.0},
    ),
    "mistral nemo": Variant(
        "mistral",
        {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 24},
        {"silu": {"activation": "gelu"}, "scale": {"attention_scale": 0.25}},
    ),
    "mixtral": Variant(
        "mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 4},
        {
            "second expert": {"n_expert_per_token": 1},
            "third expert": {"n_expert_per_token": 3},
            "shares that add up to 1": {"normalize_experts": False},
            "theta": {"rope_theta": 1e4},
        },
    ),
    "mixtral with a window": Variant(
        "mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 16},
        {"window": {"sliding_window": None, "sliding_layers": ()}},
        lambda config: without(config, "rope_parameters", "num_local_experts") | {"num_experts": 6, "rope_theta": 1e6},
    ),
    "phi 3": Variant(
        "phi3",
        {"num_key_value_heads": 2, "sliding_window": 20},
        {"window": {"sliding_window": None, "sliding_layers": ()}},
    ),
    "phi 4 mini": Variant(
        "phi3",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "sliding_window": 262144}
        | {"max_position_embeddings": 512, "original_max_position_embeddings": 44}
        | {"rope_parameters": longrope(6, partial_rotary_factor=0.75)},
        {
            "long factors": {"rope_long_factors": tuple(1.0 + i / 3 for i in range(6))},
            "tied": {"tie_embeddings": False},
            "stretch": {"rope_attention_factor": 1.0},
            "longrope": {"rope_type": "default"},
            "rotary share": {"rotary_size": None, "rope_type": "default"},
        },
        lambda config: config | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    ),
    "phi 3 of su": Variant(
        "phi3",
        {"max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_parameters": longrope(8)},
        {"original context": {"rope_original_block_size": 128}},
        lambda config: (
            without(config, "rope_parameters")
            | {"rope_theta": 10000.0, "rope_scaling": without(longrope(8), "rope_type", "rope_theta") | {"type": "su"}}
        ),
    ),
}


# Llama, Qwen, Gemma, SmolLM, OLMo


def rope(kind: str, theta: float = 1e4, **more: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def old_spelling(**changes: object) -> Callable[[dict], dict]:
    """The config.json as transformers 4 wrote it: flat rotary fields, no layer_types, no architectures."""

    def edit(config: dict) -> dict:
        scaling = dict(config.pop("rope_parameters"))
        for name in ("layer_types", "architectures"):
            config.pop(name, None)
        if "full_attention" in scaling:
            scaling, local = scaling["full_attention"], scaling["sliding_attention"]
            config["rope_local_base_freq"] = local["rope_theta"]
        config["rope_theta"] = scaling.pop("rope_theta")
        if scaling["rope_type"] != "default":
            scaling["type"] = scaling.pop("rope_type")
            config["rope_scaling"] = scaling
        return config | changes

    return edit


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SCALING_OFF = {"scaling": {"rope_type": "default"}}
QWEN3 = {"num_key_value_heads": 2, "head_dim": 24}
QWEN3_OFF = {"qk norm": {"qk_norm": "none"}, "untied": {"tie_embeddings": True}}
MOE = {**QWEN3, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
QWEN2 = {"num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
SLIDING_OFF = {
    "window": {"sliding_layers": ()},
    "its size": {"sliding_window": 25},
    "which layers": {"sliding_layers": (True, False)},
}
GEMMA = {
    "hidden_size": 48,  # of which bfloat16 cannot hold the root
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_OFF = {
    "unit offset": {"norm_unit_offset": False},
    "embedding scale": {"embedding_scale": 1.0},
    "gelu": {"activation": "silu"},
    "tied": {"tie_embeddings": False},
}
GEMMA2 = {
    **GEMMA,
    "query_pre_attn_scalar": 40,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
    "sliding_window": 24,
}
GEMMA2_OFF = {
    **GEMMA_OFF,
    "post norms": {"post_norm": False},
    "pre norms": {"pre_norm": False},
    "attention scale": {"attention_scale": None},
    "attention soft-cap": {"attention_softcap": None},
    "logits soft-cap": {"logits_softcap": None},
    "window": {"sliding_layers": ()},
    "its size": {"sliding_window": 25},
    "which layers": {"sliding_layers": (False, True)},
}
GEMMA3 = {**GEMMA, "num_hidden_layers": 3, "query_pre_attn_scalar": 40, "sliding_window": 24}
GEMMA3_TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA3_OFF = {
    **GEMMA_OFF,
    "qk norm": {"qk_norm": "none"},
    "post norms": {"post_norm": False},
    "attention scale": {"attention_scale": None},
    "window": {"sliding_layers": ()},
    "its size": {"sliding_window": 25},
    "local theta": {"rope_local_theta": None},
    "theta": {"rope_theta": 1e4},
}


def gemma3_rope(local: float = 1e3, **scaling: object) -> dict:
    full = {"rope_type": "default", "rope_theta": 1e6, **scaling}
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": {**rope("default", local)["rope_parameters"]}}
    }


VARIANTS |= {
    "llama multi-head": Variant("llama", {}, {"untied": {"tie_embeddings": True}, "silu": {"activation": "gelu"}}),
    "llama grouped-query": Variant("llama", {"num_key_value_heads": 2}, {"theta": {"rope_theta": 1e5}}),
    "llama multi-query": Variant("llama", {"num_key_value_heads": 1}),
    "llama head_dim": Variant("llama", {"head_dim": 32}, {"head size": {"attention_scale": 0.25}}),
    "llama tied": Variant("llama", {"tie_word_embeddings": True}, {"tied": {"tie_embeddings": False}}),
    "llama theta": Variant("llama", rope("default", 1e6), {"theta": {"rope_theta": 1e4}}),
    "llama rope linear": Variant("llama", rope("linear", factor=4.0), SCALING_OFF),
    "llama rope llama3": Variant(
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, **rope("llama3", **LLAMA3)},
        {**SCALING_OFF, "factor": {"rope_factor": 32.0}, "low": {"rope_low_freq_factor": 2.0}},
    ),
    "llama rope llama3, old spelling": Variant("llama", rope("llama3", **LLAMA3), SCALING_OFF, old_spelling()),
    "llama rope yarn": Variant(
        "llama", rope("yarn", **YARN), {**SCALING_OFF, "factor": {"rope_attention_factor": 1.0}}
    ),
    "llama rope yarn, two mscales": Variant(
        "llama",
        rope("yarn", **YARN, mscale=2.0, mscale_all_dim=0.5),
        {"mscales": {"rope_attention_factor": 0.1 * math.log(YARN["factor"]) + 1}},
    ),
    "llama rope yarn, fields of others": Variant(
        "llama", rope("yarn", **YARN, attn_factor=0.5, finetuned=True, mscale=0.7), SCALING_OFF
    ),
    "llama rope yarn, all its fields": Variant(
        "llama",
        rope(
            "yarn",
            **YARN | {"original_max_position_embeddings": 256},
            beta_fast=8.0,
            beta_slow=0.5,
            attention_factor=0.8,
        ),
        {"fast": {"rope_beta_fast": 32.0}, "slow": {"rope_beta_slow": 2.0}, "factor": {"rope_attention_factor": 1.0}},
        old_spelling(),
    ),
    "llama condensed rope": Variant(
        "llama",
        rope("linear", factor=8.0),
        SCALING_OFF,
        lambda c: old_spelling(rope_scaling=None, rope_condense_ratio=8)(c),
    ),
    "llama attention bias": Variant(
        "llama", {"attention_bias": True}, {"qkv": {"qkv_bias": False}, "projection": {"projection_bias": False}}
    ),
    "llama mlp bias": Variant("llama", {"mlp_bias": True}, {"bias": {"mlp_bias": False}}),
    "llama eps": Variant("llama", {"rms_norm_eps": 1e-3}, {"eps": {"norm_eps": 1e-6}}),
    "qwen2": Variant("qwen2", QWEN2, {"bias": {"qkv_bias": False}, "untied": {"tie_embeddings": True}}),
    "qwen2 tied, old spelling": Variant(
        "qwen2",
        {**QWEN2, "tie_word_embeddings": True, **rope("default", 1e6)},
        {"tied": {"tie_embeddings": False}},
        old_spelling(),
    ),
    "qwen2 yarn": Variant(
        "qwen2",
        QWEN2 | rope("yarn", 1e6, **YARN),
        {**SCALING_OFF, "factor": {"rope_factor": 2.0}, "stretch": {"rope_attention_factor": 1.0}},
        old_spelling(),
    ),
    "qwen2 window": Variant("qwen2", QWEN2 | SLIDING, SLIDING_OFF),
    "qwen2 window, old spelling": Variant("qwen2", QWEN2 | SLIDING, SLIDING_OFF, old_spelling()),
    "qwen2 window unused": Variant(
        "qwen2", QWEN2 | SLIDING | {"use_sliding_window": False}, {"bias": {"qkv_bias": False}}
    ),
    "qwen3": Variant("qwen3", QWEN3, QWEN3_OFF),
    "qwen3 tied": Variant("qwen3", {**QWEN3, "tie_word_embeddings": True}, {"tied": {"tie_embeddings": False}}),
    "qwen3 window": Variant("qwen3", QWEN3 | SLIDING, SLIDING_OFF),
    "qwen3 attention bias": Variant("qwen3", QWEN3 | {"attention_bias": True}, {"bias": {"projection_bias": False}}),
    "qwen3-moe": Variant(
        "qwen3_moe", MOE | {"norm_topk_prob": True}, {**QWEN3_OFF, "shares": {"normalize_experts": False}}
    ),
    "qwen3-moe, shares as they are": Variant(
        "qwen3_moe",
        MOE | {"norm_topk_prob": False},
        {"shares": {"normalize_experts": True}, "top": {"n_expert_per_token": 1}},
    ),
    "qwen3-moe window": Variant(
        "qwen3_moe", MOE | SLIDING, {"window": {"sliding_layers": ()}, "its size": {"sliding_window": 25}}
    ),
    "gemma": Variant("gemma", GEMMA, GEMMA_OFF),
    "gemma, old spelling": Variant("gemma", GEMMA, GEMMA_OFF, old_spelling(hidden_act="gelu", hidden_activation=None)),
    "gemma2": Variant("gemma2", GEMMA2, GEMMA2_OFF),
    "gemma2, old spelling": Variant("gemma2", GEMMA2, GEMMA2_OFF, old_spelling()),
    "gemma2 layer_types": Variant(
        "gemma2",
        GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"]},
        {"layers": {"sliding_layers": (True, False)}},
    ),
    "gemma2 without caps": Variant(
        "gemma2",
        GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
        {"caps": {"logits_softcap": 8.0}, "attention": {"attention_softcap": 5.0}, "untied": {"tie_embeddings": True}},
    ),
    "gemma3": Variant("gemma3_text", GEMMA3 | GEMMA3_TYPES | gemma3_rope(), GEMMA3_OFF),
    "gemma3 linear": Variant(
        "gemma3_text",
        GEMMA3 | GEMMA3_TYPES | gemma3_rope(rope_type="linear", factor=8.0) | {"final_logit_softcapping": 8.0},
        {**GEMMA3_OFF, **SCALING_OFF, "logits soft-cap": {"logits_softcap": None}},
    ),
    "gemma3, old spelling": Variant(
        "gemma3_text",
        GEMMA3 | {"sliding_window_pattern": 3} | gemma3_rope(rope_type="linear", factor=8.0),
        {**GEMMA3_OFF, **SCALING_OFF, "which layers": {"sliding_layers": (True, False, True)}},
        old_spelling(sliding_window_pattern=3),
    ),
    "smollm2": Variant(
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, **rope("default", 1e5)},
        {"theta": {"rope_theta": 1e4}},
    ),
    "smollm3": Variant(
        "smollm3",
        {"num_key_value_heads": 2, "no_rope_layers": [1, 0], **rope("default", 5e6)},
        {"layers": {"rope_layers": ()}, "theta": {"rope_theta": 1e4}, "tied": {"tie_embeddings": False}},
    ),
    "smollm3 interval": Variant(
        "smollm3",
        {"num_key_value_heads": 2, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
        {"layers": {"rope_layers": (False, True)}, "untied": {"tie_embeddings": True}},
        lambda c: {k: v for k, v in c.items() if k != "no_rope_layers"},
    ),
    "smollm3 window": Variant(
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 24,
            "no_rope_layers": [1, 0],
            "mlp_bias": True,
            "attention_bias": True,
        },
        {
            "window": {"sliding_layers": ()},
            "its size": {"sliding_window": 25},
            "which layers": {"sliding_layers": (True, False)},
            "mlp bias": {"mlp_bias": False},
            "attention bias": {"qkv_bias": False, "projection_bias": False},
        },
    ),
    "olmo2": Variant(
        "olmo2",
        {"num_key_value_heads": 2, **rope("default", 5e5)},
        {
            "qk norm": {"qk_norm": "none"},
            "norm per head": {"qk_norm": "head"},
            "post norms": {"post_norm": False},
            "no pre norms": {"pre_norm": True},
            "theta": {"rope_theta": 1e4},
            "untied": {"tie_embeddings": True},
        },
    ),
    "olmo2 multi-head, attention bias": Variant(
        "olmo2",
        {"attention_bias": True, "rms_norm_eps": 1e-3},
        {"bias": {"qkv_bias": False}, "eps": {"norm_eps": 1e-6}},
    ),
}
