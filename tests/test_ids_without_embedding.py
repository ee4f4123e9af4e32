"""A tokenizer with more ids than the model has embeddings: one rule wherever ids are made."""

import json
from pathlib import Path

import pytest
from conftest import make_hf_llama

from lit_sft.args import ConvertArgs, ExportGGUFArgs, GenerateArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.export_gguf import export_gguf
from lit_sft.generate import answers
from lit_sft.prepare import prepare
from lit_sft.prepare_args import PrepareArgs

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + END }}{% endfor %}"


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_model: bytes):
    """``checkpoint(end)``: a model of 400 ids with a tokenizer of 401, whose template ends turns with ``end``."""

    def make(end: str, **names: str) -> Path:
        directory = tmp_path / "model"
        make_hf_llama(directory, tokenizer_model, vocab_size=400)
        settings = {"added_tokens_decoder": {"400": {"content": "<|beyond|>", "special": True}}, **names}
        settings["chat_template"] = TEMPLATE.replace("END", repr(end)) + "{{ '' if messages else '' }}"
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))

    return make


def rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REFUSAL = r"the token '<\|beyond\|>' has the id 400, and the model has embeddings for ids below 400"


def test_data_that_need_it_are_refused(checkpoint, tmp_path):
    directory = checkpoint("<|beyond|>")
    data = rows(tmp_path / "d.jsonl", *({"prompt": f"Q{n}", "completion": "A"} for n in range(3)))
    args = PrepareArgs(checkpoint_dir=str(directory), destination_path=str(tmp_path / "data"))
    with pytest.raises(InputError, match=rf"d.jsonl row 1: {REFUSAL}"):
        prepare(args, data, "d")
    assert not (tmp_path / "data").exists()


def test_data_that_do_without_it_are_prepared(checkpoint, tmp_path):
    directory = checkpoint("</s>")
    data = rows(tmp_path / "d.jsonl", *({"prompt": f"Q{n} <|beyond|>", "completion": "A"} for n in range(3)))
    args = PrepareArgs(checkpoint_dir=str(directory), destination_path=str(tmp_path / "data"), template_applied=False)
    prepare(args, data, "d")  # where somebody wrote it, it is characters


def test_a_prompt_that_needs_it_is_refused(checkpoint):
    directory = checkpoint("<|beyond|>")
    with pytest.raises(InputError, match=REFUSAL):
        list(answers(GenerateArgs(checkpoint_dir=str(directory), prompt="a")))


def test_gguf(checkpoint, tmp_path, capsys):
    directory, out = checkpoint("</s>", eos_token="<|beyond|>"), tmp_path / "m.gguf"
    with pytest.raises(InputError, match=REFUSAL):
        export_gguf(ExportGGUFArgs(checkpoint_dir=str(directory), out_file=str(out)))
    assert not out.exists()
    export_gguf(ExportGGUFArgs(checkpoint_dir=str(checkpoint("</s>")), out_file=str(out)))
    assert "the tokenizer has 401 ids, the model embeddings for 400" in capsys.readouterr().out and out.exists()
