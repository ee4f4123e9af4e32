"""Falcon: LayerNorm, grouped or single key/value heads, attention and MLP in parallel (7B, 40B, 180B, 11B, RW).

Source: transformers' FalconConfig and FalconForCausalLM; of the older spelling, RefinedWebModel (7B, RW) and RefinedWeb
(40B), the code in those repositories.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target, fused, linear
from lit_sft.families.fields import Fields
from lit_sft.families.rotary import read_rope


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a Falcon config.json, old or new."""
    n_embd, n_head = fields.need("hidden_size", "n_embed"), fields.need("num_attention_heads", "n_head")
    kind = fields.get("model_type", default="falcon")
    new = fields.get("new_decoder_architecture", default=kind == "RefinedWeb")
    parallel = fields.get("parallel_attn", default=kind == "falcon") or new
    single = fields.get("multi_query", default=kind == "falcon")
    groups = 1 if single else n_head  # whatever num_kv_heads says, which many files fill with the number of heads
    if new:
        groups = fields.get("num_kv_heads", "n_head_kv", default=n_head)
    fields.only("num_ln_in_parallel_attn", *((1, 2) if new else (1,)))
    bias = fields.get("bias", default=False)
    block_size = fields.get("max_position_embeddings", default=2048)
    rope = read_rope(fields, block_size, n_embd // n_head)
    alibi = fields.get("alibi", default=False)
    return ModelConfig(
        block_size=block_size,
        vocab_size=fields.need("vocab_size"),
        n_layer=fields.need("num_hidden_layers", "n_layer"),
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=groups,
        head_size=n_embd // n_head,
        intermediate_size=fields.get("ffn_hidden_size", default=fields.get("ff_factor", default=4) * n_embd),
        norm="layer",
        norm_bias=True,
        norm_eps=fields.get("layer_norm_epsilon", default=1e-5),
        parallel_residual=parallel,
        shared_norm=parallel and not (new and fields.get("num_ln_in_parallel_attn", default=2) == 2),
        qkv_bias=bias,
        projection_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=fields.activation("activation", default="gelu"),
        tie_embeddings=fields.get("tie_word_embeddings", default=True),
        alibi=alibi,
        **(rope | {"rotary_size": 0} if alibi else rope),
    )


def respell(hf_config: dict) -> dict:
    """An old config.json as transformers' own class reads it."""
    if hf_config.get("model_type") not in ("RefinedWebModel", "RefinedWeb"):
        return dict(hf_config)
    names = {"n_embed": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    names |= {"n_head_kv": "num_kv_heads"}
    config = {names.get(name, name): value for name, value in hf_config.items() if name != "auto_map"}
    old = {"new_decoder_architecture": hf_config["model_type"] == "RefinedWeb", "parallel_attn": False}
    told = old | {"multi_query": False} | config
    return told | {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Falcon's names; query, key and value are one tensor, fused by key/value head; norms are named by their use."""
    block, attn = "transformer.h.{}", "blocks.{}.attn"
    qkv = f"{block}.self_attention.query_key_value"
    two_norms = config.parallel_residual and not config.shared_norm
    first, second = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "post_attention_layernorm")
    return {
        "transformer.word_embeddings.weight": "wte.weight",
        **linear(f"{block}.{first}", "blocks.{}.norm_1"),
        **fused(qkv, f"{attn}.query", f"{attn}.key", f"{attn}.value", by_group=True),
        **linear(f"{block}.self_attention.dense", f"{attn}.projection"),
        **linear(f"{block}.{second}", "blocks.{}.norm_2"),
        **linear(f"{block}.mlp.dense_h_to_4h", "blocks.{}.mlp.up"),
        **linear(f"{block}.mlp.dense_4h_to_h", "blocks.{}.mlp.down"),
        **linear("transformer.ln_f", "norm_f"),
        "lm_head.weight": "lm_head.weight",
    }


FAMILY = Family(
    name="Falcon",
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    model_types=("falcon", "RefinedWebModel", "RefinedWeb"),
    read=read,
    weight_map=weight_map,
    prefix="transformer.",
    respell=respell,
    gguf="falcon",
)
