"""The prepare scripts from their command line to what lies on disk, read back with sentencepiece and plain Python."""

import csv
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import chat_templates
import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from conftest import ROOT, instruction_texts, make_hf_llama

import lit_sft.prepare
from lit_sft.args import ConvertArgs
from lit_sft.cli import run
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.run import check_shards
from lit_sft.selection import split_size
from lit_sft.shards import Shards
from lit_sft.tokenizer import Tokenizer

SPECIAL = {1: "<s>", 2: "</s>"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer_model) -> Path:
    """A folder with checkpoints/test/tiny, converted; its context is 512 tokens."""
    root = tmp_path_factory.mktemp("prepare")
    directory = root / "checkpoints" / "test" / "tiny"
    make_hf_llama(directory, tokenizer_model)
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))
    return root


@pytest.fixture
def home(tmp_path, monkeypatch, converted) -> Path:
    """The working directory: checkpoints/test/tiny is the only checkpoint there."""
    copy_checkpoint(converted, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy_checkpoint(converted: Path, home: Path, name: str = "test/tiny", **tokenizer_config: object) -> Path:
    directory = home / "checkpoints" / name
    directory.mkdir(parents=True)
    for path in (converted / "checkpoints/test/tiny").iterdir():
        (directory / path.name).symlink_to(path)
    if tokenizer_config:
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


def main_of(script: str) -> Callable:
    name = f"script_{script}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{script}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].main


@pytest.fixture
def command(home, capsys) -> Callable[..., str]:
    """``command(script, *flags)`` runs a script's main and gives what it printed; ``code=2`` gives its complaint."""

    def call(script: str, *flags: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(main_of(script), list(map(str, flags)), prog=f"{script}.py")
        out, err = capsys.readouterr()
        complaint = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (end.value.code, len(complaint)) == (code, int(code > 0)), err
        return complaint[0] if code else out

    return call


@pytest.fixture(scope="module")
def sp(converted) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(converted / "checkpoints/test/tiny/tokenizer.model"))


def spelled(sp: sentencepiece.SentencePieceProcessor, ids: list[int]) -> str:
    pieces = [SPECIAL.get(i) or sp.id_to_piece(i) for i in ids]
    data = [bytes([int(p[3:5], 16)]) if re.fullmatch("<0x..>", p) else p.replace("▁", " ").encode() for p in pieces]
    return b"".join(data).decode()


def stored(folder: Path, split: str) -> list[tuple[list[int], list[bool]]]:
    """The examples of a split as the contract has them on disk, read without the toolkit."""
    examples = []
    for path in sorted(folder.glob(f"{split}-*.pt")):
        tensors = torch.load(path, weights_only=True, mmap=True)
        ends = tensors["offsets"].tolist()
        for start, end in pairwise(ends):
            examples.append((tensors["input_ids"][start:end].tolist(), tensors["labels_mask"][start:end].tolist()))
    return examples


def marked(sp: sentencepiece.SentencePieceProcessor, folder: Path, split: str = "*") -> list[str]:
    """The texts of a split, or all, sorted, with what is to be learned in guillemets."""
    texts = []
    for ids, mask in stored(folder, split):
        pieces, start = [], 0
        while start < len(ids):
            end = next((i for i in range(start, len(ids)) if mask[i] != mask[start]), len(ids))
            text = spelled(sp, ids[start:end])
            pieces.append(f"«{text}»" if mask[start] else text)
            start = end
        texts.append("".join(pieces))
    return sorted(texts)


def facts(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["facts"]


def alpaca(instruction: str, context: str, output: str) -> str:
    if context:
        return (
            "<s> Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n«{output}</s>»"
        )
    return (
        "<s> Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n«{output}</s>»"
    )


def later(instruction: str, output: str) -> str:
    return f"\n\n### Instruction:\n{instruction}\n\n### Response:\n«{output}</s>»"


ROWS = [
    ("What food do llamas eat?", "", "Llamas eat grass, hay\nand leaves."),
    ("Add the numbers.", "1 and 2", "3"),
    ("Übersetze.", '日本語, "quoted"', "Ελληνικά 🦙"),
    ("Say </s>.", "", "</s> is what I say <s>"),
    ("Keep spaces.", "", "  kept \n"),
]
RENDERED = sorted(alpaca(*row) for row in ROWS)
DIALOGUES = [
    ["How are you?", "Well."],
    ["First?", "One.", "Second?", "Two.", "Third?", "Three."],
    ["Thanks?", "Welcome.", "An odd turn that nobody answers"],
]


def write_json(path: Path) -> Path:
    path.write_text(json.dumps([dict(zip(("instruction", "input", "output"), row, strict=True)) for row in ROWS]))
    return path


def write_csv(path: Path, rows: list[tuple[str, str, str]] = ROWS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("instruction", "input", "output"), *rows])
    return path


def write_lima(path: Path) -> Path:
    rows = [{"conversations": turns, "source": "made"} for turns in DIALOGUES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- files of each dataset's shape


@pytest.mark.parametrize("flag", ["--csv_path", "--csv_dir", "--data_file"])
def test_csv(command, home, sp, flag):
    write_csv(home / "MyDataset.csv")
    out = command("prepare_csv", flag, "MyDataset.csv", "--checkpoint_dir", "checkpoints/test/tiny")
    assert marked(sp, home / "data/csv") == RENDERED
    assert "data/csv: 4 train and 1 val examples, prompt style alpaca" in out
    assert "reading Alpaca's columns: instruction from 'instruction', input from 'input', output from 'output'" in out


def test_alpaca(command, home, sp):
    write_json(home / "alpaca.json")
    command("prepare_alpaca", "--data_file", "alpaca.json", "--checkpoint_dir", "test/tiny")  # no checkpoints/ in front
    assert marked(sp, home / "data/alpaca") == RENDERED
    assert facts(home / "data/alpaca")["n_val"] == 1  # 5 × 0.03865, and at least one


def test_lima_first_turns(command, home, sp):
    write_lima(home / "train.jsonl")
    command("prepare_lima", "--data_file", "train.jsonl")
    assert marked(sp, home / "data/lima") == sorted(alpaca(turns[0], "", turns[1]) for turns in DIALOGUES)


def test_lima_dialogues(command, home, sp):
    write_lima(home / "train.jsonl")
    command("prepare_lima", "--data_file", "train.jsonl", "--include_multiturn_conversations", "true")
    whole = alpaca("First?", "", "One.") + later("Second?", "Two.") + later("Third?", "Three.")
    single = [alpaca("How are you?", "", "Well."), alpaca("Thanks?", "", "Welcome.")]
    assert marked(sp, home / "data/lima") == sorted([whole, *single])


MESSAGES = [
    [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Bye"), ("assistant", "See you.")],
    [("user", "Ping"), ("assistant", "Pong")],
]
TALKS = sorted(
    [
        "<s> Be brief.\n\n" + alpaca("Hello", "", "Hi.")[4:] + later("Bye", "See you."),
        alpaca("Ping", "", "Pong"),
    ]
)
OPENAI = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in MESSAGES]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"conversations": [{"from": NAMES[role], "value": text} for role, text in talk]} for talk in MESSAGES]


