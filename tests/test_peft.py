"""Adapters to peft and back: every family's, fused layers, tied heads, experts; and what cannot come in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import VARIANTS, logits_of, make_reference, token_ids
from test_lora import filled_adapter

from lit_sft import load_model
from lit_sft.args import ConvertArgs, ExportPeftArgs, ImportPeftArgs, LoRAArgs
from lit_sft.checkpoint import adapter_facts, read_adapter, save_adapter
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.peft import export_peft
from lit_sft.peft_import import import_peft

IDS = token_ids(40)


def base_of(directory: Path, name: str) -> tuple[torch.nn.Module, Path]:
    reference = make_reference(directory, VARIANTS[name])
    return reference, convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))


def adapter_of(base: Path, directory: Path, **lora: object) -> torch.Tensor:
    """Save a random adapter; gives the logits with it."""
    args = LoRAArgs(**{"lora_r": 4, "lora_alpha": 6} | lora)
    model = filled_adapter(base, args)
    save_adapter(directory, model, args, adapter_facts(base, {"prompt_style": "hermes", "stop_ids": [2, 7]}))
    with torch.no_grad():
        return model(IDS)


def exported(adapter: Path, out: Path) -> Path:
    return export_peft(ExportPeftArgs(lora_path=str(adapter), out_dir=str(out)))


def imported(peft_dir: Path, base: Path, out: Path, **args: str) -> Path:
    return import_peft(ImportPeftArgs(peft_dir=str(peft_dir), checkpoint_dir=str(base), out_dir=str(out), **args))


@torch.no_grad()
def with_peft(reference: torch.nn.Module, directory: Path) -> torch.Tensor:
    """The logits of transformers' model with the adapter as peft reads it, all of it."""
    from peft import PeftModel

    if VARIANTS["stablelm alpha v2"].model_type == reference.config.model_type:  # not one that generates
        config = json.loads((directory / "adapter_config.json").read_text()) | {"task_type": None}
        (directory / "adapter_config.json").write_text(json.dumps(config))
    model = PeftModel.from_pretrained(reference, directory).eval()
    found = sum(".lora_" in name and ".lora_B" in name for name, _ in model.named_parameters())
    assert found > 0
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if ".lora_B" in name)
    result = model.load_adapter(directory, "again")
    assert not result.missing_keys and not result.unexpected_keys
    return logits_of(model, IDS)


# spellings that transformers' own class does not know or reads otherwise
UNKNOWN_THERE = (
    *("falcon 7b of RefinedWebModel", "falcon 40b of RefinedWeb", "stablelm of stablelm_epoch"),
    *("phi 3 of su", "llama condensed rope", "gemma3, old spelling"),
)


def as_loaded(base: Path, reference: torch.nn.Module, name: str) -> torch.nn.Module:
    """The base as transformers loads it from its own folder, where it does."""
    from transformers import AutoModelForCausalLM

    if name in UNKNOWN_THERE:
        return reference
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation=VARIANTS[name].attention).eval()


PARTS = {
    "all": {},
    "all and the head": {"lora_head": True},
    "query and value": {"lora_key": False, "lora_projection": False, "lora_mlp": False},
    "key": {"lora_query": False, "lora_value": False, "lora_projection": False, "lora_mlp": False},
    "mlp, of a rank and alpha that do not divide": {
        "lora_query": False, "lora_key": False, "lora_value": False, "lora_r": 3, "lora_alpha": 7.5,
    },
}  # fmt: skip


