"""From a file to its rows: CSV, TSV, JSON, JSON lines, Parquet and Arrow."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.rows import ALIASES, Malformed, Row, kind_of, listed


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, read as its extension says, one after the other; of a folder that ``save_to_disk`` wrote too.

    InputError: it is absent, empty or broken as a whole. A row broken by itself has a Malformed as its cells.
    """
    known = ", ".join(READERS)
    if path.is_dir():
        return _saved_rows(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; name a file ({known})")
    if not path.is_file():
        raise InputError(f"{path} is no regular file; save what it gives in one, and name that ({known})")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    with path.open("rb") as file:
        start = file.read(8)
    if packed := next((name for magic, name in PACKED.items() if start.startswith(magic)), None):
        raise InputError(f"{path} is {packed}; unpack it, or save it as CSV, and name what comes out ({known})")
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path} is of an unknown kind; known: {known}")
    if path.suffix.lower() not in BINARY and start.startswith(UTF_16):
        raise InputError(f"{path} is UTF-16, not UTF-8; save it as UTF-8")
    return READERS[path.suffix.lower()](path)


def _saved_rows(path: Path) -> Iterator[Row]:
    """The rows of a dataset saved to disk by ``datasets``, whose files its state.json names."""
    if (splits := path / "dataset_dict.json").is_file():
        names = [entry.name for entry in sorted(path.iterdir()) if entry.is_dir()]
        raise InputError(
            f"{path} holds the splits {listed(names)} ({splits.name}); name one: {path}/{names[0]}"
            if names
            else f"{path} holds no split that its {splits.name} promises"
        )
    if not (path / "state.json").is_file():
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        raise InputError(f"{path} is a directory, not a file; it holds {listed(names)}; name one")
    try:
        names = [entry["filename"] for entry in read_json(path / "state.json")["_data_files"]]
        files = [path / name for name in names if isinstance(name, str) and "/" not in name]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'state.json'} is damaged ({error!r:.80}); save the dataset again") from None
    # no other folder's files are read, and not for ever those of a folder that names itself
    if len(files) < len(names) or not all(file.is_file() for file in files):
        raise InputError(f"{path / 'state.json'} names {listed(names)}, not all of them files in {path}; save it again")
    return numbered(row.cells for file in files for row in file_rows(file))


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 become lone surrogates, which the check of their cell finds: so the message names it.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # European spreadsheets write ";" (or tabs) into what they call CSV: the header's most frequent mark it is
        first = re.sub(r'"[^"]*"', "", file.readline())
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, number, line = None, 0, 1
        try:
            for cells in reader:
                if header is None and cells:
                    header = _checked_header(path, cells)
                elif cells:
                    number += 1
                    whole = len(cells) == len(header)
                    ragged = Malformed(f"has {len(cells)} cells, the header has {len(header)}")
                    yield Row(number, line, dict(zip(header, cells, strict=True)) if whole else ragged)
                line = reader.line_num + 1
        except csv.Error as error:  # past a stray quote, where rows begin is a guess: no row to skip
            raise InputError(
                f"{path.name} row {number + 1} (line {line}): broken quotes: {error}; correct it"
            ) from None


def _checked_header(path: Path, header: list[str]) -> list[str]:
    text = "".join(header)
    if "\0" in text or text != text.encode(errors="ignore").decode():
        raise InputError(f"{path} is not UTF-8 in its header; save it as UTF-8")
    if twice := sorted(name for name, count in Counter(header).items() if name and count > 1):
        raise InputError(f"{path} has more than one column {listed(twice)}; columns: {listed(header)}; rename them")
    return header


