"""The demo's promises: a sound instruction file, and a checkpoint that other libraries read as a Llama."""

import csv
import importlib.util
import json
import math
import operator
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file

from lit_sft.families import find_family

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "demo" / "make_checkpoint.py"


def read_rows() -> list[dict[str, str]]:
    with (ROOT / "demo" / "instructions.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    assert reader.fieldnames == ["instruction", "input", "output"]
    return rows


def load_script():
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*flags: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "demo" / "tiny-llama"
    result = run_script("--checkpoint_dir", directory)
    assert (result.returncode, result.stderr) == (0, "")  # sentencepiece, too, keeps quiet
    return directory


@pytest.fixture(scope="module")
def tokenizer(made) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))


# --- instructions.csv


def test_rows_are_whole_and_unlike():
    rows = read_rows()
    assert len(rows) >= 120
    for row in rows:
        assert None not in row and None not in row.values(), row  # neither a cell too many nor one too few
        assert row["instruction"].strip() and row["output"].strip(), row
        assert all(cell == cell.strip() for cell in row.values()), row
    assert len({(row["instruction"].lower(), row["input"].lower()) for row in rows}) == len(rows)


def test_rows_are_varied():
    rows = read_rows()
    assert 0.2 <= sum(bool(row["input"]) for row in rows) / len(rows) <= 0.35
    words = [len(row["output"].split()) for row in rows]
    assert 3 <= statistics.median(words) <= 15 and max(words) <= 30
    cells = [cell for row in rows for cell in row.values()]
    for character in ('"', ",", "\n"):
        assert sum(character in cell for cell in cells) >= 5, repr(character)
    assert sum(not cell.isascii() for cell in cells) >= 10


def test_the_llama_question_has_its_answer():
    answers = [row["output"] for row in read_rows() if row["instruction"] == "What food do llamas eat?"]
    assert answers == ["Llamas eat grass, hay and other plants."]


def test_arithmetic_is_right():
    operations = {"+": operator.add, "-": operator.sub, "×": operator.mul, "/": operator.truediv}
    checked = 0
    for row in read_rows():
        if match := re.fullmatch(r"What is (\d+) ([-+×/]) (\d+)\?", row["instruction"]):
            a, operation, b = match.groups()
            assert row["output"] == f"{a} {operation} {b} = {operations[operation](int(a), int(b)):g}"
            checked += 1
    assert checked >= 4


# --- make_checkpoint.py


def test_transformers_loads_every_weight(made):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(report.values()), report  # it would draw a missing weight at random and say little
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits = model(torch.tensor([[1, 300, 400, 500]])).logits
    assert logits.shape == (1, 4, model.config.vocab_size)
    assert logits.isfinite().all() and 0.5 < logits.std() < 2  # large enough for a frozen head to teach through


def test_shape_is_the_promised_one(made):
    config = transformers.AutoConfig.from_pretrained(made)
    promised = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {name: getattr(config, name) for name in promised} == promised
    assert config.initializer_range == pytest.approx(1 / math.sqrt(128))


def test_our_converter_knows_every_weight(made):
    config = json.loads((made / "config.json").read_text())
    family = find_family(config)
    shape = family.read_config(config)
    names = family.names(shape)
    assert shape.n_embd == 128
    assert all(names.find(name) for name in load_file(made / "model.safetensors"))


def test_weights_are_drawn_wide_enough_to_learn(made):
    for name, weight in load_file(made / "model.safetensors").items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones(128)), name
        else:
            assert weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.03), name
            assert abs(weight.mean().item()) < 0.003, name


def test_tokenizer_is_llamas_kind(made, tokenizer):
    assert [tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()] == [0, 1, 2, -1]
    assert tokenizer.vocab_size() == json.loads((made / "config.json").read_text())["vocab_size"]
    assert tokenizer.encode("a", out_type=str) == ["▁a"]
    assert tokenizer.encode("2024", out_type=str)[-4:] == list("2024")
    assert tokenizer.encode("\n", out_type=str)[-1] == "<0x0A>"
    settings = json.loads((made / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["add_bos_token"], settings["add_eos_token"]) == (
        "LlamaTokenizer",
        True,
        False,
    )


def test_tokenizer_loses_nothing(tokenizer):
    cells = [cell for row in read_rows() for cell in row.values()]
    for text in [*cells, "two  spaces,\ttab", "ﬁ e\u0301 ½", "你好 🐪"]:  # what a normalization would change
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_id() not in ids


def test_same_seed_same_bytes(made, tmp_path):
    main = load_script().main
    assert main(["--checkpoint_dir", str(tmp_path / "again")]) == 0
    assert main(["--checkpoint_dir", str(tmp_path / "other"), "--seed", "1"]) == 0
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((made / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    differs = [name for name in names if (made / name).read_bytes() != (tmp_path / "other" / name).read_bytes()]
    assert differs == ["model.safetensors"]


def test_a_complete_checkpoint_is_left_alone(made):
    (made / "model_config.json").write_text("added by a conversion")
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    result = run_script("--checkpoint_dir", made, "--seed", "7")
    assert result.returncode == 0 and "complete already" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    (made / "model_config.json").unlink()


def test_foreign_files_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert load_script().main(["--checkpoint_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    script = load_script()
    monkeypatch.setattr(script, "train_tokenizer", lambda: 1 / 0)  # the weights are written by then
    with pytest.raises(ZeroDivisionError):
        script.main(["--checkpoint_dir", str(tmp_path / "model")])
    assert list(tmp_path.iterdir()) == []
