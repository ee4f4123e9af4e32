import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_sft.errors import InputError
from lit_sft.prompts import Message, Sample
from lit_sft.rows import Columns
from lit_sft.sources import SampleStream, read_samples

NASTY = [
    'say "hi", twice',
    "two\nlines\r\nthree",
    "a,b\tc;d",
    "ünï¢ødé 🦙 \u2028 end",
    " spaces ",
    "NaN",
    "=1+1",
    "\ufeffbom",
]
PAIR = '{"instruction": "Ask", "output": "Answer"}'


def user(text: str, context: str = "") -> Message:
    return Message("user", text, context)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def write(folder: Path, name: str, content: str | bytes | list) -> Path:
    """A file with this content; a list is the rows of a Parquet file."""
    path = folder / name
    if isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, **options: object) -> str:
    """The message of the InputError, which is one line."""
    with pytest.raises(InputError) as caught:
        read_samples(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def dialogue(*turns: object) -> str:
    return json.dumps({"messages": turns})


ASKED = {"role": "user", "content": "Q"}
ANSWERED = {"role": "assistant", "content": "A"}

READ = {
    "csv": ("d.csv", "instruction,input,output\nAsk,,Answer\n", [user("Ask"), assistant("Answer")]),
    "csv-context": ("d.csv", "instruction,input,output\nAsk,it,Answer\n", [user("Ask", "it"), assistant("Answer")]),
    "csv-blank-input": ("d.csv", "instruction,input,output\nAsk,  ,Answer\n", [user("Ask"), assistant("Answer")]),
    "csv-crlf-bom": ("d.csv", b"\xef\xbb\xbfinstruction,output\r\nAsk,Answer\r\n", [user("Ask"), assistant("Answer")]),
    "csv-blank-lines": ("d.csv", "\ninstruction,output\n\nAsk,Answer\n\n", [user("Ask"), assistant("Answer")]),
    "csv-upper-case": ("D.CSV", "Instruction, Output\nAsk,Answer", [user("Ask"), assistant("Answer")]),
    "csv-index": ("d.csv", ",instruction,output,\n0,Ask,Answer,\n", [user("Ask"), assistant("Answer")]),
    "csv-messages": (
        "d.csv",
        'messages\n"[{""role"": ""user"", ""content"": ""Q""}, {""role"": ""assistant"", ""content"": ""A""}]"\n',
        [user("Q"), assistant("A")],
    ),
    "tsv": ("d.tsv", "prompt\tcompletion\nAsk, please\tAnswer\n", [user("Ask, please"), assistant("Answer")]),
    "json": ("d.json", f"[{PAIR}]", [user("Ask"), assistant("Answer")]),
    "json-list-in-object": ("d.json", f'{{"version": 1, "data": [{PAIR}]}}', [user("Ask"), assistant("Answer")]),
    "json-that-is-lines": ("d.json", f"{PAIR}\n{PAIR}\n", [user("Ask"), assistant("Answer")] * 2),
    "json-one-row": ("d.json", PAIR, [user("Ask"), assistant("Answer")]),
    "json-one-dialogue": ("d.json", dialogue(ASKED, ANSWERED), [user("Q"), assistant("A")]),
    "json-bom": ("d.json", b"\xef\xbb\xbf" + f"[{PAIR}]".encode(), [user("Ask"), assistant("Answer")]),
    "json-null-input": ("d.json", '[{"question": "Q", "context": null, "answer": "A"}]', [user("Q"), assistant("A")]),
    "json-nan-input": ("d.json", '[{"prompt": "Q", "input": NaN, "output": "A"}]', [user("Q"), assistant("A")]),
    "json-longform": ("d.json", '[{"input": "Q", "output": "A"}]', [user("Q"), assistant("A")]),
    "jsonl": ("d.jsonl", f"{PAIR}\n\n{PAIR}", [user("Ask"), assistant("Answer")] * 2),
    "jsonl-that-is-a-list": ("d.jsonl", f"[\n{PAIR}]", [user("Ask"), assistant("Answer")]),
    "ndjson-flan": ("d.ndjson", '{"inputs": "Q", "targets": "A", "task": 3}', [user("Q"), assistant("A")]),
    "dolly": ("d.jsonl", '{"instruction": "Q", "context": "C", "response": "A"}', [user("Q", "C"), assistant("A")]),
    "openai": (
        "d.jsonl",
        dialogue({"role": "system", "content": "S"}, ASKED, ANSWERED, ASKED, ANSWERED),
        [Message("system", "S"), user("Q"), assistant("A"), user("Q"), assistant("A")],
    ),
    "sharegpt": (
        "d.json",
        '[{"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]',
        [user("Q"), assistant("A")],
    ),
    "lima": ("d.jsonl", '{"conversations": ["Q", "A"], "source": "wiki"}', [user("Q"), assistant("A")]),
    "unanswered-last": ("d.jsonl", dialogue("Q", "A", "Q2"), [user("Q"), assistant("A")]),
    "silent-system": (
        "d.jsonl",
        dialogue({"role": "system", "content": ""}, ASKED, ANSWERED),
        [Message("system", ""), user("Q"), assistant("A")],
    ),
    "null-system": (
        "d.jsonl",
        dialogue({"role": "system", "content": None}, ASKED, ANSWERED),
        [user("Q"), assistant("A")],
    ),
    "parquet": ("d.parquet", [{"instruction": "Q", "input": None, "output": "A"}], [user("Q"), assistant("A")]),
    "parquet-dialogue": ("d.parquet", [{"messages": [ASKED, ANSWERED]}], [user("Q"), assistant("A")]),
    "prompt-beside-messages": ("d.parquet", [{"prompt": "P", "messages": ["Q", "A"]}], [user("Q"), assistant("A")]),
}


@pytest.mark.parametrize(("name", "content", "messages"), READ.values(), ids=READ)
def test_reads(tmp_path, name, content, messages):
    samples, problems, _ = read_samples(write(tmp_path, name, content))
    assert [m for sample in samples for m in sample.messages] == messages
    assert not problems


REFUSED = {
    "missing": ("d.csv", None, ["d.csv does not exist", ".parquet"]),
    "empty": ("d.csv", "", ["d.csv is empty"]),
    "unknown-kind": ("d.xlsx", "rows", ["unknown kind", ".csv"]),
    "header-only": ("d.csv", "instruction,output\n", ["d.csv holds no rows"]),
    "blank": ("d.jsonl", "\n\n", ["holds no rows"]),
    "empty-list": ("d.json", "[]", ["holds no rows"]),
    "unknown-columns": ("d.csv", "a,b\n1,2\n", ["columns: 'a', 'b'", "--instruction_column", "--text_column"]),
    "no-output": ("d.csv", "instruction,input\nQ,C\n", ["no known format", "'instruction', 'input'"]),
    "two-outputs": (
        "d.csv",
        "instruction,output,response\nQ,A,B\n",
        ["which of 'output', 'response' to read is ambiguous"],
    ),
    "pair-and-dialogue": (
        "d.jsonl",
        '{"prompt": "P", "output": "A", "messages": []}',
        ["'prompt', 'output', 'messages' to read is ambiguous"],
    ),
    "case-twins": ("d.csv", "instruction,output,Output\nQ,A,B\n", ["'output', 'Output'"]),
    "duplicate-header": ("d.csv", "instruction,output,output\nQ,A,B\n", ["more than one column 'output'"]),
    "empty-output": ("d.csv", "instruction,output\nQ,A\nQ,\n", ["d.csv row 2: column 'output' is empty (line 3)"]),
    "blank-instruction": (
        "d.csv",
        'instruction,output\nQ,A\n" \n",A\n',
        ["row 2: column 'instruction' is empty (line 3)"],
    ),
    "too-few-cells": ("d.csv", "instruction,output\nQ,A\nQ\n", ["row 2: has 1 cells, the header has 2 (line 3)"]),
    "too-many-cells": (
        "d.csv",
        'instruction,output\n"Q\nQ",A\nQ,A,A\n',
        ["row 2: has 3 cells, the header has 2 (line 4)"],
    ),
    "open-quote": ("d.csv", 'instruction,output\nQ,A\nQ,"A\nQ,A\n', ["row 2 (line 3): broken quotes"]),
    "stray-quote": ("d.csv", 'instruction,output\n"Q"x,A\n', ["row 1 (line 2): broken quotes"]),
    "csv-nul": ("d.csv", "instruction,output\nQ,A\0B\n", ["column 'output' has a NUL byte at character 2"]),
    "csv-latin-1": (
        "d.csv",
        b"instruction,output\nQ,caf\xe9\n",
        ["row 1: column 'output' is not UTF-8 at character 4"],
    ),
    "csv-utf-16": (
        "d.csv",
        "instruction,output\nQ,A\n".encode("utf-16"),
        ["d.csv is UTF-16, not UTF-8; save it as UTF-8"],
    ),
    "csv-python-dialogue": ("d.csv", "messages\n\"[{'role': 'user'}]\"\n", ["column 'messages' is text but not JSON"]),
    "json-broken": ("d.json", '[\n{"instruction": "Q",,}]', ["d.json is not JSON", "at line 2 column 21"]),
    "json-garbage-after": ("d.json", f"[{PAIR}]]", ["is not JSON: Extra data at line 1"]),
    "json-latin-1": ("d.json", b'[{"prompt": "caf\xe9"}]', ["is not UTF-8 at byte 17"]),
    "json-scalar": ("d.json", "3", ["holds a number (3)"]),
    "json-several-lists": ("d.json", '{"prompt": ["Q"], "output": ["A"]}', ["the lists 'prompt', 'output'"]),
    "json-deep": ("d.json", "[" * 100_000, ["is not JSON that can be read"]),
    "json-huge-number": ("d.json", "9" * 5_000, ["is not JSON that can be read"]),
    "json-of-texts": ("d.json", '["Q", "A"]', ["row 1: is text, not an object"]),
    "json-empty-objects": ("d.json", "[{}, {}]", ["row 1: holds no columns", "columns: none"]),
    "jsonl-broken": ("d.jsonl", f"{PAIR}\n\n{{'Q'}}\n", ["d.jsonl row 2: is not JSON", "at line 3 column 2"]),
    "jsonl-latin-1": (
        "d.jsonl",
        PAIR.encode() + b'\n{"a": "\xe9"}',
        ["row 2: is not UTF-8 at byte 8, counted from line 2"],
    ),
    "absent-key": ("d.jsonl", f'{PAIR}\n{{"instruction": "Q"}}', ["row 2: column 'output' is missing (line 2)"]),
    "null": ("d.json", '[{"instruction": "Q", "output": null}]', ["column 'output' is missing"]),
    "nan": ("d.json", '[{"instruction": "Q", "output": NaN}]', ["column 'output' is missing"]),
    "number": ("d.json", '[{"instruction": "Q", "output": 5}]', ["column 'output' is a number (5), not text"]),
    "boolean-input": ("d.json", '[{"instruction": "Q", "input": true, "output": "A"}]', ["a boolean (True), not text"]),
    "list": ("d.json", '[{"instruction": ["Q"], "output": "A"}]', ["column 'instruction' is a list, not text"]),
    "surrogate": ("d.json", '[{"instruction": "Q", "output": "\\ud800"}]', ["'output' is not UTF-8 at character 1"]),
    "unknown-role": (
        "d.jsonl",
        dialogue({"role": "tool", "content": "x"}),
        ["turn 1 has the unknown role 'tool'", "'gpt'"],
    ),
    "role-no-text": ("d.jsonl", dialogue({"role": ["user"], "content": "x"}), ["unknown role a list"]),
    "no-role": ("d.jsonl", dialogue({"content": "x"}), ["turn 1 is an object, not text"]),
    "answer-first": ("d.jsonl", dialogue(ANSWERED, ASKED), ["turn 1 is the assistant's"]),
    "user-twice": ("d.jsonl", dialogue(ASKED, ASKED, ANSWERED), ["column 'messages' turn 2 is the user's"]),
    "late-system": ("d.jsonl", dialogue(ASKED, {"role": "system", "content": "S"}), ["turn 2 is the system's"]),
    "no-answer": ("d.jsonl", dialogue("Q"), ["column 'messages' has no assistant turn"]),
    "no-turns": ("d.jsonl", dialogue(), ["has no assistant turn"]),
    "empty-answer": ("d.jsonl", dialogue("Q", " "), ["column 'messages' turn 2 (assistant) is empty"]),
    "null-content": (
        "d.jsonl",
        dialogue(ASKED, {"role": "assistant", "content": None}),
        ["turn 2 (assistant) is missing"],
    ),
    "messages-null": (
        "d.jsonl",
        f'{dialogue("Q", "A")}\n{{"messages": null}}',
        ["row 2: column 'messages' is missing"],
    ),
    "messages-object": ("d.jsonl", '{"messages": {"role": "user"}}', ["is an object, not a list of turns"]),
    "parquet-broken": ("d.parquet", "PAR1 but not", ["d.parquet cannot be read as Parquet"]),
    "parquet-number": ("d.parquet", [{"prompt": "Q", "output": 1.5}], ["column 'output' is a number (1.5), not text"]),
    "parquet-binary": ("d.parquet", [{"prompt": b"Q", "output": "A"}], ["column 'prompt' is bytes, not text"]),
}


@pytest.mark.parametrize(("name", "content", "fragments"), REFUSED.values(), ids=REFUSED)
def test_refuses(tmp_path, name, content, fragments):
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    message = refusal(path)
    assert all(fragment in message for fragment in fragments), message


def test_json_inside_parquet(tmp_path):
    """``datasets`` stores turns that differ in their keys as JSON texts: no plain texts, as LIMA's turns are."""
    texts = pa.array([[json.dumps(ASKED), json.dumps(ANSWERED | {"weight": 1})]]).cast(pa.list_(pa.json_()))
    pq.write_table(pa.table({"messages": texts}), tmp_path / "d.parquet")
    assert read_samples(tmp_path / "d.parquet").samples[0].messages == (user("Q"), assistant("A"))


def test_directory_names_its_files(tmp_path):
    write(tmp_path, "a.csv", "x")
    assert "it holds 'a.csv'; name one" in refusal(tmp_path)


def test_many_problems_fit_one_line(tmp_path):
    path = write(tmp_path, "MyDataset.csv", "instruction,output\nQ,A\n" + "Q,\n" * 14)
    message = refusal(path)
    assert message.startswith("MyDataset.csv row 2: column 'output' is empty (line 3); MyDataset.csv row 3: ")
    assert "row 4:" in message and "row 5" not in message
    assert "; and 11 more; columns: 'instruction', 'output'; --on_error skip" in message


def test_what_one_line_cannot_hold_is_listed_before_it(tmp_path):
    path = write(tmp_path, "d.csv", "instruction,output\nQ,A\n" + "Q,\n" * 14)
    with pytest.raises(InputError) as caught:
        read_samples(path)
    *lines, more = caught.value.details
    assert lines == [f"d.csv row {n}: column 'output' is empty (line {n + 1})" for n in range(2, 12)]
    assert more == "… and 4 more"
    write(tmp_path, "d.csv", "instruction,output\nQ,A\n" + "Q,\n" * 3)
    with pytest.raises(InputError) as caught:
        read_samples(path)
    assert list(caught.value.details) == []


def test_malformed_rows_before_a_broken_one_are_named_too(tmp_path):
    path = write(tmp_path, "d.csv", 'instruction,output\nQ,\nQ,A\n,A\nQ,"A\n')
    message = refusal(path)
    assert message.startswith("d.csv row 4 (line 5): broken quotes: ")
    assert "malformed before that: d.csv row 1: column 'output' is empty (line 2); d.csv row 3: " in message
    assert refusal(path, on_error="skip") == message


def test_a_stream_gives_each_row_as_it_is_read(tmp_path):
    """Broken quotes in row 2,501 end the stream there, not before."""
    rows = "".join(f"Q{i},{'A' if i % 2 else ''}\n" for i in range(2500))
    stream = SampleStream(write(tmp_path, "d.csv", f'instruction,output\n{rows}Q,"A\n'))
    items = []
    with pytest.raises(InputError, match="row 2501"):
        items.extend(stream)
    assert [isinstance(item, Sample) for item in items] == [i % 2 == 1 for i in range(2500)]
    assert [item.row for item in items[1::2]] == list(range(2, 2501, 2))
    assert str(stream) == "Alpaca's columns: instruction from 'instruction', output from 'output'"


def test_skip_leaves_malformed_rows_out(tmp_path):
    path = write(tmp_path, "d.jsonl", f"{{broken\n{PAIR}\n5\n{PAIR}")
    samples, problems, columns = read_samples(path, on_error="skip")
    assert [sample.place for sample in samples] == ["d.jsonl row 2", "d.jsonl row 4"]
    assert [problem.place for problem in problems] == ["d.jsonl row 1", "d.jsonl row 3"]
    assert str(problems[1]) == "d.jsonl row 3: is a number (5), not an object with columns (line 3)"
    assert columns == "Alpaca's columns: instruction from 'instruction', output from 'output'"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", "instruction,output\nQ,\n"),  # no sample is left
        ("d.csv", "a,b\nQ,A\n"),
        ("d.csv", 'instruction,output\nQ,A\nQ,"A\n'),
        ("d.json", "["),
        ("d.parquet", "no"),
    ],
)
def test_skip_does_not_skip_a_whole_source(tmp_path, name, content):
    refusal(write(tmp_path, name, content), on_error="skip")