@pytest.mark.parametrize("kind", ["openai.jsonl", "sharegpt.json", "talks.parquet"])
def test_dialogues(command, home, sp, kind):
    if kind.endswith("jsonl"):
        (home / kind).write_text("\n".join(map(json.dumps, OPENAI)))
    elif kind.endswith("json"):
        (home / kind).write_text(json.dumps(SHAREGPT))
    else:
        pq.write_table(pa.Table.from_pylist(OPENAI), home / kind)
    command("prepare_dataset", "--data_file", kind)
    assert marked(sp, home / "data" / kind.partition(".")[0]) == TALKS


def test_named_columns(command, home, sp):
    rows = [{"q": a, "note": b, "a": c, "id": i} for i, (a, b, c) in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), home / "odd.parquet")
    flags = ("--instruction_column", "q", "--input_column", "note", "--output_column", "a")
    assert "not read: 'id'" in command("prepare_dataset", "--data_file", "odd.parquet", *flags)
    assert marked(sp, home / "data/odd") == RENDERED


def test_the_chat_template_is_the_default_where_there_is_one(command, home, sp, converted):
    copy_checkpoint(converted, home, "test/chat", chat_template=chat_templates.LLAMA2)
    write_lima(home / "train.jsonl")
    flags = ("--data_file", "train.jsonl", "--include_multiturn_conversations", "true", "--checkpoint_dir", "test/chat")
    command("prepare_lima", *flags)
    texts = ["".join(f"<s>[INST] {q} [/INST]« {a} </s>»" for q, a in pairs(turns)) for turns in DIALOGUES]
    assert marked(sp, home / "data/lima") == sorted(texts)
    command("prepare_lima", *flags, "--prompt_style", "vicuna")
    assert "USER: First? ASSISTANT:« One.</s>»USER: Second?" in marked(sp, home / "data/lima")[0]


