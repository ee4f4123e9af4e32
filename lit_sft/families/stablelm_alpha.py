"""StableLM-alpha v2: one LayerNorm feeds attention and a gated MLP in parallel; no biases but the norms'.

transformers has no class for it. Source: the modeling_stablelm_alpha.py that stabilityai/stablelm-base-alpha-3b-v2
carries, as public ports of it name its fields and weights. Query, key and value are fused head by head, and of the
fused MLP it is the second half that gates. The MLP's width is not in config.json: 8/3 of n_embd, rounded up to 256s.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target, fused, linear
from lit_sft.families.fields import Fields
from lit_sft.families.rotary import read_rope


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a StableLM-alpha v2 config.json."""
    n_embd, n_head = fields.need("hidden_size"), fields.need("num_heads", "num_attention_heads")
    block_size = fields.get("max_position_embeddings", default=4096)
    return ModelConfig(
        block_size=block_size,
        vocab_size=fields.need("vocab_size"),
        n_layer=fields.need("num_hidden_layers"),
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=n_head,
        head_size=n_embd // n_head,
        intermediate_size=-(-int(8 * n_embd / 3) // 256) * 256,
        norm="layer",
        norm_bias=True,
        norm_eps=fields.get("norm_eps", default=1e-5),
        parallel_residual=True,
        shared_norm=True,
        tie_embeddings=fields.get("tie_word_embeddings", default=False),
        **read_rope(fields, block_size, n_embd // n_head, share=0.25),
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """StableLM-alpha v2's names."""
    block, attn, mlp = "transformer.layers.{}", "blocks.{}.attn", "blocks.{}.mlp"
    return {
        "transformer.embed.weight": "wte.weight",
        **linear(f"{block}.norm", "blocks.{}.norm_1"),
        **fused(f"{block}.attention.qkv_proj", f"{attn}.query", f"{attn}.key", f"{attn}.value", by_group=True),
        **linear(f"{block}.attention.out_proj", f"{attn}.projection"),
        **fused(f"{block}.mlp.gate_proj", f"{mlp}.up", f"{mlp}.gate"),
        **linear(f"{block}.mlp.out_proj", f"{mlp}.down"),
        **linear("transformer.final_norm", "norm_f"),
        "lm_head.weight": "lm_head.weight",
    }


FAMILY = Family(
    name="StableLM-alpha v2",
    architectures=("StableLMAlphaForCausalLM",),
    model_types=("stablelm_alpha",),
    read=read,
    weight_map=weight_map,
    prefix="transformer.",
)