def _parse(raw: bytes, line: int = 1) -> Any:
    """The JSON in a file, or in its line ``line``."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Malformed(f"is not UTF-8 at byte {error.start + 1}, counted from line {line}") from None
    except json.JSONDecodeError as error:
        raise Malformed(
            f"is not JSON: {error.msg.removesuffix(' at')} at line {error.lineno + line - 1} column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"is not JSON that can be read: {error}, from line {line}") from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        if file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _json_rows(path)  # a list, whatever its name says
            return
        file.seek(0)
        number = 0
        for line, raw in enumerate(file, 1):
            if raw.strip():
                number += 1
                try:
                    yield Row(number, line, _parse(raw, line))
                except Malformed as error:
                    yield Row(number, None, error)


def _json_rows(path: Path) -> Iterator[Row]:
    """The objects of a list, of the only list in an object, or of lines: such files are often called .json too."""
    raw = path.read_bytes()
    try:
        data = _parse(raw)
    except Malformed as error:
        if "Extra data" in str(error) and raw.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return _jsonl_rows(path)
        raise InputError(f"{path} {error}") from None
    lists = {key: value for key, value in data.items() if isinstance(value, list)} if isinstance(data, dict) else {}
    if len(lists) > 1 or not isinstance(data, dict | list):
        found = f"the lists {listed(lists)}" if lists else kind_of(data)
        raise InputError(f"{path} holds {found}; give one list of objects")
    if isinstance(data, dict):
        data = [data] if not lists or lists.keys() & set(ALIASES["messages"]) else next(iter(lists.values()))
    return numbered(data)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _table_rows(path, file.schema_arrow, file.iter_batches(BATCH))
    except (pyarrow.ArrowException, *NO_VALUES) as error:
        raise InputError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}; get it again") from None


def _arrow_rows(path: Path) -> Iterator[Row]:
    """A stream of record batches, as ``datasets`` writes, or Arrow's file format."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            if mapped.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(mapped)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                mapped.seek(0)
                file = batches = pyarrow.ipc.open_stream(mapped)
            parts = (batch.slice(i, BATCH) for batch in batches for i in range(0, len(batch), BATCH))
            yield from _table_rows(path, file.schema, parts)
    except (pyarrow.ArrowException, *NO_VALUES) as error:
        raise InputError(f"{path} cannot be read as Arrow: {' '.join(str(error).split())}; get it again") from None


def _table_rows(path: Path, schema: Any, batches: Iterable[Any]) -> Iterator[Row]:
    """The rows of Arrow's record batches."""
    _checked_header(path, schema.names)
    encoded = [column for column in schema if "arrow.json" in str(column.type)]
    for number, row in enumerate((row for batch in batches for row in _valid(batch).to_pylist()), 1):
        try:
            row |= {column.name: _decoded(row[column.name], column.type) for column in encoded}
        except (ValueError, RecursionError) as error:
            row = Malformed(f"holds JSON that cannot be read: {error}")
        yield Row(number, None, row)


def _valid(batch: Any) -> Any:
    """The batch; its buffers are checked first, as reading a damaged one would end the process, not raise."""
    batch.validate(full=True)
    return batch


def _decoded(value: Any, kind: Any) -> Any:
    """A cell whose Arrow type holds JSON as text somewhere, as ``datasets`` writes turns that differ in their keys."""
    if value is None:
        return None
    if "arrow.json" in str(getattr(kind, "extension_name", "")):
        return json.loads(value)
    if hasattr(kind, "value_type"):  # a list
        return [_decoded(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {key: _decoded(item, kind.field(key).type) for key, item in value.items()}
    return value


def numbered(rows: Iterable[Any]) -> Iterator[Row]:
    """Rows of what has no lines."""
    return (Row(number, None, cells) for number, cells in enumerate(rows, 1))


NO_VALUES = (OSError, ValueError, OverflowError, RecursionError)
"""What a table raises that is broken, or holds dates, times or depths that Python's values do not reach."""
BATCH = 1024
"""Rows of a table made Python's at a time."""
PACKED = {
    b"\x1f\x8b": "compressed (gzip)",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"BZh": "compressed (bzip2)",
}
"""How files begin that are given by mistake."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
BINARY = (".parquet", ".arrow")
