"""Broken inputs for every command, and the count of them over all tables: one line, exit code 2, nothing written."""

import json
import os
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs import (
    COMMANDS,
    RESUME,
    TARGETS,
    attempt,
    cut,
    edit,
    flip,
    judge,
    make_world,
    mutate,
    remove,
    shard,
    tensors,
    write,
)
from faults import fork
from safetensors.torch import load_file

from lit_sft import cli

Spoil = Callable[[], object]
INDEX = "raw/model.safetensors.index.json"
STATE = "cut/checkpoints/step-00000002"
OPTIMIZER = f"{STATE}/optimizer.safetensors"
BASE, ADAPTER = "base/lit_model.safetensors", "run/adapter/adapter.safetensors"


def index_text(content: str) -> Spoil:
    """An index in place of the single file, which would be read first, beside a shard."""

    def spoil() -> None:
        Path("raw/model.safetensors").rename("raw/shard.safetensors")
        Path(INDEX).write_text(content)

    return spoil


def index(**weight_map: object) -> Spoil:
    return index_text(json.dumps({"weight_map": weight_map}))


def header(path: str, text: str) -> Spoil:
    """A safetensors file with this header."""
    return write(path, len(text).to_bytes(8, "little") + text.encode())


def link(path: str, target: str) -> Spoil:
    def spoil() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(target)

    return spoil


def pipe(path: str) -> Spoil:
    return lambda: Path(path).unlink(missing_ok=True) or os.mkfifo(path)


def tokenizer_json(text: str, where: str = "base") -> Spoil:
    def spoil() -> None:
        Path(f"{where}/tokenizer.model").unlink()
        Path(f"{where}/tokenizer.json").write_text(text)

    return spoil


def family(name: str, **changes: object) -> Spoil:
    return edit("raw/config.json", architectures=[f"{name}ForCausalLM"], **changes)


def as_bin(change: Callable[[dict], dict]) -> Spoil:
    """The weights as torch.save writes them."""

    def spoil() -> None:
        weights = load_file("raw/model.safetensors")
        Path("raw/model.safetensors").unlink()
        torch.save(change(weights), "raw/pytorch_model.bin")

    return spoil


def deflate(path: str) -> Spoil:
    def spoil() -> None:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return spoil


BPE = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
       "merges": ["a b"]}}  # fmt: skip
ENDS = write("base/tokenizer_config.json", '{"eos_token": "b", "bos_token": "a"}')


def tokenizer_of(where: str = "base", **model: object) -> Spoil:
    """A tokenizer.json whose model is a small BPE with these changes."""
    kept = {key: value for key, value in (BPE["model"] | model).items() if value is not ...}
    return tokenizer_json(json.dumps(BPE | {"model": kept}), where)


def record(step: int, **changes: object) -> Spoil:
    """Fields of one line of metrics.jsonl set, or taken away."""

    def spoil() -> None:
        path = Path("cut/metrics.jsonl")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records[step - 1] = {k: v for k, v in (records[step - 1] | changes).items() if v is not ...}
        path.write_text("".join(json.dumps(r) + "\n" for r in records))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda: [spoil() for spoil in spoils] and None


def first(value: float, slot: str) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        tensors[slot].view(-1)[0] = value
        return tensors

    return change


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {name: tensor}


def slots(kind: str, value: torch.Tensor) -> Callable[[dict], dict]:
    return lambda tensors: {name: value.clone() if name.endswith(f".{kind}") else t for name, t in tensors.items()}


def without(n: int) -> Callable[[dict], dict]:
    return lambda tensors: dict(sorted(tensors.items())[n:])