def test_first_exchange_only(tmp_path):
    system = {"role": "system", "content": "S"}
    path = write(
        tmp_path, "d.jsonl", dialogue(system, ASKED, ANSWERED, ASKED, ANSWERED) + "\n" + dialogue("Q", "A", "Q", "A")
    )
    samples = read_samples(path, multiturn=False).samples
    assert [sample.messages for sample in samples] == [
        (Message("system", "S"), user("Q"), assistant("A")),
        (user("Q"), assistant("A")),
    ]


@pytest.mark.parametrize(
    ("columns", "messages"),
    [
        (Columns(output="B"), [user("Q", "C"), assistant("two")]),
        (Columns(instruction="B", output="A", input="instruction"), [user("two", "Q"), assistant("one")]),
        (Columns(messages="talk"), [user("T"), assistant("R")]),
    ],
)
def test_named_columns_win(tmp_path, columns, messages):
    row = {"instruction": "Q", "input": "C", "A": "one", "B": "two", "talk": ["T", "R"]}
    samples, _, told = read_samples(write(tmp_path, "d.json", json.dumps([row])), columns)
    assert list(samples[0].messages) == messages
    assert all(f"{part} from {column!r}" in told for part, column in columns.given().items())
    assert "not read: " in told


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        (Columns(output="antwort"), "d.csv: --output_column 'antwort' is not there; columns: 'instruction', 'output'"),
        (Columns(instruction="output", output="output"), "a column of its own"),
        (Columns(messages="output", output="instruction"), "--messages_column or --text_column alone"),
    ],
)
def test_named_columns_that_cannot_be(tmp_path, columns, fragment):
    assert fragment in refusal(write(tmp_path, "d.csv", "instruction,output\nQ,A\n"), columns=columns)


