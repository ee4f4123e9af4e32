"""GGUF files read back with the gguf package, and where llama.cpp is installed, run by it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, instruction_texts
from safetensors.torch import load_file
from test_export import FULL_DISK
from test_families import VARIANTS, Variant, logits_of, make_reference
from test_lora import filled_adapter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lit_sft.args import ConvertArgs, ExportGGUFArgs, LoRAArgs
from lit_sft.checkpoint import adapter_facts, save_adapter
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.export_gguf import export_gguf
from lit_sft.gguf_vocabulary import EXPRESSIONS

VOCAB = 400


@pytest.fixture
def checkpoint_of(tmp_path: Path, tokenizer_model: bytes) -> Callable[..., tuple[torch.nn.Module, Path]]:
    """``checkpoint_of(variant)`` makes transformers' model and its converted checkpoint, with a tokenizer."""

    def make(variant: str | Variant, directory: str = "hub", **config: object) -> tuple[torch.nn.Module, Path]:
        variant = VARIANTS[variant] if isinstance(variant, str) else variant
        reference = make_reference(tmp_path / directory, variant, **{"vocab_size": VOCAB, **config})
        (tmp_path / directory / "tokenizer.model").write_bytes(tokenizer_model)
        return reference, convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path / directory)))

    return make


def exported(checkpoint: Path, **args: str) -> gguf.GGUFReader:
    out = checkpoint.parent / f"{checkpoint.name}.gguf"
    return gguf.GGUFReader(
        export_gguf(ExportGGUFArgs(checkpoint_dir=str(checkpoint), out_file=str(out), **{"quantize": "f32"} | args))
    )


def tensors_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor, dequantised, with its dimensions in our order."""
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
        for t in reader.tensors
    }


def field(reader: gguf.GGUFReader, name: str) -> object:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def turned_back(rows: np.ndarray, n_head: int) -> np.ndarray:
    """From llama.cpp's order of a head's rows (pairs side by side) to the Hub's (first halves, second halves)."""
    size = len(rows) // n_head
    order = [h * size + i for h in range(n_head) for i in (*range(0, size, 2), *range(1, size, 2))]
    return rows[order]


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama grouped-query", "LLAMA"),
        ("llama attention bias", "LLAMA"),
        ("llama tied", "LLAMA"),
        ("mistral nemo", "LLAMA"),
        ("qwen2", "QWEN2"),
        ("qwen3", "QWEN3"),
        ("gemma", "GEMMA"),
        ("olmo2", "OLMO2"),
        ("stablelm 3b", "STABLELM"),
    ],
)
def test_names_shapes_and_values_are_those_of_the_hubs_file(checkpoint_of: Callable, name: str, arch: str) -> None:
    """The names by the gguf package's own map from the Hub's."""
    _, checkpoint = checkpoint_of(name)
    reader, arch = exported(checkpoint), gguf.MODEL_ARCH[arch]
    assert field(reader, "general.architecture") == gguf.MODEL_ARCH_NAMES[arch]
    config = json.loads((checkpoint / "config.json").read_text())
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    expected = {}
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        expected[names.get_name(key, try_suffixes=(".weight", ".bias"))] = tensor.numpy()
    found = tensors_of(reader)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        ours = found[key]
        if arch is gguf.MODEL_ARCH.LLAMA and ".attn_q." in key:
            ours = turned_back(ours, config["num_attention_heads"])
        if arch is gguf.MODEL_ARCH.LLAMA and ".attn_k." in key:
            ours = turned_back(ours, config["num_key_value_heads"])
        if arch is gguf.MODEL_ARCH.GEMMA and "norm" in key:
            tensor = tensor + 1  # llama.cpp multiplies by the weight as it is
        assert ours.shape == tensor.shape and np.array_equal(ours, tensor), key


