"""Gemma 3's text model: Gemma 2 with normed queries and keys for soft-caps, five windowed layers to one.

Source: transformers' Gemma3TextConfig and Gemma3ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target
from lit_sft.families.fields import Fields
from lit_sft.families.gemma2 import read_sandwich
from lit_sft.families.gemma2 import weight_map as gemma2_weight_map
from lit_sft.families.layers import read_window
from lit_sft.families.llama import read_shape

# the published files name only what differs from the class's defaults
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Gemma 3 config.json."""
    fields.content = DEFAULTS | fields.content
    pattern = fields.get("sliding_window_pattern", "_sliding_window_pattern", default=6)
    shape = read_shape(fields, 131072, 256, tied=True, theta=1e6, local_theta=1e4)
    return ModelConfig(
        **shape,
        **read_sandwich(fields),
        **read_window(fields, shape["n_layer"], lambda layer: (layer + 1) % pattern != 0, 4096),
        qk_norm="head",
        logits_softcap=fields.get("final_logit_softcapping"),
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Gemma 2's names and two norms."""
    return gemma2_weight_map(config) | {
        "model.layers.{}.self_attn.q_norm.weight": "blocks.{}.attn.query_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight": "blocks.{}.attn.key_norm.weight",
    }


FAMILY = Family(
    name="Gemma 3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    read=read,
    weight_map=weight_map,
    gguf="gemma3",
    tokenizer_class="GemmaTokenizer",
)
