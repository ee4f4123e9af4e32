"""Qwen2 and Qwen2.5: Llama with biased queries, keys and values.

Source: transformers' Qwen2Config and Qwen2ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family
from lit_sft.families.fields import Fields
from lit_sft.families.layers import read_window
from lit_sft.families.llama import read_shape, weight_map


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Qwen2 config.json."""
    fields.only("hidden_act", "silu", "swish")
    return ModelConfig(**read_shape(fields, block_size=32768), **read_later_window(fields), qkv_bias=True)


def read_later_window(fields: Fields) -> dict:
    """The window, where ``use_sliding_window`` says so, of the layers from ``max_window_layers`` on."""
    used = fields.get("use_sliding_window", default=False)
    first = fields.get("max_window_layers", default=28)
    return read_window(fields, fields.need("num_hidden_layers"), lambda layer: layer >= first, 4096, used)


DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


FAMILY = Family(
    name="Qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read=read,
    weight_map=weight_map,
    gguf="qwen2",
    tokenizer_class="Qwen2Tokenizer",
    overrides_tokenizer_class=True,
    defaults=DEFAULTS,
)
