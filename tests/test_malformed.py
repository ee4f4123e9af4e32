"""Malformed data, as users have them: one line each that says what, where and what to do; exit 2; nothing is left."""

import csv
import gzip
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_hf_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_sft import cli
from lit_sft.args import ConvertArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.readers import file_rows
from lit_sft.rows import Malformed
from lit_sft.sources import SampleStream

HEAD = "instruction,input,output\n"
GOOD = HEAD + "Ask,,Answer\n"
PAIR = '{"instruction": "Ask", "output": "Answer"}'
COLUMNS = "columns: 'instruction', 'input', 'output'"


def talk(*turns: object) -> str:
    return json.dumps({"messages": turns})


def said(role: str, content: object = "text") -> dict:
    return {"role": role, "content": content}


def parquet(**columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def arrow(**columns: list) -> bytes:
    sink = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("data.csv", GOOD)
    return sink.getvalue()


PAIRS = {"prompt": ["Ask"] * 2000, "output": ["An answer of some length"] * 2000}
UTF_8 = "save it as UTF-8"
SKIP = "--on_error skip leaves such rows out"

MALFORMED: dict[str, tuple[str, str | bytes | None, str]] = {
    # the file as a whole
    "absent": (
        "d.csv",
        None,
        "d.csv does not exist; name a file (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow)",
    ),
    "empty": ("d.csv", "", "d.csv is empty"),
    "unknown kind": ("d.txt", GOOD, "d.txt is of an unknown kind; known: .json, .jsonl"),
    "spreadsheet": ("d.xlsx", zipped(), "d.xlsx is a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    "zip called CSV": ("d.csv", zipped(), "d.csv is a zip archive or a spreadsheet; unpack it"),
    "gzip called JSON lines": ("d.jsonl", gzip.compress(PAIR.encode()), "d.jsonl is compressed (gzip); unpack it"),
    "gzip": ("d.jsonl.gz", gzip.compress(PAIR.encode()), "d.jsonl.gz is compressed (gzip); unpack it"),
    "zstd": ("d.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "is compressed (zstd); unpack it"),
    "bzip2": ("d.json", b"BZh91AY&SY" + bytes(9), "is compressed (bzip2); unpack it"),
    "Parquet called CSV": ("d.csv", parquet(**PAIRS), "d.csv is not UTF-8 in its header; save it as UTF-8"),
    "CSV called Parquet": ("d.parquet", GOOD, "d.parquet cannot be read as Parquet: Parquet magic bytes not found"),
    # CSV
    "header only": ("d.csv", HEAD, "d.csv holds no rows; name a file or split that does"),
    "blank lines only": ("d.csv", "\n\r\n\n", "d.csv holds no rows"),
    "no header": (
        "d.csv",
        "Ask,,Answer\nAsk,,Answer\n",
        "the columns are of no known format; columns: 'Ask', '', 'Answer'",
    ),
    "no known header": (
        "d.csv",
        "Ask me,it,Answer\nAsk,,A\n",
        "the columns are of no known format; columns: 'Ask me', 'it'",
    ),
    "no answers": (
        "d.csv",
        "instruction,input\nQ,C\n",
        "no known format; columns: 'instruction', 'input'; name yours with",
    ),
    "two answers": ("d.csv", "prompt,output,response\nQ,A,B\n", "which of 'output', 'response' to read is ambiguous"),
    "duplicate header": ("d.csv", "instruction,output,output\nQ,A,B\n", "more than one column 'output'; columns: "),
    "header in two cases": (
        "d.csv",
        "instruction,output,Output\nQ,A,B\n",
        "which of 'output', 'Output' to read is ambig",
    ),
    "empty answer": ("d.csv", GOOD + "Ask,,\n", f"d.csv row 2: column 'output' is empty (line 3); {COLUMNS}; {SKIP}"),
    "blank answer": ("d.csv", GOOD + 'Ask,,"  \n "\n', "d.csv row 2: column 'output' is empty (line 3)"),
    "empty question": ("d.csv", GOOD + ",,Answer\n", "d.csv row 2: column 'instruction' is empty (line 3)"),
    "a cell too few": ("d.csv", GOOD + "Ask,Answer\n", "d.csv row 2: has 2 cells, the header has 3 (line 3)"),
    "a cell too many": ("d.csv", GOOD + "Ask,,Well, no\n", "d.csv row 2: has 4 cells, the header has 3 (line 3)"),
    "after a cell of many lines": (
        "d.csv",
        HEAD + '"A\nB\nC",,D\nAsk\n',
        "d.csv row 2: has 1 cells, the header has 3 (line 5)",
    ),
    "CRLF": ("d.csv", (GOOD + "Ask,,\n").replace("\n", "\r\n"), "d.csv row 2: column 'output' is empty (line 3)"),
    "open quote": (
        "d.csv",
        GOOD + 'Ask,,"Answer\nAsk,,Answer\n',
        "d.csv row 2 (line 3): broken quotes: unexpected end",
    ),
    "stray quote": (
        "d.csv",
        HEAD + '"Ask" me,,Answer\n',
        "d.csv row 1 (line 2): broken quotes: ',' expected after '\"'",
    ),
    "NUL": ("d.csv", GOOD + "Ask,,An\0swer\n", "d.csv row 2: column 'output' has a NUL byte at character 3 (line 3)"),
    "Latin-1": (
        "d.csv",
        (GOOD + "Ask,,café\n").encode("latin-1"),
        "row 2: column 'output' is not UTF-8 at character 4 (line 3)",
    ),
    "Latin-1 header": (
        "d.csv",
        "question,réponse\nQ,A\n".encode("latin-1"),
        f"d.csv is not UTF-8 in its header; {UTF_8}",
    ),
    "Windows quotes": ("d.csv", (GOOD + "Ask,,“Hm”\n").encode("cp1252"), "column 'output' is not UTF-8 at character 1"),
    "UTF-16": ("d.csv", GOOD.encode("utf-16"), f"d.csv is UTF-16, not UTF-8; {UTF_8}"),
    "UTF-16, no mark": ("d.csv", GOOD.encode("utf-16-be"), f"d.csv is not UTF-8 in its header; {UTF_8}"),
    "commas in a TSV": ("d.tsv", GOOD, "the columns are of no known format; columns: 'instruction,input,output'"),
    "Python's dialogue": (
        "d.csv",
        "messages\n\"[{'role': 'user'}]\"\n",
        "row 1: column 'messages' is text but not JSON",
    ),
    # JSON
    "broken on line 3": (
        "d.json",
        f'[\n{PAIR},\n{{"instruction": "Q",,}}]',
        "d.json is not JSON: Expecting property name enclosed in double quotes at line 3 column 21",
    ),
    "comma at the end": ("d.json", f"[{PAIR},\n]", "d.json is not JSON: "),
    "cut": ("d.json", f"[{PAIR},\n{PAIR[:20]}", "d.json is not JSON: Unterminated string starting at line 2 column 17"),
    "text behind": ("d.json", f"[{PAIR}]]", "d.json is not JSON: Extra data at line 1"),
    "a web page": ("d.json", "<!DOCTYPE html>\n<html>", "d.json is not JSON: Expecting value at line 1 column 1"),
    "UTF-16 JSON": ("d.json", f"[{PAIR}]".encode("utf-16"), f"d.json is UTF-16, not UTF-8; {UTF_8}"),
    "Latin-1 JSON": ("d.json", '[{"prompt": "café"}]'.encode("latin-1"), "d.json is not UTF-8 at byte 17"),
    "a number": ("d.json", "3", "d.json holds a number (3); give one list of objects"),
    "columns of lists": (
        "d.json",
        '{"prompt": ["Q"], "output": ["A"]}',
        "d.json holds the lists 'prompt', 'output'; give one",
    ),
    "an empty list": ("d.json", "[]", "d.json holds no rows"),
    "a list of texts": (
        "d.json",
        '["Q", "A"]',
        "d.json row 1: is text, not an object with columns; d.json row 2: is text",
    ),
    "too deep": ("d.json", "[" * 100_000, "d.json is not JSON that can be read"),
    "null": ("d.json", '[{"instruction": "Q", "output": null}]', "row 1: column 'output' is missing; columns: "),
    "NaN": ("d.json", '[{"instruction": "Q", "output": NaN}]', "row 1: column 'output' is missing"),
    "a number as text": (
        "d.json",
        '[{"instruction": "Q", "output": 5}]',
        "row 1: column 'output' is a number (5), not text; store it as text",
    ),
    "a boolean": (
        "d.json",
        '[{"instruction": "Q", "input": true, "output": "A"}]',
        "column 'input' is a boolean (True), not text",
    ),
    "a list": ("d.json", '[{"instruction": "Q", "output": ["A"]}]', "row 1: column 'output' is a list, not text"),
    "half a surrogate pair": (
        "d.json",
        '[{"prompt": "Q", "output": "\\ud800"}]',
        "column 'output' is not UTF-8 at character 1",
    ),
    # JSON lines
    "a broken line": (
        "d.jsonl",
        f"{PAIR}\n\n{{'Q'}}\n",
        "d.jsonl row 2: is not JSON: Expecting property name enclosed in double quotes at line 3 column 2",
    ),
    "a cut line": (
        "d.jsonl",
        f"{PAIR}\n{PAIR[:30]}",
        "d.jsonl row 2: is not JSON: Unterminated string starting at line 2 column 24",
    ),
    "a Latin-1 line": (
        "d.jsonl",
        f'{PAIR}\n{{"a": "é"}}'.encode("latin-1"),
        "row 2: is not UTF-8 at byte 8, counted from line 2",
    ),
    "a line that is no object": ("d.jsonl", f"{PAIR}\nnull\n", "d.jsonl row 2: holds no columns (line 2)"),
    "a key less": ("d.jsonl", f'{PAIR}\n{{"instruction": "Q"}}', "d.jsonl row 2: column 'output' is missing (line 2)"),
    "another column for it": (
        "d.jsonl",
        f'{PAIR}\n{{"instruction": "Q", "response": "A"}}',
        "which of 'output', 'response'",
    ),
    "a deep cell": (
        "d.jsonl",
        f'{PAIR}\n{{"instruction": "Q", "output": {"[" * 900}{"]" * 900}}}',
        "d.jsonl row 2: column 'output' is a list, not text",
    ),
    # dialogues
    "unknown role": (
        "d.jsonl",
        talk(said("tool")),
        "column 'messages' turn 1 has the unknown role 'tool'; known: 'system'",
    ),
    "role that is none": ("d.jsonl", talk(said(None)), "turn 1 has the unknown role missing"),
    "turn without a role": (
        "d.jsonl",
        talk({"content": "x"}),
        "turn 1 is an object, not text, {role, content} or {from",
    ),
    "answer first": (
        "d.jsonl",
        talk(said("assistant"), said("user")),
        "turn 1 is the assistant's; a dialogue is [system,] user",
    ),
    "user twice": (
        "d.jsonl",
        talk(said("user"), said("user")),
        "turn 2 is the user's; a dialogue is [system,] user, assistant",
    ),
    "late system": ("d.jsonl", talk(said("user"), said("system")), "turn 2 is the system's"),
    "no answer": ("d.jsonl", talk(said("user")), "row 1: column 'messages' has no assistant turn"),
    "no turns": ("d.jsonl", talk(), "row 1: column 'messages' has no assistant turn"),
    "silent answer": ("d.jsonl", talk(said("user"), said("assistant", "")), "turn 2 (assistant) is empty"),
    "null answer": ("d.jsonl", talk(said("user"), said("assistant", None)), "turn 2 (assistant) is missing"),
    "answer in parts": (
        "d.jsonl",
        talk(said("user"), said("assistant", [{"type": "text"}])),
        "turn 2 (assistant) is a list",
    ),
    "an object of turns": (
        "d.jsonl",
        '{"messages": {"role": "user"}}',
        "column 'messages' is an object, not a list of turns",
    ),
    "no dialogue": (
        "d.jsonl",
        f'{talk("Q", "A")}\n{{"messages": null}}',
        "row 2: column 'messages' is missing (line 2)",
    ),
    # text
    "empty text": ("d.jsonl", '{"text": "a"}\n{"text": ""}', "d.jsonl row 2: column 'text' is empty (line 2)"),
    "null text": ("d.jsonl", '{"text": "a"}\n{"text": null}', "d.jsonl row 2: column 'text' is missing (line 2)"),
    # tables
    "truncated Parquet": ("d.parquet", parquet(**PAIRS)[:-200], "d.parquet cannot be read as Parquet: "),
    "Parquet of numbers": (
        "d.parquet",
        parquet(prompt=["Q"], output=[1.5]),
        "row 1: column 'output' is a number (1.5), not text",
    ),
    "Parquet of bytes": (
        "d.parquet",
        parquet(prompt=[b"Q"], output=["A"]),
        "row 1: column 'prompt' is bytes, not text",
    ),
    "Parquet without columns": ("d.parquet", parquet(), "d.parquet holds no rows"),
    "Parquet of a far day": (
        "d.parquet",
        parquet(prompt=["Q"], output=["A"], day=pa.array([2**31 - 1], pa.int32()).cast(pa.date32())),
        "d.parquet cannot be read as Parquet: days=2147483647",
    ),
    "Arrow of a long time": (
        "d.arrow",
        arrow(prompt=["Q"], output=["A"], time=pa.array([2**62], pa.duration("s"))),
        "d.arrow cannot be read as Arrow: ",
    ),
    "Arrow of deep JSON": (
        "d.arrow",
        arrow(messages=pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(["[" * 9000 + "]" * 9000]))),
        "d.arrow row 1: holds JSON that cannot be read: ",
    ),
    "truncated Arrow": ("d.arrow", arrow(**PAIRS)[:5000], "d.arrow cannot be read as Arrow: "),
    "broken Arrow": ("d.arrow", b"ARROW1\0\0 but not", "d.arrow cannot be read as Arrow: "),
    "Arrow of numbers": (
        "d.arrow",
        arrow(prompt=["Q"], output=[2]),
        "row 1: column 'output' is a number (2), not text",
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer_model) -> Path:
    root = tmp_path_factory.mktemp("malformed") / "checkpoints"
    make_hf_llama(root / "test" / "tiny", tokenizer_model)
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(root / "test" / "tiny")))
    return root


@pytest.fixture
def refusal(checkpoints, tmp_path, monkeypatch, capsys) -> Callable[..., list[str]]:
    """``refusal(name, *flags)``: the lines that a refused command wrote; the last is the error. It leaves nothing."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(checkpoints)

    def run(name: str, *flags: str) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(import_module(cli.commands()[name]).main, list(flags), prog=name)
        err = capsys.readouterr().err
        assert end.value.code == 2, err
        assert sorted(tmp_path.rglob("*")) == before
        *details, last = err.splitlines()
        assert err.endswith("\n") and last.startswith("error: ") and "Traceback" not in err
        assert not [line for line in details if line.startswith("error: ")]
        return [*details, last]

    return run


def test_the_table_is_long_enough():
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize("skip", [False, True], ids=["fail", "skip"])
@pytest.mark.parametrize(("name", "content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(refusal, name, content, message, skip):
    """What a whole file has is refused with --on_error skip too, and so is a file of which no row is usable."""
    if content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    if skip and SKIP in " ".join(refusal("prepare_dataset", "--data_file", name)):
        return  # tests/test_prepare.py shows that the others are then used
    [line] = refusal("prepare_dataset", "--data_file", name, *(["--on_error", "skip"] if skip else []))
    assert message in line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "d.csv is a directory, not a file; it holds none; name one"),
        (lambda p: p.mkdir() or (p / "train.csv").write_text(GOOD), "it holds 'train.csv'; name one"),
        (lambda p: os.mkfifo(p), "d.csv is no regular file; save what it gives in one, and name that"),
        (lambda p: p.symlink_to("/dev/zero"), "d.csv is no regular file"),
        (lambda p: p.symlink_to("gone.csv"), "d.csv does not exist"),
        (lambda p: p.symlink_to(p.name), "d.csv does not exist"),
        (lambda p: p.mkdir() or (p / "state.json").write_text("{"), "d.csv/state.json is not valid JSON"),
        (lambda p: p.mkdir() or (p / "state.json").write_text("[" * 99_999), "d.csv/state.json is not valid JSON"),
        (lambda p: p.mkdir() or (p / "state.json").write_text('{"_data_files": [{}]}'), "d.csv/state.json is damaged"),
        (
            lambda p: p.mkdir() or (p / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}'),
            "d.csv/state.json names 'a.arrow', not all of them files in d.csv",
        ),
        (  # itself, for ever
            lambda p: p.mkdir() or (p / "state.json").write_text('{"_data_files": [{"filename": "."}]}'),
            "d.csv/state.json names '.', not all of them files in d.csv",
        ),
        (
            lambda p: (
                p.mkdir()
                or (
                    Path("secret.jsonl").write_text(PAIR)
                    and (p / "state.json").write_text('{"_data_files": [{"filename": "../secret.jsonl"}]}')
                )
            ),
            "d.csv/state.json names '../secret.jsonl', not all of them files in d.csv",
        ),
        (
            lambda p: datasets.DatasetDict({"x": datasets.Dataset.from_dict({"a": ["b"]})}).save_to_disk(p),
            "d.csv/train",
        ),
    ],
)
def test_what_is_no_file(refusal, make, message):
    make(Path("d.csv"))
    [line] = refusal("prepare_csv", "--csv_path", "d.csv")
    assert message in line


def test_many_columns_take_no_longer_than_few(tmp_path):
    """Those of a CSV file, and those that come one with each row, of names that could mean something too."""
    (tmp_path / "d.csv").write_text("instruction,output," + ",".join(map(str, range(60_000))) + "\n")
    rows = ({"instruction": "a", "output": "b", f"k{i}": 1, " " * i + "text": 1} for i in range(12_000))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = time.process_time()
    assert not list(file_rows(tmp_path / "d.csv"))
    assert sum(1 for _ in SampleStream(tmp_path / "d.jsonl")) == 12_000
    assert time.process_time() - start < 8  # more than a minute when each was compared with all


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_column", "answer"], f"d.csv: --output_column 'answer' is not there; {COLUMNS}"),
        (["--instruction_column", "output"], "d.csv: "),
        (["--text_column", "output", "--output_column", "input"], "--text_column alone"),
        (["--messages_column", "output"], "d.csv row 1: column 'output' is text but not JSON"),
        (["--val_file", "absent.csv"], "absent.csv does not exist"),
        (["--val_file", "bad.csv"], "bad.csv row 1: column 'output' is empty (line 2)"),
        (["--prompt_style", "absent.jinja"], "--prompt_style absent.jinja cannot be read"),
        (["--prompt_style", "gemma"], "ends a response with '<end_of_turn>', which is no control token"),
    ],
)
def test_what_flags_make_of_it(refusal, flags, message):
    Path("d.csv").write_text(GOOD)
    Path("bad.csv").write_text(HEAD + "Ask,,\n")
    [line] = refusal("prepare_csv", "--csv_path", "d.csv", *flags)
    assert message in line


def test_ten_problems_in_full_and_the_rest_counted(refusal):
    Path("d.csv").write_text(GOOD + "Ask,,\n" * 30 + "Ask\n")
    *lines, more, last = refusal("prepare_csv", "--csv_path", "d.csv")
    assert lines == [f"d.csv row {n}: column 'output' is empty (line {n + 1})" for n in range(2, 12)]
    assert more == "… and 21 more"
    assert last.startswith("error: d.csv row 2: column 'output' is empty (line 3); d.csv row 3: ")
    assert last.endswith(f"; and 28 more; {COLUMNS}; {SKIP}")


def test_messages_that_make_no_tree(refusal):
    rows = [{"message_id": "a", "parent_id": None, "role": "prompter", "text": "Q"}]
    rows += [{"message_id": "b", "parent_id": "a", "role": "assistant", "text": ""}]
    rows += [{"message_id": "c", "parent_id": "?", "role": "assistant", "text": "A"}]
    Path("d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [line] = refusal("prepare_oasst", "--data_file", "d.jsonl")
    assert (
        "d.jsonl row 1: column 'messages' turn 2 (assistant) is empty (line 1); d.jsonl row 3: column 'parent_id'"
        in line
    )


# --- what is well-formed is read as it was written, whatever it is; what is not never ends in a traceback

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(
    header=st.lists(CELL.filter(str.strip), min_size=1, max_size=4, unique=True),
    rows=st.lists(st.lists(CELL, min_size=4, max_size=4), min_size=1, max_size=5),
    mark=st.sampled_from([",", ";", "\t"]),
    # with "\n" alone, the writer leaves a lone "\r" without quotes, which no reader can know from the end of a line
    dialect=st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    bom=st.booleans(),
)
def test_csv_is_what_python_wrote(tmp_path, header, rows, mark, dialect, bom):
    # the mark is the most frequent in the header's text outside quotes, which is what a reader can know
    header = [name.translate(dict.fromkeys(map(ord, ',;\t"'))).strip() or f"c{i}" for i, name in enumerate(header)]
    header = [f"{i}{''.join(name.split())}" for i, name in enumerate([*header, "last"])]
    rows = [row[: len(header)] + [""] * (len(header) - len(row)) for row in rows]
    path = tmp_path / ("d.tsv" if mark == "\t" else "d.csv")
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        end, quoting = dialect
        csv.writer(file, delimiter=mark, lineterminator=end, quoting=quoting).writerows([header, *rows])
    found = list(file_rows(path))
    assert [row.cells for row in found] == [dict(zip(header, row, strict=True)) for row in rows]
    assert [row.number for row in found] == list(range(1, len(rows) + 1))


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | CELL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELL, inner, max_size=3),
    max_leaves=10,
)


@QUICK
@given(
    rows=st.lists(st.dictionaries(CELL, VALUE, max_size=4), min_size=1, max_size=5),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    bom=st.booleans(),
)
def test_json_is_what_python_wrote(tmp_path, rows, ascii_only, indent, bom):
    encoding = "utf-8-sig" if bom else "utf-8"
    listed, lines = tmp_path / "d.json", tmp_path / "d.jsonl"
    listed.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding=encoding)
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    with lines.open("w", encoding=encoding, newline="") as file:
        file.write(text)
    for path in (listed, lines):
        assert [row.cells for row in file_rows(path)] == rows


@QUICK
@given(
    data=st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet", "arrow"]).flatmap(
        lambda kind: st.tuples(st.just(kind), st.binary() | damaged(kind))
    )
)
def test_any_bytes_are_rows_or_a_refusal(tmp_path, data):
    kind, content = data
    path = tmp_path / f"d.{kind}"
    path.write_bytes(content)
    try:
        rows = list(file_rows(path))
    except InputError as error:
        assert "d." in str(error) and "\n" not in str(error)
    else:
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        assert all(
            isinstance(row.cells, Malformed) or kind.startswith("json") or isinstance(row.cells, dict) for row in rows
        )


WHOLE = {
    "csv": (GOOD * 2).encode(),
    "tsv": GOOD.replace(",", "\t").encode(),
    "json": f"[{PAIR}, {PAIR}]".encode(),
    "jsonl": f"{PAIR}\n{PAIR}\n".encode(),
    "parquet": parquet(prompt=["Ask"] * 5, output=["Answer"] * 5),
    "arrow": arrow(prompt=["Ask"] * 5, output=["Answer"] * 5),
}


def damaged(kind: str) -> st.SearchStrategy[bytes]:
    """A good file, cut or with bytes changed."""
    whole = WHOLE[kind]

    def change(at: int, new: bytes, cut: int) -> bytes:
        return (whole[:at] + new + whole[at + len(new) :])[:cut]

    place = st.integers(0, len(whole))
    return st.builds(change, place, st.binary(max_size=4), st.just(len(whole)) | place)
