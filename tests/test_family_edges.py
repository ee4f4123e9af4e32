"""Where families meet their edges: long contexts, kinds of files, names of the base model, fields that are refused."""

import json
from pathlib import Path

import pytest
import torch
from family_variants import SHAPE, VARIANTS, longrope, without
from safetensors.torch import load_file, save_file
from test_families import convert_dir, logits_of, make_reference, token_ids

from lit_sft import GPT, KVCache, load_model
from lit_sft.attention import Layout, alibi_slopes
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.generate import generate


@pytest.mark.parametrize("name", ["falcon rw", "mistral 0.1", "mixtral with a window", "phi 3", "phi 3 of su"])
def test_long_examples(tmp_path: Path, name: str) -> None:
    """Past 512 queries attention goes in chunks; past 256 positions bf16 no longer holds alibi's products exactly."""
    reference = make_reference(tmp_path, VARIANTS[name])
    model, row, lengths = load_model(convert_dir(tmp_path)), token_ids(1000, batch=1), [600, 70, 330]
    with torch.no_grad():
        packed = model.logits(model.hidden_states(row, Layout(lengths)))
        for logits, part in zip(packed.split(lengths, 1), row.split(lengths, 1), strict=True):
            assert (logits - logits_of(reference, part)).abs().max() < 2e-5
        part = row[:, :600]
        cache = KVCache(model.config, 1, 600, torch.device("cpu"), torch.float32)
        chunks = [model(piece, cache=cache) for piece in part.split([560, 1, 1, 38], 1)]
        assert (torch.cat(chunks, 1) - logits_of(reference, part)).abs().max() < 2e-5


def test_alibi_slopes_are_those_of_transformers() -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    mask = torch.ones(1, 2, dtype=torch.int64)
    for n_head in range(1, 129):
        theirs = build_alibi_tensor(mask, n_head, torch.float32)[:, 0, 1]
        assert torch.equal(alibi_slopes(n_head).bfloat16().float(), theirs), n_head


@pytest.mark.parametrize("name", ["phi 4 mini", "phi 3 of su"])
def test_generating_across_the_original_context(tmp_path: Path, name: str) -> None:
    """Longrope turns a long example by other angles from its first token on: the cache begins anew at that point."""
    reference = make_reference(tmp_path, VARIANTS[name])
    model = load_model(convert_dir(tmp_path))
    original, ends = model.config.rope_original_block_size, set()
    for n_prompt in (original - 12, original, original + 5):
        prompt = token_ids(n_prompt, batch=1)
        theirs = reference.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        ours = list(generate(model, prompt[0].tolist(), 24, ()))
        assert ours == theirs[0, n_prompt:].tolist()
        ends.add(tuple(ours[-4:]))
        ids = torch.cat([prompt[0], torch.tensor(ours)])
        with torch.no_grad():
            for i in range(n_prompt, len(ids)):
                assert model(ids[None, :i])[0, -1].argmax() == ids[i]
    assert len(ends) > 1
    cache = KVCache(model.config, 1, 100, torch.device("cpu"), torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="turned anew"):
        model(token_ids(original, batch=1), cache=cache)
        model(token_ids(1, batch=1), cache=cache)


def as_bin(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, directory / "pytorch_model.bin")


