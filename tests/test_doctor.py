"""doctor: what a directory is, what of it cannot be used (exit code 2) and what is suspicious (0), converted or not."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_hf_llama
from family_variants import VARIANTS
from safetensors.torch import load_file, save_file
from test_families import make_reference

from lit_sft import cli
from lit_sft.args import ConvertArgs, DoctorArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.doctor import examine
from lit_sft.errors import InputError
from scripts.doctor import main

LLAMA2 = "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
LLAMA2 += "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"


def edit(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@pytest.fixture
def made(tmp_path: Path, tokenizer_model: bytes) -> Path:
    """A downloaded Llama, not converted."""
    make_hf_llama(tmp_path, tokenizer_model)
    return tmp_path


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture) -> Callable[[Path], tuple[str, str]]:
    """``doctor(directory)`` gives what is printed, and the error or nothing."""

    def run(directory: Path) -> tuple[str, str]:
        capsys.readouterr()
        before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
        error = ""
        try:
            examine(DoctorArgs(checkpoint_dir=str(directory)))
        except InputError as raised:
            error = str(raised)
        assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before, "it must only look"
        return capsys.readouterr().out, error

    return run


def test_a_download_and_what_it_becomes(made: Path, doctor: Callable) -> None:
    text, error = doctor(made)
    assert not error and text.endswith("it can be used\n")
    for line in (
        "family      Llama (LlamaForCausalLM)",
        "shape       n_layer 2, n_embd 64, n_head 4, n_query_groups 2, head_size 16, vocab_size 400, block_size 512, ",
        "switches    norm_eps 1e-06",
        f"parameters  {sum(t.numel() for t in load_file(made / 'model.safetensors').values()):,}",
        "files       model.safetensors: 21 tensors, float32, 0.00",
        "converted   no; run: python scripts/convert_hf_checkpoint.py",
        "tokenizer   tokenizer.model, 400 ids, BOS <s> 1, EOS </s> 2; BOS is put in front",
        "prompts     alpaca to prepare data, plain text to generate from; answers end at 2",
    ):
        assert f"\n  {line}" in text, line
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(made), dtype="bfloat16"))
    text, error = doctor(made)
    assert not error and "converted   yes, by lit_sft" in text and "21 tensors, bfloat16" in text
    (made / "chat_template.jinja").write_text(LLAMA2)
    assert "prompts     chat-template; answers end at 2\n" in doctor(made)[0]
    (made / "model.safetensors").unlink()  # as merged checkpoints are
    text, error = doctor(made)
    assert not error and "files " not in text and text.endswith("it can be used\n")


def test_the_prompt_style_of_a_fine_tuned_model(made: Path, doctor: Callable) -> None:
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(made)))
    content = json.loads((made / "manifest.json").read_text())
    content["facts"] |= {"prompt_style": "vicuna", "stop_ids": [2]}
    (made / "manifest.json").write_text(json.dumps(content | {"digest": None}))
    assert "prompts     vicuna; answers end at 2\n" in doctor(made)[0]


def test_switches_and_fields_that_are_not_read(tmp_path: Path, tokenizer_model: bytes, doctor: Callable) -> None:
    make_reference(tmp_path, VARIANTS["gemma3 linear"], vocab_size=400)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    edit(tmp_path / "config.json", mystery=7, use_cache=True)
    assert "mystery = 7: the toolkit does not know" in doctor(tmp_path)[1]
    edit(tmp_path / "config.json", mystery=False, quantization_config={"bits": 4})  # beside whole weights
    text, error = doctor(tmp_path)
    assert not error
    for switch in (
        "quantization_config: not read, all weights",
        "norm_unit_offset True",
        "sliding_window 24",
        "sliding_layers 2 of 3",
        "rope_type linear",
    ):
        assert switch in text
    assert "\n  not read    mystery\n" in text


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def change_weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        save_file(change(weights), directory / "model.safetensors")

    return apply


def index_of_missing_shard(directory: Path) -> None:
    names = dict.fromkeys(load_file(directory / "model.safetensors"), "model-2.safetensors")
    (directory / "model.safetensors").unlink()
    edit(directory / "model.safetensors.index.json", weight_map=names)


def old_index(directory: Path) -> None:
    edit(directory / "model.safetensors.index.json", weight_map={"model.norm.weight": "model-2.safetensors"})


def tied_but_different(directory: Path) -> None:
    edit(directory / "config.json", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "config.json is missing; download"),
        (lambda d: edit(d / "config.json", architectures=["GPT9"]), "no known family"),
        (
            lambda d: edit(d / "config.json", use_gated_attention=True),
            "use_gated_attention = True: the toolkit does not know",
        ),
        (remove("model.safetensors"), "holds no model.safetensors .* download it first"),
        (index_of_missing_shard, "model-2.safetensors is missing, though the index names it"),
        (change_weights(lambda w: {k: v for k, v in w.items() if "norm.weight" not in k}), "is missing from the check"),
        (change_weights(lambda w: w | {"base_model.model.lora_A": torch.ones(2)}), "is unknown to the Llama family"),
        (tied_but_different, "set tie_word_embeddings to false"),
        (remove("tokenizer.model"), "no tokenizer in .*; download it"),
    ],
)
def test_what_cannot_be_used(made: Path, doctor: Callable, spoil: Callable, message: str) -> None:
    spoil(made)
    text, error = doctor(made)
    assert re.search(message, error) and re.search(f"\nunusable: .*{message}", text), (text, error)
    assert "it can be used" not in text


def smaller_vocabulary(size: int) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        edit(directory / "config.json", vocab_size=size)
        change_weights(lambda w: {k: v[:size].clone() if v.shape[0] == 400 else v for k, v in w.items()})(directory)

    return spoil


def added_eos(directory: Path) -> None:
    token = {"content": "<|end|>", "special": True}
    edit(directory / "tokenizer_config.json", eos_token="<|end|>", added_tokens_decoder={"400": token})


def test_ids_beyond_the_embedding(made: Path, doctor: Callable) -> None:
    """Fatal where every answer ends with one."""
    smaller_vocabulary(390)(made)
    text, error = doctor(made)
    assert not error and "suspicious: the tokenizer has 400 ids, the model 390: the last ones, where they are" in text
    added_eos(made)
    text, error = doctor(made)
    assert "the tokenizer has 401 ids, the model 390: the last ones, EOS or BOS among them, fail" in error


def added(*texts: str, **names: str | None) -> Callable[[Path], None]:
    """Control tokens over pieces that the vocabulary has."""
    tokens = {str(10 + i): {"content": text, "special": True} for i, text in enumerate(texts)}
    return lambda directory: edit(directory / "tokenizer_config.json", added_tokens_decoder=tokens, **names)


def tokenizer_json(*special: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        import tokenizers

        (directory / "tokenizer.model").unlink()
        vocabulary = {"a": 0, "b": 1, **{text: i + 2 for i, text in enumerate(special)}}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
        tokenizer.add_special_tokens(list(special))
        tokenizer.save(str(directory / "tokenizer.json"))
        edit(directory / "config.json", bos_token_id=None, eos_token_id=None)

    return write


def mixed(directory: Path) -> None:
    change_weights(lambda w: w | {"model.norm.weight": w["model.norm.weight"].bfloat16()})(directory)


def converted(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))
        spoil(directory)

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (added(pad_token="</s>"), "the padding token is EOS, </s>: without effect here"),
        (tokenizer_json(), "no EOS: answers end where a chat template ends them"),
        (
            tokenizer_json("<|im_start|>", "<|im_end|>"),
            r"has <\|im_start\|> and there is no chat template; .* --prompt_style",
        ),
        (lambda d: (d / "chat_template.jinja").write_text("{{ raise_exception('never so') }}"), "never so"),
        (mixed, r"weights are bfloat16 and float32 \(model.norm.weight is bfloat16\); convert with --dtype"),
        (lambda d: edit(d / "adapter_config.json", peft_type="LORA"), "adapter_config.json is an adapter of peft"),
        (lambda d: edit(d / "config.json", vocab_size=390), "says vocab_size 390, the embedding has 400 rows"),
        (
            converted(lambda d: edit(d / "config.json", vocab_size=390)),
            "says vocab_size 390, the embedding has 400 rows",
        ),
        (converted(remove("manifest.json")), "of a conversion that did not end; run: python scripts/convert"),
        (
            converted(lambda d: edit(d / "config.json", rms_norm_eps=1e-3)),
            "config.json has changed since .*; run: python",
        ),
        (old_index, "model.safetensors is read; model.safetensors.index.json is ignored, in transformers' order; del"),
        (converted(index_of_missing_shard), "the converted weights are whole, but .*model-2.safetensors is missing"),
    ],
)
def test_what_is_suspicious(made: Path, doctor: Callable, spoil: Callable, message: str) -> None:
    assert "\nsuspicious: " not in doctor(made)[0]
    spoil(made)
    text, error = doctor(made)
    assert not error and re.search(f"\nsuspicious: .*{message}", text), (text, error)
    assert re.search("it can be used; [1-9] suspicious, see above\n$", text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "lit_model.safetensors").write_bytes(b"x"), "lit_model.safetensors has 1 bytes, not"),
        (lambda d: edit(d / "model_config.json", n_layer=3), "model_config.json"),
        (
            lambda d: edit(d / "config.json", intermediate_size=97),
            "are not those that config.json asks for; run: python",
        ),
    ],
)
def test_a_conversion_that_was_damaged(made: Path, doctor: Callable, spoil: Callable, message: str) -> None:
    converted(spoil)(made)
    text, error = doctor(made)
    assert re.search(message, error) and "unusable: " in text


def test_the_directory_may_stand_without_its_flag(made: Path, capsys: pytest.CaptureFixture) -> None:
    for argv in ([str(made)], ["--checkpoint_dir", str(made)], [str(made), "--debug", "false"]):
        with pytest.raises(SystemExit) as end:
            cli.run(main, argv, prog="lit-sft doctor")
        assert end.value.code == 0 and capsys.readouterr().out.startswith(f"{made}\n")
    (made / "tokenizer.model").unlink()
    with pytest.raises(SystemExit) as end:
        cli.run(main, [str(made)], prog="lit-sft doctor")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "family      Llama" in out
    assert err.startswith(f"error: {made} cannot be used: no tokenizer") and err.count("\n") == 1