def pairs(turns: list[str]) -> list[tuple[str, str]]:
    return list(zip(turns[::2], turns[1::2], strict=False))


def test_labels_of_everything(command, home, sp):
    write_csv(home / "d.csv")
    for flag in ("--mask_prompt", "--mask_inputs"):
        command("prepare_csv", "--csv_path", "d.csv", flag, "false")
        unmarked = ["<s>«" + text[3:].replace("«", "") for text in RENDERED]
        assert marked(sp, home / "data/csv") == unmarked
        assert facts(home / "data/csv")["mask_prompt"] is False


def test_malformed_rows_can_be_left_out(command, home, sp):
    write_csv(home / "d.csv", [*ROWS, ("No answer", "", "")])
    said = command("prepare_csv", "--csv_path", "d.csv", code=2)
    assert "d.csv row 6: column 'output' is empty" in said and not (home / "data/csv").exists()
    out = command("prepare_csv", "--csv_path", "d.csv", "--on_error", "skip")
    assert "skipped: d.csv row 6: column 'output' is empty" in out and ", 1 skipped" in out
    assert marked(sp, home / "data/csv") == RENDERED and facts(home / "data/csv")["n_skipped"] == 1


def test_one_row_is_enough(command, home, sp):
    write_csv(home / "d.csv", ROWS[:1])
    command("prepare_csv", "--csv_path", "d.csv")
    assert (len(stored(home / "data/csv", "train")), len(stored(home / "data/csv", "val"))) == (1, 0)


# --- what the manifest says


def test_manifest(command, home):
    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 300, "--access_token", "hf_secret")
    text = (home / "data/csv/manifest.json").read_text()
    assert "hf_secret" not in text
    manifest = json.loads(text)
    assert (manifest["kind"], manifest["format_version"]) == ("data", 1)
    assert set(manifest["files"]) == {"report.html", "train-00000.pt", "val-00000.pt"}
    assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in manifest["files"].values())
    found = manifest["facts"]
    examples = stored(home / "data/csv", "*")
    tokenizer = Tokenizer("checkpoints/test/tiny")
    expected = {
        "checkpoint_dir": "checkpoints/test/tiny",
        "tokenizer": tokenizer.fingerprint,
        "prompt_style": "alpaca",
        "stop_ids": [2],
        "mask_prompt": True,
        "max_seq_length": 300,
        "n_train": 4,
        "n_val": 1,
        "n_tokens": sum(len(ids) for ids, _ in examples),
        "n_labels": sum(sum(mask) for _, mask in examples),
        "n_cut": 0,
        "n_dropped": 0,
        "n_tokens_cut": 0,
        "n_skipped": 0,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["arguments"]["data_file"] == "d.csv" and found["arguments"]["seed"] == 42


def test_percentiles(command, home, sp):
    """The smallest length that at least p % of the examples do not exceed."""
    for n in (1, 2, 3, 19, 20, 21, 101):
        write_csv(home / "d.csv", [("Q?", "", "a " * (1 + 7 * i % 50)) for i in range(n)])
        command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 400)
        lengths = [len(ids) for ids, _ in stored(home / "data/csv", "*")]
        found = facts(home / "data/csv")["length"]
        assert len(lengths) == n and found["max"] == max(lengths)
        for p in (50, 95, 99):
            assert found[f"p{p}"] == min(k for k in lengths if sum(x <= k for x in lengths) >= math.ceil(p * n / 100))