# kind → (what, command, its further flags, how the world is spoiled, what the line must say)
BAD: dict[str, list[tuple[str, str, list[str], Spoil, str]]] = {
    "config.json": [
        ("empty", "convert_hf_checkpoint", [], write("raw/config.json", ""), "config.json is not valid JSON"),
        ("cut", "convert_hf_checkpoint", [], cut("raw/config.json"), "config.json is not valid JSON"),
        ("a list", "convert_hf_checkpoint", [], write("raw/config.json", "[]"), "holds a list"),
        ("UTF-16", "convert_hf_checkpoint", [], write("raw/config.json", "{}".encode("utf-16")), "config.json"),
        ("too deep", "convert_hf_checkpoint", [], write("raw/config.json", "[" * 99_999), "config.json"),
        ("no family", "convert_hf_checkpoint", [], edit("raw/config.json", architectures=["GPT9"]), "GPT9"),
        ("no shape", "convert_hf_checkpoint", [], edit("raw/config.json", hidden_size=...), "hidden_size"),
        ("a huge shape", "convert_hf_checkpoint", [], edit("raw/config.json", hidden_size=10**12), "hidden_size"),
        ("a wrong shape", "convert_hf_checkpoint", [], edit("raw/config.json", intermediate_size=50), "shape"),
        ("many layers", "convert_hf_checkpoint", [], edit("raw/config.json", num_hidden_layers=10**6), ""),
        ("negative", "convert_hf_checkpoint", [], edit("raw/config.json", num_attention_heads=-2), "n_head"),
        ("text", "convert_hf_checkpoint", [], edit("raw/config.json", vocab_size="many"), "vocab_size"),
        ("NaN", "convert_hf_checkpoint", [], edit("raw/config.json", rope_theta=float("nan")), "rope"),
        ("remote code", "convert_hf_checkpoint", [], edit("raw/config.json", hidden_act="os.system"), "hidden_act"),
        ("nobody's field", "convert_hf_checkpoint", [], edit("raw/config.json", residual_scale=0.5), "residual_scale"),
        ("layers of Qwen2", "convert_hf_checkpoint", [], family("Qwen2", num_hidden_layers=10**12), "hidden_layers"),
        ("layers of Phi-3", "convert_hf_checkpoint", [], family("Phi3", num_hidden_layers=10**19, sliding_window=9),
         "num_hidden_layers"),
        ("layers of SmolLM3", "doctor", [], family("SmolLM3", num_hidden_layers=10**9), "num_hidden_layers"),
        ("layers of Mistral", "doctor", [], family("Mistral", num_hidden_layers=10**9), "num_hidden_layers"),
        ("experts", "convert_hf_checkpoint", [], family("Mixtral", num_local_experts=2**31 - 1), "experts"),
        ("experts, some", "convert_hf_checkpoint", [], family("Mixtral", num_local_experts=9000), "9000 experts"),
        ("experts, doctor", "doctor", [], family("Mixtral", num_local_experts=2**31 - 1), "experts"),
        ("a theta of 400 digits", "convert_hf_checkpoint", [], edit("raw/config.json", rope_theta=10**400), "large"),
        ("a head of 400 digits", "convert_hf_checkpoint", [], edit("raw/config.json", head_dim=10**400), "head_dim"),
        ("an infinite share", "doctor", [], edit("raw/config.json", partial_rotary_factor=float("inf")), "infinity"),
        ("an infinite factor", "convert_hf_checkpoint", [],
         edit("raw/config.json", rope_scaling={"type": "linear", "factor": float("inf")}), "rope_factor"),
        ("an infinite original", "convert_hf_checkpoint", [], edit("raw/config.json", rope_scaling={
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": float("inf")}), "infinity"),
        ("names and a number", "doctor", [], edit("raw/config.json", architectures=["LlamaForCausalLM", 5]), "a list"),
        ("a scaling of a number", "export_hf", [], edit("base/config.json", rope_scaling=5), "rope_scaling"),
        ("parameters of text", "export_hf", [], edit("base/config.json", rope_parameters="x"), "rope_parameters"),
        ("a condensation of text", "export_hf", [], edit("base/config.json", rope_condense_ratio="x"), "'x'"),
        ("a link out", "export_hf", [], link("base/config.json", "../raw/config.json"), "is a link to"),
        ("missing", "doctor", [], remove("raw/config.json"), "config.json is missing"),
        ("a pipe", "convert_hf_checkpoint", [], pipe("raw/config.json"), "config.json is no regular file"),
        ("a device", "convert_hf_checkpoint", [], link("raw/config.json", "/dev/zero"), "config.json is no regular"),
        ("large", "doctor", [], lambda: os.truncate("raw/config.json", 1 << 40), "1,099,511,627,776 bytes, more than"),
        ("changed", "export_hf", [], write("base/config.json", "{"), "config.json"),
        ("missing, gguf", "export_gguf", [], remove("base/config.json"), "config.json"),
    ],
    "index": [
        ("empty", "convert_hf_checkpoint", [], index_text(""), "index.json"),
        ("a list", "convert_hf_checkpoint", [], index_text("[]"), "index.json"),
        ("no map", "convert_hf_checkpoint", [], index_text("{}"), "no weight_map"),
        ("a list as map", "doctor", [], index_text('{"weight_map": ["a"]}'), "no weight_map"),
        ("a missing shard", "convert_hf_checkpoint", [], index(a="gone.safetensors"), "gone.safetensors is missing"),
        ("upwards", "convert_hf_checkpoint", [], index(a="../base/model.safetensors"), "not a file of"),
        ("absolute", "doctor", [], index(a="/etc/passwd"), "not a file of"),
        ("a number", "convert_hf_checkpoint", [], index(a=5), ""),
        ("a promise", "convert_hf_checkpoint", [], index(a="shard.safetensors"), "promises 'a'"),
        ("NUL", "convert_hf_checkpoint", [], index(a="a\0b.safetensors"), ""),
        ("itself", "convert_hf_checkpoint", [], index(a="model.safetensors.index.json"), ""),
    ],
    "weights": [
        ("empty", "convert_hf_checkpoint", [], write("raw/model.safetensors", ""), "damaged"),
        ("cut", "convert_hf_checkpoint", [], cut("raw/model.safetensors", 0.9), "damaged"),
        ("a huge header", "convert_hf_checkpoint", [], write("raw/model.safetensors", b"\xff" * 16), "damaged"),
        ("no header", "doctor", [], header("raw/model.safetensors", "[]"), "damaged"),
        ("overlapping", "convert_hf_checkpoint", [], header(
            "raw/model.safetensors", '{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'), "damaged"),
        ("no dtype", "doctor", [], header(
            "raw/model.safetensors", '{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}'), "damaged"),
        ("one missing", "convert_hf_checkpoint", [], tensors("raw/model.safetensors", without(1)), "missing"),
        ("an unknown one", "convert_hf_checkpoint", [],
         tensors("raw/model.safetensors", with_tensor("extra", torch.ones(2))), "extra"),
        ("integers", "convert_hf_checkpoint", [],
         tensors("raw/model.safetensors", with_tensor("model.norm.weight", torch.ones(32, dtype=torch.int64))), "norm"),
        ("a link to nowhere", "convert_hf_checkpoint", [], link("raw/model.safetensors", "gone"), ""),
        ("zeros without end", "convert_hf_checkpoint", [],
         as_bin(lambda t: t | {"lm_head.weight": torch.zeros(1).expand(2 * 10**9, 32)}), "more values than the file"),
        ("a sparse one", "convert_hf_checkpoint", [],
         as_bin(lambda t: t | {"lm_head.weight": t["lm_head.weight"].to_sparse()}), "sparse_coo"),
        ("one in rows", "doctor", [],
         as_bin(lambda t: t | {"lm_head.weight": t["lm_head.weight"].to_sparse_csr()}), "sparse_csr"),
        ("one without contents", "convert_hf_checkpoint", [],
         as_bin(lambda t: t | {"lm_head.weight": t["lm_head.weight"].to("meta")}), "meta"),
        ("a compressed .bin", "convert_hf_checkpoint", [], both(as_bin(dict), deflate("raw/pytorch_model.bin")),
         "is compressed"),
        ("a text as .bin", "convert_hf_checkpoint", [],
         both(remove("raw/model.safetensors"), write("raw/pytorch_model.bin", "weights")), "pytorch_model.bin"),
        ("an empty .bin", "convert_hf_checkpoint", [],
         both(remove("raw/model.safetensors"), write("raw/pytorch_model.bin", "")), "pytorch_model.bin"),
        ("no weights", "convert_hf_checkpoint", [], remove("raw/model.safetensors"), "holds no model.safetensors"),
    ],
    "checkpoint": [
        ("cut weights", "generate", [], cut(BASE), "lit_model.safetensors has"),
        ("no weights", "generate", [], remove(BASE), "lit_model.safetensors is missing"),
        ("other tensors", "generate", [], tensors(BASE, without(2)), "does not hold its own model"),
        ("another shape", "generate", [], tensors(BASE, with_tensor("norm.weight", torch.ones(3))), "norm.weight"),
        ("many layers", "generate", [], edit("base/model_config.json", n_layer=9999), "layers are asked for"),
        ("many experts", "generate", [], edit("base/model_config.json", n_expert=9999, n_expert_per_token=1), "19998"),
        ("experts without end", "lora", [], edit("base/model_config.json", n_expert=2**31, n_expert_per_token=1), ""),
        ("a file out of it", "export_hf", [], link("base/merges.txt", "../rows.csv"), "is a link to"),
        ("a file out of it, merged", "merge_lora", [], link("base/merges.txt", "../rows.csv"), "is a link to"),
        ("a file out of it, gguf", "export_gguf", [], link("base/chat_template.jinja", "../style.jinja"), "is a link"),
        ("a file out of it, trained", "full", [], link("base/vocab.json", "../rows.csv"), "is a link to"),
        ("stop ids too large", "export_gguf", [], edit("base/manifest.json", facts={"stop_ids": [10**30]}), "stop_ids"),
        ("no config", "generate", [], write("base/model_config.json", "{}"), "model_config.json"),
        ("a huge number", "lora", [], edit("base/model_config.json", logits_softcap=10**30), "logits_softcap"),
        ("an unknown field", "generate", [], edit("base/model_config.json", speed=3), "model_config.json"),
        ("text as a number", "generate", [], edit("base/model_config.json", n_embd="x"), "model_config.json"),
        ("a manifest cut", "generate", [], cut("base/manifest.json"), "not a manifest"),
        ("a manifest of another kind", "generate", [], write("base/manifest.json", '{"kind": "x"}'), "manifest"),
        ("a newer manifest", "merge_lora", [], edit("base/manifest.json", format_version=2), "newer than 1"),
        ("a name upwards", "generate", [],
         write("base/manifest.json", '{"kind": "checkpoint", "facts": {}, "files": {"../x": {}}}'), "'../x'"),
        ("flipped", "verify", [], flip(BASE), "sha256"),
        ("cut, exported", "export_hf", [], cut(BASE), "lit_model.safetensors"),
        ("cut, gguf", "export_gguf", [], cut(BASE), "lit_model.safetensors"),
        ("cut, back", "convert_lit_checkpoint", [], cut(BASE), "lit_model.safetensors"),
        ("cut, trained", "full", [], cut(BASE), "lit_model.safetensors"),
        ("cut, LoRA", "lora", [], cut(BASE), "lit_model.safetensors"),
        ("no directory", "verify", ["--path=nowhere"], lambda: None, "no directory 'nowhere'"),
        ("nothing ours", "verify", ["--path=raw"], lambda: None, "nothing that lit_sft finished"),
    ],
    "tokenizer": [
        ("cut", "generate", [], cut("base/tokenizer.model"), "tokenizer.model"),
        ("empty", "prepare_csv", [], write("base/tokenizer.model", ""), "tokenizer.model"),
        ("text", "prepare_csv", [], write("base/tokenizer.model", "pieces"), "tokenizer.model"),
        ("missing", "prepare_csv", [], remove("base/tokenizer.model"), "no tokenizer"),
        ("missing, doctor", "doctor", [], remove("raw/tokenizer.model"), "no tokenizer"),
        ("JSON of nothing", "generate", [], tokenizer_json("{}"), "tokenizer.json"),
        ("JSON cut", "prepare_csv", [], tokenizer_json('{"model": {"type": "BPE"'), "tokenizer.json"),
        ("a list", "doctor", [], tokenizer_json("[]", "raw"), "tokenizer.json"),
        ("a config cut", "generate", [], write("base/tokenizer_config.json", "{"), "tokenizer_config.json"),
        ("tokens of a list", "prepare_csv", [],
         write("base/tokenizer_config.json", '{"added_tokens_decoder": [1]}'), "tokenizer_config.json"),
        ("an id that is none", "prepare_csv", [],
         write("base/tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'), "tokenizer_config"),
        ("cut, gguf", "export_gguf", [], cut("base/tokenizer.model"), "tokenizer.model"),
        ("a prefix too long", "prepare_csv", [], tokenizer_of(continuing_subword_prefix="#" * 9), "lacks the prefix"),
        ("a prefix in a letter", "doctor", [],
         tokenizer_of("raw", continuing_subword_prefix="#", vocab={"a": 0, "é": 1}, merges=["a é"]), "lacks the"),
        ("a charsmap", "generate", [],
         tokenizer_json(json.dumps(BPE | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}})),
         "tokenizer.json"),
        ("no length", "prepare_csv", [],
         tokenizer_json(json.dumps(BPE | {"pre_tokenizer": {"type": "FixedLength", "length": 0}})), "tokenizer.json"),
        ("an unknown token added", "doctor", [], tokenizer_json(json.dumps(BPE | {"post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}], "pair": [],
            "special_tokens": {}}}), "raw"), "tokenizer.json"),
        ("words without unknown", "prepare_csv", [],
         both(ENDS, tokenizer_of(type="WordLevel", unk_token="zz", merges=...)), "the tokenizer in base fails"),
        ("pairs without unknown", "generate", [], both(ENDS, tokenizer_of(unk_token="zz")), "base"),
        ("pieces without unknown", "generate", [],
         both(ENDS, tokenizer_of(type="Unigram", unk_id=None, vocab=[["a", -1], ["b", -2]], merges=...)), "base"),
        ("half a pair of surrogates", "prepare_csv", [],
         write("base/tokenizer_config.json", '{"bos_token": "\\ud800"}'), "tokenizer_config.json"),
        ("half a pair, gguf", "export_gguf", [],
         write("base/tokenizer_config.json", '{"chat_template": "\\ud800"}'), "tokenizer_config.json"),
    ],
    "template": [
        ("open", "prepare_csv", ["--prompt_style=style.jinja"], write("style.jinja", "{% for"), "style.jinja"),
        ("unknown word", "prepare_csv", ["--prompt_style=style.jinja"], write("style.jinja", "{{ x.y() }}"), ""),
        ("out of the sandbox", "prepare_csv", ["--prompt_style=style.jinja"],
         write("style.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ""),
        ("a pipe", "prepare_csv", ["--prompt_style=style.jinja"], pipe("style.jinja"), "style.jinja is no regular"),
        ("another file", "prepare_csv", ["--prompt_style=style.jinja"],
         write("style.jinja", "{% include '/etc/passwd' %}"), ""),
        ("Latin-1", "prepare_csv", ["--prompt_style=style.jinja"], write("style.jinja", b"\xe9"), "style.jinja"),
        ("the checkpoint's", "prepare_csv", [], write("base/chat_template.jinja", "{{ 1/0 }}"), ""),
        ("the config's", "prepare_csv", [], write("base/tokenizer_config.json", '{"chat_template": 5}'), ""),
        ("parentheses", "prepare_csv", ["--prompt_style=style.jinja"],
         write("style.jinja", "{{ " + "(" * 3000 + "instruction" + ")" * 3000 + " }}"), "style.jinja"),
        ("a wide number", "prepare_csv", ["--prompt_style=style.jinja"],
         write("style.jinja", "{{ '%1000000000d'|format(1) }}{{ instruction }}"), "more than 1 GB"),
        ("a device", "prepare_csv", ["--prompt_style=style.jinja"], link("style.jinja", "/dev/zero"), "no regular"),
        ("drops the answer", "prepare_csv", ["--prompt_style=style.jinja"], write("style.jinja", "hello"), ""),
    ],
    "data": [
        ("empty", "prepare_csv", [], write("rows.csv", ""), "rows.csv is empty"),
        ("a cell too few", "prepare_csv", [], write("rows.csv", "instruction,output\nQ\n"), "rows.csv row 1"),
        ("NUL", "prepare_csv", [], write("rows.csv", "instruction,output\nQ,\0\n"), "rows.csv row 1"),
        ("no list", "prepare_dataset", [], write("rows.jsonl", '{"messages": 5}\n'), "rows.jsonl row 1"),
        ("cut", "prepare_dataset", [], cut("rows.jsonl", 0.3), "rows.jsonl row 1"),
        ("a loop of links", "prepare_csv", [], link("rows.csv", "rows.csv"), "rows.csv"),
    ],
    "shards": [
        ("cut", "lora", [], cut("data/train-00000.pt"), "train-00000.pt"),
        ("flipped", "lora", [], flip("data/train-00000.pt"), "train-00000.pt"),
        ("missing", "full", [], remove("data/train-00000.pt"), "train-00000.pt is missing"),
        ("missing, estimate", "estimate", [], remove("data/train-00000.pt"), "train-00000.pt is missing"),
        ("no val", "lora", [], remove("data/val-00000.pt"), "val-00000.pt is missing"),
        ("a list", "lora", [], shard(lambda s: [1]), "train-00000.pt"),
        ("a tensor missing", "full", [], shard(lambda s: {k: v for k, v in s.items() if k != "offsets"}), "train-0"),
        ("offsets beyond", "lora", [], shard(first(10**9, "offsets")), "train-00000.pt"),
        ("ids below zero", "lora", [], shard(first(-5, "input_ids")), ""),
        ("ids too large", "lora", [], shard(first(10**6, "input_ids")), ""),
        ("floats", "lora", [], shard(lambda s: s | {"input_ids": s["input_ids"].float()}), "train-00000.pt"),
        ("empty", "lora", [], shard(lambda s: {k: v[: int(k == "offsets")].clone() for k, v in s.items()}), "train-0"),
        ("nowhere", "estimate", [], shard(lambda s: {k: v.to("meta") for k, v in s.items()}), "train-00000.pt"),
        ("sparse", "lora", [], shard(lambda s: s | {"input_ids": s["input_ids"].to_sparse()}), "train-00000.pt"),
        ("one id repeated", "verify", ["--path=data"],
         shard(lambda s: s | {"input_ids": torch.zeros(1, dtype=torch.int32).expand(len(s["input_ids"]))}), "train-0"),
        ("a fact short", "lora", [], shard(lambda s: s | {"n_labels": s["n_labels"][:0].clone()}), "train-00000.pt"),
        ("a fact of floats", "estimate", [], shard(lambda s: s | {"n_prompt": s["n_prompt"].float()}), "train-00000"),
        ("labels that lie", "lora", [], shard(lambda s: s | {"n_labels": s["n_labels"] * 0}), "not as many as told"),
        ("counts that lie", "verify", ["--path=data"], edit("data/manifest.json", facts={"n_train": 1}), "data"),
        ("facts missing", "lora", [], edit("data/manifest.json", facts={}), "manifest"),
        ("a newer format", "full", [], edit("data/manifest.json", format_version=2), "newer than 1"),
        ("no hashes", "lora", [], edit("data/manifest.json", files={"train-00000.pt": {}}), "no bytes and sha256"),
    ],
    "run directory": [
        ("arguments cut", "resume", [], write("cut/run.yaml", "a: [1"), "does not say what its run was started with"),
        ("arguments of code", "resume", [], write("cut/run.yaml", "!!python/object/apply:os.getcwd []"), "does not s"),
        ("arguments of aliases", "resume", [], write("cut/run.yaml", "a: &a [x, x]\nlora_r: [*a, *a]"), "the alias *a"),
        ("arguments of no kind", "resume", [], write("cut/run.yaml", 'lora_r: !!int ""'), "a value that is none of"),
        ("arguments with much", "resume", [],
         both(edit("cut/inputs.json", lora_r=["x"] * 9999), write("cut/run.yaml", "{}")), "lora_r: ['x', 'x'"),
        ("arguments verified", "verify", ["--path=run"], write("run/run.yaml", "out_dir: !!bool x"), "it is no YAML"),
        ("inputs a pipe", "resume", [], pipe("cut/inputs.json"), "inputs.json is no regular file"),
        ("records a pipe", "resume", [], pipe("cut/metrics.jsonl"), "metrics.jsonl is no regular file"),
        ("records a pipe, verified", "verify", ["--path=run"], pipe("run/metrics.jsonl"), "run/metrics.jsonl"),
        ("DONE of bytes", "verify", ["--path=run"], write("run/DONE", b"\xff\xfe"), "metrics.jsonl"),
        ("arguments a list", "resume", [], write("cut/run.yaml", "[]"), "does not say"),
        ("inputs cut", "resume", [], write("cut/inputs.json", "{"), "does not say"),
        ("inputs a list", "resume", [], write("cut/inputs.json", "[1]"), "does not say"),
        ("other arguments", "resume", ["--lora_r=8"], lambda: None, "lora_r: 4 then, 8 now"),
        ("other data", "resume", [], shard(first(9, "input_ids")), "data_fingerprint"),
        ("records missing", "resume", [], write("cut/metrics.jsonl", '{"step": 1, "loss": 1'), "metrics.jsonl"),
        ("records of a list", "resume", [], write("cut/metrics.jsonl", "[]\n"), "metrics.jsonl"),
        ("a record without", "resume", [], record(2, n_tokens=...), "metrics.jsonl is damaged: after step 1"),
        ("a record of a word", "resume", [], record(1, tokens_per_s="fast"), "its tokens_per_s is 'fast'"),
        ("a record too large", "resume", [], record(2, seconds=10**400), "its seconds is 1000"),
        ("a newer state", "resume", [], edit(f"{STATE}/manifest.json", format_version=2), "newer than 1"),
        ("another step", "resume", [], edit(f"{STATE}/state.json", step="two"), "state.json"),
        ("no step", "resume", [], edit(f"{STATE}/state.json", step=...), "state.json"),
        ("no facts", "resume", [], edit(f"{STATE}/state.json", best_step=...), "state.json"),
        ("a tensor less", "resume", [], tensors(f"{STATE}/adapter.safetensors", without(1)), "adapter.safetensors"),
        ("a slot less", "resume", [], tensors(OPTIMIZER, without(1)), "optimizer.safetensors"),
        ("a slot of another shape", "resume", [],
         tensors(OPTIMIZER, lambda t: {name: torch.ones(3) for name in t}), "optimizer"),
        ("a slot too many", "resume", [],
         tensors(OPTIMIZER, with_tensor("x.exp_avg", torch.ones(2))), "x.exp_avg"),
        ("slots of one number", "resume", [], tensors(OPTIMIZER, slots("exp_avg", torch.ones(()))),
         "is no slot of AdamW"),
        ("a full step", "resume", [], tensors(OPTIMIZER, slots("step", torch.ones(4, 32))), "AdamW"),
        ("an infinite step", "resume", [],
         tensors(OPTIMIZER, slots("step", torch.tensor(torch.inf))), "is no slot of AdamW"),
        ("slots of whole numbers", "resume", [],
         tensors(OPTIMIZER, lambda t: {k: v.int() for k, v in t.items()}), "is no slot of AdamW"),
        ("slots of another name", "resume", [],
         tensors(OPTIMIZER, lambda t: {f"{k}x": v for k, v in t.items()}), "is no slot of AdamW"),
        ("no steps", "resume", [],
         tensors(OPTIMIZER, lambda t: {k: v for k, v in t.items() if not k.endswith(".step")}),
         "holds other slots"),
        ("a state that is none", "resume", ["--resume=cut/checkpoints/step-00000009"], lambda: None, "step-00000009"),
        ("a state elsewhere", "resume", ["--resume=run/checkpoints/step-00000001"], lambda: None, "no saved state"),
        ("finished", "lora", ["--out_dir=run"], lambda: None, "holds a finished run"),
        ("verified: a step missing", "verify", ["--path=run"], write("run/metrics.jsonl", ""), "metrics.jsonl"),
        ("verified: no adapter config", "verify", ["--path=run"], remove("run/adapter/adapter_config.json"), "adapter"),
    ],
    "adapter": [
        ("cut", "generate", ["--adapter_dir=run"], cut(ADAPTER), "adapter.safetensors has"),
        ("flipped", "merge_lora", [], flip(ADAPTER), "sha256"),
        ("config cut", "export_peft", [], write("run/adapter/adapter_config.json", "{"), "adapter_config.json"),
        ("no base named", "merge_lora", [], edit("run/adapter/adapter_config.json", checkpoint_dir=...), ""),
        ("no fingerprint", "generate", ["--adapter_dir=run"],
         edit("run/adapter/adapter_config.json", base_fingerprint=...), ""),
        ("a rank of text", "merge_lora", [], edit("run/adapter/adapter_config.json", lora_r="four"), "lora_r"),
        ("another rank", "export_peft", [], edit("run/adapter/adapter_config.json", lora_r=7), "adapter.safetensors"),
        ("a huge rank", "merge_lora", [], edit("run/adapter/adapter_config.json", lora_r=10**9), ""),
        ("a huge alpha", "merge_lora", [], edit("run/adapter/adapter_config.json", lora_alpha=1e308), "lora_alpha"),
        ("an unknown field", "merge_lora", [], edit("run/adapter/adapter_config.json", lora_speed=1), "lora_speed"),
        ("a tensor less", "merge_lora", [], tensors(ADAPTER, without(1)), "does not fit the model"),
        ("stop ids of text", "generate", ["--adapter_dir=run"],
         edit("run/adapter/adapter_config.json", stop_ids="end"), "stop_ids"),
    ],
    "peft": [
        ("no config", "import_peft", [], remove("peft/adapter_config.json"), "holds no adapter_config.json"),
        ("config cut", "import_peft", [], cut("peft/adapter_config.json"), "adapter_config.json"),
        ("another kind", "import_peft", [], edit("peft/adapter_config.json", peft_type="IA3"), "IA3"),
        ("a rank of text", "import_peft", [], edit("peft/adapter_config.json", r="four"), "r"),
        ("a rank of zero", "import_peft", [], edit("peft/adapter_config.json", r=0), ""),
        ("no alpha", "import_peft", [], edit("peft/adapter_config.json", lora_alpha=...), ""),
        ("an infinite alpha", "import_peft", [], edit("peft/adapter_config.json", lora_alpha=float("inf")), ""),
        ("patterns of a list", "import_peft", [], edit("peft/adapter_config.json", rank_pattern=[1]), ""),
        ("an open pattern", "import_peft", [], edit("peft/adapter_config.json", rank_pattern={"[": 1}), ""),
        ("slow stars", "import_peft", [], edit("peft/adapter_config.json", rank_pattern={".*" * 30 + "ZZ": 4}), ".*"),
        ("slow choices", "import_peft", [],
         edit("peft/adapter_config.json", alpha_pattern={"(.*|.*|.*)" * 8 + "Z": 4}), "(.*|"),
        ("slow dots", "import_peft", [], edit("peft/adapter_config.json", rank_pattern={"." * 499 + "!": 4}), "..."),
        ("a long alpha", "import_peft", [], edit("peft/adapter_config.json", lora_alpha=10**400), "lora_alpha"),
        ("a huge alpha", "import_peft", [], edit("peft/adapter_config.json", lora_alpha=1e308), "lora_alpha"),
        ("no tensors", "import_peft", [], remove("peft/adapter_model.safetensors"), "adapter_model"),
        ("tensors cut", "import_peft", [], cut("peft/adapter_model.safetensors"), "adapter_model"),
        ("an unknown tensor", "import_peft", [],
         tensors("peft/adapter_model.safetensors", with_tensor("x", torch.ones(2))), "x"),
        ("half a pair", "import_peft", [], tensors("peft/adapter_model.safetensors", without(1)), ""),
        ("no such style", "import_peft", ["--prompt_style=none-such"], lambda: None, "none-such"),
    ],
    "output": [
        ("the disk is a file", "export_hf", ["--out_dir=rows.csv/x"], lambda: None, "rows.csv"),
        ("a folder in the way", "export_gguf", ["--out_file=data"], lambda: None, "data"),
        ("another directory", "merge_lora", ["--out_dir=data"], lambda: None, "not an empty folder"),
        ("a file in the way", "prepare_csv", ["--destination_path=rows.jsonl"], lambda: None, "rows.jsonl"),
        ("a run in a file", "lora", ["--out_dir=rows.csv"], lambda: None, "rows.csv"),
        ("no peft", "import_peft", ["--peft_dir=nowhere"], lambda: None, "nowhere"),
        ("a quantization that is none", "lora", ["--quantize=int3"], lambda: None, "int3"),
    ],
}  # fmt: skip
CASES = [pytest.param(*case[1:], id=f"{kind}: {case[0]}, {case[1]}") for kind, cases in BAD.items() for case in cases]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("bad") / "world"
    assert fork(lambda: make_world(world), world.with_suffix(".log")) == 0, world.with_suffix(".log").read_text()
    return world


@pytest.mark.parametrize(("name", "flags", "spoil", "says"), CASES)
def test_what_is_broken_is_named_and_nothing_is_touched(
    name: str, flags: list[str], spoil: Spoil, says: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room"
    shutil.copytree(world, room)
    monkeypatch.chdir(room)
    spoil()
    argv = ["lora", *RESUME] if name == "resume" else [name, *COMMANDS[name]]
    given = {flag.partition("=")[0] for flag in flags}
    argv = [word for word in argv if word.partition("=")[0] not in given]
    argv = [word for word in argv if word not in ("base", "raw") or "--path" not in given]
    end = attempt(room, [*argv, *flags], tmp_path / "log")
    assert end.code == 2 and end.problem is None, (end.problem, end.code, end.text)
    assert says in next(line for line in end.text.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("target", [*TARGETS])
def test_what_is_not_broken_is_accepted(target: str, world: Path, tmp_path: Path) -> None:
    """Otherwise the table would prove nothing."""
    from bad_inputs import argv_of

    shutil.copytree(world, tmp_path / "room")
    end = attempt(tmp_path / "room", argv_of(target), tmp_path / "log")
    assert end.code == 0 and end.problem is None, end.text


def test_there_are_more_than_a_hundred_over_all_commands() -> None:
    """The count of the bad-input table: arguments are in test_cli, data in test_malformed, the rest is here."""
    import test_cli
    import test_malformed

    counts = Counter({kind: len(cases) for kind, cases in BAD.items()})
    counts["arguments"] += len(test_cli.NO_SUCH_THING)
    counts["data"] += len(test_malformed.MALFORMED)
    print(f"{counts.total()} bad inputs: {dict(counts)}")
    assert counts.total() >= 300 and min(counts.values()) >= 6
    commands = {case[1] for cases in BAD.values() for case in cases} | {case[1] for case in test_cli.NO_SUCH_THING}
    others = {"prepare_dolly", "prepare_flan", "prepare_lima", "prepare_longform", "prepare_oasst", "resume"}
    assert commands | others >= set(cli.commands())


# --- the harness ---


def test_the_judge_condemns_what_it_must() -> None:
    line = "error: x is wrong\n"
    assert judge(2, line, {}, {}, []) is None and judge(0, "", {}, {"new": None}, []) is None
    assert judge(1, line, {}, {}, []) == "exit code 1" and judge(-9, "", {}, {}, []) == "exit code -9"
    assert judge(2, "", {}, {}, []) == "0 error lines" and judge(2, line * 2, {}, {}, []) == "2 error lines"
    assert judge(2, "Traceback\n" + line, {}, {}, []) == "a traceback"
    assert judge(2, line, {}, {"new": None}, []) == "changed: ['new']"
    assert judge(0, "", {}, {}, [".tmp-x"]) == "left over: ['.tmp-x']"


def test_mutations_differ_and_are_repeatable() -> None:
    for kind, content in (
        (".json", b'{"a": [1, {"b": "c"}], "d": 2}'),
        (".safetensors", bytes(900)),
        (".csv", b"a,b\n"),
    ):
        once = [mutate(content, kind, random.Random(seed)) for seed in range(50)]
        assert once == [mutate(content, kind, random.Random(seed)) for seed in range(50)]
        assert len({*once}) > 20 and sum(one != content for one in once) > 35


def test_the_world_is_what_the_table_says(world: Path) -> None:
    assert load_file(world / BASE).keys() and (world / STATE / "manifest.json").is_file()
    assert not (world / "cut" / "DONE").exists() and (world / "run" / "DONE").is_file()
