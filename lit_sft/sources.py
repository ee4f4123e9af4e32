"""Raw data in: the rows of files and of Hub datasets, each checked and made a sample.

The only module that imports ``datasets``; it and pyarrow are imported where they are used, for that takes seconds.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

from lit_sft.errors import InputError
from lit_sft.prompts import Sample
from lit_sft.readers import READERS, file_rows, numbered
from lit_sft.rows import FLAGS, Columns, Malformed, Row, listed, recognise, turns_of

HEAD = 1000
"""The first rows, whose keys are the columns: JSON has no header, and its objects may leave keys out."""
PARQUET_BRANCH = "refs/convert/parquet"
"""Where the Hub itself keeps datasets converted to Parquet."""


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the Hub; ``token`` None: the environment's."""

    repo_id: str
    config: str | None = None
    split: str = "train"
    token: str | None = None


@dataclass(frozen=True)
class Problem:
    """A row that gives no sample: where it is (``data.csv row 417``) and why."""

    place: str
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"


class Samples(NamedTuple):
    """What a source gives: its samples in its order, the rows left out, and the columns read, to be printed."""

    samples: list[Sample]
    problems: list[Problem]
    columns: str


def read_samples(
    source: Path | HubDataset,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    on_error: Literal["fail", "skip"] = "fail",
    multiturn: bool = True,
) -> Samples:
    """Read and check every row of ``source``; ``multiturn`` False keeps only the first exchange of a dialogue.

    Raises InputError, on one line, when the source cannot be read, its columns are not recognised or no sample is left;
    with ``on_error`` "fail" also when a row is malformed.
    """
    local = isinstance(source, Path)
    name = source.name if local else f"{source.repo_id.rpartition('/')[2]} {source.split}"
    rows = file_rows(source) if local else _hub_rows(source)
    head = list(islice(rows, HEAD))
    seen: dict[str, None] = {key: None for row in head if isinstance(row.cells, dict) for key in row.cells}
    found = _recognise(name, seen, columns, columns) if seen else columns
    samples, problems = [], []
    for row in chain(head, rows):
        place = f"{name} row {row.number}"
        if isinstance(row.cells, dict) and not row.cells.keys() <= seen.keys():
            seen |= dict.fromkeys(row.cells)
            found = _recognise(place, seen, columns, found)
        try:
            if isinstance(row.cells, Malformed):
                raise row.cells
            samples.append(Sample(turns_of(row.cells, found, multiturn), place))
        except Malformed as error:
            problems.append(Problem(place, f"{error}{f' (line {row.line})' if row.line else ''}"))
    if not samples or (problems and on_error == "fail"):
        raise _refusal(name, problems, bool(samples), seen)
    unused = [column for column in seen if column not in found.given().values()]
    return Samples(samples, problems, f"{found}" + (f"; not read: {listed(unused)}" if unused else ""))


def _recognise(place: str, seen: Iterable[str], wanted: Columns, before: Columns) -> Columns:
    """The columns to read now that ``seen`` are there: one more than ``before`` is well, another one is not."""
    try:
        found = recognise(list(seen), wanted)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    if not before.given().items() <= found.given().items():
        differ = f"{place} would be read as {found}, those before it as {before}"
        raise InputError(f"{differ}; columns: {listed(seen)}; name yours with {FLAGS}")
    return found


def _refusal(name: str, problems: list[Problem], usable: bool, seen: list[str]) -> InputError:
    if not problems:
        return InputError(f"{name} holds no rows; name a file or split that does")
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    advice = "--on_error skip leaves such rows out" if usable else "not one row is usable"
    return InputError(f"{'; '.join(map(str, problems[:3]))}{more}; columns: {listed(seen)}; {advice}")


def _hub_rows(source: HubDataset) -> Iterator[Row]:
    """The rows of a Hub dataset; InputError says why there are none. No code of the repository is ever run."""
    from datasets import load_dataset

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo_id):
        raise InputError(
            f"--data_repo_id {source.repo_id!r} is not of the form ORG/NAME; --data_file names a local file"
        )
    try:
        yield from numbered(load_dataset(source.repo_id, source.config, split=source.split, token=source.token))
        return
    except Exception as error:  # whatever the network, the Hub and the repository's files come up with
        if "scripts are no longer supported" not in str(error):
            raise _explained(source, error) from error
    yield from numbered(row.cells for file in _files_beside_script(source) for row in file_rows(file))


def _files_beside_script(source: HubDataset) -> list[Path]:
    """Download the split of a repository with a loading script, as GAIR/lima: the Hub's conversion, else its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    api, names = HfApi(token=source.token), []
    try:
        for revision in (PARQUET_BRANCH, "main"):
            try:
                names = api.list_repo_files(source.repo_id, repo_type="dataset", revision=revision)
            except RevisionNotFoundError:
                continue
            if chosen := _of_split(source, names):
                download = partial(api.hf_hub_download, source.repo_id, repo_type="dataset", revision=revision)
                return [Path(download(name)) for name in chosen]
    except InputError:
        raise
    except Exception as error:
        raise _explained(source, error) from error
    where = f"{source.repo_id} has a loading script, which is never run, and no file of the split {source.split!r}"
    raise InputError(f"{where}; it holds {listed(names)}; download what you need and give it as --data_file")


def _of_split(source: HubDataset, names: list[str]) -> list[str]:
    """The files whose names say they are the split's: train.jsonl, data/train-00000.parquet, train/0000.parquet."""
    pattern = re.compile(rf"(.*/)?{re.escape(source.split)}([-_./].*)?")
    chosen = [n for n in names if Path(n).suffix in READERS and pattern.fullmatch(n)]
    if source.config is not None:
        chosen = [n for n in chosen if source.config in Path(n).parts]
    groups = {(Path(n).parent, Path(n).suffix) for n in chosen}
    if len(groups) > 1:
        raise InputError(f"{source.repo_id} {source.split} may be any of {listed(chosen)}; choose with --data_config")
    return sorted(chosen)


def _explained(source: HubDataset, error: Exception) -> InputError:
    """What went wrong on the Hub and what to do about it, on one line."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    text = " ".join(str(error).split()).partition(" For more information check: ")[0]
    page = f"https://huggingface.co/datasets/{source.repo_id}"
    if isinstance(error, GatedRepoError) or "is a gated dataset on the Hub" in text:
        return InputError(
            f"{source.repo_id} is gated: accept its licence at {page}, then give --access_token or set HF_TOKEN"
        )
    if isinstance(error, DatasetNotFoundError | RepositoryNotFoundError):
        return InputError(
            f"{page} does not exist, or is private: check the name, or give --access_token or set HF_TOKEN"
        )
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return InputError(
            f"{source.repo_id}: the Hub refuses the token ({text}); give another: --access_token or HF_TOKEN"
        )
    if isinstance(error, ConnectionError | HTTPError):
        return InputError(
            f"{source.repo_id}: the Hub cannot be reached ({text}); run the command again, or give --data_file"
        )
    cause = " ".join(str(error.__cause__ or "").split())
    return InputError(f"{source.repo_id} {source.split} cannot be read: {text}{f' ({cause})' if cause else ''}")