def test_stored_prompts_are_those_of_generation(command, home):
    from lit_sft.prompts import Message
    from lit_sft.samples import encode_prompt

    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv")
    tokenizer = Tokenizer("checkpoints/test/tiny")
    prompts = sorted(encode_prompt((Message("user", a, b),), "alpaca", tokenizer) for a, b, _ in ROWS)
    assert sorted(ids[: mask.index(True)] for ids, mask in stored(home / "data/csv", "*")) == prompts


# --- what a folder of data held before


def test_other_data_do_not_replace_those_of_a_folder(command, home):
    write_csv(home / "d.csv")
    write_csv(home / "other.csv", ROWS[:3])
    command("prepare_csv", "--csv_path", "d.csv")
    before = {path.name: path.read_bytes() for path in (home / "data/csv").iterdir()}
    complaint = command("prepare_csv", "--csv_path", "other.csv", code=2)
    assert "data/csv holds other data (d.csv) than are asked for now (other.csv)" in complaint
    assert "--destination_path" in complaint and "--overwrite true" in complaint
    assert before == {path.name: path.read_bytes() for path in (home / "data/csv").iterdir()}
    # the same file by another name for it, edited, and with other flags
    write_csv(home / "d.csv", ROWS[:4])
    out = command("prepare_csv", "--csv_path", home / "d.csv", "--max_seq_length", 400)
    assert "replacing what data/csv held" in out and facts(home / "data/csv")["n_rows"] == 4
    command("prepare_csv", "--csv_path", "other.csv", "--overwrite", "true")
    assert facts(home / "data/csv")["n_rows"] == 3
    command("prepare_csv", "--csv_path", "d.csv", "--destination_path", "data/d")


@pytest.mark.parametrize(("script", "then", "now"), [
    ("prepare_alpaca", ["--data_file", "d.json"], ["--data_file", "e.json"]),
    ("prepare_dataset", ["--data_file", "d.json"], ["--mix", "mix.yaml"]),
    ("prepare_alpaca", ["--data_file", "d.json"], []),
    ("prepare_alpaca", ["--data_file", "d.json"], ["--data_repo_id", "ORG/NAME"]),
    ("prepare_alpaca", ["--data_file", "d.json"], ["--data_file", "d.json", "--variant", "libre"]),
])  # fmt: skip
def test_other_data_of_any_kind(command, home, script, then, now):
    write_json(home / "d.json")
    write_json(home / "e.json")
    (home / "mix.yaml").write_text("- data_file: e.json\n")
    where = ("--destination_path", "data/x")
    command(script, *then, *where)
    assert "data/x holds other data (" in command(script, *now, *where, code=2)


# --- too long


def long_rows() -> list[tuple[str, str, str]]:
    words = instruction_texts()
    return [(f"Question {i}?", "", " ".join(words[i : i + 1 + 3 * i])[: 40 * i + 5]) for i in range(12)]


@pytest.fixture
def lengthy(home, command) -> dict[str, tuple[list[int], list[bool]]]:
    """d.csv, of which some is too long for 150 tokens; its examples when nothing is, by the beginning of the text."""
    write_csv(home / "d.csv", long_rows())
    command("prepare_csv", "--csv_path", "d.csv", "--destination_path", "whole", "--on_overflow", "error")
    return {tuple(ids[: mask.index(True)]): (ids, mask) for ids, mask in stored(home / "whole", "*")}


def test_truncate_cuts_responses_and_their_end_tokens(command, home, lengthy):
    limit = 150
    out = command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", limit)
    examples = stored(home / "data/csv", "*")
    assert len(examples) == len(lengthy) == 12
    for ids, mask in examples:
        whole_ids, whole_mask = lengthy[tuple(ids[: mask.index(True)])]
        assert (ids, mask) == (whole_ids[:limit], whole_mask[:limit])
        assert (ids[-1] == 2) == (len(whole_ids) <= limit)
    too_long = [ids for ids, _ in lengthy.values() if len(ids) > limit]
    lost = sum(len(ids) - limit for ids in too_long)
    assert 0 < len(too_long) < 12
    found = facts(home / "data/csv")
    assert (found["n_cut"], found["n_tokens_cut"], found["n_dropped"]) == (len(too_long), lost, 0)
    assert f"{len(too_long)} examples cut, 0 dropped ({lost:,} tokens lost)" in out
    assert found["length"]["max"] == max(len(ids) for ids, _ in lengthy.values())
    assert f"max {found['length']['max']}; max_seq_length {limit}" in out


