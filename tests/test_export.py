"""The way out to transformers: every family comes back bit by bit and loads, whatever was done to it in between."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, instruction_texts, make_hf_llama
from safetensors.torch import load_file
from test_families import VARIANTS, logits_of, make_reference, token_ids
from test_lora import filled_adapter

from lit_sft import load_model, weights
from lit_sft.args import ConvertArgs, ConvertLitArgs, ExportHFArgs, LoRAArgs, MergeArgs
from lit_sft.checkpoint import adapter_facts, save_adapter, save_model
from lit_sft.convert import convert_checkpoint, source_weights
from lit_sft.errors import InputError
from lit_sft.export import convert_lit_checkpoint, export_hf
from lit_sft.merge import merge_checkpoint

IDS = token_ids(40)


def exported(directory: Path, out: Path, **args: str) -> Path:
    return export_hf(ExportHFArgs(checkpoint_dir=str(directory), out_dir=str(out), **args))


def loaded(directory: Path, attention: str = "eager") -> object:
    """What transformers makes of a directory, every weight found in it and none left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, local_files_only=True, attn_implementation=attention
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {weight.name: weight.load() for weight in source_weights(directory)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_base_checkpoint_comes_back_bit_by_bit_and_loads(tmp_path: Path, name: str) -> None:
    reference = make_reference(tmp_path / "hub", VARIANTS[name])
    original = load_file(tmp_path / "hub" / "model.safetensors")
    out = exported(convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub"))), tmp_path / "out")
    assert_same(load_file(out / "model.safetensors"), original)
    model = loaded(out, VARIANTS[name].attention)
    assert torch.equal(logits_of(model, IDS), logits_of(reference, IDS))
    assert type(model) is type(reference) and model.config.torch_dtype == torch.float32
    if VARIANTS[name].model_type != "stablelm_alpha":  # the tests' own class, which does not generate
        assert model.generation_config.eos_token_id == reference.generation_config.eos_token_id


MERGED = ("llama tied", "neox", "falcon 40b", "phi 3", "mixtral", "gemma3", "qwen3", "stablelm 2 12b", "olmo2")


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_merged_on_the_way_is_one_merged_before(tmp_path: Path, name: str) -> None:
    make_reference(tmp_path / "hub", VARIANTS[name])
    base = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub")))
    args = LoRAArgs(lora_r=4, lora_alpha=6, lora_head=True)
    model = filled_adapter(base, args)
    save_adapter(tmp_path / "adapter", model, args, adapter_facts(base, {"prompt_style": "plain", "stop_ids": [2, 7]}))
    at_once = export_hf(ExportHFArgs(lora_path=str(tmp_path / "adapter"), out_dir=str(tmp_path / "at_once")))
    merged = merge_checkpoint(MergeArgs(lora_path=str(tmp_path / "adapter"), out_dir=str(tmp_path / "merged")))
    assert_same(tensors_of(at_once), tensors_of(exported(merged, tmp_path / "later")))
    for kind in ("config.json", "generation_config.json"):
        assert (at_once / kind).read_bytes() == (tmp_path / "later" / kind).read_bytes()
    with torch.no_grad():
        assert (logits_of(loaded(at_once, VARIANTS[name].attention), IDS) - model(IDS)).abs().max() < 1e-4
    assert json.loads((at_once / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_what_full_fine_tuning_saves_is_exported(tmp_path: Path) -> None:
    make_reference(tmp_path / "hub", VARIANTS["neox"])
    base = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub")))
    model = load_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_model(tmp_path / "run" / "model", model, base, {"prompt_style": "hermes", "stop_ids": [2]})
    out = exported(tmp_path / "run" / "model", tmp_path / "out")
    with torch.no_grad():
        assert (logits_of(loaded(out), IDS) - model(IDS)).abs().max() < 1e-5
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert facts["prompt_style"] == "hermes" and facts["family"] == "GPT-NeoX"


@pytest.mark.parametrize("ends", [{}, [[2]], "2", [True]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_no_ids_are_refused(
    name: str, ends: object, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint()
    config = json.loads((base / name).read_text()) if (base / name).is_file() else {}
    if name == "config.json":
        (base / "generation_config.json").unlink(missing_ok=True)
    (base / name).write_text(json.dumps(config | {"eos_token_id": ends}))
    with pytest.raises(InputError, match=rf"{name}: eos_token_id .* is no token id"):
        exported(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_directory_is_complete(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """transformers' own tokenizer, chat template and generation settings, from the exported directory alone."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    base = checkpoint()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(instruction_texts(), vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names).save_pretrained(base)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    (base / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true, "eos_token_id": 2}')
    out = exported(base, tmp_path / "out")
    shutil.move(base, tmp_path / "away")
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    text = "What do llamas eat?\n  Grass, 12 kg 🦙."
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(tmp_path / "away")(text).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>Hi</s>"
    assert GenerationConfig.from_pretrained(out).temperature == 0.25
    generated = loaded(out).generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)
    recorded = json.loads((out / "manifest.json").read_text())["files"]
    assert set(recorded) == {path.name for path in out.iterdir()} - {"manifest.json"}


def test_large_models_are_sharded_with_an_index(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint()
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    out = exported(base, tmp_path / "out")
    assert not (out / "model.safetensors").exists() and len(list(out.glob("model-0000*-of-*.safetensors"))) > 2
    assert_same(tensors_of(out), load_file(base / "model.safetensors"))
    loaded(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(checkpoint: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    base, kind = checkpoint(), getattr(torch, dtype)
    out = exported(base, tmp_path / "out", dtype=dtype)
    original = load_file(base / "model.safetensors")
    assert_same(tensors_of(out), {name: tensor.to(kind) for name, tensor in original.items()})
    assert {p.dtype for p in loaded(out).parameters()} == {kind}


def test_condensed_rope_is_spelled_so_that_transformers_sees_it(tmp_path: Path) -> None:
    """LongChat's first revisions: a field that transformers does not know becomes the scaling that it means."""
    make_hf_llama(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text()) | {"rope_condense_ratio": 8}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    base = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub")))
    with torch.no_grad():
        ours = load_model(base)(IDS)
    assert (logits_of(loaded(tmp_path / "hub"), IDS) - ours).abs().max() > 1e-3
    out = exported(base, tmp_path / "out")
    assert (logits_of(loaded(out), IDS) - ours).abs().max() < 1e-5
    again = convert_checkpoint(ConvertArgs(checkpoint_dir=str(out)))
    with torch.no_grad():
        assert torch.equal(load_model(again)(IDS), ours)


@pytest.mark.parametrize("kind", [".bin", ".pth", ".safetensors", "directory"])
def test_lit_gpts_way_back(tmp_path: Path, kind: str) -> None:
    make_reference(tmp_path / "hub", VARIANTS["neox"])
    original = load_file(tmp_path / "hub" / "model.safetensors")
    base = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "hub")))
    out = tmp_path / "deep" / ("out" if kind == "directory" else f"model{kind}")
    given = base / "lit_model.safetensors" if kind == ".bin" else base
    convert_lit_checkpoint(ConvertLitArgs(checkpoint_path=str(given), output_path=str(out), config_path="any.json"))
    if kind == "directory":
        assert_same(load_file(out / "model.safetensors"), original)
        loaded(out)
    else:
        assert_same(load_file(out) if kind == ".safetensors" else torch.load(out, weights_only=True), original)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone/lit_model.safetensors"])
def test_weights_that_are_not_there(checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    given = checkpoint() / name
    with pytest.raises(InputError, match=f"--checkpoint_path .*{name} is not there"):
        convert_lit_checkpoint(ConvertLitArgs(checkpoint_path=str(given), output_path=str(tmp_path / "x.bin")))
    assert not (tmp_path / "x.bin").exists()


def test_lit_gpts_own_file_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a file of Lit-GPT itself"):
        convert_lit_checkpoint(ConvertLitArgs(checkpoint_path=str(checkpoint() / "lit_model.pth"), output_path="x.bin"))


@pytest.mark.parametrize("out", ["full", "file", "base"])
def test_what_is_in_the_way_is_left_alone(checkpoint: Callable[..., Path], tmp_path: Path, out: str) -> None:
    base = checkpoint()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match=r"--out_dir .* exists and is not an empty folder; name another"):
        exported(base, base if out == "base" else tmp_path / out)
    with pytest.raises(InputError, match=r"--output_path .* exists"):
        convert_lit_checkpoint(ConvertLitArgs(checkpoint_path=str(base), output_path=str(tmp_path / "file")))
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    load_model(base)


FULL_DISK = """
import resource, sys
import torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow further, as on a full disk
from lit_sft import cli
from importlib import import_module
cli.run(import_module(cli.commands()[sys.argv[1]]).main, sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("export_hf", ["--checkpoint_dir={base}", "--out_dir={out}"]),
        ("convert_lit_checkpoint", ["--checkpoint_path={base}", "--output_path={out}.bin"]),
        ("convert_lit_checkpoint", ["--checkpoint_path={base}", "--output_path={out}.safetensors"]),
    ],
)
def test_a_full_disk_leaves_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, command: str, flags: list[str]
) -> None:
    base, out = checkpoint(), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    argv = [flag.format(base=base, out=out) for flag in flags]
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, command, *argv], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 2, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert "cannot be written" in line and "make room" in line
    assert sorted(tmp_path.rglob("*")) == before
