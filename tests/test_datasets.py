"""Each dataset's command on a file of that dataset's real shape, against renderings written out here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import datasets
import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from conftest import ROOT, make_hf_llama
from test_prepare import alpaca, facts, later, marked
from transformers.utils.chat_template_utils import render_jinja_template

from lit_sft import cli
from lit_sft.args import ConvertArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.rows import Malformed, Row
from lit_sft.trees import best_paths


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_model) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    directory = root / "checkpoints" / "test" / "tiny"
    make_hf_llama(directory, tokenizer_model)
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))
    return root


@pytest.fixture(scope="module")
def sp(world) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(world / "checkpoints/test/tiny/tokenizer.model"))


@pytest.fixture
def command(world, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """``command(name, *flags)`` runs a command in a directory of its own; gives what it printed."""
    (tmp_path / "checkpoints").symlink_to(world / "checkpoints")
    monkeypatch.chdir(tmp_path)

    def call(name: str, *flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(import_module(cli.commands()[name]).main, list(map(str, flags)), prog=name)
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        return out

    return call


def json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- instructions

ALPACA = [
    {"instruction": "Name a llama's food.", "input": "", "output": "Hay."},
    {"instruction": "Add.", "input": "1, 2", "output": "3\n"},
    {"instruction": "Quote.", "input": '"x"', "output": "Ünï 🦙"},
]
RENDERED = sorted(alpaca(*row.values()) for row in ALPACA)


@pytest.mark.parametrize("variant", ["cleaned", "original", "libre", "gpt4"])
def test_alpaca(command, tmp_path, sp, variant):
    whole = variant in ("original", "gpt4")  # these repeat it all in a column "text"
    rows = [row | ({"text": "Below is …" + row["output"]} if whole else {}) for row in ALPACA]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows, indent=4))
    out = command("prepare_alpaca", "--data_file", "alpaca.json", "--variant", variant)
    name = "data/alpaca" if variant == "cleaned" else f"data/alpaca_{variant}"
    assert marked(sp, Path(name)) == RENDERED and facts(Path(name))["n_val"] == 1
    assert "reading Alpaca's columns: instruction from 'instruction', input from 'input'" in out
    assert ("not read: 'text'" in out) == whole


DOLLY = [
    {"instruction": "When?", "context": "In 1999.", "response": "1999", "category": "closed_qa"},
    {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"},
]


def test_dolly(command, tmp_path, sp):
    json_lines(tmp_path / "databricks-dolly-15k.jsonl", DOLLY)
    out = command("prepare_dolly", "--data_file", "databricks-dolly-15k.jsonl")
    expected = sorted(alpaca(row["instruction"], row["context"], row["response"]) for row in DOLLY)
    assert marked(sp, Path("data/dolly")) == expected
    assert "input from 'context', output from 'response'; not read: 'category'" in out
    command("prepare_dolly", "--data_file", "databricks-dolly-15k.jsonl", "--prompt_style", "dolly")
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert marked(sp, Path("data/dolly")) == [
        f"<s> {task}\n\n### Instruction:\nWhen?\n\nInput:\nIn 1999.\n\n### Response:\n«1999</s>»",
        f"<s> {task}\n\n### Instruction:\nWhy?\n\n### Response:\n«Because.</s>»",
    ]


LONGFORM = [
    {"input": f"Write text {i}.", "output": f"Text {i}.\n\nMore.", "source": "C4", "subset": "r"} for i in range(6)
]


def test_longform_keeps_upstreams_splits(command, tmp_path, sp):
    train, val = LONGFORM[:4], LONGFORM[4:]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "val.json").write_text(json.dumps(val))
    out = command("prepare_longform", "--data_file", "train.json", "--val_file", "val.json")
    for split, rows in (("train", train), ("val", val)):
        assert marked(sp, Path("data/longform"), split) == [alpaca(row["input"], "", row["output"]) for row in rows]
    assert "4 train and 2 val examples" in out and "reading val.json: input/output: instruction from 'input'" in out
    command("prepare_longform", "--data_file", "train.json", "--val_split_fraction", "0.25")  # drawn
    assert facts(Path("data/longform"))["n_train"] == 3 and facts(Path("data/longform"))["n_val"] == 1


def test_flan(command, tmp_path, sp):
    rows = [{"inputs": f"Is {i} odd?\nOptions: yes, no", "targets": "no", "task": "math"} for i in range(3)]
    json_lines(tmp_path / "math_10templates_train.jsonl", rows)
    command("prepare_flan", "--data_file", "math_10templates_train.jsonl", "--prompt_style", "plain")
    assert marked(sp, Path("data/flan")) == [f"<s> {row['inputs']}«no</s>»" for row in rows]


# --- Open Assistant


def message(key: str, parent: str | None, role: str, text: str, **more: object) -> dict:
    """A row with the columns of oasst1."""
    usual = {"lang": "en", "rank": None, "deleted": False, "tree_state": "ready_for_export", "review_result": True}
    return {"message_id": key, "parent_id": parent, "role": role, "text": text} | usual | more


OASST = [
    message("a", None, "prompter", "Hello?"),
    message("a1", "a", "assistant", "Worse", rank=1),
    message("a2", "a", "assistant", "Better", rank=0),
    message("a3", "a", "assistant", "Unranked"),
    message("a4", "a", "assistant", "Deleted", rank=-1, deleted=True),
    message("a11", "a1", "prompter", "Under the worse one", rank=0),
    message("a21", "a2", "prompter", "And?", rank=1),
    message("a22", "a2", "prompter", "Then?", rank=0),
    message("a221", "a22", "assistant", "The end."),
    message("a2211", "a221", "prompter", "Unanswered"),
    message("b", None, "prompter", "¿Qué?", lang="es"),
    message("b1", "b", "assistant", "Nada.", lang="es", rank=0),
    message("c", None, "prompter", "Not ready", tree_state="growing"),
    message("c1", "c", "assistant", "x", tree_state="growing"),
    message("d", None, "prompter", "No answer"),
    message("e", None, "prompter", "Deleted prompt", deleted=True),
    message("e1", "e", "assistant", "x"),
]
ENGLISH = alpaca("Hello?", "", "Better") + later("Then?", "The end.")
SPANISH = alpaca("¿Qué?", "", "Nada.")


def nested(rows: list[dict]) -> list[dict]:
    """The same trees as oasst's .trees.jsonl has them."""
    nodes = {row["message_id"]: {k: v for k, v in row.items() if k != "parent_id"} | {"replies": []} for row in rows}
    for row in rows:
        if row["parent_id"]:
            nodes[row["parent_id"]]["replies"].append(nodes[row["message_id"]])
    roots = [row["message_id"] for row in rows if not row["parent_id"]]
    return [
        {"message_tree_id": root, "tree_state": nodes[root].pop("tree_state"), "prompt": nodes[root]} for root in roots
    ]