def test_drop(command, home, lengthy):
    command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 150, "--on_overflow", "drop")
    kept = [example for example in lengthy.values() if len(example[0]) <= 150]
    assert sorted(stored(home / "data/csv", "*")) == sorted(kept)
    found = facts(home / "data/csv")
    assert (found["n_cut"], found["n_dropped"]) == (0, 12 - len(kept))
    assert found["n_tokens_cut"] == sum(len(ids) for ids, _ in lengthy.values() if len(ids) > 150)
    said = command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 5, "--on_overflow", "drop", code=2)
    assert f"no example is left; the shortest has {min(len(ids) for ids, _ in lengthy.values())} tokens" in said


@pytest.mark.parametrize("rule", ["truncate", "error"])
def test_refusal_names_the_length_that_works(command, home, lengthy, rule):
    """At that length the command works, one below it does not."""
    flags = ("prepare_csv", "--csv_path", "d.csv", "--on_overflow", rule, "--max_seq_length")
    said = command(*flags, 10, code=2)
    what = "keep no label when cut" if rule == "truncate" else "are longer than that"
    assert f"--max_seq_length 10: 12 examples {what} (d.csv row 1, d.csv row 2, d.csv row 3, …)" in said
    assert "--on_overflow drop leaves out all 12 that are too long" in said
    needed = int(re.search(r"--max_seq_length (\d+) keeps all", said)[1])
    assert not (home / "data").exists()
    said = command(*flags, needed - 1, code=2)
    assert f"--max_seq_length {needed} keeps all" in said
    command(*flags, needed)
    assert all(any(mask) for _, mask in stored(home / "data/csv", "*"))
    assert facts(home / "data/csv")["n_dropped"] == 0


def test_drop_is_said_to_drop_the_cut_ones_too(command, home):
    write_csv(home / "d.csv", [("Short?", "", "x" * 100), ("Long? " * 60, "", "No.")])
    said = command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 150, code=2)
    assert "1 examples keep no label when cut (d.csv row 2)" in said and "leaves out all 2 that are too long" in said


def test_a_length_beyond_the_context_is_not_advised(command, home):
    write_csv(home / "d.csv", [("Why? " * 600, "", "Because."), *ROWS])
    said = command("prepare_csv", "--csv_path", "d.csv", code=2)
    assert "--max_seq_length 512: 1 examples keep no label when cut (d.csv row 1); only a context of " in said
    assert "keeps all" not in said


def test_the_context_is_the_limit(command, home):
    write_csv(home / "d.csv", [("Why?", "", "Because. " * 600), *ROWS])
    out = command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 2048)
    assert "--max_seq_length 2048 is beyond the model's context; 512 is used" in out
    assert max(len(ids) for ids, _ in stored(home / "data/csv", "*")) == 512
    assert facts(home / "data/csv")["max_seq_length"] == 512


def test_dialogues_are_cut_back_to_the_last_label(command, home, sp):
    write_lima(home / "train.jsonl")
    flags = ("prepare_lima", "--data_file", "train.jsonl", "--include_multiturn_conversations", "true")
    command(*flags, "--destination_path", "whole")
    [(whole_ids, whole_mask)] = [e for e in stored(home / "whole", "*") if e[0].count(2) == 3]
    ends = [i for i, token in enumerate(whole_ids) if token == 2]
    second = next(i for i in range(ends[0] + 1, len(whole_ids)) if whole_mask[i])
    for limit in (ends[0], ends[0] + 1, second, second + 1, ends[1], ends[1] + 1, ends[2]):
        command(*flags, "--max_seq_length", limit)
        [(ids, mask)] = [e for e in stored(home / "data/lima", "*") if "First?" in spelled(sp, e[0])]
        assert (ids, mask) == (whole_ids[: len(ids)], whole_mask[: len(ids)]) and len(ids) <= limit
        assert mask[-1] and not any(whole_mask[len(ids) : limit])
        assert facts(home / "data/lima")["n_cut"] == sum(len(ids) > limit for ids, _ in stored(home / "whole", "*"))


