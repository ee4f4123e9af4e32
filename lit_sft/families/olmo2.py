"""OLMo 2: norms after attention and MLP only, queries and keys normed over all heads at once.

Source: transformers' Olmo2Config and Olmo2ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target
from lit_sft.families.fields import Fields
from lit_sft.families.llama import read_bias, read_shape
from lit_sft.families.llama import weight_map as llama_weight_map


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of an OLMo 2 config.json."""
    fields.only("hidden_act", "silu", "swish")
    return ModelConfig(
        **read_shape(fields, norm_eps=1e-5),
        **read_bias(fields),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        round_late=True,
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names, with norms elsewhere."""
    names = llama_weight_map(config)
    del names["model.layers.{}.input_layernorm.weight"]
    return names | {
        "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.post_norm_1.weight",
        "model.layers.{}.post_feedforward_layernorm.weight": "blocks.{}.post_norm_2.weight",
        "model.layers.{}.self_attn.q_norm.weight": "blocks.{}.attn.query_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight": "blocks.{}.attn.key_norm.weight",
    }


FAMILY = Family(
    name="OLMo 2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    read=read,
    weight_map=weight_map,
    gguf="olmo2",
    tokenizer_class="TokenizersBackend",
)
