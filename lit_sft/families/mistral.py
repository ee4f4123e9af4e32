"""Mistral: Llama with a sliding window in every layer, or without one (7B v0.1–v0.3, Nemo, Small).

Source: transformers' MistralConfig and MistralForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family
from lit_sft.families.fields import Fields
from lit_sft.families.llama import FAMILY as LLAMA
from lit_sft.families.llama import read_shape


def read(fields: Fields, window: int | None = 4096, norm_eps: float = 1e-6, theta: float = 10000.0) -> ModelConfig:
    """ModelConfig of a Mistral config.json; the defaults are those of fields that the file does not have."""
    shape = read_shape(fields, block_size=131072, norm_eps=norm_eps, theta=theta)
    window = fields.given("sliding_window", window)  # null means none
    return ModelConfig(
        **shape | {"n_query_groups": fields.get("num_key_value_heads", default=8)},
        activation=fields.activation("hidden_act", default="silu"),
        sliding_window=window,
        sliding_layers=(True,) * shape["n_layer"] if window else (),
    )


DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


FAMILY = Family(
    name="Mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read=read,
    weight_map=LLAMA.weight_map,
    gguf="llama",
    defaults=DEFAULTS,
    tokenizer_class="TokenizersBackend",
)