def test_a_prompt_is_never_cut(command, home, lengthy):
    command("prepare_csv", "--csv_path", "d.csv", "--destination_path", "all", "--mask_prompt", "false")
    prompts = [len(prompt) for prompt in lengthy]
    flags = ("prepare_csv", "--csv_path", "d.csv", "--mask_prompt", "false", "--max_seq_length")
    said = command(*flags, max(prompts), code=2)
    assert f"--max_seq_length {max(prompts) + 1} keeps all" in said
    command(*flags, max(prompts) + 1)
    assert all(mask == [False] + [True] * (len(ids) - 1) for ids, mask in stored(home / "data/csv", "*"))


# --- the split


@pytest.mark.parametrize(
    ("n", "fraction", "n_val"),
    [(51_759, 0.03865, 2000), (15_011, 0.1, 1501), (1030, 0.1, 103), (7, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0), (9, 0, 0)],
)
def test_sizes_are_litgpts(n, fraction, n_val):
    assert split_size(n, fraction) == n_val


@pytest.mark.parametrize("flag", ["--val_split_fraction", "--test_split_fraction"])
def test_fraction_flag(command, home, sp, flag):
    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv", flag, "0.4")
    train, val = marked(sp, home / "data/csv", "train"), marked(sp, home / "data/csv", "val")
    assert (len(train), len(val)) == (3, 2) and sorted(train + val) == RENDERED
    command("prepare_csv", "--csv_path", "d.csv", flag, "0")
    assert not list((home / "data/csv").glob("val-*")) and len(Shards("data/csv", "val")) == 0


# --- the directory


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_twice(command, home):
    write_csv(home / "d.csv", long_rows())
    command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 150)
    first = content(home / "data/csv")
    command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 150)
    assert content(home / "data/csv") == first
    command("prepare_csv", "--csv_path", "d.csv", "--max_seq_length", 150, "--seed", 1)
    assert content(home / "data/csv") != first


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("where", ["fill", "write_shards", "Manifest"])
def test_an_earlier_result_stays_until_the_new_one_is_whole(command, home, monkeypatch, failure, where):
    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv")
    before = content(home / "data")

    def fail(*_: object) -> None:
        if where == "write_shards":
            (next((home / "data").glob(".tmp-*")) / "train-00000.pt").write_bytes(b"half")
        raise failure

    class Failing(lit_sft.prepare.Manifest):
        write = fail

    monkeypatch.setattr(lit_sft.prepare, where, Failing if where == "Manifest" else fail)
    code = {OSError: 2, KeyboardInterrupt: 130, RuntimeError: 1}[type(failure)]
    command("prepare_csv", "--csv_path", "d.csv", "--seed", 1, code=code)
    assert content(home / "data") == before
    monkeypatch.undo()
    monkeypatch.chdir(home)
    command("prepare_csv", "--csv_path", "d.csv", "--seed", 1)
    assert content(home / "data") != before and [p.name for p in (home / "data").iterdir()] == ["csv"]


def test_bad_data_leave_an_earlier_result_alone(command, home):
    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv")
    before = content(home / "data")
    write_csv(home / "d.csv", [("Q", "", "")])
    command("prepare_csv", "--csv_path", "d.csv", code=2)
    assert content(home / "data") == before


@pytest.mark.parametrize("content_of_it", ["notes.txt", "manifest.json"])
def test_a_foreign_folder_is_refused_before_anything_is_read(command, home, content_of_it):
    (home / "data/csv").mkdir(parents=True)
    (home / "data/csv" / content_of_it).write_text('{"name": "mine"}')
    said = command("prepare_csv", "--csv_path", "absent.csv", code=2)
    assert "data/csv exists and is not a data directory of lit_sft; remove it or name another" in said
    assert (home / "data/csv" / content_of_it).read_text() == '{"name": "mine"}'


def test_a_file_in_the_way(command, home):
    write_csv(home / "d.csv")
    (home / "out").write_text("mine")
    command("prepare_csv", "--csv_path", "d.csv", "--destination_path", "out", code=2)
    assert (home / "out").read_text() == "mine"


