"""Raw data in: which files or Hub datasets are meant, and their rows, each checked and made a sample."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_sft.errors import InputError
from lit_sft.hub_datasets import HubDataset, hub_rows
from lit_sft.prepare_args import PrepareArgs, PrepareCSVArgs
from lit_sft.prompts import Sample, with_system
from lit_sft.readers import file_rows
from lit_sft.row_fields import folded
from lit_sft.rows import FLAGS, NAMES, Columns, Malformed, Row, format_of, listed, recognise
from lit_sft.turns import RowReader

HEAD = 1000
"""The first rows, whose keys are the columns: JSON has no header, and its objects may leave keys out."""
SHOWN = 10
"""Problems told in full; the rest are counted."""
DEPTH = 100
"""Lists in lists that are kept of a malformed row."""
IN_LINE = 3
"""Problems that the one line of a refusal names; if there are more, lines before it tell them."""
DATA = Path("data")
"""Where fetched files are kept."""


@dataclass(frozen=True)
class Reshaped:
    """A source whose rows a function makes others, such as dialogues of single messages."""

    source: Path | HubDataset
    reshape: Callable[[Iterator[Row]], Iterator[Row]]

    @property
    def name(self) -> str:
        """What rows are said to be of."""
        return self.source.name

    def __str__(self) -> str:
        """In full, where two have one name."""
        return str(self.source)


Source = Path | HubDataset | Reshaped


def chosen_sources(args: PrepareArgs) -> tuple[Path | HubDataset, Path | HubDataset | None]:
    """The data that the flags name, and those that are their val split as given, or None: it is to be drawn.

    A file given as an address is fetched. InputError: it cannot be, or no data are named.
    """
    given = args.data_file or args.data_file_url
    val = _local(args.val_file) if args.val_file else None
    if given is None:
        if args.data_repo_id is None:
            raise InputError(
                "--csv_path is missing; name the data to prepare: a file or an address (--data_file is the same flag), "
                "or a dataset on the Hub with --data_repo_id"
            )
        hub = HubDataset(args.data_repo_id, args.data_config, args.data_split, args.access_token)
        splits = args.data_val_split is not None and val is None
        return hub, replace(hub, split=args.data_val_split) if splits else val
    source = _local(given, args.data_file_name)
    if (source / "dataset_dict.json").is_file():  # saved to disk with its splits
        splits = args.data_val_split is not None and val is None and (source / args.data_val_split).is_dir()
        source, val = source / args.data_split, source / args.data_val_split if splits else val
    return source, val


def given_columns(args: PrepareCSVArgs) -> Columns:
    """The columns that flags name."""
    return Columns(**{f.name: getattr(args, f"{f.name}_column") for f in fields(Columns)})


def _local(given: str, name: str | None = None) -> Path:
    """The file that is ``given``; an address is fetched into data/, as ``name`` or by its own."""
    if "://" not in given:
        return Path(given)
    from lit_sft.transfer import fetch_url  # here, as the Hub's library is slow to import

    return fetch_url(given, DATA / Path(name or given.partition("?")[0].rstrip("/")).name)


def rows_of(source: Source) -> Iterator[Row]:
    """The rows of a source, one after the other."""
    if isinstance(source, Reshaped):
        return source.reshape(rows_of(source.source))
    return file_rows(source) if isinstance(source, Path) else hub_rows(source)


@dataclass(frozen=True)
class Problem:
    """A row that gives no sample: where it is (``data.csv row 417``) and why."""

    place: str
    why: str
    cells: Any = None
    """The row as read, where it could be read."""

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"


class SampleStream:
    """The rows of a source in its order, one by one: each gives a sample or a problem. Memory does not grow with it.

    Attributes:
        name: the file's name, or that of the Hub dataset and its split; a sample's place begins with it.
        seen: the columns met so far, as the keys of a dict, in the order in which they came.
        format: what the rows are called, for the user; known from the first item on, as are the ``columns``.
    """

    def __init__(
        self,
        source: Source,
        columns: Columns = Columns(),  # noqa: B008 (it is frozen)
        multiturn: bool = True,
        system_prompt: str | None = None,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        """``multiturn`` False keeps only the first exchange of a dialogue. Nothing is read yet.

        ``ignored``: folded names of fields that go unread although they change what is learned.
        """
        self.source, self.wanted, self.system_prompt = source, columns, system_prompt
        self.name = source.name
        self.seen: dict[str, None] = {}
        self.reader = RowReader(columns, columns, multiturn, ignored)
        self.format = ""

    @property
    def columns(self) -> Columns:
        """The columns that are read; those that were asked for until the first item."""
        return self.reader.columns

    def __iter__(self) -> Iterator[Sample | Problem]:
        """Read and check from the first row; row n of a file, counted from 1, is the n-th item.

        Raises InputError, on one line, when the source cannot be read, holds no rows or has no columns of a known kind;
        malformed rows before that are named with it.
        """
        problems, count = [], 0
        try:
            for item in self._items():
                if isinstance(item, Problem):
                    count += 1
                    problems += [item] if count <= SHOWN else []
                yield item
        except InputError as error:
            if not count:
                raise
            told = f"{error}; malformed before that: {_in_line(problems, count)}"
            raise InputError(told, [*_in_full(problems, count), str(error)]) from None

    def _items(self) -> Iterator[Sample | Problem]:
        rows = rows_of(self.source)
        head, broken = [], None
        try:
            head.extend(islice(rows, HEAD))  # which keeps what came before an error
        except InputError as error:
            broken = error
        if not head:
            raise broken or InputError(f"{self.name} holds no rows; name a file or split that does")
        self.seen = {key: None for row in head if isinstance(row.cells, dict) for key in row.cells}
        if self.seen:
            self.reader.columns = self._recognise(self.name, self.wanted)
        met = Counter(name for key in self.seen if (name := key.strip().lower()) in NAMES)
        cells = (row.cells for row in head if isinstance(row.cells, dict))
        self.format = format_of(self.columns, next(cells, None))
        for row in chain(head, rows):
            place = f"{self.name} row {row.number}"
            if isinstance(row.cells, dict) and (new := [key for key in row.cells if key not in self.seen]):
                # none, one and several of a known name are read differently; others change nothing, and may be many
                known = [name for key in new if (name := key.strip().lower()) in NAMES]
                decide = not self.seen or any(met[name] < 2 for name in known)
                self.seen |= dict.fromkeys(new)
                met.update(known)
                if decide:
                    self.reader.columns = self._recognise(place, self.columns)
            try:
                if isinstance(row.cells, Malformed):
                    raise row.cells
                turns = self.reader.turns(row.cells)
                yield Sample(with_system(turns, self.system_prompt), place, row.number)
            except Malformed as error:
                cells = None if isinstance(row.cells, Malformed) else _shallow(row.cells)
                yield Problem(place, f"{error}{f' (line {row.line})' if row.line else ''}", cells)
        if broken is not None:
            raise broken

    def _recognise(self, place: str, before: Columns) -> Columns:
        """The columns to read of those seen: one more than ``before`` is well, another one is not."""
        seen = [column for column in self.seen if folded(column) not in self.reader.ignored]
        try:
            found = recognise(seen, self.wanted)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        if not before.given().items() <= found.given().items():
            differ = f"{place} would be read as {found}, those before it as {before}"
            raise InputError(f"{differ}; columns: {listed(seen)}; name yours with {FLAGS}")
        return found

    def __str__(self) -> str:
        unused = [column for column in self.seen if column not in self.columns.given().values()]
        told = [f"{self.format}: {self.columns}"]
        if unused:
            told.append(f"not read: {listed(unused)}")
        if self.reader.unread:
            told.append(f"not read of turns: {listed(self.reader.unread)}")
        return "; ".join(told)


class Samples(NamedTuple):
    """What a source gives: its samples in its order, the rows left out, and the columns read, to be printed."""

    samples: list[Sample]
    problems: list[Problem]
    columns: str


def read_samples(
    source: Source,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    on_error: Literal["fail", "skip"] = "fail",
    multiturn: bool = True,
    system_prompt: str | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Samples:
    """Read and check every row of ``source`` into memory.

    Raises InputError as a SampleStream does, and when no sample is left or, with ``on_error`` "fail", a row is
    malformed.
    """
    stream = SampleStream(source, columns, multiturn, system_prompt, ignored)
    samples, problems = [], []
    for item in stream:
        (samples if isinstance(item, Sample) else problems).append(item)
    if not samples or (problems and on_error == "fail"):
        raise refusal(problems[:SHOWN], len(problems), bool(samples), stream.seen)
    return Samples(samples, problems, str(stream))


def refusal(problems: list[Problem], count: int, usable: bool, seen: Iterable[str]) -> InputError:
    """What to say of malformed rows: ``problems`` are the first of ``count`` in all."""
    advice = "--on_error skip leaves such rows out" if usable else "not one row is usable"
    told = f"{_in_line(problems, count)}; columns: {listed(seen)}; {advice}"
    return InputError(told, _in_full(problems, count))


def _in_line(problems: list[Problem], count: int) -> str:
    more = f"; and {count - IN_LINE} more" if count > IN_LINE else ""
    return "; ".join(map(str, problems[:IN_LINE])) + more


def _in_full(problems: list[Problem], count: int) -> list[str]:
    """Lines for what one line cannot hold."""
    rest = [f"… and {count - SHOWN} more"] if count > SHOWN else []
    return [*map(str, problems[:SHOWN]), *rest] if count > IN_LINE else []


def _shallow(value: Any, depth: int = DEPTH) -> Any:
    """Cells that can be pickled and written: what lies deeper than any that are meant is left out."""
    if isinstance(value, dict):
        return {key: _shallow(item, depth - 1) for key, item in value.items()} if depth else "…"
    if isinstance(value, list):
        return [_shallow(item, depth - 1) for item in value] if depth else "…"
    return value
