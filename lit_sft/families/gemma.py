"""Gemma: norms stored as their difference from 1, scaled embeddings, a gated GELU, the head tied.

Source: transformers' GemmaConfig and GemmaForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family
from lit_sft.families.fields import Fields
from lit_sft.families.llama import read_bias, read_shape, weight_map


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Gemma config.json."""
    # the first files say "gelu" and mean its approximation, with which the model was trained
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    return ModelConfig(**read_shape(fields, 8192, 256, tied=True), **read_bias(fields), **read_common(fields))


def read_common(fields: Fields) -> dict:
    """What all Gemmas have in common."""
    return {
        "norm_unit_offset": True,
        "activation": "gelu_tanh",
        "embedding_scale": fields.need("hidden_size") ** 0.5,
    }


FAMILY = Family(
    name="Gemma",
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    read=read,
    weight_map=weight_map,
    gguf="gemma",
    tokenizer_class="GemmaTokenizer",
)