def test_files_kept_beside_the_shards_are_not_lost(command, home):
    """Lit-GPT kept the raw data there."""
    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv")
    (home / "data/csv/raw.csv").write_text("mine")
    said = command("prepare_csv", "--csv_path", "d.csv", code=2)
    assert "data/csv holds 'raw.csv' beside earlier shards; move it, or name another folder" in said
    assert (home / "data/csv/raw.csv").read_text() == "mine" and stored(home / "data/csv", "train")


# --- the checkpoint


def test_the_only_checkpoint(command, home):
    write_lima(home / "train.jsonl")
    out = command("prepare_lima", "--data_file", "train.jsonl", "--max_seq_length", 2048)
    assert "using checkpoints/test/tiny, the only converted checkpoint" in out
    assert facts(home / "data/lima")["checkpoint_dir"] == "checkpoints/test/tiny"


def test_several_checkpoints(command, home, converted):
    write_lima(home / "train.jsonl")
    copy_checkpoint(converted, home, "test/other")
    said = command("prepare_lima", "--data_file", "train.jsonl", code=2)
    assert "several converted checkpoints exist: checkpoints/test/other, checkpoints/test/tiny" in said
    assert "--checkpoint_dir" in said


def test_no_checkpoint(command, home):
    write_lima(home / "train.jsonl")
    (home / "checkpoints").rename(home / "away")
    said = command("prepare_lima", "--data_file", "train.jsonl", code=2)
    assert "no converted checkpoint below checkpoints/; name one with --checkpoint_dir" in said


@pytest.mark.parametrize("missing", ["manifest.json", "model_config.json"])
def test_half_a_conversion(command, home, missing):
    write_lima(home / "train.jsonl")
    (home / "checkpoints/test/tiny" / missing).unlink()
    flags = ("prepare_lima", "--data_file", "train.jsonl")
    said = command(*flags, "--checkpoint_dir", "checkpoints/test/tiny", code=2)
    assert f"{missing} missing; run: python scripts/convert_hf_checkpoint.py" in said
    command(*flags, code=2)


def test_shards_of_another_tokenizer_are_refused(command, home, converted, tokenizer_model):
    write_csv(home / "d.csv")
    command("prepare_csv", "--csv_path", "d.csv")
    shards = Shards("data/csv", "train")
    checkpoint_dir = Path("checkpoints/test/tiny")
    check_shards(shards, shards, Tokenizer(checkpoint_dir), checkpoint_dir)
    other = copy_checkpoint(converted, home, "test/other", add_bos_token=False)
    with pytest.raises(InputError, match=r"prepare the data again with --checkpoint_dir .*test/other"):
        check_shards(shards, shards, Tokenizer(other), other)


# --- flags


def test_every_flag_of_litgpt(command, home):
    write_json(home / "alpaca.json")
    flags = ("--destination_path", "data/mine", "--checkpoint_dir", "checkpoints/test/tiny", "--mask_inputs", "false")
    flags += ("--ignore_index", "-1", "--max_seq_length", "256", "--test_split_fraction", "0.2", "--seed", "42")
    out = command("prepare_alpaca", *flags, "--data_file", "alpaca.json", "--data_file_name", "x.json")
    assert "--ignore_index has no effect" in out
    assert facts(home / "data/mine")["n_val"] == 1


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (("--prompt_style", "alpca"), "error: unknown prompt style 'alpca'; known: plain, alpaca"),
        (
            ("--prompt_style", "chat-template"),
            "error: prompt style 'chat-template': the checkpoint has no chat template",
        ),
        (("--max_seq_length", "1"), "--max_seq_length 1 must be at least 2"),
        (("--val_split_fraction", "1"), "--val_split_fraction 1.0 must be in [0, 1)"),
        (("--val_split_fraction", "-0.1"), "--val_split_fraction -0.1 must be in [0, 1)"),
        (("--on_overflow", "cut"), "on_overflow"),
        (("--checkpoint_dir", "no/where"), "no checkpoint directory 'no/where'"),
        (("--csv_path", "absent.csv"), "error: absent.csv does not exist"),
        (("--data_repo_id", "me/data"), "error: --data_file and --data_repo_id name different data; give one"),
        (("--data_file_url", "http://x/d.csv"), "error: --data_file and --data_file_url name different data; give one"),
    ],
)
def test_wrong_flags(command, home, flags, fragment):
    write_csv(home / "d.csv")
    said = command("prepare_csv", "--csv_path", "d.csv", *flags, code=2)
    assert fragment in said and not (home / "data/csv").exists()


