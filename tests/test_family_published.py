"""What published config.json files mean: NeoX, Falcon, StableLM, Mistral, Mixtral, Phi-3; and the Llamas of the rest.

The number of parameters is the one that the model's card or its weights' index states, where it does. Some cards of
Stability AI count what tensor-parallel ranks hold in common (norms, biases of their outputs) once for each rank, and
in StableLM-alpha v2 a second norm that training had and nothing used; that is taken off here.
"""

import json
from dataclasses import replace

import pytest
import torch

from lit_sft import GPT, ModelConfig
from lit_sft.families import find_family


def neox(h: int, layers: int, heads: int, vocab: int, context: int, **fields: object) -> dict:
    """A GPT-NeoX config.json of 2023."""
    shape = {"hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    common = {"bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "intermediate_size": 4 * h}
    common |= {"layer_norm_eps": 1e-05, "max_position_embeddings": context, "rotary_emb_base": 10000}
    common |= {"initializer_range": 0.02, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True}
    kind = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    return kind | shape | common | {"rotary_pct": 0.25, "use_parallel_residual": True} | fields


def our_neox(h: int, layers: int, heads: int, vocab: int, context: int, **fields: object) -> ModelConfig:
    shape = {"n_embd": h, "n_layer": layers, "n_head": heads, "n_query_groups": heads, "vocab_size": vocab}
    shape |= {"head_size": h // heads, "intermediate_size": 4 * h, "block_size": context}
    biases = {"norm_bias": True, "qkv_bias": True, "projection_bias": True, "mlp_bias": True}
    kind = {"norm": "layer", "gated_mlp": False, "activation": "gelu", "parallel_residual": True}
    return ModelConfig(**shape | biases | kind | {"rotary_size": h // heads // 4} | fields)


FALCON = {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False, "bias": False}
FALCON |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "apply_residual_connection_post_layernorm": False}
FALCON |= {"bos_token_id": 11, "eos_token_id": 11, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05}
FALCON |= {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "vocab_size": 65024}
FALCON_7B = FALCON | {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "num_kv_heads": 71}
FALCON_40B = FALCON | {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8}
FALCON_40B |= {"new_decoder_architecture": True}
FALCON_180B = FALCON_40B | {"hidden_size": 14848, "num_attention_heads": 232, "num_hidden_layers": 80}
FALCON_11B = FALCON_40B | {"hidden_size": 4096, "num_attention_heads": 32, "num_ln_in_parallel_attn": 1}
FALCON_11B |= {"activation": "gelu", "ff_factor": 4, "ffn_hidden_size": 16384, "max_position_embeddings": 8192}
FALCON_11B |= {"rope_scaling": None, "rope_theta": 500042.0, "tie_word_embeddings": False}
FALCON_RW = FALCON | {"alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False, "vocab_size": 50304}
FALCON_RW |= {"num_attention_heads": 32, "num_hidden_layers": 24, "num_kv_heads": 32, "parallel_attn": False}
REFINED_40B = {"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb", "alibi": False, "bias": False}
REFINED_40B |= {"apply_residual_connection_post_layernorm": False, "hidden_size": 8192, "layer_norm_epsilon": 1e-05}
REFINED_40B |= {"n_head": 128, "n_head_kv": 8, "n_layer": 60, "parallel_attn": True, "vocab_size": 65024}
OUR_FALCON_7B = ModelConfig(
    block_size=2048,
    vocab_size=65024,
    n_layer=32,
    n_embd=4544,
    n_head=71,
    n_query_groups=1,
    head_size=64,
    intermediate_size=18176,
    norm="layer",
    norm_bias=True,
    parallel_residual=True,
    shared_norm=True,
    gated_mlp=False,
    activation="gelu",
    tie_embeddings=True,
)
OUR_FALCON_40B = replace(
    OUR_FALCON_7B,
    n_layer=60,
    n_embd=8192,
    n_head=128,
    n_query_groups=8,
    intermediate_size=32768,
    shared_norm=False,
)
STABLELM_3B = {"architectures": ["StableLMEpochForCausalLM"], "model_type": "stablelm_epoch", "hidden_act": "silu"}
STABLELM_3B |= {"hidden_size": 2560, "intermediate_size": 6912, "max_position_embeddings": 4096, "norm_eps": 1e-05}
STABLELM_3B |= {"num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32}
STABLELM_3B |= {"rope_pct": 0.25, "rope_theta": 10000, "rotary_scaling_factor": 1.0, "tie_word_embeddings": False}
STABLELM_3B |= {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 50304}
STABLELM_2 = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_act": "silu"}
STABLELM_2 |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "layer_norm_eps": 1e-05, "vocab_size": 100352}
STABLELM_2 |= {"max_position_embeddings": 4096, "num_attention_heads": 32, "partial_rotary_factor": 0.25}
STABLELM_2 |= {"rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False, "use_qkv_bias": True}
STABLELM_1_6B = STABLELM_2 | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
STABLELM_1_6B |= {"num_key_value_heads": 32}
STABLELM_12B = STABLELM_2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
STABLELM_12B |= {"num_key_value_heads": 8, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False}
OUR_STABLELM_3B = ModelConfig(
    block_size=4096,
    vocab_size=50304,
    n_layer=32,
    n_embd=2560,
    n_head=32,
    n_query_groups=32,
    head_size=80,
    intermediate_size=6912,
    norm="layer",
    norm_bias=True,
    rotary_size=20,
)
ALPHA_V2 = {"architectures": ["StableLMAlphaForCausalLM"], "model_type": "stablelm_alpha", "hidden_size": 2560}
ALPHA_V2 |= {"hidden_act": "silu", "max_position_embeddings": 4096, "norm_eps": 1e-05, "num_heads": 32}
ALPHA_V2 |= {"num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 0.25, "rotary_scaling_factor": 1.0}
ALPHA_V2 |= {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "vocab_size": 50432}
OUR_ALPHA_V2 = replace(OUR_STABLELM_3B, vocab_size=50432, parallel_residual=True, shared_norm=True)
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096}
MISTRAL |= {"bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 14336, "num_attention_heads": 32}
MISTRAL |= {"max_position_embeddings": 32768, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05}
MISTRAL |= {"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000}
MISTRAL_03 = MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
NEMO = MISTRAL_03 | {"head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 1024000, "vocab_size": 131072}
NEMO |= {"num_hidden_layers": 40}
MIXTRAL = MISTRAL_03 | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2}
MIXTRAL |= {"num_local_experts": 8, "output_router_logits": False, "router_aux_loss_coef": 0.02, "vocab_size": 32000}
OUR_MISTRAL = ModelConfig(
    block_size=32768,
    vocab_size=32000,
    n_layer=32,
    n_embd=4096,
    n_head=32,
    n_query_groups=8,
    head_size=128,
    intermediate_size=14336,
    sliding_window=4096,
    sliding_layers=(True,) * 32,
)
OUR_MISTRAL_03 = replace(OUR_MISTRAL, vocab_size=32768, rope_theta=1e6, sliding_window=None, sliding_layers=())
PHI_3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "hidden_act": "silu"}
PHI_3 |= {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_size": 3072, "vocab_size": 32064}
PHI_3 |= {"intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32}
PHI_3 |= {"num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096}
PHI_3 |= {"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047}
PHI_3 |= {"tie_word_embeddings": False}
SHORT, LONG = [1.0 + i / 100 for i in range(48)], [1.0 + i for i in range(48)]  # in place of the published ones
PHI_128K = PHI_3 | {"max_position_embeddings": 131072, "sliding_window": 262144}
PHI_128K |= {"rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}}
PHI_4 = PHI_3 | {"hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384}
PHI_4 |= {"num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10, "rope_theta": 250000}
PHI_4 |= {"original_max_position_embeddings": 16384, "sliding_window": None, "vocab_size": 100352}
PHI_4_MINI = PHI_128K | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
PHI_4_MINI |= {"num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75}
PHI_4_MINI |= {"tie_word_embeddings": True, "vocab_size": 200064}
OUR_PHI_3 = ModelConfig(
    block_size=4096,
    vocab_size=32064,
    n_layer=32,
    n_embd=3072,
    n_head=32,
    n_query_groups=32,
    head_size=96,
    intermediate_size=8192,
    sliding_window=2047,
    sliding_layers=(True,) * 32,
)
OUR_PHI_128K = replace(
    OUR_PHI_3,
    block_size=131072,
    sliding_window=262144,
    rope_type="longrope",
    rope_original_block_size=4096,
    rope_short_factors=tuple(SHORT),
    rope_long_factors=tuple(LONG),
    rope_attention_factor=1.1902380714238083,  # √(1 + ln 32 / ln 4096), which is √(17/12)
)
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 6656}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 17920, "num_attention_heads": 52}
LLAMA |= {"max_position_embeddings": 2048, "num_hidden_layers": 60, "rms_norm_eps": 1e-06, "vocab_size": 32000}
LLAMA |= {"pad_token_id": 0, "pretraining_tp": 1, "tie_word_embeddings": False, "use_cache": True}
OUR_30B = ModelConfig(
    block_size=2048,
    vocab_size=32000,
    n_layer=60,
    n_embd=6656,
    n_head=52,
    n_query_groups=52,
    head_size=128,
    intermediate_size=17920,
    norm_eps=1e-6,
)
LLAMA_2_13B = LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
LLAMA_2_13B |= {"max_position_embeddings": 4096, "num_hidden_layers": 40, "rms_norm_eps": 1e-05}
OUR_13B = replace(OUR_30B, n_layer=40, n_embd=5120, n_head=40, n_query_groups=40, intermediate_size=13824)
OUR_13B = replace(OUR_13B, block_size=4096, norm_eps=1e-5)
LLAMA_2_70B = LLAMA_2_13B | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
LLAMA_2_70B |= {"num_hidden_layers": 80, "num_key_value_heads": 8}
OUR_70B = replace(OUR_13B, n_layer=80, n_embd=8192, n_head=64, n_query_groups=8, intermediate_size=28672)

PUBLISHED: dict[str, tuple[dict, ModelConfig, int | None]] = {
    "StableBeluga2": (LLAMA_2_70B, OUR_70B, 68_976_648_192),
    "stablecode-completion-alpha-3b": (
        neox(2560, 32, 32, 49152, 16384),
        our_neox(2560, 32, 32, 49152, 16384),
        None,
    ),
    "falcon-7b": (FALCON_7B, OUR_FALCON_7B, 6_921_720_704),
    "falcon-40b": (FALCON_40B, OUR_FALCON_40B, None),
    "falcon-40b, first revision": (REFINED_40B, OUR_FALCON_40B, None),
    "falcon-180B": (
        FALCON_180B,
        replace(OUR_FALCON_40B, n_layer=80, n_embd=14848, n_head=232, intermediate_size=59392),
        None,
    ),
    "falcon-11B": (
        FALCON_11B,
        replace(
            OUR_FALCON_40B,
            n_embd=4096,
            n_head=32,
            head_size=128,
            intermediate_size=16384,
            block_size=8192,
            shared_norm=True,
            tie_embeddings=False,
            rope_theta=500042.0,
        ),
        None,
    ),
    "falcon-rw-1b": (
        FALCON_RW,
        replace(
            OUR_FALCON_7B,
            vocab_size=50304,
            n_layer=24,
            n_embd=2048,
            n_head=32,
            n_query_groups=32,
            intermediate_size=8192,
            parallel_residual=False,
            shared_norm=False,
            qkv_bias=True,
            projection_bias=True,
            mlp_bias=True,
            alibi=True,
            rotary_size=0,
        ),
        1_311_625_216,
    ),
    "vicuna-33b-v1.3": (LLAMA, OUR_30B, 32_528_943_616),
    "RedPajama-INCITE-Base-3B-v1": (
        neox(2560, 32, 32, 50432, 2048, rotary_pct=1.0, use_parallel_residual=False),
        our_neox(2560, 32, 32, 50432, 2048, rotary_size=None, parallel_residual=False),
        2_775_864_320,
    ),
    "RedPajama-INCITE-7B-Base": (
        neox(4096, 32, 32, 50432, 2048, rotary_pct=1.0, use_parallel_residual=False),
        our_neox(4096, 32, 32, 50432, 2048, rotary_size=None, parallel_residual=False),
        6_857_302_016,
    ),
    "pythia-70m": (neox(512, 6, 8, 50304, 2048), our_neox(512, 6, 8, 50304, 2048), 70_426_624),
    "pythia-410m": (neox(1024, 24, 16, 50304, 2048), our_neox(1024, 24, 16, 50304, 2048), 405_334_016),
    "pythia-1b": (neox(2048, 16, 8, 50304, 2048), our_neox(2048, 16, 8, 50304, 2048), 1_011_781_632),
    "pythia-6.9b": (neox(4096, 32, 32, 50432, 2048), our_neox(4096, 32, 32, 50432, 2048), 6_857_302_016),
    "pythia-12b": (neox(5120, 36, 40, 50688, 2048), our_neox(5120, 36, 40, 50688, 2048), 11_846_072_320),
    "stablelm-base-alpha-3b": (
        neox(4096, 16, 32, 50688, 4096),
        our_neox(4096, 16, 32, 50688, 4096),
        3_638_525_952 - 3 * (16 * 6 + 2) * 4096,
    ),
    "stablelm-base-alpha-7b": (
        neox(6144, 16, 48, 50432, 4096),
        our_neox(6144, 16, 48, 50432, 4096),
        7_869_358_080 - (16 * 6 + 2) * 6144,
    ),
    "Platypus-30B": (LLAMA, OUR_30B, 32_528_943_616),
    "Nous-Hermes-Llama2-13b": (
        LLAMA_2_13B | {"vocab_size": 32032},
        replace(OUR_13B, vocab_size=32032),
        13_015_864_320 + 2 * 32 * 5120,
    ),
    "CodeLlama-13b-Python-hf": (
        LLAMA_2_13B | {"max_position_embeddings": 16384, "rope_theta": 1000000, "num_key_value_heads": 40},
        replace(OUR_13B, block_size=16384, rope_theta=1e6),
        13_015_864_320,
    ),
    "stablelm-3b-4e1t": (STABLELM_3B, OUR_STABLELM_3B, 2_795_443_200),
    "stablelm-2-1_6b": (
        STABLELM_1_6B,
        replace(
            OUR_STABLELM_3B,
            vocab_size=100352,
            n_layer=24,
            n_embd=2048,
            head_size=64,
            intermediate_size=5632,
            rotary_size=16,
            qkv_bias=True,
        ),
        1_644_515_328,
    ),
    "stablelm-2-12b": (
        STABLELM_12B,
        replace(
            OUR_STABLELM_3B,
            vocab_size=100352,
            n_layer=40,
            n_embd=5120,
            n_query_groups=8,
            head_size=160,
            intermediate_size=13824,
            rotary_size=40,
            qk_norm="each_head",
            parallel_residual=True,
            shared_norm=True,
        ),
        12_143_605_760 - (40 * 2 + 2) * 5120,
    ),
    "stablelm-base-alpha-3b-v2": (ALPHA_V2, OUR_ALPHA_V2, 2_796_431_360 - (32 * (2 + 4) + 2) * 2560),
    "stablelm-base-alpha-7b-v2": (
        ALPHA_V2 | {"hidden_size": 4096},
        replace(OUR_ALPHA_V2, n_embd=4096, head_size=128, intermediate_size=11008, rotary_size=32),
        6_890_209_280 - (32 * (2 + 4) + 2) * 4096,
    ),
    "Mistral-7B-v0.1": (MISTRAL, OUR_MISTRAL, 7_241_732_096),
    "Mistral-7B-v0.3": (MISTRAL_03, OUR_MISTRAL_03, 7_248_023_552),
    "Mistral-Nemo-Base-2407": (
        NEMO,
        replace(OUR_MISTRAL_03, block_size=1024000, vocab_size=131072, n_layer=40, n_embd=5120),
        12_247_782_400,
    ),
    "Mixtral-8x7B-v0.1": (
        MIXTRAL,
        replace(OUR_MISTRAL_03, vocab_size=32000, n_expert=8, n_expert_per_token=2),
        46_702_792_704,
    ),
    "Phi-3-mini-4k-instruct": (PHI_3, OUR_PHI_3, 3_821_079_552),
    "Phi-3-mini-128k-instruct": (PHI_128K, OUR_PHI_128K, 3_821_079_552),
    "phi-4": (
        PHI_4,
        replace(
            OUR_PHI_3,
            block_size=16384,
            vocab_size=100352,
            n_layer=40,
            n_embd=5120,
            n_head=40,
            n_query_groups=10,
            head_size=128,
            intermediate_size=17920,
            sliding_window=None,
            sliding_layers=(),
            rope_theta=250000.0,
        ),
        14_659_507_200,
    ),
    "Phi-4-mini-instruct": (
        PHI_4_MINI,
        replace(
            OUR_PHI_128K,
            vocab_size=200064,
            n_head=24,
            n_query_groups=8,
            head_size=128,
            rotary_size=96,
            tie_embeddings=True,
        ),
        3_836_021_760,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_means_this(name: str) -> None:
    published, expected, n_parameters = PUBLISHED[name]
    config = find_family(published).read_config(published)
    assert config == expected
    if n_parameters is not None:
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(config).parameters()) == n_parameters


OWN_CODE = ("RefinedWeb", "stablelm_epoch", "stablelm_alpha")  # spellings that transformers has no class for


@pytest.mark.parametrize("name", [name for name, (file, *_) in PUBLISHED.items() if file["model_type"] not in OWN_CODE])
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    """Older spellings, read by transformers and written by it again."""
    from transformers import AutoConfig

    published, expected, _ = PUBLISHED[name]
    rewritten = AutoConfig.for_model(**json.loads(json.dumps(published))).to_dict()
    assert ("rope_parameters" in rewritten) and rewritten != published
    assert find_family(rewritten).read_config(rewritten) == expected