@pytest.mark.parametrize(("quantize", "bound"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", None)])
def test_matrices_are_quantized_and_vectors_are_not(checkpoint_of: Callable, quantize: str, bound: float) -> None:
    _, checkpoint = checkpoint_of("qwen2", hidden_size=64, intermediate_size=96)
    exact = tensors_of(exported(checkpoint))
    (checkpoint.parent / "hub.gguf").unlink()
    reader = exported(checkpoint, quantize=quantize)
    assert field(reader, "general.file_type") == {"f16": 1, "bf16": 32, "q8_0": 7}[quantize]
    for tensor in reader.tensors:
        is_matrix = len(tensor.shape) > 1
        assert tensor.tensor_type.name == (quantize.upper() if is_matrix else "F32"), tensor.name
    for name, tensor in tensors_of(reader).items():
        error = np.abs(tensor - exact[name])
        if exact[name].ndim < 2:
            assert not error.any()
        elif bound:
            assert (error <= bound * np.abs(exact[name]) + 1e-7).all(), name
        else:  # half a step of the block's 127, and the step itself rounded to f16
            largest = np.abs(exact[name]).reshape(-1, 32).max(1)
            assert (error.reshape(-1, 32).max(1) <= largest / 127 * 0.57).all(), name
            assert error.any()


def test_rows_that_do_not_fill_blocks_stay_f16(checkpoint_of: Callable) -> None:
    _, checkpoint = checkpoint_of("qwen3", hidden_size=48)
    kinds = {t.name: t.tensor_type.name for t in exported(checkpoint, quantize="q8_0").tensors}
    assert kinds["token_embd.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_the_shape_is_told(checkpoint_of: Callable) -> None:
    _, checkpoint = checkpoint_of("llama rope linear", num_key_value_heads=2, rms_norm_eps=1e-3)
    reader = exported(checkpoint)
    told = {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-3,
        "rope.dimension_count": 16,
        "rope.freq_base": 1e4,
        "rope.scaling.factor": 4.0,
        "vocab_size": VOCAB,
    }
    assert {key: field(reader, f"llama.{key}") for key in told} == pytest.approx(told, rel=1e-6)
    assert field(reader, "llama.rope.scaling.type") == "linear"


def test_experts_are_stacked(checkpoint_of: Callable) -> None:
    _, checkpoint = checkpoint_of("mixtral")
    found, original = tensors_of(exported(checkpoint)), load_file(checkpoint / "model.safetensors")
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        stack = [original[f"model.layers.1.block_sparse_moe.experts.{i}.{theirs}.weight"] for i in range(4)]
        assert np.array_equal(found[f"blk.1.ffn_{ours}_exps.weight"], torch.stack(stack).numpy())


def test_an_adapter_is_merged_on_the_way(checkpoint_of: Callable, tmp_path: Path) -> None:
    _, base = checkpoint_of("llama grouped-query")
    args = LoRAArgs(lora_r=4)
    model = filled_adapter(base, args)
    save_adapter(tmp_path / "adapter", model, args, adapter_facts(base, {"prompt_style": "plain", "stop_ids": [2, 7]}))
    reader = gguf.GGUFReader(
        export_gguf(
            ExportGGUFArgs(lora_path=str(tmp_path / "adapter"), out_file=str(tmp_path / "x.gguf"), quantize="f32")
        )
    )
    layer = model.blocks[1].mlp.up
    expected = (layer.base.weight + layer.delta()).detach().numpy()
    assert np.allclose(tensors_of(reader)["blk.1.ffn_up.weight"], expected, atol=1e-7)
    assert field(reader, "tokenizer.ggml.eot_token_id") == 7  # what the run was trained to end with


# --- tokenizers ---


def test_a_sentencepiece_model_is_told_piece_by_piece(checkpoint_of: Callable, tokenizer_model: bytes) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query", vocab_size=VOCAB + 5)
    added = {"400": {"content": "<|im_end|>", "special": True}, "401": {"content": "<tool>", "special": False}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    reader = exported(checkpoint)
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    tokens, scores, kinds = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    assert tokens[:VOCAB] == [model.id_to_piece(i) for i in range(VOCAB)]
    assert scores[:VOCAB] == pytest.approx([model.get_score(i) for i in range(VOCAB)])
    assert tokens[VOCAB:] == ["<|im_end|>", "<tool>", "[PAD402]", "[PAD403]", "[PAD404]"]
    types = gguf.TokenType
    assert kinds[VOCAB:] == [types.CONTROL, types.USER_DEFINED, *[types.UNUSED] * 3]
    assert kinds[:3] == [types.UNKNOWN, types.CONTROL, types.CONTROL]
    assert [i for i, kind in enumerate(kinds) if kind == types.BYTE] == [i for i in range(VOCAB) if model.is_byte(i)]
    for key, value in {
        "model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "add_bos_token": True, "add_space_prefix": True,
    }.items():  # fmt: skip
        assert field(reader, f"tokenizer.ggml.{key}") == value, key
    assert field(reader, "tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.parametrize(("begin", "legacy", "expected"), [("{{ bos_token }}", False, False), ("Hi ", False, True),
                                                          ("{{ bos_token }}", True, True)])  # fmt: skip
def test_the_space_in_front_is_that_of_chat_prompts(checkpoint_of, begin, legacy, expected) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    settings = {"chat_template": begin + "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "legacy": legacy}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    assert field(exported(checkpoint), "tokenizer.ggml.add_space_prefix") is expected


def byte_level(pre: list, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre) if len(pre) > 1 else pre[0]
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(instruction_texts(), trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def cut_by(expression: str) -> list:
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(expression), "isolated"), bare]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# as published: Llama 3's, Qwen 2's, Mistral Nemo's and Phi-4-mini's tokenizer.json
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PHI4_MINI = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FALCON = [
    pre_tokenizers.Punctuation("contiguous"),
    GPT2,
    pre_tokenizers.Digits(individual_digits=False),
    pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
]
PRE = {
    "gpt-2": ([GPT2], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT2], False),
    "falcon": (FALCON, False),
    "llama-bpe": (cut_by(LLAMA3), True),
    "dbrx": (cut_by(LLAMA3), False),
    "qwen2": (cut_by(QWEN2), False),
    "tekken": (cut_by(NEMO), True),
    "gpt-4o": (cut_by(PHI4_MINI), False),
}


def test_the_published_expressions_are_known() -> None:
    assert {LLAMA3, QWEN2, NEMO, PHI4_MINI} == EXPRESSIONS.keys()


def with_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> Path:
    (checkpoint / "tokenizer.model").unlink()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(names))
    return checkpoint


@pytest.mark.parametrize("pre", PRE)
def test_a_byte_level_tokenizer_is_told_with_its_merges(checkpoint_of: Callable, pre: str) -> None:
    tokenizer = byte_level(*PRE[pre])
    _, checkpoint = checkpoint_of("llama grouped-query")
    reader = exported(with_tokenizer(checkpoint, tokenizer))
    assert field(reader, "tokenizer.ggml.model") == "gpt2" and field(reader, "tokenizer.ggml.pre") == pre
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    size = tokenizer.get_vocab_size()
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)] and len(tokens) == VOCAB
    document = json.loads((checkpoint / "tokenizer.json").read_text())
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(merge) for merge in document["model"]["merges"]]
    types = gguf.TokenType
    assert kinds[:4] == [types.CONTROL] * 3 + [types.NORMAL]
    assert kinds[size - 1 :] == [types.USER_DEFINED] + [types.UNUSED] * (VOCAB - size)