def test_csv_as_python_writes_it(tmp_path):
    path = tmp_path / "d.csv"
    rows = [(a, b, c) for a in NASTY for b in ("", *NASTY) for c in NASTY]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("instruction", "input", "output"), *rows])
    samples = read_samples(path).samples
    assert [(s.messages[0].content, s.messages[0].input, s.messages[1].content) for s in samples] == rows


def test_columns_may_be_absent_from_the_first_object(tmp_path):
    path = write(tmp_path, "d.jsonl", PAIR + '\n{"instruction": "Q", "input": "C", "output": "A"}')
    assert read_samples(path).samples[1].messages[0] == user("Q", "C")


def test_a_column_that_appears_late_is_read(tmp_path):
    path = write(tmp_path, "d.jsonl", f"{PAIR}\n" * 1500 + '{"instruction": "Q", "input": "C", "output": "A"}')
    samples, _, told = read_samples(path)
    assert samples[-1].messages[0] == user("Q", "C")
    assert "input from 'input'" in told


@pytest.mark.parametrize(
    ("late", "fragment"),
    [
        (
            '{"instruction": "Q", "response": "A"}',
            "d.jsonl row 1501: which of 'output', 'response' to read is ambiguous",
        ),
        ('{"messages": ["Q", "A"]}', "to read is ambiguous"),
    ],
)
def test_a_late_column_that_changes_the_format(tmp_path, late, fragment):
    assert fragment in refusal(write(tmp_path, "d.jsonl", f"{PAIR}\n" * 1500 + late))