@pytest.mark.parametrize("form", ["flat.jsonl", "flat.parquet", "turned.jsonl", "oasst_ready.trees.jsonl"])
def test_oasst(command, tmp_path, sp, form):
    if form == "flat.parquet":
        pq.write_table(pa.Table.from_pylist(OASST), tmp_path / form)
    else:
        rows = nested(OASST) if "trees" in form else OASST[::-1] if "turned" in form else OASST
        json_lines(tmp_path / form, rows)
    out = command("prepare_oasst", "--data_file", form)
    assert marked(sp, Path("data/oasst")) == sorted([ENGLISH, SPANISH])
    assert "left out 3 of 5 trees: not ready, of another language, or without an answer" in out
    command("prepare_oasst", "--data_file", form, "--languages", "en, de", "--overwrite", "true")
    assert marked(sp, Path("data/oasst")) == [ENGLISH]


FAULTS = {
    "no role": ({"message_id": "x", "text": "T"}, "column 'role' is missing"),
    "a number": (message("x", None, "prompter", 5), "column 'text' is a number (5), not text"),
    "twice": (OASST[1], "column 'message_id' 'a1' is there twice"),
    "orphan": (message("x", "y", "assistant", "T"), "column 'parent_id' 'y' leads to no prompt"),
    "cycle": (message("x", "x", "assistant", "T"), "column 'parent_id' 'x' leads to no prompt"),
    "text": ("T", "is text, not an object with columns"),
    "prompt": ({"prompt": ["T"]}, "holds a message that is a list, not an object"),
    "replies": (
        {"prompt": {"message_id": "x", "text": "T", "role": "prompter", "replies": "no"}},
        "is text, not a list",
    ),
}


@pytest.mark.parametrize(("row", "fragment"), FAULTS.values(), ids=FAULTS)
def test_messages_that_hang_on_no_tree(row, fragment):
    rows = [Row(i, i, cells) for i, cells in enumerate([*OASST, row], 1)]
    *_, last = best_paths(rows)
    assert last.number == len(rows) and isinstance(last.cells, Malformed) and fragment in str(last.cells)


