"""Llama: RMSNorm, SwiGLU, rotary embedding, grouped-query attention (Llama 1–3, CodeLlama, Vicuna, SmolLM2, …).

Source: transformers' LlamaConfig and LlamaForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target, linear
from lit_sft.families.fields import Fields
from lit_sft.families.rotary import read_rope


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Llama config.json."""
    fields.only("hidden_act", "silu", "swish")
    mlp_bias = fields.get("mlp_bias", default=False)
    return ModelConfig(**read_shape(fields), **read_bias(fields), mlp_bias=mlp_bias)


def read_shape(
    fields: Fields,
    block_size: int = 2048,
    head_size: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
    theta: float = 10000.0,
    local_theta: float | None = None,
) -> dict:
    """What almost every later family spells alike; the arguments are what a silent file means."""
    n_embd, n_head = fields.need("hidden_size"), fields.need("num_attention_heads")
    block_size = fields.get("max_position_embeddings", default=block_size)
    head_size = fields.get("head_dim", default=head_size or n_embd // n_head)
    return {
        "block_size": block_size,
        "vocab_size": fields.need("vocab_size"),
        "n_layer": fields.need("num_hidden_layers"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_query_groups": fields.get("num_key_value_heads", default=n_head),
        "head_size": head_size,
        "intermediate_size": fields.need("intermediate_size"),
        "norm_eps": fields.get("rms_norm_eps", default=norm_eps),
        "tie_embeddings": fields.get("tie_word_embeddings", default=tied),
        **read_rope(fields, block_size, head_size, theta, local_theta=local_theta),
    }


def read_bias(fields: Fields) -> dict:
    """Whether the four matrices of attention have biases."""
    bias = fields.get("attention_bias", default=False)
    return {"qkv_bias": bias, "projection_bias": bias}


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names, which most later families share."""
    return {
        "model.embed_tokens.weight": "wte.weight",
        "model.layers.{}.input_layernorm.weight": "blocks.{}.norm_1.weight",
        **linear("model.layers.{}.self_attn.q_proj", "blocks.{}.attn.query"),
        **linear("model.layers.{}.self_attn.k_proj", "blocks.{}.attn.key"),
        **linear("model.layers.{}.self_attn.v_proj", "blocks.{}.attn.value"),
        **linear("model.layers.{}.self_attn.o_proj", "blocks.{}.attn.projection"),
        "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.norm_2.weight",
        **linear("model.layers.{}.mlp.gate_proj", "blocks.{}.mlp.gate"),
        **linear("model.layers.{}.mlp.up_proj", "blocks.{}.mlp.up"),
        **linear("model.layers.{}.mlp.down_proj", "blocks.{}.mlp.down"),
        "model.norm.weight": "norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }


DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


FAMILY = Family(
    name="Llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    read=read,
    weight_map=weight_map,
    gguf="llama",
    defaults=DEFAULTS,
)
