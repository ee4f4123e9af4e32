import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf_llama
from safetensors.torch import load_file, save_file

from lit_sft import load_model, weights
from lit_sft.args import ConvertArgs, ExportHFArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.export import export_hf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def convert_dir(directory: Path, **args: str) -> Path:
    return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory), **args))


def token_ids(n: int = 96) -> torch.Tensor:
    return torch.randint(0, 400, (2, n), generator=torch.Generator().manual_seed(1))


def test_old_and_new_spelling_of_rope_read_alike(tmp_path: Path) -> None:
    make_hf_llama(tmp_path, rope_parameters=LLAMA3_ROPE)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new and "rope_scaling" not in new
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "architectures")}
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    first = json.loads((convert_dir(tmp_path) / "model_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old | {"rope_theta": 10000.0, "rope_scaling": scaling}))
    assert json.loads((convert_dir(tmp_path) / "model_config.json").read_text()) == first


def test_longchat_spelling_of_linear_scaling(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"rope_condense_ratio": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    converted = json.loads((convert_dir(tmp_path) / "model_config.json").read_text())
    assert (converted["rope_type"], converted["rope_factor"]) == ("linear", 8.0)


def as_bin(directory: Path, shards: int) -> dict:
    """Replace the safetensors file by pickled ones, as older repositories have them."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # seen in the wild
    names = list(weights)
    if shards == 1:
        torch.save(weights, directory / "pytorch_model.bin")
        return weights
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        torch.save({n: weights[n] for n in names if weight_map[n] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weights


@pytest.mark.parametrize("source", ["safetensors shards", "bin", "bin shards", "bin of old torch"])
def test_every_kind_of_source_gives_the_same_model(tmp_path: Path, source: str) -> None:
    reference = make_hf_llama(tmp_path)
    if source == "safetensors shards":
        (tmp_path / "model.safetensors").unlink()
        reference.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        weights = as_bin(tmp_path, 3 if source == "bin shards" else 1)
        if source == "bin of old torch":
            torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        assert torch.equal(load_model(convert_dir(tmp_path))(token_ids()), load_model(tmp_path)(token_ids()))
        assert (load_model(tmp_path)(token_ids()) - reference(token_ids()).logits).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_dtype(tmp_path: Path, dtype: str | None) -> None:
    reference = make_hf_llama(tmp_path)
    model = load_model(convert_dir(tmp_path, **({"dtype": dtype} if dtype else {})))
    wanted = getattr(torch, dtype or "float32")
    theirs = reference.model.layers[1].mlp.up_proj.weight
    assert torch.equal(model.blocks[1].mlp.up.weight, theirs.to(wanted))
    assert {p.dtype for p in model.parameters()} == {wanted}


def test_large_checkpoints_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_hf_llama(tmp_path)
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    model = load_model(convert_dir(tmp_path))
    index = json.loads((tmp_path / "lit_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (tmp_path / "lit_model.safetensors").exists()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], model.state_dict()[name])
    with torch.no_grad():
        assert (model(token_ids()) - reference(token_ids()).logits).abs().max() < 1e-5


def test_converting_again_leaves_no_file_of_the_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_llama(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 100_000)
        convert_dir(tmp_path)
    convert_dir(tmp_path)
    assert [p.name for p in tmp_path.glob("lit_model*")] == ["lit_model.safetensors"]
    load_model(tmp_path)


def test_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    make_hf_llama(tmp_path, tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    model = load_model(convert_dir(tmp_path))
    assert model.lm_head.weight is model.wte.weight
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        convert_dir(tmp_path)


@pytest.mark.parametrize("said", [390, 512])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_tensors_where_a_fine_tune_added_tokens(
    tmp_path: Path, said: int, tied: bool, capsys: pytest.CaptureFixture
) -> None:
    """What is exported then says the size that it has, so that transformers loads it."""
    from transformers import LlamaForCausalLM

    reference = make_hf_llama(tmp_path / "hub", tie_word_embeddings=tied)
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": said}))
    base = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub")))
    assert f"says vocab_size {said}, the embedding has 400 rows, which are taken" in capsys.readouterr().out
    ids = torch.arange(400)[None]
    with torch.no_grad():
        logits = load_model(base)(ids)
        assert logits.shape[-1] == 400 and (logits - reference(ids).logits).abs().max() < 1e-5
        out = export_hf(ExportHFArgs(checkpoint_dir=str(base), out_dir=str(tmp_path / "out")))
        assert torch.equal(LlamaForCausalLM.from_pretrained(out).eval()(ids).logits, reference(ids).logits)


def test_head_and_embedding_must_agree_on_the_vocabulary(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.ones(401, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"'lm_head\.weight' has shape \(401, 64\); config.json asks for \(400, 64\)"):
        convert_dir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"),
        (
            lambda w: w.update({"model.layers.0.extra.weight": torch.ones(2)}),
            r"'model\.layers\.0\.extra\.weight' is unknown",
        ),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}), "not part of the model"),
        (lambda w: w.update({"model.norm.weight": torch.ones(65)}), r"has shape \(65,\); config.json asks for \(64,\)"),
        (lambda w: w.update({"lm_head.weight": torch.ones(400, 64, dtype=torch.int8)}), "not supported|quantized"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "not part of the model"),
    ],
)
def test_unmapped_and_missing_weights_are_named_and_fatal(tmp_path: Path, change: object, message: str) -> None:
    make_hf_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        convert_dir(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT9"]}, "no known family"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2}}, "'proportional'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast = 3"),
        ({"sliding_window": 64}, "sliding_window = 64 is not supported for the Llama family"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        (
            {"residual_scale": 0.5},
            "residual_scale = 0.5: the toolkit does not know .* --accept_config_key residual_scale",
        ),
        ({"use_gated_attention": True, "zeta": [1]}, "--accept_config_key use_gated_attention,zeta"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"head_dim": 16.0}, r"head_dim is 16\.0; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 10**22}, "vocab_size is .* at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is .* at most 10,000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a positive integer"),
        ({"rms_norm_eps": "x"}, "norm_eps is 'x'"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_parameters": {"rope_theta": "x"}}, "wrong type or value"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_factor is 0.0"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings is 'false'"),
        ({"architectures": 5}, "architectures is 5"),
    ],
)
def test_unsupported_config_fields_are_named(tmp_path: Path, fields: dict, message: str) -> None:
    make_hf_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as refusal:
        convert_dir(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path))  # of which checkpoint
    assert not (tmp_path / "manifest.json").exists()


def test_fields_that_a_person_knows_are_accepted_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_hf_llama(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"residual_scale": 0.5, "use_mrope": True}))
    with pytest.raises(InputError, match=r"use_mrope = True is not supported .* --accept_config_key use_mrope"):
        convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub"), accept_config_key="residual_scale"))
    with pytest.raises(InputError, match=r"--accept_config_key nothing: config.json has no such field"):
        convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub"), accept_config_key="nothing"))
    capsys.readouterr()
    accepted = "residual_scale, use_mrope"
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub"), accept_config_key=accepted))
    assert f"notice: config.json: {accepted}: not read, as you say" in capsys.readouterr().out
    facts = json.loads((tmp_path / "hub" / "manifest.json").read_text())["facts"]
    assert facts["accepted_config_keys"] == ["residual_scale", "use_mrope"]
    export_hf(ExportHFArgs(checkpoint_dir=str(tmp_path / "hub"), out_dir=str(tmp_path / "out")))  # without asking again


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_says_nothing_is_not_used(tmp_path: Path, value: object) -> None:
    make_hf_llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_gated_attention": value}))
    convert_dir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{,}", "not valid JSON"), ("[]", "not an object"), (None, "is missing")]
)
def test_broken_config(tmp_path: Path, content: str | None, message: str) -> None:
    make_hf_llama(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        convert_dir(tmp_path)


class Hostile:
    """Unpickling it would create the file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    canary = tmp_path.parent / "canary"
    (tmp_path / "model.safetensors").unlink()
    for write, reason in (
        (lambda p: torch.save({"x": Hostile(canary)}, p), r"it calls \S+"),
        (lambda p: p.write_bytes(pickle.dumps(Hostile(canary))), "Unsupported operand 149"),
    ):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match=rf"it was not run \({reason}\)$"):  # and no advice to run it
            convert_dir(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("kept", [0, 4, 40, 5000])
def test_truncated_safetensors(tmp_path: Path, kept: int) -> None:
    make_hf_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="damaged"):
        convert_dir(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "../shard.safetensors"}, "not a file of"),
        ({"model.norm.weight": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"model.nothing": "shard.safetensors"}, "promises 'model.nothing'"),
        ("text", "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: object, message: str) -> None:
    make_hf_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        convert_dir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [1, 2], "holds a list, not tensors by name"),
        (lambda w: {1: torch.ones(2)}, "1 is a Tensor, not a tensor with a name"),
        (lambda w: w | {"model.norm.weight": w["model.norm.weight"].to(torch.float8_e4m3fn)}, "do not convert"),
        (lambda w: w | {"model.norm.weight": w["model.norm.weight"] * 1e9}, "beyond the range of float16"),
    ],
)
def test_a_bin_file_of_something_else(tmp_path: Path, change: object, message: str) -> None:
    make_hf_llama(tmp_path)
    torch.save(change(load_file(tmp_path / "model.safetensors")), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        convert_dir(tmp_path, dtype="float16")
    assert not list(tmp_path.glob("*lit_model*"))


def test_a_weight_that_is_there_twice(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "shard.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"] + 5}, tmp_path / "stale.safetensors")
    weight_map = dict.fromkeys(weights, "shard.safetensors") | {"model.norm.weight": "stale.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"'model.norm.weight' is there twice"):
        convert_dir(tmp_path)


@pytest.mark.slow
def test_memory_stays_near_the_largest_source_shard(tmp_path: Path) -> None:
    """Anonymous memory of a conversion of 480 MB in 80 MB shards, above that of one of almost nothing."""
    script = (
        "import sys, re; from pathlib import Path; from lit_sft.args import ConvertArgs;"
        "from lit_sft.convert import convert_checkpoint; import threading, time; peak = [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        status = Path('/proc/self/status').read_text()\n"
        "        peak[0] = max(peak[0], int(re.search(r'RssAnon:\\s+(\\d+)', status)[1])); time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "dtype = sys.argv[2] if len(sys.argv) > 2 else None\n"
        "convert_checkpoint(ConvertArgs(checkpoint_dir=sys.argv[1], dtype=dtype))\n"
        "print('peak', peak[0])"
    )

    def peak_mb(directory: Path, *dtype: str) -> float:
        run = subprocess.run([sys.executable, "-c", script, str(directory), *dtype], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split("peak")[1]) / 1024

    make_hf_llama(tmp_path / "small")
    big = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 8000}
    reference = make_hf_llama(tmp_path / "big", **big, num_attention_heads=8, num_key_value_heads=8)
    (tmp_path / "big" / "model.safetensors").unlink()
    reference.save_pretrained(tmp_path / "big", max_shard_size="80MB")
    total = sum(p.stat().st_size for p in (tmp_path / "big").glob("model-*.safetensors")) / 2**20
    assert total > 400
    for dtype in ((), ("bfloat16",)):
        assert peak_mb(tmp_path / "big", *dtype) - peak_mb(tmp_path / "small", *dtype) < 80