def test_ranks_beyond_belief():
    rows = [message("a", None, "prompter", "Q")]
    rows += [message(f"{rank}", "a", "assistant", f"{rank}", rank=rank) for rank in (float("nan"), "0", 7, None, True)]
    [row] = best_paths(Row(i, None, cells) for i, cells in enumerate(rows, 1))
    assert row.cells["messages"][1]["content"] == "True"


# --- anything else

TEXTS = ["A llama eats.\n\nHay.", "Second </s> text.", " with spaces "]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_plain_text_is_learned_whole(command, tmp_path, sp, kind):
    rows = datasets.Dataset.from_list([{"text": text, "url": "x"} for text in TEXTS])
    path = tmp_path / f"corpus.{kind}"
    if kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.data.schema) as writer:
            writer.write_table(rows.data.table)
    else:
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[kind](path)
    out = command("prepare_dataset", "--data_file", path.name)
    assert "reading plain text, learned whole: text from 'text'; not read: 'url'" in out
    assert marked(sp, Path("data/corpus")) == sorted(f"<s>« {text}</s>»" for text in TEXTS)
    command("prepare_dataset", "--data_file", path.name, "--text_column", "url")
    assert marked(sp, Path("data/corpus")) == ["<s>« x</s>»"] * 3


def test_a_dataset_saved_to_disk(command, tmp_path, sp):
    rows = datasets.Dataset.from_list([{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(7)])
    rows.select([0, 2, 4, 6]).save_to_disk("saved", num_shards=2)
    out = command("prepare_dataset", "--data_file", "saved")
    assert "reading prompt/completion: instruction from 'prompt', output from 'completion'" in out
    assert marked(sp, Path("data/saved")) == [alpaca(f"Q{i}", "", f"A{i}") for i in (0, 2, 4, 6)]
    datasets.DatasetDict({"train": rows, "test": rows.select([1, 3])}).save_to_disk("splits")
    command("prepare_dataset", "--data_file", "splits", "--data_val_split", "test")
    assert len(marked(sp, Path("data/splits"), "train")) == 7
    assert marked(sp, Path("data/splits"), "val") == [alpaca(f"Q{i}", "", f"A{i}") for i in (1, 3)]


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (lambda role, text: {"role": role, "content": text}, "OpenAI messages: messages from 'conversations'"),
        (lambda role, text: {"from": {"user": "human"}.get(role, "gpt"), "value": text}, "ShareGPT conversations: "),
        (lambda role, text: text, "lists of turns: "),
    ],
)
def test_the_format_is_said(command, tmp_path, sp, turn, told):
    json_lines(tmp_path / "d.jsonl", [{"conversations": [turn("user", "Q"), turn("assistant", "A")]}])
    assert f"reading {told}" in command("prepare_dataset", "--data_file", "d.jsonl")
    assert marked(sp, Path("data/d")) == [alpaca("Q", "", "A")]


# --- fields that change what is learned


def said(role: str, text: str, **more: object) -> dict:
    return {"role": role, "content": text} | more


