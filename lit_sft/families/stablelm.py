"""StableLM: Llama with LayerNorm and rotary embedding over a quarter of each head (3B-4E1T, Zephyr, StableLM 2).

Source: transformers' StableLmConfig and StableLmForCausalLM; for the older spelling, stablelm_epoch, the code that its
repositories carry.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Stacked, Target, linear
from lit_sft.families.fields import Fields
from lit_sft.families.llama import FAMILY as LLAMA
from lit_sft.families.rotary import read_rope


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a StableLM config.json."""
    n_embd, n_head = fields.need("hidden_size"), fields.need("num_attention_heads")
    block_size = fields.get("max_position_embeddings", default=4096)
    parallel = fields.get("use_parallel_residual", default=False)
    return ModelConfig(
        block_size=block_size,
        vocab_size=fields.need("vocab_size"),
        n_layer=fields.need("num_hidden_layers"),
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=fields.get("num_key_value_heads", default=n_head),
        head_size=n_embd // n_head,
        intermediate_size=fields.need("intermediate_size"),
        norm="layer",
        norm_bias=True,
        norm_eps=fields.get("layer_norm_eps", "norm_eps", default=1e-5),
        parallel_residual=parallel,
        shared_norm=parallel,
        qk_norm="each_head" if fields.get("qk_layernorm") else "none",
        qkv_bias=fields.get("use_qkv_bias", default=False),
        activation=fields.activation("hidden_act", default="silu"),
        tie_embeddings=fields.get("tie_word_embeddings", default=False),
        **read_rope(fields, block_size, n_embd // n_head, share=0.25),
    )


def respell(hf_config: dict) -> dict:
    """An old config.json as transformers' own class reads it."""
    if hf_config.get("model_type") != "stablelm_epoch":
        return dict(hf_config)
    names = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
    config = {names.get(name, name): value for name, value in hf_config.items() if name != "auto_map"}
    return config | {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """Llama's names; norms have biases, and each head's norm of queries and keys is a tensor of its own."""
    block, attn = "model.layers.{}", "blocks.{}.attn"
    return {
        **LLAMA.weight_map(config),
        **linear(f"{block}.input_layernorm", "blocks.{}.norm_1"),
        f"{block}.self_attn.q_layernorm.norms.{{}}.weight": Stacked(f"{attn}.query_norm.weight"),
        f"{block}.self_attn.k_layernorm.norms.{{}}.weight": Stacked(f"{attn}.key_norm.weight"),
        **linear(f"{block}.post_attention_layernorm", "blocks.{}.norm_2"),
        **linear("model.norm", "norm_f"),
    }


FAMILY = Family(
    name="StableLM",
    architectures=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    model_types=("stablelm", "stablelm_epoch"),
    read=read,
    weight_map=weight_map,
    respell=respell,
    gguf="stablelm",
    tokenizer_class="TokenizersBackend",
)
