"""GPT-NeoX: LayerNorm, biases, rotary embedding over a part of each head (Pythia, RedPajama, StableLM-alpha, …).

Source: transformers' GPTNeoXConfig and GPTNeoXForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family, Target, fused, linear
from lit_sft.families.fields import Fields
from lit_sft.families.rotary import read_rope


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a GPT-NeoX config.json."""
    n_embd, n_head = fields.need("hidden_size"), fields.need("num_attention_heads")
    block_size = fields.get("max_position_embeddings", default=2048)
    head_size = n_embd // n_head
    attention_bias = fields.get("attention_bias", default=True)
    return ModelConfig(
        block_size=block_size,
        vocab_size=fields.need("vocab_size"),
        n_layer=fields.need("num_hidden_layers"),
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=n_head,
        head_size=head_size,
        intermediate_size=fields.need("intermediate_size"),
        norm="layer",
        norm_bias=True,
        norm_eps=fields.get("layer_norm_eps", default=1e-5),
        parallel_residual=fields.get("use_parallel_residual", default=True),
        qkv_bias=attention_bias,
        projection_bias=attention_bias,
        mlp_bias=True,
        gated_mlp=False,
        activation=fields.activation("hidden_act", default="gelu"),
        tie_embeddings=fields.get("tie_word_embeddings", default=False),
        **read_rope(fields, block_size, head_size, share=0.25),
    )


def weight_map(config: ModelConfig) -> dict[str, Target]:
    """GPT-NeoX's names; query, key and value are one tensor, fused head by head."""
    block, attn = "gpt_neox.layers.{}", "blocks.{}.attn"
    return {
        "gpt_neox.embed_in.weight": "wte.weight",
        **linear(f"{block}.input_layernorm", "blocks.{}.norm_1"),
        **fused(f"{block}.attention.query_key_value", f"{attn}.query", f"{attn}.key", f"{attn}.value", by_group=True),
        **linear(f"{block}.attention.dense", f"{attn}.projection"),
        **linear(f"{block}.post_attention_layernorm", "blocks.{}.norm_2"),
        **linear(f"{block}.mlp.dense_h_to_4h", "blocks.{}.mlp.up"),
        **linear(f"{block}.mlp.dense_4h_to_h", "blocks.{}.mlp.down"),
        **linear("gpt_neox.final_layer_norm", "norm_f"),
        "embed_out.weight": "lm_head.weight",
        "lm_head.weight": "lm_head.weight",
    }


FAMILY = Family(
    name="GPT-NeoX",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    read=read,
    weight_map=weight_map,
    prefix="gpt_neox.",
    gguf="gptneox",
    modules={"embed_out": "lm_head"},
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",),
    tokenizer_class="GPTNeoXTokenizer",
)