def as_shards(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    weight_map = {}
    for i, name in enumerate(sorted(weights)):
        weight_map[name] = f"model-{i % 3}.safetensors"
    for file in set(weight_map.values()):
        save_file({n: weights[n] for n in weights if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_base_model(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """What the class without a head saves: names without their prefix."""
    save_file(
        {n.removeprefix("transformer.").removeprefix("model."): w for n, w in weights.items()},
        directory / "model.safetensors",
    )


def as_tied_head(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Of two names for one tensor some writers keep the other one."""
    save_file({"lm_head.weight" if "embed" in n else n: w for n, w in weights.items()}, directory / "model.safetensors")


def with_buffers(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Extra keys that old files have; the head by the name it has in transformers 5."""
    extra = {f"gpt_neox.layers.0.attention.{n}": torch.ones(1) for n in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    renamed = {n.replace("embed_out", "lm_head"): w for n, w in weights.items()}
    save_file(renamed | extra, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((name, write) for name in ("neox", "falcon 40b", "stablelm 2 12b", "phi 3") for write in (as_bin, as_shards)),
        *((name, write) for name in ("falcon 7b", "phi 4 mini") for write in (as_base_model, as_tied_head)),
        ("mixtral", as_shards),
        ("neox", with_buffers),
    ],
)
def test_kinds_of_files_give_the_same_model(tmp_path: Path, name: str, write: object) -> None:
    reference = make_reference(tmp_path, VARIANTS[name])
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, weights)
    with torch.no_grad():
        assert (load_model(convert_dir(tmp_path))(token_ids()) - logits_of(reference, token_ids())).abs().max() < 1e-5


@pytest.mark.parametrize("drop", ["embed_tokens", "lm_head"])
def test_an_untied_file_needs_embedding_and_head(tmp_path: Path, drop: str) -> None:
    make_reference(tmp_path, VARIANTS["phi 3"])
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: w for n, w in weights.items() if drop not in n}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"{drop}\.weight' is missing"):
        convert_dir(tmp_path)


def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path: Path) -> None:
    """Rows that no text has are kept, through training's and export's names too: the head is as wide as the file's."""
    config = {"vocab_size": 192}
    reference = make_reference(tmp_path, VARIANTS["neox"], **config)
    model = load_model(convert_dir(tmp_path))
    with torch.no_grad():
        logits = model(token_ids())
        assert logits.shape[-1] == 192 and (logits - logits_of(reference, token_ids())).abs().max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_model_type_decides_where_architectures_is_absent(name: str) -> None:
    from transformers import AutoConfig

    variant = VARIANTS[name]
    config = AutoConfig.for_model(variant.model_type, **{**SHAPE, **variant.config}).to_dict()
    config = variant.edit(config | {"architectures": None}) if variant.edit else config
    family = find_family(config)
    assert find_family(without(config, "architectures")) is family
    assert find_family({**config, "architectures": list(family.architectures[:1])}) is family


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("neox", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("neox", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "rope scaling 'proportional'"),
        ("neox", {"qk_norm": True}, "qk_norm = True"),
        ("falcon 7b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("falcon 7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ("falcon 40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3"),
        ("falcon 40b", {"residual_scale": 0.5}, "residual_scale"),
        ("stablelm 3b", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor = 2.0"),
        ("stablelm 3b", {"attention_bias": True}, "attention_bias = True"),
        ("stablelm alpha v2", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor = 2.0"),
        ("stablelm alpha v2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mistral 0.1", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("mistral 0.1", {"num_attention_heads": 3}, "multiple"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("phi 3", {"rope_parameters": {"type": "yarn", "factor": 4.0, "short_factor": [1.0] * 8}}, "short_factor"),
        ("phi 4 mini", {"original_max_position_embeddings": None}, "original_max_position_embeddings"),
        ("phi 4 mini", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("phi 4 mini", {"full_attn_mod": 2}, "full_attn_mod = 2"),
        ("phi 4 mini", {"rope_parameters": longrope(8, partial_rotary_factor=0.75)}, "8 values for 6 pairs"),
    ],
)
def test_fields_that_would_change_the_computation_are_refused(
    tmp_path: Path, name: str, fields: dict, message: str
) -> None:
    make_reference(tmp_path, VARIANTS[name])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if fields.get("original_max_position_embeddings", "") is None:
        del config["rope_parameters"]["original_max_position_embeddings"]
    path.write_text(json.dumps(config | fields))
    with pytest.raises(InputError, match=message):
        convert_dir(tmp_path)
    assert not (tmp_path / "lit_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mistral", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}),
        ("mixtral", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}),
        ("phi3", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}),
        ("stablelm", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}),
        ("gpt_neox", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}),
        ("falcon", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8}),
    ],
)
def test_a_silent_file_means_what_it_means_to_transformers(name: str, fields: dict) -> None:
    """The defaults of everything that a config.json may leave out: the same as those that transformers fills in."""
    from transformers import AutoConfig

    silent = {"model_type": name, "vocab_size": 100, **fields}
    if name == "stablelm":
        silent["num_key_value_heads"] = 8
    full = AutoConfig.for_model(**silent).to_dict()
    assert find_family(silent).read_config(silent) == find_family(full).read_config(full)


def test_forms_of_one_model_are_one_config() -> None:
    """The old spelling of Falcon-7B gives the shape that the new one gives."""
    new = {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32}
    new |= {"num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False}
    old = {"model_type": "RefinedWebModel", "vocab_size": 65024, "hidden_size": 4544, "n_layer": 32, "n_head": 71}
    old |= {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}
    config = find_family(new).read_config(new)
    assert isinstance(config, ModelConfig) and config == find_family(old).read_config(old)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == 6_921_720_704