def test_csv_without_a_csv(command):
    assert "--csv_path is missing" in command("prepare_csv", code=2)


def test_a_broken_template_is_refused_before_anything_is_read(command, home, converted):
    copy_checkpoint(converted, home, "test/broken", chat_template="{% for m in messages %}{{ m.content }")
    said = command("prepare_csv", "--csv_path", "absent.csv", "--checkpoint_dir", "test/broken", code=2)
    assert said.startswith("error: the chat template refuses the dialogue: unexpected '}'")


def test_a_row_that_a_template_refuses_is_named(command, home, converted):
    copy_checkpoint(converted, home, "test/gemma", chat_template=chat_templates.GEMMA.replace("<end_of_turn>", "</s>"))
    (home / "d.jsonl").write_text("\n".join(map(json.dumps, reversed(OPENAI))))
    said = command("prepare_dataset", "--data_file", "d.jsonl", "--checkpoint_dir", "test/gemma", code=2)
    assert said.startswith("error: d.jsonl row 2: the chat template refuses the dialogue: System role not supported")


# --- as processes, from a Hub


def process(home: Path, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT), **environment}
    arguments = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *flags]
    return subprocess.run(arguments, cwd=home, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    lima = write_lima(folder / "train.jsonl").read_bytes()
    script = b"import pathlib\npathlib.Path('ran').touch()\n"
    test = b'{"conversations": ["No answer?"], "source": "made"}\n'
    datasets = {
        "GAIR/lima": hub_server.Repo({"lima.py": script, "train.jsonl": lima, "test.jsonl": test}, token="hf_mine"),
        "yahma/alpaca-cleaned": hub_server.Repo(
            {"alpaca_data_cleaned.json": write_json(folder / "a.json").read_bytes()}
        ),
    }
    with hub_server.HubServer({}, datasets) as server:
        yield server


def test_lima_from_the_hub(home, sp, hub):
    bare = ("prepare_lima", "--max_seq_length", "512")
    refused = process(home, *bare, HF_ENDPOINT=hub.url)
    assert refused.returncode == 2
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "accept its licence at https://huggingface.co/datasets/GAIR/lima" in line
    assert "Traceback" not in refused.stderr and not (home / "data/lima").exists()
    done = process(home, *bare, HF_ENDPOINT=hub.url, HF_TOKEN="hf_mine")
    assert done.returncode == 0, done.stderr
    assert "using checkpoints/test/tiny, the only converted checkpoint" in done.stdout
    assert marked(sp, home / "data/lima") == sorted(alpaca(turns[0], "", turns[1]) for turns in DIALOGUES)
    assert not (home / "ran").exists()
    manifest = json.loads((home / "data/lima/manifest.json").read_text())
    assert manifest["command"].endswith("scripts/prepare_lima.py --max_seq_length 512")


def test_alpaca_from_the_hub_with_a_token_that_is_not_kept(home, sp, hub):
    done = process(home, "prepare_alpaca", "--access_token", "hf_mine", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert marked(sp, home / "data/alpaca") == RENDERED
    assert "hf_mine" not in (home / "data/alpaca/manifest.json").read_text() + done.stdout + done.stderr


def test_alpaca_from_an_address(home, sp, hub):
    url = f"{hub.url}/datasets/yahma/alpaca-cleaned/resolve/main/alpaca_data_cleaned.json"
    done = process(home, "prepare_alpaca", "--data_file_url", url, "--data_file_name", "mine.json")
    assert done.returncode == 0, done.stderr
    assert marked(sp, home / "data/alpaca") == RENDERED
    assert (home / "data/mine.json").is_file()


def test_dataset_from_the_hub(home, sp, hub):
    flags = ("--repo_id", "yahma/alpaca-cleaned", "--data_split", "train", "--val_split_fraction", "0")
    done = process(home, "prepare_dataset", *flags, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert marked(sp, home / "data/alpaca-cleaned") == RENDERED
