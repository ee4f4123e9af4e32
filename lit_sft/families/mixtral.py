"""Mixtral: Mistral with a mixture of experts in place of the MLP (8x7B, 8x22B).

Source: transformers' MixtralConfig and MixtralForCausalLM; its checkpoints hold each expert's matrices by themselves.
"""

from dataclasses import replace

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target
from lit_sft.families.fields import Fields
from lit_sft.families.llama import FAMILY as LLAMA
from lit_sft.families.mistral import read as read_mistral


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Mixtral config.json."""
    return replace(
        read_mistral(fields, window=None, norm_eps=1e-5, theta=1e6),
        n_expert=fields.get("num_local_experts", "num_experts", default=8),
        n_expert_per_token=fields.get("num_experts_per_tok", default=2),
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names around the experts, under either name of the mixture."""
    names: dict[str, Target] = {}
    for mixture in ("block_sparse_moe", "mlp"):
        theirs, ours = f"model.layers.{{}}.{mixture}", "blocks.{}.mlp"
        names |= {
            f"{theirs}.gate.weight": f"{ours}.router.weight",
            f"{theirs}.experts.{{}}.w1.weight": f"{ours}.experts.{{}}.gate.weight",
            f"{theirs}.experts.{{}}.w2.weight": f"{ours}.experts.{{}}.down.weight",
            f"{theirs}.experts.{{}}.w3.weight": f"{ours}.experts.{{}}.up.weight",
        }
    return LLAMA.weight_map(config) | names


FAMILY = Family(
    name="Mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read=read,
    weight_map=weight_map,
    gguf="llama",
    tokenizer_class="TokenizersBackend",
)