def test_a_late_column_that_changes_what_was_read(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"input": "Q", "output": "A"}\n' * 1500 + PAIR)
    assert "d.jsonl row 1501 would be read as instruction from 'instruction'" in refusal(path)


def test_long_cells(tmp_path):
    text = "x" * 200_000
    path = write(tmp_path, "d.csv", f"instruction,output\nQ,{text}\n")
    assert read_samples(path).samples[0].messages[1].content == text


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda text: text.strip())
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(rows=st.lists(st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}), min_size=1, max_size=5))
def test_any_text_survives_any_format(tmp_path, rows):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    paths = [
        write(tmp_path, "d.jsonl", lines),
        write(tmp_path, "d.json", json.dumps(rows)),
        write(tmp_path, "d.parquet", rows),
    ]
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(rows)
    for path in (*paths, tmp_path / "d.csv"):
        turns = [sample.messages for sample in read_samples(path).samples]
        assert turns == [(user(row["instruction"]), assistant(row["output"])) for row in rows]


PIECES = [
    "instruction",
    "output",
    "messages",
    ",",
    '"',
    "\n",
    "\r",
    "{",
    "}",
    "[",
    "]",
    ":",
    "NaN",
    "\0",
    "1",
    "\\ud800",
    PAIR,
]
SOUP = st.one_of(
    st.binary(), st.lists(st.sampled_from([*PIECES, "role", "user"]).map(str.encode), max_size=30).map(b"".join)
)


