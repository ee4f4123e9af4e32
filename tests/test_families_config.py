"""What published config.json files mean, field by field; and what is refused by name rather than ignored."""

import json
from dataclasses import replace

import pytest
import torch

from lit_sft import GPT, ModelConfig
from lit_sft.errors import InputError
from lit_sft.families import FAMILIES, find_family
from lit_sft.families.family import text_config

# as on the Hub, but for fields that say nothing about the computation (initializer_range, transformers_version, …)
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
OURS_LLAMA_2_7B = ModelConfig(
    block_size=4096,
    vocab_size=32000,
    n_layer=32,
    n_embd=4096,
    n_head=32,
    n_query_groups=32,
    head_size=128,
    intermediate_size=11008,
)
LLAMA_2_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
LLAMA_3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1_8B = LLAMA_2_7B | {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA_3_ROPE,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
OURS_LLAMA_3_1_8B = replace(
    OURS_LLAMA_2_7B,
    block_size=131072,
    vocab_size=128256,
    n_query_groups=8,
    intermediate_size=14336,
    rope_theta=5e5,
    rope_type="llama3",
    rope_factor=8.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_block_size=8192,
)
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
OPEN_LLAMA_3B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LONGCHAT_7B = {**OPEN_LLAMA_3B, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LONGCHAT_7B |= {"max_sequence_length": 2048, "rope_condense_ratio": 8}
OURS_OLD_7B = replace(OURS_LLAMA_2_7B, block_size=2048, norm_eps=1e-6)
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
OURS_QWEN_2_5_7B = ModelConfig(
    block_size=32768,
    vocab_size=152064,
    n_layer=28,
    n_embd=3584,
    n_head=28,
    n_query_groups=4,
    head_size=128,
    intermediate_size=18944,
    norm_eps=1e-6,
    qkv_bias=True,
    rope_theta=1e6,
)
QWEN_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN_3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OURS_QWEN_3_06B = ModelConfig(
    block_size=40960,
    vocab_size=151936,
    n_layer=28,
    n_embd=1024,
    n_head=16,
    n_query_groups=8,
    head_size=128,
    intermediate_size=3072,
    norm_eps=1e-6,
    qk_norm="head",
    tie_embeddings=True,
    rope_theta=1e6,
)
QWEN_3_30B_A3B = QWEN_3_06B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
GEMMA_7B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
OURS_GEMMA_7B = ModelConfig(
    block_size=8192,
    vocab_size=256000,
    n_layer=28,
    n_embd=3072,
    n_head=16,
    n_query_groups=16,
    head_size=256,
    intermediate_size=24576,
    norm_eps=1e-6,
    norm_unit_offset=True,
    activation="gelu_tanh",
    tie_embeddings=True,
    embedding_scale=3072**0.5,
)
GEMMA_2_27B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
OURS_GEMMA_2_27B = replace(
    OURS_GEMMA_7B,
    n_layer=46,
    n_embd=4608,
    n_head=32,
    head_size=128,
    intermediate_size=36864,
    embedding_scale=4608**0.5,
    post_norm=True,
    attention_scale=1 / 12,
    attention_softcap=50.0,
    logits_softcap=30.0,
    sliding_window=4096,
    sliding_layers=(True, False) * 23,
)
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
OURS_GEMMA_3_1B = ModelConfig(
    block_size=32768,
    vocab_size=262144,
    n_layer=26,
    n_embd=1152,
    n_head=4,
    n_query_groups=1,
    head_size=256,
    intermediate_size=6912,
    norm_eps=1e-6,
    norm_unit_offset=True,
    post_norm=True,
    qk_norm="head",
    activation="gelu_tanh",
    tie_embeddings=True,
    embedding_scale=1152**0.5,
    attention_scale=1 / 16,
    sliding_window=512,
    sliding_layers=((True,) * 5 + (False,)) * 4 + (True, True),
    rope_theta=1e6,
    rope_local_theta=1e4,
)
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model"},
}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
OLMO_2_7B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
PUBLISHED = {
    "Llama-2-7b": (LLAMA_2_7B, OURS_LLAMA_2_7B),
    "Llama-2-70b": (
        LLAMA_2_7B | LLAMA_2_70B | {"num_key_value_heads": 8},
        replace(OURS_LLAMA_2_7B, n_layer=80, n_embd=8192, n_head=64, n_query_groups=8, intermediate_size=28672),
    ),
    "CodeLlama-7b": (
        LLAMA_2_7B | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016},
        replace(OURS_LLAMA_2_7B, block_size=16384, rope_theta=1e6, vocab_size=32016),
    ),
    "vicuna-7b-v1.5-16k": (
        LLAMA_2_7B | {"max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        replace(OURS_LLAMA_2_7B, rope_type="linear", rope_factor=4.0),
    ),
    "longchat-7b-16k": (LONGCHAT_7B, replace(OURS_OLD_7B, rope_type="linear", rope_factor=8.0)),
    "open_llama_3b": (
        OPEN_LLAMA_3B,
        replace(OURS_OLD_7B, n_layer=26, n_embd=3200, head_size=100, intermediate_size=8640),
    ),
    "Llama-3.1-8B": (LLAMA_3_1_8B, OURS_LLAMA_3_1_8B),
    "Llama-3.2-1B": (
        LLAMA_3_2_1B,
        replace(
            OURS_LLAMA_3_1_8B,
            n_layer=16,
            n_embd=2048,
            head_size=64,
            intermediate_size=8192,
            rope_factor=32.0,
            tie_embeddings=True,
        ),
    ),
    "SmolLM2-135M": (
        SMOLLM2_135M,
        ModelConfig(
            block_size=8192,
            vocab_size=49152,
            n_layer=30,
            n_embd=576,
            n_head=9,
            n_query_groups=3,
            head_size=64,
            intermediate_size=1536,
            tie_embeddings=True,
            rope_theta=1e5,
        ),
    ),
    "Qwen2.5-7B": (QWEN_2_5_7B, OURS_QWEN_2_5_7B),
    "Qwen2.5-7B with YaRN as its model card says": (
        QWEN_2_5_7B | {"rope_scaling": QWEN_YARN},
        replace(
            OURS_QWEN_2_5_7B,
            rope_type="yarn",
            rope_factor=4.0,
            rope_original_block_size=32768,
            rope_attention_factor=1.1386294361119891,
        ),
    ),
    "Qwen3-0.6B": (QWEN_3_06B, OURS_QWEN_3_06B),
    "Qwen3-30B-A3B": (
        QWEN_3_30B_A3B,
        replace(
            OURS_QWEN_3_06B,
            n_layer=48,
            n_embd=2048,
            n_head=32,
            n_query_groups=4,
            intermediate_size=768,
            n_expert=128,
            n_expert_per_token=8,
            normalize_experts=True,
            tie_embeddings=False,
        ),
    ),
    "gemma-7b": (GEMMA_7B, OURS_GEMMA_7B),
    "gemma-2-27b": (GEMMA_2_27B, OURS_GEMMA_2_27B),
    "gemma-3-1b-it": (GEMMA_3_1B, OURS_GEMMA_3_1B),
    "gemma-3-4b-it": (
        GEMMA_3_4B,
        replace(
            OURS_GEMMA_3_1B,
            block_size=131072,
            vocab_size=262208,
            n_layer=34,
            n_embd=2560,
            n_head=8,
            n_query_groups=4,
            intermediate_size=10240,
            embedding_scale=2560**0.5,
            sliding_window=1024,
            sliding_layers=((True,) * 5 + (False,)) * 5 + (True,) * 4,
            rope_type="linear",
            rope_factor=8.0,
        ),
    ),
    "SmolLM3-3B": (
        SMOLLM3_3B,
        ModelConfig(
            block_size=65536,
            vocab_size=128256,
            n_layer=36,
            n_embd=2048,
            n_head=16,
            n_query_groups=4,
            head_size=128,
            intermediate_size=11008,
            norm_eps=1e-6,
            tie_embeddings=True,
            rope_layers=(True, True, True, False) * 9,
            rope_theta=5e6,
        ),
    ),
    "OLMo-2-1124-7B": (
        OLMO_2_7B,
        replace(
            OURS_LLAMA_2_7B,
            vocab_size=100352,
            norm_eps=1e-6,
            round_late=True,
            pre_norm=False,
            post_norm=True,
            qk_norm="full",
            rope_theta=5e5,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_mean_this(name: str) -> None:
    published, expected = PUBLISHED[name]
    assert find_family(published).read_config(published) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_have_as_many_parameters_as_in_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    published, expected = PUBLISHED[name]
    fields = json.loads(json.dumps(text_config(published) if "text_config" in published else published))
    theirs = AutoConfig.for_model(**fields)
    theirs.num_hidden_layers = 2  # the layers are alike
    theirs.layer_types = (getattr(theirs, "layer_types", None) or [])[:2]
    layers = {field: getattr(expected, field)[:2] for field in ("sliding_layers", "rope_layers")}
    layers["sliding_layers"] = layers["sliding_layers"] if any(layers["sliding_layers"]) else ()
    with torch.device("meta"):
        reference, ours = AutoModelForCausalLM.from_config(theirs), GPT(replace(expected, n_layer=2, **layers))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())


def test_without_architectures_the_model_type_decides() -> None:
    for family in FAMILIES:
        for model_type in family.model_types:
            assert find_family({"model_type": model_type}) is family
        for architecture in family.architectures:
            assert find_family({"architectures": [architecture]}) is family
    names = [name for family in FAMILIES for name in (*family.architectures, *family.model_types)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("published", "change", "message"),
    [
        (LLAMA_2_7B, {"rope_interleaved": True}, "rope_interleaved = True"),
        (LLAMA_2_7B, {"is_causal": False}, "is_causal = False"),
        (LLAMA_2_7B, {"vision_config": {"hidden_size": 8}}, "vision_config"),
        (LLAMA_2_7B, {"quantization": {"bits": 4, "group_size": 64}}, "quantization = "),
        (LLAMA_2_7B, {"layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, "layer_types"),
        (LLAMA_2_7B, {"num_local_experts": 8}, "num_local_experts = 8"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional' is not supported"),
        (
            LLAMA_2_7B,
            {"rope_scaling": QWEN_YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "differs from rope_parameters .* delete one",
        ),
        (LLAMA_2_7B, {"rope_scaling": QWEN_YARN | {"truncate": False}}, "truncate = False"),
        (LLAMA_2_7B, {"rope_scaling": QWEN_YARN | {"log_scale": 0.7}}, "log_scale = 0.7"),
        (QWEN_2_5_7B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (QWEN_2_5_7B, {"use_mrope": True}, "use_mrope = True"),
        (QWEN_2_5_7B, {"is_causal": False}, "is_causal = False"),
        (QWEN_2_5_7B, {"dual_chunk_attention_config": {"local_size": 8192}}, "dual_chunk_attention_config"),
        (QWEN_2_5_7B, {"layer_types": ["linear_attention"] * 28}, "layer_types has 'linear_attention'"),
        (QWEN_2_5_7B, {"layer_types": ["sliding_attention"] * 28}, "no sliding_window is in use"),
        (QWEN_2_5_7B, {"mlp_bias": True}, "mlp_bias = True"),
        (QWEN_3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (QWEN_3_30B_A3B, {"mlp_only_layers": [0, 1]}, r"mlp_only_layers = \[0, 1\]"),
        (QWEN_3_30B_A3B, {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size = 512"),
        (GEMMA_7B, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        (GEMMA_7B, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA_2_27B, {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        (GEMMA_2_27B, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA_3_4B, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            GEMMA_3_1B,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding layers is not supported",
        ),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "rope_layers is given for 2 of 36"),
        (OLMO_2_7B, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ],
)
def test_what_would_change_the_computation_is_refused_by_name(published: dict, change: dict, message: str) -> None:
    find_family(published).read_config(published)
    with pytest.raises(InputError, match=message):
        find_family(published).read_config(published | change)


def test_both_spellings_may_say_the_same() -> None:
    both = QWEN_2_5_7B | {"rope_scaling": QWEN_YARN, "rope_parameters": {**QWEN_YARN, "rope_type": "yarn"}}
    once = QWEN_2_5_7B | {"rope_scaling": QWEN_YARN}
    assert find_family(both).read_config(both) == find_family(once).read_config(once)


@pytest.mark.parametrize("name", ["layer_types", "no_rope_layers", "mlp_layer_types"])
def test_a_list_that_changes_no_layer_is_neutral(name: str) -> None:
    same = {"layer_types": "full_attention", "no_rope_layers": 1, "mlp_layer_types": "dense"}[name]
    silent = LLAMA_2_7B | {name: [same] * 32}
    assert find_family(silent).read_config(silent) == OURS_LLAMA_2_7B


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2"]
)
def test_a_silent_file_means_what_it_means_to_transformers(name: str) -> None:
    """The defaults of everything that a config.json may leave out: the same as those that transformers fills in."""
    from transformers import AutoConfig

    silent = {"model_type": name, "vocab_size": 100, "num_hidden_layers": 8, "hidden_size": 64}
    silent |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
    full = AutoConfig.for_model(**silent).to_dict()
    assert find_family(silent).read_config(silent) == find_family(full).read_config(full)
