"""Every field of a config.json is read, known to compute nothing, or refused by name; transformers says which it is."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_families_config as configs
import test_family_published as published
import torch
from conftest import ROOT
from family_variants import VARIANTS, longrope, without
from safetensors.torch import load_file, save_file
from test_families import make_reference
from wrapped_models import WRAPPED, make_wrapped

from lit_sft import ModelConfig, load_model
from lit_sft.args import ConvertArgs, ExportHFArgs
from lit_sft.checkpoint import save_model
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.export import export_hf
from lit_sft.families import find_family
from lit_sft.verify import convert_verified, fixed_ids

ROPE = ("rope_parameters", "rope_scaling", "rope_theta")


def edit(directory: Path, **fields: object) -> None:
    """Change config.json; rotary fields replace those that are there."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if fields.keys() & {*ROPE, "original_max_position_embeddings"}:
        theta = (config.get("rope_parameters") or {}).get("rope_theta", 1e4)
        config = without(config, *ROPE) | {"rope_theta": theta}
    path.write_text(json.dumps(config | fields))


def convert(directory: Path, verify: bool = False, **flags: object) -> None:
    (convert_verified if verify else convert_checkpoint)(ConvertArgs(checkpoint_dir=str(directory), **flags))


# what transformers writes

GENERAL = {  # of its versions 4, with values that are not the default
    **{"return_dict": False, "output_hidden_states": True, "output_attentions": True, "torchscript": True},
    **{"use_bfloat16": True, "tf_legacy_loss": True, "pruned_heads": {}, "chunk_size_feed_forward": 7},
    **{"is_decoder": True, "cross_attention_hidden_size": 3, "tie_encoder_decoder": True, "max_length": 99},
    **{"min_length": 3, "do_sample": True, "early_stopping": True, "num_beams": 4, "num_beam_groups": 2},
    **{"diversity_penalty": 0.5, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "typical_p": 0.5},
    **{"repetition_penalty": 1.5, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]]},
    **{"encoder_no_repeat_ngram_size": 3, "num_return_sequences": 2, "output_scores": True},
    **{"return_dict_in_generate": True, "forced_bos_token_id": 1, "forced_eos_token_id": 2, "prefix": "x"},
    **{"remove_invalid_values": True, "exponential_decay_length_penalty": [1, 1.1], "suppress_tokens": [1]},
    **{"begin_suppress_tokens": [1], "finetuning_task": "x", "id2label": {"0": "A"}, "label2id": {"A": 0}},
    **{"tokenizer_class": "LlamaTokenizer", "sep_token_id": 1, "decoder_start_token_id": 1, "problem_type": "x"},
    **{"task_specific_params": {"a": {"b": 1}}, "_name_or_path": "x/y", "transformers_version": "4.31.0"},
    **{"auto_map": {"AutoConfig": "configuration_x.XConfig"}, "torch_dtype": "float16", "use_cache": False},
    **{"attn_implementation": "eager", "_attn_implementation_autoset": True, "pretraining_tp": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_general_fields_of_transformers_change_nothing(name: str) -> None:
    """Those of today's classes at whatever value, and those of its versions 4."""
    from transformers import AutoConfig, GenerationConfig, PretrainedConfig

    variant = VARIANTS[name]
    saved = json.loads(AutoConfig.for_model(variant.model_type, **configs_of(name)).to_json_string(use_diff=False))
    saved = variant.edit(saved) if variant.edit else saved
    expected = find_family(saved).read_config(saved)
    computed = {"architectures", "model_type", "tie_word_embeddings", "is_encoder_decoder", "add_cross_attention"}
    general = {*PretrainedConfig().to_dict(), *GenerationConfig().to_dict()} - computed
    todays = saved | {field: 7 for field in general if not isinstance(saved.get(field), dict)}
    for full in (todays, saved | GENERAL):
        assert find_family(full).read_config(full) == expected


def configs_of(name: str) -> dict:
    from family_variants import SHAPE

    return SHAPE | VARIANTS[name].config


@pytest.mark.parametrize("name", WRAPPED)
def test_fields_of_multimodal_classes_change_nothing(name: str, tmp_path: Path) -> None:
    """As written in full, without leaving out what is the class's default."""
    import transformers

    model = make_wrapped(tmp_path, WRAPPED[name])
    short = json.loads((tmp_path / "config.json").read_text())
    full = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": short["architectures"]}
    assert isinstance(model, transformers.PreTrainedModel)
    assert find_family(full).read_config(full) == find_family(short).read_config(short)
    with pytest.raises(InputError, match=r"residual_scale = 0\.5: the toolkit does not know"):
        find_family(full).read_config(full | {"residual_scale": 0.5})


# what repositories hold besides

UNSLOTH = {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "use_cache": False, "rope_scaling": None}
NEMO = published.NEMO | {"_attn_implementation_autoset": True}
LEFTOVERS = {
    "Hermes": (
        configs.LLAMA_3_1_8B,
        {"_name_or_path": "NousResearch/x", "torch_dtype": "bfloat16", "eos_token_ids": [1]},
    ),
    "Llama 1": (configs.LLAMA_2_7B, {"max_sequence_length": 2048, "pad_token_id": 0}),
    "unsloth": (configs.LLAMA_2_7B, UNSLOTH),
    "Falcon3": (configs.LLAMA_2_7B, {"activation": "swiglu", "head_dim": 128}),
    "SmolLM2": (configs.SMOLLM2_135M, {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
    "dolly": (published.neox(64, 2, 4, 100, 128), {"custom_pipelines": {"text-generation": {"impl": "x.Y"}}}),
    "GPT-NeoX-20B": (published.neox(64, 2, 4, 100, 128), {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}),
    "stablelm-3b": (published.STABLELM_3B, {"num_heads": 32, "rotary_scaling_factor": 1.0, "use_cache": True}),
    "Phi-4-mini": (published.PHI_4_MINI, {"auto_map": {"AutoConfig": "x.Y"}, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    "Nemo": (NEMO, {"head_dim": 128, "_attn_implementation": "sdpa"}),
    "Mixtral": (published.MIXTRAL, {"norm_topk_prob": True, "router_jitter_noise": 0.0}),
    "Qwen3-Coder-30B": (
        configs.QWEN_3_30B_A3B,
        {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0, "max_window_layers": 28},
    ),
    "Qwen2 of others": (configs.QWEN_2_5_7B, {"qkv_bias": True, "attention_bias": True, "rope_interleaved": False}),
    "gemma-2, first": (configs.GEMMA_2_27B, {"sliding_window_size": 4096, "_attn_implementation": "eager"}),
    "gemma-3": (configs.GEMMA_3_1B, {"use_bidirectional_attention": False, "_sliding_window_pattern": 6}),
    "OLMo-2": (configs.OLMO_2_7B, {"qk_norm": True, "clip_qkv": None, "norm_type": "rms"}),
    "Falcon-40B": (published.FALCON_40B, {"alibi": False, "auto_map": {"AutoConfig": "x.Y"}, "rope_scaling": None}),
    "DeepSeek-R1-Distill": (configs.QWEN_2_5_7B, {"use_mrope": False, "sliding_window": 4096, "max_window_layers": 28}),
    "a Mistral as Llama": (configs.LLAMA_2_7B, {"sliding_window": 4096, "use_sliding_window": False}),
    "no further layers": (configs.QWEN_3_06B, {"num_nextn_predict_layers": 0, "n_group": 0, "num_mtp_layers": 0}),
    "merged, unused": (
        configs.LLAMA_2_7B,
        {"use_gated_attention": False, "residual_scale": None, "gates": [], "x": ""},
    ),
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_published_files_hold_besides_changes_nothing(name: str) -> None:
    base, besides = LEFTOVERS[name]
    assert find_family(base).read_config(base | besides) == find_family(base).read_config(base)


def test_a_published_smolvlm() -> None:
    """Its text_config has leftovers of the model before it."""
    text = {"_flash_attn_2_enabled": True, "architectures": ["VLlama3ForCausalLM"], "head_dim": 64, "hidden_size": 2048}
    text |= {"intermediate_size": 8192, "is_llama_config": True, "max_position_embeddings": 16384, "vocab_size": 49155}
    text |= {"model_type": "llama", "neftune_noise_alpha": 0.0, "num_key_value_heads": 32, "pixel_shuffle_factor": 3}
    text |= {"perceiver_config": {"resampler_depth": 6}, "qk_layer_norms": False, "use_resampler": False}
    text |= {"num_hidden_layers": 24, "rms_norm_eps": 1e-05, "rope_theta": 273768}
    whole = {"architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 49153, "model_type": "idefics3"}
    whole |= {"scale_factor": 3, "text_config": text, "tie_word_embeddings": False, "vocab_size": 49155}
    whole |= {"vision_config": {"hidden_size": 1152, "use_reentrant_checkpointing": False}}
    assert find_family(whole).read_config(whole).rope_theta == 273768


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (configs.LLAMA_2_7B, "use_qk_norm", True),
        (configs.LLAMA_2_7B, "activation", "gelu"),
        (configs.LLAMA_2_7B, "activation", "geglu"),
        (configs.LLAMA_2_7B, "sliding_window_size", 4096),
        (configs.LLAMA_2_7B, "norm_type", "layernorm"),
        (configs.LLAMA_2_7B, "causal", False),
        (configs.LLAMA_2_7B, "use_rope", False),
        (configs.LLAMA_2_7B, "swiglu", False),
        (configs.LLAMA_2_7B, "pre_norm", False),
        (configs.LLAMA_2_7B, "pruned_heads", {"0": [1]}),
        (configs.LLAMA_2_7B, "num_heads", 16),
        (configs.LLAMA_2_7B, "sliding_window", 4096),
        (configs.GEMMA_2_27B, "sliding_window_size", 1024),
        (configs.QWEN_2_5_7B, "use_qk_norm", True),
        (configs.QWEN_2_5_7B, "mlp_bias", True),
        (published.MIXTRAL, "norm_topk_prob", False),
        (published.neox(64, 2, 4, 100, 128), "head_dim", 8),
        (published.neox(64, 2, 4, 100, 128), "use_rmsnorm", True),
        (published.FALCON_7B, "head_dim", 32),
    ],
)
def test_a_field_that_says_otherwise_is_refused(base: dict, field: str, value: object) -> None:
    find_family(base).read_config(base)
    with pytest.raises(InputError, match=rf"{field} = .* is not supported .* --accept_config_key {field}$"):
        find_family(base).read_config(base | {field: value})
    assert find_family(base).read_config(base | {field: value}, [field]) == find_family(base).read_config(base)


def test_all_that_is_refused_is_named_at_once() -> None:
    asked = configs.LLAMA_2_7B | {"zeta": 1, "residual_scale": 0.5, "use_mrope": True, "use_cla": 2}
    names = "use_mrope,use_cla,zeta,residual_scale"
    with pytest.raises(
        InputError, match=rf"zeta = 1, residual_scale = 0\.5: the toolkit .* --accept_config_key {names}$"
    ):
        find_family(asked).read_config(asked)
    assert find_family(asked).read_config(asked, names.split(",")) == configs.OURS_LLAMA_2_7B


@pytest.mark.parametrize(
    "fields",
    [{"residual_scale": 0.0}, {"residual_scale": 1}, {"gate": "sigmoid"}, {"layers": [0]}, {"num_mtp_layers": 1}],
)
def test_a_field_of_an_unknown_name_is_refused_at_any_other_value(fields: dict) -> None:
    for base in (configs.LLAMA_2_7B, configs.GEMMA_3_4B, published.FALCON_7B, configs.QWEN_3_30B_A3B):
        with pytest.raises(InputError, match=f"{next(iter(fields))} = .*: the toolkit does not know"):
            find_family(base).read_config(base | fields)


# what transformers makes of rotary fields as they are published

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", **without(longrope(8), "rope_type", "rope_theta")}
SCALINGS: dict[str, tuple[str, dict, str | None]] = {
    "DeepSeek-R1-0528-Qwen3-8B": (
        "qwen3",
        {"rope_scaling": without(YARN, "type") | {"rope_type": "yarn", "attn_factor": 0.8782488562869419}},
        "attn_factor of the rope scaling: not read",
    ),
    "Yarn-Llama": ("llama multi-head", {"rope_scaling": YARN | {"finetuned": True}}, "finetuned of the rope scaling"),
    "Yarn-Mistral": ("mistral 0.1", {"rope_scaling": YARN | {"finetuned": True}}, "finetuned of the rope scaling"),
    "yarn, one mscale": ("llama multi-head", {"rope_scaling": YARN | {"mscale": 0.7}}, None),
    "yarn, two": ("llama multi-head", {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}, None),
    "yarn, attention_factor": (
        "llama multi-head",
        {"rope_scaling": YARN | {"attention_factor": 0.5, "mscale": 2.0}},
        None,
    ),
    "yarn, nulls": ("llama multi-head", {"rope_scaling": YARN | {"factor": None, "beta_fast": None}}, None),
    "yarn, context outside": (
        "llama multi-head",
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        None,
    ),
    "yarn, no context": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, None),
    "llama3, context outside": (
        "llama multi-head",
        {"rope_scaling": LLAMA3 | YARN | LLAMA3 | {"type": "llama3"}, "original_max_position_embeddings": 128},
        None,
    ),
    "llama3, no context": ("llama multi-head", {"rope_scaling": LLAMA3}, None),
    "linear, with a context": (
        "llama multi-head",
        {"rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}},
        None,
    ),
    "default, factor 1": ("llama multi-head", {"rope_scaling": {"type": "default", "factor": 1.0}}, None),
    "dynamic": (
        "llama multi-head",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "none within the context of 512",
    ),
    "longrope, Phi-3's own context": ("phi 3", {"rope_scaling": LONG, "max_position_embeddings": 8192}, None),
    "longrope, factor": (
        "llama multi-head",
        {"rope_scaling": LONG | {"factor": 8.0, "original_max_position_embeddings": 64}},
        None,
    ),
    "mrope": (
        "qwen2",
        {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}},
        "mrope_section of the rope scaling: not read",
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_fields_mean_what_they_mean_to_transformers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    variant, fields, notice = SCALINGS[name]
    make_reference(tmp_path, VARIANTS[variant])
    edit(tmp_path, **fields)
    convert(tmp_path, verify=True)
    said = capsys.readouterr().out
    assert "verified: 256 positions" in said
    assert (notice in said) if notice else ("notice" not in said)


def test_mrope_by_its_own_name_is_plain(tmp_path: Path) -> None:
    """transformers has no such type for a text model alone, whose three positions are one; verify says so."""
    make_reference(tmp_path, VARIANTS["qwen2"])
    convert(tmp_path)
    plain = ModelConfig.from_dir(tmp_path)
    edit(tmp_path, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    convert(tmp_path)
    assert ModelConfig.from_dir(tmp_path) == plain
    with pytest.raises(InputError, match=r"transformers cannot load it \(KeyError: 'mrope'\); leave --verify out"):
        convert(tmp_path, verify=True)


def test_a_key_of_a_rotary_scaling_is_accepted_by_its_path(tmp_path: Path) -> None:
    make_reference(tmp_path, VARIANTS["llama multi-head"])
    edit(tmp_path, rope_scaling=YARN | {"log_scale": 0.7, "warmup": 3, "off": False})
    names = "rope_scaling.log_scale,rope_scaling.warmup"
    with pytest.raises(InputError, match=rf"log_scale = 0\.7, .*warmup = 3: not known .* --accept_config_key {names}$"):
        convert(tmp_path)
    convert(tmp_path, verify=True, accept_config_key=names)
    with pytest.raises(InputError, match=r"--accept_config_key rope_scaling\.x: config\.json has no such field"):
        convert(tmp_path, accept_config_key="rope_scaling.x")


def test_an_accepted_field_is_not_read(tmp_path: Path) -> None:
    """Not even where the family would read it."""
    make_reference(tmp_path, VARIANTS["llama multi-head"])
    convert(tmp_path)
    plain = ModelConfig.from_dir(tmp_path)
    edit(tmp_path, rope_scaling={"type": "proportional", "factor": 2.0})
    with pytest.raises(InputError, match="'proportional' is not supported"):
        convert(tmp_path)
    convert(tmp_path, accept_config_key="rope_scaling")
    assert ModelConfig.from_dir(tmp_path) == plain


# what else is published

CHUNKS = {"chunk_size": 300, "local_size": 100, "original_max_position_embeddings": 300}


@pytest.mark.parametrize(
    ("chunks", "block_size"),
    [
        (CHUNKS, 300),
        (CHUNKS | {"original_max_position_embeddings": 256}, 256),
        (without(CHUNKS, "original_max_position_embeddings") | {"sparse_attention_enabled": True}, 300),
        (CHUNKS | {"chunk_size": 9999, "original_max_position_embeddings": 9999}, 512),
    ],
)
def test_dual_chunk_attention_up_to_its_threshold(
    tmp_path: Path, chunks: dict, block_size: int, capsys: pytest.CaptureFixture
) -> None:
    make_reference(tmp_path, VARIANTS["qwen2"])
    edit(tmp_path, dual_chunk_attention_config=chunks)
    convert(tmp_path, verify=True)
    assert ModelConfig.from_dir(tmp_path).block_size == block_size
    assert f"plain attention up to {block_size} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "chunks", [{"chunk_size": 0}, {"chunk_size": "9"}, {**CHUNKS, "gate": 1}, [1], {"local_size": 1}]
)
def test_dual_chunk_attention_of_another_kind_is_refused(chunks: object) -> None:
    asked = configs.QWEN_2_5_7B | {"dual_chunk_attention_config": chunks}
    with pytest.raises(InputError, match="dual_chunk_attention_config"):
        find_family(asked).read_config(asked)


QUANTIZED = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
    "compressed-tensors of old": {"compression_config": {"format": "dense"}},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantization_that_the_weights_do_not_have(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture
) -> None:
    """It is said, compared in full precision, and does not leave with the weights, which would be quantized by it."""
    from transformers import AutoModelForCausalLM

    reference = make_reference(tmp_path / "hub", VARIANTS["llama multi-head"])
    edit(tmp_path / "hub", **QUANTIZED[method])
    convert(tmp_path / "hub", verify=True)
    said = capsys.readouterr().out
    for name in QUANTIZED[method]:
        assert f"notice: config.json: {name}" in said and "all weights are in full precision" in said
    export_hf(ExportHFArgs(checkpoint_dir=str(tmp_path / "hub"), out_dir=str(tmp_path / "out")))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = fixed_ids(160)
    torch.testing.assert_close(exported(ids).logits, reference(ids).logits)
    assert not json.loads((tmp_path / "out" / "config.json").read_text()).keys() & QUANTIZED[method].keys()


def test_what_was_accepted_and_left_over_goes_on_with_the_model(tmp_path: Path) -> None:
    """A merged or fully fine-tuned checkpoint needs no flag again, and nothing quantizes its weights."""
    make_reference(tmp_path / "hub", VARIANTS["llama multi-head"])
    edit(tmp_path / "hub", residual_scale=0.5, **QUANTIZED["mlx"])
    convert(tmp_path / "hub", accept_config_key="residual_scale")
    save_model(tmp_path / "merged", load_model(tmp_path / "hub"), tmp_path / "hub", {})
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["residual_scale"] == 0.5 and not config.keys() & QUANTIZED["mlx"].keys()
    export_hf(ExportHFArgs(checkpoint_dir=str(tmp_path / "merged"), out_dir=str(tmp_path / "out")))


def test_a_quantization_beside_buffers_of_whole_numbers(tmp_path: Path) -> None:
    """Masks that old files of GPT-NeoX hold are no quantized weights."""
    make_reference(tmp_path, VARIANTS["neox"])
    weights = load_file(tmp_path / "model.safetensors")
    masks = {f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool) for i in range(2)}
    save_file(weights | masks, tmp_path / "model.safetensors")
    edit(tmp_path, **QUANTIZED["bitsandbytes"])
    convert(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight"])
def test_quantized_weights_are_named(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    make_reference(tmp_path, VARIANTS["llama multi-head"])
    weights = load_file(tmp_path / "model.safetensors")
    tensor = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights | {name: tensor.to(dtype)}, tmp_path / "model.safetensors")
    edit(tmp_path, **QUANTIZED["gptq"])
    with pytest.raises(
        InputError, match=rf"quantization_config \(gptq\), weight '{name}' is stored as {dtype}: .* unquantized"
    ):
        convert(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(without(json.loads(path.read_text()), "quantization_config")))
    with pytest.raises(InputError, match=rf": weight '{name}' is stored as {dtype}: .* unquantized"):
        convert(tmp_path)


def test_weights_that_are_quantized_in_every_pass_are_refused(tmp_path: Path) -> None:
    make_reference(tmp_path, VARIANTS["llama multi-head"])
    edit(tmp_path, quantization_config={"quant_method": "bitnet", "linear_class": "autobitlinear"})
    with pytest.raises(InputError, match=r"quantization_config \(bitnet\) quantizes weights and activations"):
        convert(tmp_path)


@pytest.mark.parametrize("name", ["llama multi-head", "neox", "falcon 7b", "gemma3", "qwen3-moe", "olmo2", "phi 3"])
def test_tables_of_angles_are_passed_over_as_transformers_does(tmp_path: Path, name: str) -> None:
    make_reference(tmp_path, VARIANTS[name])
    weights = load_file(tmp_path / "model.safetensors")
    base = next(iter(weights)).split(".")[0]
    buffers = {
        f"{base}.rotary_emb.inv_freq",
        f"{base}.rotary_emb.original_inv_freq",
        f"{base}.rotary_emb_local.inv_freq",
        f"{base}.rotary_emb.sliding_attention_inv_freq",
        f"{base}.layers.0.self_attn.rotary_emb.inv_freq",
        f"{base}.layers.0.self_attn.rotary_emb.cos_cached",
        f"{base}.layers.0.self_attn.rotary_emb.sin_cached",
        f"{base}.layers.0.self_attn.rotary_pos_emb.inv_freq",
        f"{base}.h.0.self_attention.rotary.inv_freq",
        f"{base}.h.0.self_attention.maybe_rotary.inv_freq",
    }
    save_file(weights | {buffer: torch.full((4,), 3.0) for buffer in buffers}, tmp_path / "model.safetensors")
    convert(tmp_path, verify=True)


# the flag


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


def test_the_flag_is_repeated_or_has_commas(tmp_path: Path) -> None:
    make_reference(tmp_path, VARIANTS["llama multi-head"])
    fields = {"residual_scale": 0.5, "use_gated_attention": True, "zeta": [1]}
    edit(tmp_path, **fields)
    command = ["scripts/convert_hf_checkpoint.py", "--checkpoint_dir", str(tmp_path)]
    refused = run(*command)
    assert refused.returncode == 2
    assert "residual_scale = 0.5, use_gated_attention = True, zeta = [1]: the toolkit does not know" in refused.stderr
    assert not (tmp_path / "manifest.json").exists()
    flag = "--accept_config_key"
    assert flag + " residual_scale,use_gated_attention,zeta" in refused.stderr
    doctor = run("scripts/doctor.py", str(tmp_path), flag, "zeta", flag, "residual_scale")
    assert doctor.returncode == 2 and "use_gated_attention = True" in doctor.stdout
    assert "zeta = " not in doctor.stdout + doctor.stderr
    ended = run(*command, flag, "zeta", f"{flag}=residual_scale, use_gated_attention")
    assert ended.returncode == 0, ended.stderr
    facts = json.loads((tmp_path / "manifest.json").read_text())["facts"]
    assert facts["accepted_config_keys"] == [*("zeta", "residual_scale", "use_gated_attention")]
    assert "zeta, residual_scale, use_gated_attention: not read, as you say" in ended.stdout
    assert load_model(tmp_path).config == replace(ModelConfig.from_dir(tmp_path))
    assert "accepted    zeta, residual_scale" in run("scripts/doctor.py", str(tmp_path)).stdout