@QUICK
@given(
    soup=SOUP,
    extension=st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet"]),
    skip=st.booleans(),
    begun=st.booleans(),
)
def test_any_bytes_are_read_or_refused(tmp_path, soup, extension, skip, begun):
    start = {"csv": b"instruction,output\n", "jsonl": PAIR.encode() + b"\n"}.get(extension, b"") if begun else b""
    try:
        read_samples(write(tmp_path, f"d.{extension}", start + soup), on_error="skip" if skip else "fail")
    except InputError as error:
        assert "\n" not in str(error)
        assert re.search(r"\bd\.", str(error))


def parquet(*rows: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


LIMA = b'{"conversations": ["Q1", "A1"], "source": "s"}\n{"conversations": ["Q2", "A2", "Q3"], "source": "s"}\n'
SCRIPT = b"import pathlib\npathlib.Path('ran').touch()\n"
CONVERTED = {f"{name}/train/0000.parquet": parquet({"prompt": f"Q {name}", "completion": "A"}) for name in ("de", "en")}

READER = """
import json, sys
from lit_sft.errors import InputError
from lit_sft.sources import HubDataset, read_samples
for arguments in json.loads(sys.argv[1]):
    try:
        samples, _, columns = read_samples(HubDataset(**arguments))
        print(json.dumps([[[s.place, *(m.content for m in s.messages)] for s in samples], columns]))
    except InputError as error:
        print(json.dumps(str(error)))
"""

HUB = {
    "plain": ({"repo_id": "me/plain"}, [["plain train row 1", "Q1", "A1"], ["plain train row 2", "Q2", "A2"]]),
    "split": ({"repo_id": "me/plain", "split": "test"}, [["plain test row 1", "T", "A"]]),
    "unknown-split": ({"repo_id": "me/plain", "split": "dev"}, "me/plain dev cannot be read: Unknown split"),
    "unknown-config": ({"repo_id": "me/plain", "config": "xx"}, "'xx' not found. Available: ['default']"),
    "keys-that-differ": ({"repo_id": "me/mixed"}, [["mixed train row 1", "Q", "A"], ["mixed train row 2", "Q", "A"]]),
    "gated": (
        {"repo_id": "GAIR/lima"},
        "accept its licence at https://huggingface.co/datasets/GAIR/lima, then give --access",
    ),
    "no-access": ({"repo_id": "GAIR/lima", "token": "hf_other"}, "GAIR/lima is gated"),
    "wrong-token": ({"repo_id": "me/broken", "token": "typo"}, "me/broken: the Hub refuses the token"),
    "script": (
        {"repo_id": "GAIR/lima", "token": "hf_mine"},
        [["lima train row 1", "Q1", "A1"], ["lima train row 2", "Q2", "A2"]],
    ),
    "script-config": ({"repo_id": "me/made", "config": "de"}, [["made train row 1", "Q de", "A"]]),
    "script-no-config": ({"repo_id": "me/made"}, "choose with --data_config"),
    "script-no-split": ({"repo_id": "me/made", "split": "test"}, "a loading script, which is never run, and no file"),
    "unknown-columns": ({"repo_id": "me/odd"}, "odd train: the columns are of no known format; columns: 'a', 'b'"),
    "broken": ({"repo_id": "me/broken"}, "me/broken train cannot be read: "),
    "absent": ({"repo_id": "me/absent"}, "https://huggingface.co/datasets/me/absent does not exist, or is private"),
    "down": ({"repo_id": "me/down"}, "me/down: the Hub cannot be reached (Server error '500"),
    "no-name": ({"repo_id": "json"}, "--data_repo_id 'json' is not of the form ORG/NAME"),
}


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory):
    """What a process that uses a local Hub reads from each dataset of HUB."""
    plain = b'{"prompt": "Q1", "output": "A1"}\n{"prompt": "Q2", "output": "A2"}\n'
    datasets = {
        "me/plain": hub_server.Repo({"train.jsonl": plain, "test.jsonl": b'{"prompt": "T", "output": "A"}\n'}),
        "me/mixed": hub_server.Repo(
            {"train.jsonl": f"{dialogue(ASKED, ANSWERED | {'weight': 1})}\n{dialogue(ASKED, ANSWERED)}\n".encode()}
        ),
        "GAIR/lima": hub_server.Repo({"lima.py": SCRIPT, "train.jsonl": LIMA, "test.jsonl": LIMA}, token="hf_mine"),
        "me/made": hub_server.Repo({"made.py": SCRIPT, "raw.tar": b"x"}, branches={"refs/convert/parquet": CONVERTED}),
        "me/odd": hub_server.Repo({"train.jsonl": b'{"a": "Q", "b": "A"}\n'}),
        "me/broken": hub_server.Repo({"train.jsonl": b'{"prompt": "Q", "output": "A"}\n{broken\n'}),
        "me/down": hub_server.Repo({"train.jsonl": plain}, faults={"api": hub_server.Fault("500")}),
    }
    home = tmp_path_factory.mktemp("home")
    with hub_server.HubServer({}, datasets) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        arguments = json.dumps([arguments for arguments, _ in HUB.values()])
        command = [sys.executable, "-c", READER, arguments]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (home / "ran").exists()
    return dict(zip(HUB, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", HUB)
def test_hub(hub_answers, case):
    answer, expected = hub_answers[case], HUB[case][1]
    assert (expected in answer and "\n" not in answer) if isinstance(expected, str) else answer[0] == expected, answer


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_marks_of_spreadsheets(tmp_path, mark):
    """A CSV of a European spreadsheet: semicolons or tabs, a byte order mark, quotes around what holds the mark."""
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([["instruction", "output"], [f"a{mark} b; c, d", 'say "é"\ntwice']])
    (sample,), *_ = read_samples(path)
    assert [m.content for m in sample.messages] == [f"a{mark} b; c, d", 'say "é"\ntwice']
