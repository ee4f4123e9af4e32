"""Gemma 2: norms before and after, soft-capped scores and logits, a window in every other layer.

Source: transformers' Gemma2Config and Gemma2ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target
from lit_sft.families.fields import Fields
from lit_sft.families.gemma import read_common
from lit_sft.families.layers import read_window
from lit_sft.families.llama import read_bias, read_shape
from lit_sft.families.llama import weight_map as llama_weight_map


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Gemma 2 config.json."""
    return ModelConfig(
        **read_shape(fields, 8192, 256, tied=True),
        **read_sandwich(fields),
        **read_window(fields, fields.need("num_hidden_layers"), lambda layer: layer % 2 == 0, 4096),
        attention_softcap=fields.given("attn_logit_softcapping", 50.0),
        logits_softcap=fields.given("final_logit_softcapping", 30.0),
    )


def read_sandwich(fields: Fields) -> dict:
    """What Gemma 2 and 3 have in common."""
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("hidden_act", "gelu_pytorch_tanh")
    return {
        **read_bias(fields),
        **read_common(fields),
        "post_norm": True,
        "attention_scale": fields.get("query_pre_attn_scalar", default=256) ** -0.5,
    }


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names, with four norms a layer."""
    layer, block = "model.layers.{}", "blocks.{}"
    return llama_weight_map(config) | {
        f"{layer}.post_attention_layernorm.weight": f"{block}.post_norm_1.weight",
        f"{layer}.pre_feedforward_layernorm.weight": f"{block}.norm_2.weight",
        f"{layer}.post_feedforward_layernorm.weight": f"{block}.post_norm_2.weight",
    }


FAMILY = Family(
    name="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    read=read,
    weight_map=weight_map,
    gguf="gemma2",
    tokenizer_class="GemmaTokenizer",
)
