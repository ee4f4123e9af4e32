"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer.

Source: transformers' Qwen3MoeConfig and Qwen3MoeForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families.family import Family, Target
from lit_sft.families.fields import Fields
from lit_sft.families.layers import read_window
from lit_sft.families.llama import read_bias, read_shape
from lit_sft.families.qwen3 import weight_map as qwen3_weight_map


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json."""
    fields.only("hidden_act", "silu", "swish")
    fields.only("decoder_sparse_step", 1)
    if dense := fields.get("mlp_only_layers"):
        raise InputError(f"config.json: mlp_only_layers = {dense} is not supported: every layer must have experts")
    used = fields.get("use_sliding_window", default=False)
    return ModelConfig(
        **read_shape(fields, block_size=32768)
        | {"intermediate_size": fields.get("moe_intermediate_size", default=768)},
        **read_bias(fields),
        **read_window(fields, fields.need("num_hidden_layers"), lambda layer: True, 4096, used),
        qk_norm="head",
        n_expert=fields.get("num_experts", "num_local_experts", default=128),
        n_expert_per_token=fields.get("num_experts_per_tok", default=8),
        normalize_experts=fields.get("norm_topk_prob", default=False),
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Qwen3's names, the MLP's for each expert."""
    names = {theirs: ours for theirs, ours in qwen3_weight_map(config).items() if ".mlp." not in theirs}
    layer, experts = "model.layers.{}.mlp", "blocks.{}.mlp.experts.{}"
    parts = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return names | {
        f"{layer}.gate.weight": "blocks.{}.mlp.router.weight",
        **{f"{layer}.experts.{{}}.{theirs}.weight": f"{experts}.{ours}.weight" for theirs, ours in parts.items()},
    }


FAMILY = Family(
    name="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read=read,
    weight_map=weight_map,
    gguf="qwen3moe",
    tokenizer_class="Qwen2Tokenizer",
)
