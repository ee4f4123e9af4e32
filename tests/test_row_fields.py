"""Fields of rows and turns that change what is learned: each is read or refused, and what is not read is said."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_sft.errors import InputError
from lit_sft.prompts import Message
from lit_sft.row_fields import parse_ignored, says_something
from lit_sft.rows import Columns
from lit_sft.sources import Samples, read_samples

ASKED = {"role": "user", "content": "Q"}
ANSWERED = {"role": "assistant", "content": "A"}
PAIR = {"instruction": "Q", "output": "A"}
DIALOGUE = (Message("user", "Q"), Message("assistant", "A"))


def read(folder: Path, *rows: dict, **options: object) -> Samples:
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(folder / "d.jsonl", **options)


def refusal(folder: Path, *rows: dict, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, *rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def talk(first: dict | None = None, second: dict | None = None, asked: dict | None = None) -> dict:
    """Two exchanges, with more fields in the first answer, the second or the first question."""
    turns = [ASKED | (asked or {}), ANSWERED | (first or {}), ASKED, ANSWERED | (second or {})]
    return {"messages": turns}


# --- is a turn learned?

NOT_LEARNED = [
    {"weight": 0},  # OpenAI, Mistral, Together, Fireworks
    {"weight": 0.0},
    {"weight": False},
    {"train": False},  # Axolotl
    {"training": False},
    {"trainable": False},
    {"loss": False},  # ms-swift, XTuner
    {"loss_scale": 0},
    {"loss_weight": 0.0},
    {"sample_weight": 0},
    {"loss_mask": 0},
    {"step_loss_mask": 0},  # slime
    {"masked": True},  # torchtune
    {"lossMask": 0},
    {"Weight": 0},
    {"weight": "0"},
    {"train": "false"},
    {"weight": 0, "train": False, "masked": 1},
]


@pytest.mark.parametrize("fields", NOT_LEARNED, ids=json.dumps)
def test_a_turn_that_is_not_learned_stays_as_context(tmp_path, fields):
    context = (Message("user", "Q"), Message("assistant", "A", learned=False))
    assert read(tmp_path, talk(fields)).samples[0].messages == (*context, *DIALOGUE)
    assert read(tmp_path, talk(None, fields)).samples[0].messages == (*DIALOGUE, *context)


@pytest.mark.parametrize(
    "fields",
    [
        *({"weight": value} for value in (1, 1.0, "1", True, None, float("nan"), "")),
        *({"train": True}, {"loss": True}, {"loss_mask": 1}, {"masked": False}, {"train": None, "weight": 1}),
    ],
    ids=json.dumps,
)
def test_a_turn_that_is_learned_is_an_ordinary_one(tmp_path, fields):
    samples = read(tmp_path, talk(fields, fields))
    assert samples.samples[0].messages == DIALOGUE * 2
    assert "not read" not in samples.columns


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"weight": 0.5}, "'weight' is a number (0.5), neither 0 nor 1"),
        ({"weight": 2}, "'weight' is a number (2), neither 0 nor 1"),
        ({"weight": -1}, "'weight' is a number (-1), neither 0 nor 1"),
        ({"weight": "low"}, "'weight' is text ('low'), neither 0 nor 1"),
        ({"loss_mask": [0, 1]}, "'loss_mask' is a list, neither 0 nor 1"),
        ({"loss_scale": 1.5}, "'loss_scale' is a number (1.5), neither 0 nor 1"),
        ({"train": {"a": 1}}, "'train' is an object, neither 0 nor 1"),
        ({"weight": 0, "train": True}, "'weight', 'train' contradict each other"),
        ({"weight": 1, "masked": True}, "'weight', 'masked' contradict each other"),
    ],
)
def test_what_is_neither_is_refused_by_name(tmp_path, fields, fragment):
    message = refusal(tmp_path, talk(), talk(None, fields))
    assert message.startswith("d.jsonl row 2: column 'messages' turn 4 (assistant): ") and fragment in message
    assert "(line 2)" in message and "--on_error skip" in message


def test_a_dialogue_of_which_nothing_is_learned_is_malformed(tmp_path):
    assert "row 2: nothing of it is learned: " in refusal(tmp_path, talk(), talk({"weight": 0}, {"train": False}))
    [sample] = read(tmp_path, talk({"weight": 0}), talk(), on_error="skip", multiturn=False).samples
    assert sample.messages == DIALOGUE  # the first exchange of the other row is not learned, and nothing else is kept


def test_turns_of_sharegpt_too(tmp_path):
    turns = [{"from": "human", "value": "Q", "train": False}, {"from": "gpt", "value": "A", "train": False}]
    turns += [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "train": True}]
    [sample] = read(tmp_path, {"conversations": turns}).samples
    assert [message.learned for message in sample.messages] == [False, False, None, None]


def test_a_table_gives_each_turn_all_keys(tmp_path):
    """Arrow's turns have the keys of all, null where they were absent; nested ones are objects of nulls."""
    calls = {"function_call": {"name": None, "arguments": None}, "tool_calls": [], "weight": None}
    rows = [{"messages": [ASKED | calls, ANSWERED | calls | {"weight": 0}, ASKED | calls, ANSWERED | calls]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    [sample] = read_samples(tmp_path / "d.parquet").samples
    assert [message.learned for message in sample.messages] == [None, False, None, None]


# --- what would be lost

CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
LOST_IN_TURNS = {
    "tool_calls": CALL,
    "toolCalls": CALL,
    "function_call": {"name": "f", "arguments": "{}"},
    "reasoning_content": "Hm.",
    "reasoning": "Hm.",
    "thinking": "Hm.",
    "thinking_blocks": [{"thinking": "Hm."}],
    "refusal": "No.",
    "audio": {"id": "a"},
    "images": ["a.png"],
    "videos": ["a.mp4"],
    "tools": [{"name": "f"}],
    "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
    "training_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
    "mask": [0, 1],
    "weights": [0, 1],
    "eot": False,
    "need_eos_token": False,
}


@pytest.mark.parametrize(("key", "value"), LOST_IN_TURNS.items(), ids=LOST_IN_TURNS)
def test_what_would_be_lost_of_a_turn_is_refused(tmp_path, key, value):
    message = refusal(tmp_path, talk(), talk(None, {key: value}))
    assert message.startswith(f"d.jsonl row 2: column 'messages' turn 4 (assistant): {key!r} ")
    [way] = re.findall(r"--ignore_fields (\w+)", message)
    samples = read(tmp_path, talk(), talk(None, {key: value}), ignored=parse_ignored(way))
    assert samples.samples[1].messages == DIALOGUE * 2
    assert samples.columns.endswith(f"; not read of turns: {key!r}")


def test_a_call_without_text_names_the_call(tmp_path):
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": CALL}]
    assert "turn 2 (assistant): 'tool_calls' holds a call of a tool" in refusal(tmp_path, {"messages": turns})


@pytest.mark.parametrize("key", sorted(LOST_IN_TURNS))
@pytest.mark.parametrize("value", [None, "", " ", [], {}, [None], {"a": None, "b": [""]}, float("nan"), "[]"], ids=repr)
def test_what_is_empty_is_harmless(tmp_path, key, value):
    assert read(tmp_path, talk({key: value})).samples[0].messages == DIALOGUE * 2
    assert read(tmp_path, talk() | {key: value}).samples[0].messages == DIALOGUE * 2
    assert read(tmp_path, PAIR | {key: value}).samples[0].messages == DIALOGUE


def test_a_deep_value_is_looked_into():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert not says_something(deep)


LOST_IN_COLUMNS = {
    "tools": [{"name": "f"}],
    "functions": "[{}, 1]",
    "images": ["a.png"],
    "image": "a.png",
    "audio": {"path": "a.wav"},
    "videos": ["a.mp4"],
    "reasoning": "Hm.",
    "chat_template_kwargs": {"enable_thinking": False, "x": 1},
    "completion_mask": [0, 1],
    "mask": "Assistant",
    "history": [["Q", "A"]],
    "chat_history": [["Q", "A"]],
    "weight": 0,
    "loss": False,
    "train": False,
    "loss_mask": [0, 1],
    "chosen": "A",
    "rejected": "B",
    "rejected_response": "B",
    "label": False,
    "kto_tag": False,
}


@pytest.mark.parametrize(("key", "value"), LOST_IN_COLUMNS.items(), ids=LOST_IN_COLUMNS)
def test_what_would_be_lost_of_a_row_is_refused(tmp_path, key, value):
    for row in (PAIR, talk(), {"text": "T"}):
        if key == "history" and row is PAIR:
            continue  # where it is read
        message = refusal(tmp_path, row, row | {key: value})
        assert message.startswith(f"d.jsonl row 2: column {key!r} ")
        ignored = parse_ignored(key)
        samples = read(tmp_path, row, row | {key: value}, ignored=ignored)
        assert samples.samples[0].messages == samples.samples[1].messages
        assert f"; not read: {key!r}" in samples.columns


@pytest.mark.parametrize(
    "fields",
    [
        *({"weight": value} for value in (1, "1", "", None)),
        *({"label": value} for value in (True, "no", 0)),
        *({"loss": True}, {"mask": "User"}, {"chosen": None, "rejected": ""}, {"category": {"deep": [1]}}),
    ],
    ids=json.dumps,
)
def test_columns_that_change_nothing(tmp_path, fields):
    samples = read(tmp_path, PAIR | fields)
    assert samples.samples[0].messages == DIALOGUE
    assert "; not read: " in samples.columns


def test_weights_between_are_refused(tmp_path):
    message = refusal(tmp_path, PAIR | {"weight": 0.5})
    assert "column 'weight' is a number (0.5), neither 0 nor 1; --ignore_fields weight" in message


def test_a_preference_is_chosen_by_flag(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    assert read(tmp_path, row, columns=Columns(output="chosen")).samples[0].messages == DIALOGUE
    row = {"prompt": "Q", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}
    assert read(tmp_path, row, columns=Columns(messages="chosen")).samples[0].messages == DIALOGUE
    row = {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED], "messages": [ASKED, ANSWERED]}
    assert "'chosen' holds one of several answers; name the column" in refusal(tmp_path, row)
    assert read(tmp_path, row, columns=Columns(messages="messages")).samples[0].messages == DIALOGUE


# --- the dialogue's other columns


@pytest.mark.parametrize("column", ["system", "system_prompt", "System", "system_message"])
def test_a_system_column(tmp_path, column):
    expected = (Message("system", "Be brief."), *DIALOGUE)
    for row in (PAIR, {"question": "Q", "response": "A"}, {"conversations": ["Q", "A"]}, {"messages": ["Q", "A"]}):
        samples = read(tmp_path, row | {column: "Be brief."}, row | {column: ""}, row, system_prompt="Flag.")
        assert [sample.messages for sample in samples.samples] == [
            expected,
            (Message("system", "Flag."), *DIALOGUE),
            (Message("system", "Flag."), *DIALOGUE),
        ]
        assert f"system from {column!r}" in samples.columns


def test_a_system_column_by_flag(tmp_path):
    expected = (Message("system", "Be brief."), *DIALOGUE)
    for row in (PAIR, talk()):
        samples = read(
            tmp_path, row | {"role_of_ai": "Be brief.", "system": "no"}, columns=Columns(system="role_of_ai")
        )
        assert samples.samples[0].messages[:3] == expected


@pytest.mark.parametrize("turn", ["Be brief.", "Be brief.\n"])
def test_a_system_column_that_repeats_the_turn(tmp_path, turn):
    row = {"system": "Be brief.", "messages": [{"role": "system", "content": turn}, ASKED, ANSWERED]}
    assert read(tmp_path, row).samples[0].messages == (Message("system", turn), *DIALOGUE)


@pytest.mark.parametrize("turn", ["Be long.", ""])
def test_a_system_column_against_the_turn(tmp_path, turn):
    row = {"system": "Be brief.", "messages": [{"role": "system", "content": turn}, ASKED, ANSWERED]}
    message = refusal(tmp_path, row)
    assert (
        f"column 'system' ('Be brief.') and the system turn ({turn!r}) differ; --ignore_fields system takes" in message
    )
    samples = read(tmp_path, row, ignored=parse_ignored("system"))
    assert samples.samples[0].messages == (Message("system", turn), *DIALOGUE)


@pytest.mark.parametrize(
    ("system", "fragment"),
    [(5, "column 'system' is a number (5), not text"), ([{"text": "S"}], "column 'system' is a list, not text")],
)
def test_a_system_that_is_no_text(tmp_path, system, fragment):
    assert fragment in refusal(tmp_path, PAIR | {"system": system})


def test_two_system_columns(tmp_path):
    message = refusal(tmp_path, PAIR | {"system": "A", "system_prompt": "B"})
    assert "which of 'system', 'system_prompt' to read is ambiguous" in message and "--system_column" in message


HISTORY = [["Q1", "A1"], ["Q2", "A2"]]
EARLIER = tuple(Message(role, text + n) for n in "12" for role, text in (("user", "Q"), ("assistant", "A")))


@pytest.mark.parametrize(
    "history",
    [HISTORY, json.dumps(HISTORY), [{"role": m.role, "content": m.content} for m in EARLIER]],
    ids=["pairs", "text", "messages"],
)
def test_history_comes_before_the_instruction(tmp_path, history):
    """As in LLaMA-Factory, where the answers in it are learned as well."""
    row = PAIR | {"input": "it", "system": "Be brief.", "history": history}
    samples = read(tmp_path, row)
    last = (Message("user", "Q", "it"), Message("assistant", "A"))
    assert samples.samples[0].messages == (Message("system", "Be brief."), *EARLIER, *last)
    assert samples.columns == (
        "Alpaca's columns: instruction from 'instruction', input from 'input', output from 'output', "
        "system from 'system', history from 'history'"
    )
    named = read(tmp_path, {"q": "Q", "a": "A", "past": history}, columns=Columns("q", output="a", history="past"))
    assert named.samples[0].messages == (*EARLIER, *DIALOGUE)
    assert read(tmp_path, row, multiturn=False).samples[0].messages == (Message("system", "Be brief."), *EARLIER[:2])


@pytest.mark.parametrize("history", [None, [], "", "[]", [["", ""]], [[]], '[["", ""]]', "[[]]"], ids=repr)
def test_no_history(tmp_path, history):
    assert read(tmp_path, PAIR | {"history": history}).samples[0].messages == DIALOGUE


@pytest.mark.parametrize(
    ("history", "fragment"),
    [
        ([["Q", "A"], ["Q"]], "column 'history' item 2 is a list of 1, not [user, assistant]"),
        ([["Q", "A", "Q"]], "item 1 is a list of 3, not [user, assistant]"),
        (["Q", "A"], "item 1 is text, not [user, assistant]"),
        ([["Q", None]], "item 1 (assistant) is missing"),
        ([["Q", " "]], "item 1 (assistant) is empty"),
        ([[5, "A"]], "item 1 (user) is a number (5), not text"),
        ("Q: A", "column 'history' is text but not JSON"),
        ({"Q": "A"}, "column 'history' is an object, not a list of [user, assistant]"),
        ([ASKED, ANSWERED, ASKED], "column 'history' ends with a question"),
        ([ASKED, ANSWERED | {"tool_calls": CALL}], "turn 2 (assistant): 'tool_calls' holds a call"),
    ],
)
def test_history_that_is_none(tmp_path, history, fragment):
    assert fragment in refusal(tmp_path, PAIR | {"history": history})


def test_columns_that_cannot_go_together(tmp_path):
    row = {"messages": ["Q", "A"], "text": "T", "past": [], "sys": ""}
    for columns in (Columns(messages="messages", history="past"), Columns(text="text", system="sys")):
        assert "--messages_column or --text_column alone" in refusal(tmp_path, row, columns=columns)
    assert "no known format" in refusal(tmp_path, {"text": "T", "sys": "S"}, columns=Columns(system="sys"))


# --- what is not read is said


def test_unknown_keys_of_turns_are_said(tmp_path):
    rows = [talk({"name": "Bo", "id": 3}) | {"source": "s"}, talk({"name": "Di", "end_turn": True, "tool_calls": None})]
    told = read(tmp_path, *rows).columns
    assert told == (
        "OpenAI messages: messages from 'messages'; not read: 'source'; not read of turns: 'name', 'id', 'end_turn'"
    )
