"""Llama: RMSNorm, SwiGLU, rotary embedding, grouped-query attention (Llama 1–3, CodeLlama, Vicuna, Nous-Hermes, …).

Source: transformers' LlamaConfig and LlamaForCausalLM; both spellings of the rotary fields occur on the Hub.
"""

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families.family import Family, require


def read_rope(hf_config: dict) -> dict:
    """The rotary fields of a config.json, spelled as of old (rope_theta, rope_scaling) or anew (rope_parameters)."""
    rope = {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if condense := hf_config.get("rope_condense_ratio"):  # LongChat's first revisions: linear scaling by another name
        kind, rope = "linear", {"factor": condense}
    fields = {"rope_theta": float(theta), "rope_type": kind}
    try:
        if kind in ("linear", "llama3"):
            fields["rope_factor"] = float(rope["factor"])
        if kind == "llama3":
            fields["rope_low_freq_factor"] = float(rope["low_freq_factor"])
            fields["rope_high_freq_factor"] = float(rope["high_freq_factor"])
            fields["rope_original_block_size"] = int(rope["original_max_position_embeddings"])
    except KeyError as error:
        raise InputError(f"config.json: rope scaling {kind!r} lacks {error}") from None
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"config.json: rope scaling {kind!r} is not supported; supported: 'linear', 'llama3'")
    return fields


def read_config(hf_config: dict) -> ModelConfig:
    """ModelConfig of a Llama config.json; InputError names a missing or unsupported field."""
    require(hf_config, "hidden_act", "silu", "swish")
    require(hf_config, "partial_rotary_factor", 1.0)
    require(hf_config, "quantization_config")
    try:
        n_embd, n_head = hf_config["hidden_size"], hf_config["num_attention_heads"]
        return ModelConfig(
            block_size=hf_config.get("max_position_embeddings", 2048),
            vocab_size=hf_config["vocab_size"],
            n_layer=hf_config["num_hidden_layers"],
            n_embd=n_embd,
            n_head=n_head,
            n_query_groups=hf_config.get("num_key_value_heads") or n_head,
            head_size=hf_config.get("head_dim") or n_embd // n_head,
            intermediate_size=hf_config["intermediate_size"],
            norm_eps=hf_config.get("rms_norm_eps", 1e-6),
            qkv_bias=hf_config.get("attention_bias", False),
            projection_bias=hf_config.get("attention_bias", False),
            mlp_bias=hf_config.get("mlp_bias", False),
            tie_embeddings=hf_config.get("tie_word_embeddings", False),
            **read_rope(hf_config),
        )
    except KeyError as error:
        raise InputError(f"config.json: {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"config.json: a field has the wrong type or value ({error})") from None


def _linear(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


FAMILY = Family(
    name="Llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    read_config=read_config,
    weight_map={
        "model.embed_tokens.weight": "wte.weight",
        "model.layers.{}.input_layernorm.weight": "blocks.{}.norm_1.weight",
        **_linear("model.layers.{}.self_attn.q_proj", "blocks.{}.attn.query"),
        **_linear("model.layers.{}.self_attn.k_proj", "blocks.{}.attn.key"),
        **_linear("model.layers.{}.self_attn.v_proj", "blocks.{}.attn.value"),
        **_linear("model.layers.{}.self_attn.o_proj", "blocks.{}.attn.projection"),
        "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.norm_2.weight",
        **_linear("model.layers.{}.mlp.gate_proj", "blocks.{}.mlp.gate"),
        **_linear("model.layers.{}.mlp.up_proj", "blocks.{}.mlp.up"),
        **_linear("model.layers.{}.mlp.down_proj", "blocks.{}.mlp.down"),
        "model.norm.weight": "norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    },
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
)