def check_there_and_back(tmp_path: Path, name: str, parts: str) -> None:
    reference, base = base_of(tmp_path / "hub", name)
    expected = adapter_of(base, tmp_path / "adapter", **PARTS[parts])
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    back = imported(out, base, tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(load_model(base, back)(IDS), expected)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (back, tmp_path / "adapter")]
    assert configs[0] == configs[1]
    assert (back / "adapter.safetensors").read_bytes() == (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    assert (expected - logits_of(reference, IDS)).abs().max() > 1e-2
    assert (with_peft(as_loaded(base, reference, name), out) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_peft_and_the_adapter_comes_back(tmp_path: Path, name: str) -> None:
    check_there_and_back(tmp_path, name, "all")


@pytest.mark.parametrize("parts", list(PARTS)[1:])
@pytest.mark.parametrize("name", ["llama grouped-query", "llama tied", "neox", "falcon 40b", "phi 3", "mixtral"])
def test_adapters_of_some_parts(tmp_path: Path, name: str, parts: str) -> None:
    check_there_and_back(tmp_path, name, parts)


def test_the_rank_of_a_fused_layer_is_that_of_its_adapted_parts(tmp_path: Path) -> None:
    """As documented: the A's one above the other, each B in its own rows (of each head) and columns."""
    _, base = base_of(tmp_path / "hub", "neox")
    adapter_of(base, tmp_path / "adapter", lora_key=False)
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"query_key_value": 8} and config["alpha_pattern"] == {"query_key_value": 12}
    assert config["r"] == 4 and config["lora_alpha"] == 6
    assert config["target_modules"] == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    ours, theirs = load_file(tmp_path / "adapter" / "adapter.safetensors"), load_file(out / "adapter_model.safetensors")
    layer, attn = "base_model.model.gpt_neox.layers.1.attention.query_key_value.lora_{}.weight", "blocks.1.attn"
    factors = [ours[f"{attn}.{part}.lora_A"] for part in ("query", "value")]
    assert torch.equal(theirs[layer.format("A")], torch.cat(factors))
    rows = theirs[layer.format("B")].view(4, 3, 16, 8)  # heads, (query, key, value), head size, rank
    assert torch.equal(rows[:, 0, :, :4].flatten(0, 1), ours[f"{attn}.query.lora_B"])
    assert torch.equal(rows[:, 2, :, 4:].flatten(0, 1), ours[f"{attn}.value.lora_B"])
    assert not rows[:, 1].any() and not rows[:, 0, :, 4:].any() and not rows[:, 2, :, :4].any()


def test_the_base_is_named_as_on_the_hub(tmp_path: Path) -> None:
    _, base = base_of(tmp_path / "hub", "llama grouped-query")
    adapter_of(base, tmp_path / "adapter")
    (base / "download.json").write_text(json.dumps({"repo_id": "org/model", "commit": "abc"}))
    config = json.loads((exported(tmp_path / "adapter", tmp_path / "peft") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model" and config["revision"] == "abc"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


# --- what peft itself has saved ---


def saved_by_peft(reference: torch.nn.Module, directory: Path, **config: object) -> torch.Tensor:
    """An adapter of peft's own with random factors, saved by it; gives its logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(reference, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return logits_of(model, IDS)


LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TAKEN = {
    "plain": ("llama grouped-query", {"target_modules": LLAMA_LAYERS}),
    "two layers, dropout": ("llama grouped-query", {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05}),
    "rank-stabilised": ("llama grouped-query", {"target_modules": LLAMA_LAYERS, "use_rslora": True}),
    "a rank and alpha for some": (
        "llama grouped-query",
        {"target_modules": LLAMA_LAYERS, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}}
        | {"alpha_pattern": {"k_proj": 16}},
    ),
    "one layer only": ("llama grouped-query", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "up, not down": ("llama grouped-query", {"target_modules": ["up_proj"]}),
    "the head": ("llama grouped-query", {"target_modules": ["q_proj", "lm_head"]}),
    "a tied head": ("llama tied", {"target_modules": ["q_proj", "lm_head"]}),
    "fused by head": ("neox", {"target_modules": ["query_key_value", "dense"]}),
    "fused by group": ("falcon 40b", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "fused, one behind the other": ("phi 3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "every linear layer": ("stablelm 2 12b", {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_peft_saved_is_read(tmp_path: Path, case: str) -> None:
    name, config = TAKEN[case]
    reference, base = base_of(tmp_path / "hub", name)
    before = logits_of(reference, IDS)
    expected = saved_by_peft(reference, tmp_path / "peft", **config)
    (base / "tokenizer.json").write_text(TOKENIZER)
    adapter = imported(tmp_path / "peft", base, tmp_path / "ours", prompt_style="plain")
    with torch.no_grad():
        logits = load_model(base, adapter)(IDS)
    assert (logits - expected).abs().max() < 2e-5 and (expected - before).abs().max() > 1e-2
    facts = json.loads((adapter / "adapter_config.json").read_text())
    assert facts["prompt_style"] == "plain" and facts["stop_ids"] == [2]
    assert facts["lora_dropout"] == config.get("lora_dropout", 0)
    assert all(t.dtype == torch.float32 for t in read_adapter(adapter, base)[1].values())


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False}
            for i, text in enumerate(("<pad>", "<s>", "</s>"))
        ],
        "model": {"type": "BPE", "vocab": {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, "merges": []},
    }
)


def test_a_pickled_adapter_is_read(tmp_path: Path) -> None:
    reference, base = base_of(tmp_path / "hub", "llama grouped-query")
    expected = saved_by_peft(reference, tmp_path / "peft", target_modules=["v_proj"])
    torch.save(load_file(tmp_path / "peft" / "adapter_model.safetensors"), tmp_path / "peft" / "adapter_model.bin")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    (base / "tokenizer.json").write_text(TOKENIZER)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    adapter = imported(tmp_path / "peft", base, tmp_path / "ours")
    with torch.no_grad():
        assert (load_model(base, adapter)(IDS) - expected).abs().max() < 2e-5
    assert json.loads((adapter / "adapter_config.json").read_text())["prompt_style"] == "chat-template"


def test_of_two_files_the_one_that_peft_reads_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reference, base = base_of(tmp_path / "hub", "llama grouped-query")
    saved_by_peft(reference, tmp_path / "peft", target_modules=["v_proj"])
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    torch.save({name: w + 1 for name, w in weights.items()}, tmp_path / "peft" / "adapter_model.bin")
    (base / "tokenizer.json").write_text(TOKENIZER)
    adapter = imported(tmp_path / "peft", base, tmp_path / "ours", prompt_style="plain")
    assert "adapter_model.safetensors is read, as by peft; adapter_model.bin is ignored" in capsys.readouterr().out
    there = with_peft(make_reference(tmp_path / "again", VARIANTS["llama grouped-query"]), tmp_path / "peft")
    with torch.no_grad():
        assert (load_model(base, adapter)(IDS) - there).abs().max() < 2e-5


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora = True"),
    "saved modules": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "biases": ({"bias": "lora_only"}, "bias = 'lora_only'"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding|embed_tokens"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "copied layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_here_cannot_hold_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, says = REFUSED[case]
    reference, base = base_of(tmp_path / "hub", "llama grouped-query")
    saved_by_peft(reference, tmp_path / "peft", **{"target_modules": ["q_proj"]} | config)
    with pytest.raises(InputError, match=says):
        imported(tmp_path / "peft", base, tmp_path / "ours", prompt_style="plain")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not LORA"),
        ({"r": 5}, "has rank 4, not 5"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"a_switch_of_tomorrow": True}, "a_switch_of_tomorrow = True cannot be held"),
    ],
)
def test_a_config_of_something_else(tmp_path: Path, config: dict, says: str) -> None:
    reference, base = base_of(tmp_path / "hub", "llama grouped-query")
    saved_by_peft(reference, tmp_path / "peft", target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=says):
        imported(tmp_path / "peft", base, tmp_path / "ours", prompt_style="plain")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k.replace("q_proj", "x_proj"): v for k, v in t.items()}, "x_proj' can have no adapter here"),
        (lambda t: {k.replace("layers.1", "layers.2"): v for k, v in t.items()}, "can have no adapter here"),
        (lambda t: {k.replace("self_attn.q_proj", "input_layernorm"): v for k, v in t.items()}, "no adapter here"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "one of lora_A and lora_B only"),
        (lambda t: {k: v[:, :3] if "lora_A" in k else v for k, v in t.items()}, r"of shape \(64, 3\), not \(64, 64\)"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(160, 64)}, "'base_model.model.lm_head.weight'"),
        (lambda t: {}, "adapts nothing"),
    ],
)
def test_tensors_of_something_else(tmp_path: Path, change: Callable, says: str) -> None:
    reference, base = base_of(tmp_path / "hub", "llama grouped-query")
    saved_by_peft(reference, tmp_path / "peft", target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)
    (base / "tokenizer.json").write_text(TOKENIZER)
    with pytest.raises(InputError, match=says):
        imported(tmp_path / "peft", base, tmp_path / "ours", prompt_style="plain")


@pytest.mark.parametrize("given", ["hub", "gone"])
def test_a_folder_that_peft_did_not_save(tmp_path: Path, given: str) -> None:
    _, base = base_of(tmp_path / "hub", "llama grouped-query")
    with pytest.raises(InputError, match=f"--peft_dir .*{given} holds no adapter_config.json; give the folder"):
        imported(tmp_path / given, base, tmp_path / "ours")


def test_what_was_exported_for_another_base_is_refused(tmp_path: Path) -> None:
    _, base = base_of(tmp_path / "hub", "llama grouped-query")
    adapter_of(base, tmp_path / "adapter")
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    make_reference(tmp_path / "other", VARIANTS["llama grouped-query"], seed=1)
    other = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / "other")))
    with pytest.raises(InputError, match="whose weights differ from those of"):
        imported(out, other, tmp_path / "back")


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    _, base = base_of(tmp_path / "hub", "llama grouped-query")
    adapter_of(base, tmp_path / "adapter")
    for out in (tmp_path / "adapter", base):
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            exported(tmp_path / "adapter", out)
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            imported(tmp_path / "adapter", base, out)
