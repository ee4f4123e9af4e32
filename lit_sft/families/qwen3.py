"""Qwen3: queries and keys normed per head with one weight, heads of their own size.

Source: transformers' Qwen3Config and Qwen3ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target
from lit_sft.families.fields import Fields
from lit_sft.families.llama import read_bias, read_shape
from lit_sft.families.llama import weight_map as llama_weight_map
from lit_sft.families.qwen2 import DEFAULTS, read_later_window


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Qwen3 config.json."""
    fields.only("hidden_act", "silu", "swish")
    return ModelConfig(
        **read_shape(fields, block_size=32768, head_size=128),
        **read_bias(fields),
        **read_later_window(fields),
        qk_norm="head",
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names and two norms."""
    return llama_weight_map(config) | {
        "model.layers.{}.self_attn.q_norm.weight": "blocks.{}.attn.query_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight": "blocks.{}.attn.key_norm.weight",
    }


FAMILY = Family(
    name="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read=read,
    weight_map=weight_map,
    gguf="qwen3",
    tokenizer_class="Qwen2Tokenizer",
    defaults=DEFAULTS,
)
