"""Phi-3: Llama with fused projections, often with longrope and a sliding window (Phi-3, Phi-3.5, Phi-4, Phi-4-mini).

Source: transformers' Phi3Config and Phi3ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target, fused, linear
from lit_sft.families.fields import Fields
from lit_sft.families.llama import read_shape


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Phi-3 config.json."""
    fields.content = {"original_max_position_embeddings": 4096} | fields.content
    shape, window = read_shape(fields, block_size=4096, norm_eps=1e-5), fields.get("sliding_window")
    return ModelConfig(
        **shape,
        activation=fields.activation("hidden_act", default="silu"),
        sliding_window=window,
        sliding_layers=(True,) * shape["n_layer"] if window else (),
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names, but for two tensors that are several of ours, one behind the other."""
    block, attn, mlp = "model.layers.{}", "blocks.{}.attn", "blocks.{}.mlp"
    return {
        "model.embed_tokens.weight": "wte.weight",
        f"{block}.input_layernorm.weight": "blocks.{}.norm_1.weight",
        **fused(f"{block}.self_attn.qkv_proj", f"{attn}.query", f"{attn}.key", f"{attn}.value"),
        **linear(f"{block}.self_attn.o_proj", f"{attn}.projection"),
        f"{block}.post_attention_layernorm.weight": "blocks.{}.norm_2.weight",
        **fused(f"{block}.mlp.gate_up_proj", f"{mlp}.gate", f"{mlp}.up"),
        **linear(f"{block}.mlp.down_proj", f"{mlp}.down"),
        "model.norm.weight": "norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }


FAMILY = Family(
    name="Phi-3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    read=read,
    weight_map=weight_map,
    gguf="phi3",
    tokenizer_class="TokenizersBackend",
)