@pytest.mark.parametrize(
    "pre", [[pre_tokenizers.ByteLevel(add_prefix_space=True)], cut_by(r"\s+"), [pre_tokenizers.Whitespace(), GPT2]]
)
def test_an_unknown_pre_tokenizer_is_said_to_be_so(
    checkpoint_of: Callable, capsys: pytest.CaptureFixture, pre: list
) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    reader = exported(with_tokenizer(checkpoint, byte_level(pre)))
    assert field(reader, "tokenizer.ggml.pre") == "default"
    assert "notice: llama.cpp has no name for this tokenizer's pre-tokenizer" in capsys.readouterr().out


def byte_fallback() -> Tokenizer:
    """As transformers saves Llama's SentencePiece model."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(prefix)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    words = pre_tokenizers.Split("▁", "merged_with_next")
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, words
    trained.train_from_iterator(instruction_texts(), trainers.BpeTrainer(vocab_size=VOCAB - 259))
    model = json.loads(trained.to_str())["model"]
    base = special + [f"<0x{i:02X}>" for i in range(256)]
    vocab = {text: i for i, text in enumerate([*base, *model["vocab"]])}
    document = json.loads(tokenizer.to_str())
    document["model"] |= {"vocab": vocab, "merges": model["merges"]}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_byte_fallback_without_a_sentencepiece_file(checkpoint_of: Callable) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    tokenizer = byte_fallback()
    reader = exported(with_tokenizer(checkpoint, tokenizer))
    assert field(reader, "tokenizer.ggml.model") == "llama" and field(reader, "tokenizer.ggml.add_space_prefix")
    tokens, scores = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.scores")
    merges = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["merges"]
    made = [scores[tokens.index("".join(merge))] for merge in merges]
    assert made == sorted(made, reverse=True) and len(set(made)) == len(set(map("".join, merges)))
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert kinds[0] == kinds[1] == gguf.TokenType.CONTROL and kinds[3:259] == [gguf.TokenType.BYTE] * 256


def unigram(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(instruction_texts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "u"), vocab_size=300, minloglevel=2
    )
    (checkpoint / "tokenizer.model").write_bytes((tmp_path / "u.model").read_bytes())


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stablelm alpha v2", "llama.cpp has no architecture for the StableLM-alpha"),
        ("falcon rw", "does not compute .*alibi = True"),
        ("qwen3 attention bias", "'qwen3' does not compute qkv_bias = True"),
        ("qwen3-moe, shares as they are", "normalize_experts = False"),
        ("gemma2", "attention_scale"),
        ("llama rope yarn, all its fields", "rope_beta_fast = 8.0"),
        ("neox without biases of attention", "qkv_bias = False"),
        ("smollm3 interval", "rope_layers"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(checkpoint_of: Callable, name: str, says: str) -> None:
    _, checkpoint = checkpoint_of(name)
    with pytest.raises(InputError, match=says):
        exported(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["hub"]


def test_tokenizers_that_llama_cpp_lacks_are_refused(checkpoint_of: Callable, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    unigram(checkpoint, tmp_path)
    with pytest.raises(InputError, match="is a unigram model"):
        exported(checkpoint)
    document = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (checkpoint / "tokenizer.model").unlink()
    (checkpoint / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="is a WordLevel model"):
        exported(checkpoint)
    assert not (tmp_path / "hub.gguf").exists()


def test_a_window_that_llama_cpp_lacks_bounds_the_context(
    checkpoint_of: Callable, capsys: pytest.CaptureFixture
) -> None:
    _, checkpoint = checkpoint_of("mistral 0.1")
    assert field(exported(checkpoint), "llama.context_length") == 8
    assert "has no window; the context is cut to its 8 tokens" in capsys.readouterr().out


def test_without_the_package_it_is_named(checkpoint_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'lit-sft\[gguf\]'"):
        export_gguf(ExportGGUFArgs(checkpoint_dir=str(checkpoint), out_file="x.gguf"))


def test_a_file_in_the_way_is_left_alone(checkpoint_of: Callable, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    (tmp_path / "hub.gguf").write_text("precious")
    with pytest.raises(InputError, match=r"--out_file .* exists"):
        exported(checkpoint)
    assert (tmp_path / "hub.gguf").read_text() == "precious"


def test_a_full_disk_leaves_nothing(checkpoint_of: Callable, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of("llama grouped-query")
    before = sorted(tmp_path.rglob("*"))
    flags = [f"--checkpoint_dir={checkpoint}", f"--out_file={tmp_path / 'x.gguf'}"]
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "export_gguf", *flags],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 2 and "x.gguf cannot be written" in run.stderr and run.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# --- llama.cpp itself ---

RUNS = {
    name: VARIANTS[name]
    for name in (
        "llama grouped-query", "llama head_dim", "llama rope linear", "llama rope llama3", "llama rope yarn",
        "llama attention bias", "mistral nemo", "mixtral", "qwen2", "qwen2 yarn", "qwen3", "qwen3-moe", "gemma",
        "smollm2", "olmo2", "stablelm 3b", "stablelm 2 12b", "neox", "falcon 7b", "falcon 40b",
    )
}  # fmt: skip
for _name in ("gemma2", "gemma3"):  # with the scale that llama.cpp takes
    RUNS[_name] = replace(VARIANTS[_name], config=VARIANTS[_name].config | {"query_pre_attn_scalar": 16})
_four = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
RUNS["smollm3"] = replace(VARIANTS["smollm3"], config=VARIANTS["smollm3"].config | _four)
_wide = {"sliding_window": None, "original_max_position_embeddings": 256}  # below it the short factors, as here
RUNS["phi 3 longrope"] = replace(VARIANTS["phi 3 of su"], config=VARIANTS["phi 3 of su"].config | _wide, edit=None)
TABLED_GELU = ("neox", "falcon 7b", "falcon 40b", "gemma", "gemma2", "gemma3")  # its gelu is read from an f16 table


def running(path: Path) -> object:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which builds llama.cpp, is not installed")
    f32 = 0  # of the cache, so that logits can be compared
    options = {"n_ctx": 256, "logits_all": True, "n_gpu_layers": 0, "verbose": False, "type_k": f32, "type_v": f32}
    return llama_cpp.Llama(str(path), n_threads=1, **options)


@pytest.mark.parametrize("name", RUNS)
def test_llama_cpp_gives_the_same_greedy_tokens(checkpoint_of: Callable, name: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, which builds llama.cpp, is not installed")
    reference, checkpoint = checkpoint_of(RUNS[name])
    exported(checkpoint)
    llama = running(checkpoint.parent / "hub.gguf")
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    llama.eval(ids[0].tolist())
    logits = torch.tensor(llama.scores[: ids.shape[1]])
    assert (logits - logits_of(reference, ids)[0]).abs().max() < (2e-2 if name in TABLED_GELU else 1e-4)
    for _ in range(12):
        token = int(logits_of(reference, ids)[0, -1].argmax())
        assert int(llama.scores[llama.n_tokens - 1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        llama.eval([token])


TEXTS = [
    "What do llamas eat?", "  two spaces, 12345 digits; I've LLAMAs'RE here\n\n\tend ", "naïve 🦙 中文 Ünïcode…",
    "def f(x):\n    return x['a'] + 3.14 // 7\n", "",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["sentencepiece", "byte fallback", *PRE])
def test_llama_cpp_cuts_texts_into_the_same_ids(checkpoint_of: Callable, kind: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, which builds llama.cpp, is not installed")
    from lit_sft import Tokenizer as Ours

    _, checkpoint = checkpoint_of("llama grouped-query" if kind in ("sentencepiece", "byte fallback") else "qwen2")
    if kind != "sentencepiece":
        with_tokenizer(checkpoint, byte_fallback() if kind == "byte fallback" else byte_level(*PRE[kind]))
    exported(checkpoint)
    llama, ours = running(checkpoint.parent / "hub.gguf"), Ours(checkpoint)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text, bos=False), text
    text = "a</s>b"
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == ours.encode(text, control=True)
