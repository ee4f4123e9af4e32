"""Several sources in one preparation: each with its share, its split and its ratings."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lit_sft.args import MOST_INT
from lit_sft.documents import read_bytes, read_yaml
from lit_sft.errors import InputError
from lit_sft.hub_datasets import HubDataset
from lit_sft.prepare_args import PrepareArgs
from lit_sft.readers import READERS, file_rows
from lit_sft.row_fields import parse_ignored
from lit_sft.rows import Columns, Malformed, listed
from lit_sft.sources import SampleStream

MOST_GAPS = 1_000_000
"""Rows without a score, below the last that has one, up to which it is looked for the first of them."""


@dataclass(frozen=True)
class Share:
    """What a mix says of one of its sources; these names are its keys, those of ``_source`` say what it is."""

    weight: float | None = None
    """Its share of the training examples; all sources have one or none has."""
    max_examples: int | None = None
    """Most of its examples, drawn at random."""
    repeat: int = 1
    """How often an epoch trains on each of its examples."""
    val_split_fraction: float | None = None
    keep_scores: str | None = None
    min_score: float | None = None


@dataclass(frozen=True)
class MixedSource:
    """A source with all that decides what is taken of it.

    ``val_split_fraction`` 1: it is val as a whole. ``scores``: (rows,) float64, NaN where a row has none; None: every
    row is as good as another.
    """

    stream: SampleStream
    val_split_fraction: float
    weight: float | None = None
    max_examples: int | None = None
    repeat: int = 1
    scores: np.ndarray | None = None
    min_score: float = -math.inf

    def check_scores(self, n_rows: int) -> None:
        """Require a score for each of the ``n_rows`` rows that were read, and no more."""
        if self.scores is None:
            return
        if len(self.scores) > n_rows:
            raise InputError(f"--keep_scores rates row {len(self.scores)}, {self.stream.name} has {n_rows} rows")
        missing = np.flatnonzero(np.isnan(self.scores)) + 1
        if len(missing) or len(self.scores) < n_rows:
            first = missing[0] if len(missing) else len(self.scores) + 1
            count = len(missing) + n_rows - len(self.scores)
            raise InputError(f"--keep_scores has no score for row {first} of {self.stream.name} ({count} rows in all)")


def with_flags(args: PrepareArgs, streams: list[SampleStream]) -> list[MixedSource]:
    """The source of a command without a mix, as its flags have it; a second stream is val as a whole."""
    scores = None if args.keep_scores is None else read_scores(Path(args.keep_scores))
    least = -math.inf if args.min_score is None else args.min_score
    fraction = args.val_split_fraction if len(streams) == 1 else 0.0
    _tell_apart(streams)
    first = MixedSource(streams[0], fraction, None, args.max_examples, 1, scores, least)
    return [first, *(MixedSource(stream, 1.0) for stream in streams[1:])]


def read_mix(path: Path, args: PrepareArgs) -> list[MixedSource]:
    """The sources that a YAML file lists, with the flags of ``args`` where it says nothing else.

    Each is a map of ``data_file`` or ``data_repo_id`` (with ``data_config``, ``data_split``), any of the ``*_column``
    flags and of the fields of ``Share``. Raises InputError that names the file, the entry and what is wrong with it.
    """
    try:
        entries = read_yaml(path)
    except FileNotFoundError:
        raise InputError(f"--mix {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--mix {path} is not YAML: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"--mix {path} must be a list of sources, each a map with data_file or data_repo_id")
    found = [_source(f"--mix {path} source {i}", dict(entry), args) for i, entry in enumerate(entries, 1)]
    if len({source.weight is None for source in found}) > 1:
        raise InputError(f"--mix {path}: give every source a weight, or none")
    _tell_apart([source.stream for source in found])
    return found


def _tell_apart(streams: list[SampleStream]) -> None:
    """Name those of one name in full."""
    names = [stream.name for stream in streams]
    for stream in streams:
        if names.count(stream.name) > 1:
            stream.name = str(stream.source)


def _source(where: str, entry: dict[str, Any], args: PrepareArgs) -> MixedSource:
    parts = [f.name for f in fields(Columns)]
    known = {"data_file": str, "data_repo_id": str, "data_config": str, "data_split": str}
    known |= {f"{part}_column": str for part in parts} | {"max_examples": int, "repeat": int, "keep_scores": str}
    known |= dict.fromkeys(("weight", "val_split_fraction", "min_score"), float)
    for key, value in entry.items():
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r:.80}; known: {listed(known)}")
        kinds = (int, float) if known[key] is float else known[key]
        beyond = isinstance(value, int) and abs(value) > MOST_INT
        if not isinstance(value, kinds) or isinstance(value, bool) or value != value or value == "" or beyond:
            raise InputError(f"{where}: {key} {value!r:.80} is no {known[key].__name__}")
    if ("data_file" in entry) == ("data_repo_id" in entry):
        raise InputError(f"{where}: give one of data_file and data_repo_id")
    share = Share(**{f.name: entry[f.name] for f in fields(Share) if f.name in entry})
    fraction = args.val_split_fraction if share.val_split_fraction is None else share.val_split_fraction
    wrong = {
        f"weight {share.weight} must be above 0": share.weight is not None and not 0 < share.weight < math.inf,
        f"max_examples {share.max_examples} must be above 0": share.max_examples is not None and share.max_examples < 1,
        f"repeat {share.repeat} must be above 0": share.repeat < 1,
        f"val_split_fraction {fraction} must be in [0, 1)": not 0 <= fraction < 1,
        "give keep_scores and min_score together": (share.keep_scores is None) != (share.min_score is None),
    }
    if problems := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise InputError(f"{where}: {'; '.join(problems)}")
    source: Path | HubDataset = Path(entry.get("data_file", ""))
    if "data_repo_id" in entry:
        split = entry.get("data_split", "train")
        source = HubDataset(entry["data_repo_id"], entry.get("data_config"), split, args.access_token)
    columns = Columns(**{part: entry.get(f"{part}_column") for part in parts})
    scores = read_scores(Path(share.keep_scores)) if share.keep_scores else None
    least = -math.inf if share.min_score is None else share.min_score
    most = args.max_examples if share.max_examples is None else share.max_examples
    return MixedSource(
        SampleStream(source, columns, system_prompt=args.system_prompt, ignored=parse_ignored(args.ignore_fields)),
        fraction,
        share.weight,
        most,
        share.repeat,
        scores,
        least,
    )


def read_scores(path: Path) -> np.ndarray:
    """The scores of a source's rows, (highest rated row,) float64, NaN where there is none.

    A table (CSV, JSON lines, …) with a column ``score``, and ``row``, from 1, unless its rows are those of the data;
    any other file holds one score a line. InputError names the file and the row of what is no score.
    """
    if path.suffix.lower() in READERS:
        found = [(row.number, row.cells) for row in file_rows(path)]
    elif path.is_file():
        lines = read_bytes(path).decode(errors="replace").splitlines()
        found = [(number, {"score": line}) for number, line in enumerate(lines, 1)]
    else:
        raise InputError(f"--keep_scores {path} does not exist")
    scores: dict[int, float] = {}
    for number, cells in found:
        where = f"--keep_scores {path} row {number}"
        if isinstance(cells, int | float | str):
            cells = {"score": cells}  # JSON lines of bare numbers
        if isinstance(cells, Malformed) or not isinstance(cells, dict):
            raise InputError(f"{where}: {cells if isinstance(cells, Malformed) else 'is no object with a score'}")
        if "score" not in cells:
            raise InputError(f"{where}: there is no column 'score'; columns: {listed(cells)}")
        try:
            row, score = int(cells.get("row", number)), float(cells["score"])
        except (TypeError, ValueError, OverflowError):
            row, score = 0, math.nan
        if row < 1 or not math.isfinite(score):
            told = f"{cells['score']!r:.80} for row {cells.get('row', number)!r:.80}"
            raise InputError(f"{where}: {told} is no score of a row")
        if row in scores:
            raise InputError(f"{where}: row {row} has two scores")
        scores[row] = score
    if not scores:
        raise InputError(f"--keep_scores {path} holds no scores")
    if max(scores) > len(scores) + MOST_GAPS:  # refused later in any case, and nothing to ask memory for
        raise InputError(f"--keep_scores {path} rates row {max(scores)}, but no more than {len(scores)} in all")
    rated = np.full(max(scores), np.nan)
    rated[np.fromiter(scores, np.int64) - 1] = list(scores.values())
    return rated