def failure(capsys, name: str, *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.run(import_module(cli.commands()[name]).main, list(flags), prog=name)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_answers_that_are_not_learned(command, tmp_path, sp, workers):
    """On disk they are context without labels, whichever process wrote them."""
    turns = [said("user", "Q0"), said("assistant", "Bad.", weight=0), said("user", "Q1"), said("assistant", "Good.")]
    rows = [{"messages": turns}] + [{"messages": [said("user", f"Q {i}"), turns[3]]} for i in range(2500)]
    json_lines(tmp_path / "d.jsonl", rows)
    command("prepare_dataset", "--data_file=d.jsonl", "--val_split_fraction=0", f"--num_workers={workers}")
    texts = marked(sp, Path("data/d"))
    assert len(texts) == 2501
    bad = alpaca("Q0", "", "Bad.").replace("«", "").replace("»", "")
    assert [text for text in texts if "Bad." in text] == [bad + later("Q1", "Good.")]
    # too long an example is cut back to a learned answer, and is refused where there is none left
    limit = len(sp.encode(bad)) + 4
    command("prepare_dataset", "--data_file=d.jsonl", f"--max_seq_length={limit}", "--on_overflow=drop")
    assert not [text for text in marked(sp, Path("data/d")) if "Bad." in text]


def test_an_answer_that_is_not_learned_is_no_response_of_the_filters(command, tmp_path, sp):
    rows = [
        {
            "messages": [
                said("user", "Q"),
                said("assistant", answer, weight=0),
                said("user", "R"),
                said("assistant", "OK"),
            ]
        }
        for answer in ("!!!!!!!!", "yes")
    ]
    json_lines(tmp_path / "d.jsonl", [*rows, {"messages": [said("user", "Q"), said("assistant", "?!")]}])
    command("prepare_dataset", "--data_file=d.jsonl", "--val_split_fraction=0", "--min_alphanumeric_share=0.9")
    assert len(marked(sp, Path("data/d"))) == 2


def test_repetitions_that_teach_different_answers_are_none(command, tmp_path, sp):
    turns = [said("user", "Q"), said("assistant", "A"), said("user", "R"), said("assistant", "B")]
    rows = [turns, [turns[0], turns[1] | {"weight": 0}, *turns[2:]], [*turns[:3], turns[3] | {"weight": 0}], turns]
    rows.append([*turns[:2], turns[2] | {"weight": 0}, turns[3]])  # as prompts are in any case
    json_lines(tmp_path / "d.jsonl", [{"messages": row} for row in rows])
    command("prepare_dataset", "--data_file=d.jsonl", "--val_split_fraction=0", "--deduplicate=exact")
    texts = marked(sp, Path("data/d"))
    assert sorted(text.count("»") for text in texts) == [1, 1, 2] and len(set(texts)) == 3


def test_system_and_history_columns(command, tmp_path, sp):
    row = {"instruction": "Q3", "input": "it", "output": "A3", "system": "Be brief.", "history": [["Q1", "A1"]]}
    mine = {"q": "Q3", "in": "it", "a": "A3", "s": "Be brief.", "h": [["Q1", "A1"]]}
    flags = ("--instruction_column=q", "--input_column=in", "--output_column=a", "--system_column=s")
    expected = ["<s> Be brief.\n\n" + alpaca("Q1", "", "A1")[4:] + later("Q3\n\nit", "A3")]
    json_lines(tmp_path / "d.jsonl", [row])
    json_lines(tmp_path / "mine.jsonl", [mine])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    datasets.Dataset.from_list([row | {"history": json.dumps(row["history"])}]).to_csv(tmp_path / "d.csv")
    for name in ("d.jsonl", "d.parquet", "d.csv"):
        out = command("prepare_csv", "--csv_path", name, "--overwrite=true")
        assert "system from 'system', history from 'history'" in out and marked(sp, Path("data/csv")) == expected
    for name in ("prepare_csv", "prepare_dataset"):
        command(name, "--data_file=mine.jsonl", "--destination_path=data/mine", *flags, "--history_column=h")
        assert marked(sp, Path("data/mine")) == expected
    entry = {"data_file": "mine.jsonl"} | dict(flag[2:].split("=") for flag in (*flags, "--history_column=h"))
    (tmp_path / "mix.yaml").write_text(json.dumps([entry, {"data_file": "d.jsonl"}]))
    command("prepare_dataset", "--mix=mix.yaml")
    assert marked(sp, Path("data/mix")) == expected * 2


def test_fields_that_would_be_lost_are_refused_or_ignored_by_name(command, tmp_path, sp, capsys):
    rows = [
        {"messages": [said("user", "Q"), said("assistant", "A", reasoning_content="Hm.")], "tools": [{"name": "f"}]},
        {"messages": [said("user", "Q"), said("assistant", "B", reasoning_content=None)], "tools": []},
    ]
    json_lines(tmp_path / "d.jsonl", rows)
    told = failure(capsys, "prepare_dataset", "--data_file=d.jsonl")
    assert (
        "d.jsonl row 1: column 'tools' holds definitions of tools, which would be lost; --ignore_fields tools" in told
    )
    told = failure(capsys, "prepare_dataset", "--data_file=d.jsonl", "--ignore_fields=tools")
    assert (
        "turn 2 (assistant): 'reasoning_content' holds a thought, which would be lost; write it into the text" in told
    )
    ignore = "--ignore_fields=tools, reasoning_content"
    out = command("prepare_dataset", "--data_file=d.jsonl", ignore)
    assert "not read: 'tools'; not read of turns: 'reasoning_content'" in out
    assert marked(sp, Path("data/d")) == [alpaca("Q", "", "A"), alpaca("Q", "", "B")]
    (tmp_path / "mix.yaml").write_text("- data_file: d.jsonl")
    command("prepare_dataset", "--mix=mix.yaml", ignore)
    assert marked(sp, Path("data/mix")) == [alpaca("Q", "", "A"), alpaca("Q", "", "B")]
    command("prepare_dataset", "--data_file=d.jsonl", "--on_error=skip")
    assert marked(sp, Path("data/d")) == [alpaca("Q", "", "B")]
    told = failure(capsys, "prepare_dataset", "--data_file=d.jsonl", "--ignore_fields=toolz")
    assert "--ignore_fields 'toolz': known are weight, train, " in told


def test_keys_that_come_late_are_said(command, tmp_path):
    usual = {"messages": [said("user", "Q"), said("assistant", "A", name="Bo")]}
    json_lines(tmp_path / "d.jsonl", [usual] * 2500 + [{"messages": [said("user", "Q", id=1), said("assistant", "A")]}])
    out = command("prepare_dataset", "--data_file=d.jsonl")
    assert "reading OpenAI messages: messages from 'messages'; not read of turns: 'name'\n" in out
    assert (
        "d.jsonl, read to its end: OpenAI messages: messages from 'messages'; not read of turns: 'name', 'id'\n" in out
    )


DEFAULTS = (  # as Qwen 2.5's, with tokens that this tokenizer has
    "{% if messages[0]['role'] == 'system' %}{{ bos_token + '[' + messages[0]['content'] + ']' }}"
    "{% else %}{{ bos_token + '[You are a helpful assistant.]' }}{% endif %}"
    "{% for m in messages if m['role'] != 'system' %}{{ '(' + m['role'] + ') ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant) ' }}{% endif %}"
)


def test_an_empty_system_message_goes_all_the_way(command, tmp_path, world, sp, monkeypatch):
    """From the data, and from --system_prompt "" of both commands; as transformers writes it."""
    usual = world / "checkpoints" / "test" / "tiny"
    chat = tmp_path / "chat"
    chat.mkdir()
    for path in usual.iterdir():
        (chat / path.name).symlink_to(path)
    (chat / "chat_template.jinja").write_text(DEFAULTS)
    turns = [said("system", ""), said("user", "Q"), said("assistant", "A")]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    [text, default], _ = render_jinja_template([turns, turns[1:]], chat_template=DEFAULTS, **names)
    [prompt], _ = render_jinja_template([turns[:2]], chat_template=DEFAULTS, add_generation_prompt=True, **names)
    assert "helpful" in default and "helpful" not in text
    json_lines(tmp_path / "d.jsonl", [{"messages": turns}])
    json_lines(tmp_path / "none.jsonl", [{"messages": turns[1:]}])
    flags = ("prepare_dataset", f"--checkpoint_dir={chat}", "--destination_path=data/d", "--overwrite=true")
    for more, expected in (
        (("--data_file=d.jsonl",), text),
        (("--data_file=d.jsonl", "--system_prompt=Be brief."), text),
        (("--data_file=none.jsonl", "--system_prompt="), text),
        (("--data_file=none.jsonl",), default),
    ):
        command(*flags, *more)
        [found] = marked(sp, Path("data/d"))
        assert found.replace("«", "").replace("»", "").replace("<s> ", "<s>") == expected
    asked = []
    monkeypatch.setattr("lit_sft.generate.generate", lambda model, ids, *_: asked.append(ids) or iter(()))
    command("generate", f"--checkpoint_dir={chat}", "--prompt=Q", "--system_prompt=", "--prompt_style=chat-template")
    assert sp.decode(asked[0]) == prompt.removeprefix("<s>")


# --- prompts that later commands must know


@pytest.mark.parametrize("merged", [False, True])
def test_a_style_of_the_users_own_goes_all_the_way(command, tmp_path, sp, merged, monkeypatch):
    (tmp_path / "mine.jinja").write_text("{% if system %}({{ system }}) {% endif %}Q: {{ instruction }}\n\nA: \n")
    json_lines(tmp_path / "d.jsonl", [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(8)])
    flags = ("--prompt_style", "mine.jinja", "--system_prompt", "Be </s> brief.", "--val_split_fraction", "0.2")
    out = command("prepare_dataset", "--data_file", "d.jsonl", *flags)
    assert "prompt style your own ({% if system %}({{ system }}) {% endif" in out
    texts = [f"<s> (Be </s> brief.) Q: Q{i}\n\nA: «A{i}</s>»" for i in range(8)]
    assert marked(sp, Path("data/d")) == texts
    (tmp_path / "mine.jinja").write_text("changed: {{ instruction }}")
    command(
        "lora", "--data_dir=data/d", "--max_steps=1", "--global_batch_size=2", "--device=cpu", "--sample_prompt=Hm?"
    )
    (tmp_path / "mine.jinja").unlink()
    asked = []
    monkeypatch.setattr("lit_sft.generate.generate", lambda model, ids, *_: asked.append(ids) or iter(()))
    where = ["--adapter_dir=out/lora"]
    if merged:
        command("merge_lora", "--lora_path=out/lora", "--out_dir=checkpoints_merged")
        where = ["--checkpoint_dir=checkpoints_merged"]
    command("generate", *where, "--prompt=Q1", "--max_new_tokens=1")
    command("generate", *where, "--prompt=Q1", "--max_new_tokens=1", "--system_prompt=")
    command("generate", *where, "--prompt=Q1", "--max_new_tokens=1", "--prompt_style={instruction} =")
    prompts = ["(Be </s> brief.) Q: Q1\n\nA: ", "Q: Q1\n\nA: ", "Be </s> brief.\n\nQ1 ="]
    assert asked == [[sp.bos_id(), *sp.encode(prompt)] for prompt in prompts]


# --- from a Hub, in one process

RUNNER = """
import json, sys
from importlib import import_module
from lit_sft import cli
for name, flags in json.loads(sys.argv[1]):
    try:
        cli.run(import_module(cli.commands()[name]).main, flags, prog=name)
    except SystemExit as end:
        assert end.code == 0, (name, flags)
"""


def test_upstreams_splits_from_the_hub(world, tmp_path, sp):
    def flan(split: str, *tasks: str) -> dict[str, bytes]:
        row = '{{"inputs": "{0} {1}", "targets": "T", "task": "{0}"}}\n'
        return {f"{split}/{t}_10templates_{split}.jsonl": row.format(t, split).encode() for t in tasks}

    def parquet(rows: list[dict]) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()

    splits = {"train": LONGFORM[:3], "validation": LONGFORM[3:5], "test": LONGFORM[5:]}
    repos = {
        "akoksal/LongForm": {f"data/{name}-00000-of-00001.parquet": parquet(rows) for name, rows in splits.items()},
        "Muennighoff/flan": flan("train", "aeslc", "trec", "wic") | flan("test", "aeslc", "trec", "wic"),
        "OpenAssistant/oasst1": {"train.parquet": parquet(OASST[:10]), "validation.parquet": parquet(OASST[10:12])},
        "databricks/databricks-dolly-15k": {"databricks-dolly-15k.jsonl": "\n".join(map(json.dumps, DOLLY)).encode()},
        "tatsu-lab/alpaca": {"data/train-00000-of-00001.parquet": parquet(ALPACA)},
    }
    todo = [
        ("prepare_longform", []),
        ("prepare_flan", ["--subsets=trec,wic_10templates", "--prompt_style=plain"]),
        ("prepare_oasst", []),
        ("prepare_dolly", []),
        ("prepare_alpaca", ["--variant=original"]),
        ("prepare_csv", ["--data_repo_id=databricks/databricks-dolly-15k"]),
    ]
    (tmp_path / "checkpoints").symlink_to(world / "checkpoints")
    with hub_server.HubServer({}, {name: hub_server.Repo(files) for name, files in repos.items()}) as hub:
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", RUNNER, json.dumps(todo)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    data = tmp_path / "data"
    texts = [alpaca(row["input"], "", row["output"]) for row in LONGFORM]
    assert (marked(sp, data / "longform", "train"), marked(sp, data / "longform", "val")) == (texts[:3], texts[3:5])
    for split, name in (("train", "train"), ("val", "test")):
        assert marked(sp, data / "flan", split) == [f"<s> {task} {name}«T</s>»" for task in ("trec", "wic")]
    assert marked(sp, data / "oasst", "train") == [ENGLISH] and marked(sp, data / "oasst", "val") == [SPANISH]
    dolly = sorted(alpaca(row["instruction"], row["context"], row["response"]) for row in DOLLY)
    assert marked(sp, data / "dolly") == marked(sp, data / "csv") == dolly
    assert marked(sp, data / "alpaca_original") == RENDERED
