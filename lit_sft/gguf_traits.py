"""What each architecture of llama.cpp computes, and the refusal of a model that asks for more.

Source: llama.cpp's src/models.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError

ANY = ...


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp."""

    traits: dict[str, Any] = field(default_factory=dict)
    """Beyond the plain transformer of ModelConfig's defaults: field → its value, several in a tuple, or any."""
    scalings: tuple[str, ...] = ("linear",)
    """Kinds of rope scaling."""
    windows: bool = False
    interleaved: bool = False
    """RoPE turns neighbouring dimensions of a head."""
    fused_qkv: bool = False
    fused_gate: bool = False
    norms_of_attention: bool = False
    """Of two norms before attention and MLP the second one is attention's."""
    shared_head: bool = False
    """The head is the embedding, always."""
    own_head: bool = False
    """The file must hold a head, tied or not."""


GEMMA = {"norm_unit_offset": True, "activation": "gelu_tanh", "embedding_scale": ANY}
LAYER_NORM = {"norm": "layer", "norm_bias": True, "rotary_size": ANY}
UNGATED = LAYER_NORM | {"gated_mlp": False, "activation": ("gelu", "gelu_tanh")}
EXPERTS = {"n_expert": ANY, "n_expert_per_token": ANY}
BIASES = {"qkv_bias": ANY, "projection_bias": ANY, "mlp_bias": ANY}
ARCHITECTURES = {
    "llama": Architecture(BIASES | EXPERTS, scalings=("linear", "llama3", "yarn"), interleaved=True),
    "qwen2": Architecture({"qkv_bias": ANY}, scalings=("linear", "yarn")),
    "qwen3": Architecture({"qk_norm": "head"}, scalings=("linear", "yarn")),
    "qwen3moe": Architecture({"qk_norm": "head"} | EXPERTS, scalings=("linear", "yarn")),
    "gemma": Architecture(GEMMA, shared_head=True),
    "gemma2": Architecture(
        GEMMA | {"post_norm": True, "attention_softcap": ANY, "logits_softcap": ANY}, windows=True, shared_head=True
    ),
    "gemma3": Architecture(
        GEMMA | {"post_norm": True, "qk_norm": "head", "logits_softcap": ANY, "rope_local_theta": ANY}, windows=True
    ),
    "phi3": Architecture({"rotary_size": ANY}, scalings=("linear", "longrope"), fused_gate=True),
    "smollm3": Architecture({"rope_layers": ANY}, interleaved=True),
    "olmo2": Architecture({"round_late": True, "pre_norm": False, "post_norm": True, "qk_norm": "full"}, own_head=True),
    "stablelm": Architecture(
        LAYER_NORM | {"parallel_residual": ANY, "shared_norm": ANY, "qk_norm": ("none", "each_head"), "qkv_bias": ANY},
        own_head=True,
    ),
    "gptneox": Architecture(
        UNGATED | dict.fromkeys(BIASES, True) | {"parallel_residual": ANY}, fused_qkv=True, own_head=True
    ),
    "falcon": Architecture(
        UNGATED | {"parallel_residual": True, "shared_norm": ANY}, norms_of_attention=True, fused_qkv=True
    ),
}
# fields that every file has, or that are judged apart
JUDGED = (
    "block_size vocab_size n_layer n_embd n_head n_query_groups head_size intermediate_size norm_eps tie_embeddings"
)
APART = {*JUDGED.split(), "sliding_window", "sliding_layers", "attention_scale", "rope_theta", "rope_type"}
WIDE = {("gemma2", 46), ("gemma3", 62)}  # the 27B models scale by the width of a head that n_embd would give


def check_traits(config: ModelConfig, name: str) -> None:
    """InputError for a switch that the architecture does not have in llama.cpp."""
    architecture, default = ARCHITECTURES[name], ModelConfig.__dataclass_fields__
    wrong = {}
    for key, value in vars(config).items():
        scaling = key.startswith("rope_") and key not in ("rope_layers", "rope_local_theta")
        allowed = architecture.traits.get(key, default[key].default)
        several = allowed if isinstance(allowed, tuple) and allowed else (allowed,)
        if key not in APART and not scaling and allowed is not ANY and value not in several:
            wrong[key] = value
    if config.rope_type not in ("default", *architecture.scalings):
        wrong["rope_type"] = config.rope_type
    if config.rope_type == "yarn":
        usual = {
            "rope_beta_fast": 32,
            "rope_beta_slow": 1,
            "rope_attention_factor": 0.1 * math.log(config.rope_factor) + 1,
        }
        wrong |= {k: getattr(config, k) for k, v in usual.items() if not math.isclose(getattr(config, k), v)}
    if architecture.shared_head and not config.tie_embeddings:
        wrong["tie_embeddings"] = False
    if config.rope_layers and config.rope_layers != tuple((i + 1) % 4 != 0 for i in range(config.n_layer)):
        wrong["rope_layers"] = config.rope_layers
    width = config.n_embd // config.n_head if (name, config.n_layer) in WIDE else config.head_size
    if config.attention_scale and not math.isclose(config.attention_scale, width**-0.5, rel_tol=1e-6):
        wrong["attention_scale"] = config.attention_scale
    if wrong:
        what = ", ".join(f"{key} = {value}" for key, value in wrong.items())
        raise InputError(f"llama.cpp's {name!r} does not compute {what}; nothing was written")
