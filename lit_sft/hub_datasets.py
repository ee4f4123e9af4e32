"""Datasets on the Hub → rows. No code of a repository is ever run.

The only module that imports ``datasets``, where it is used, for that takes seconds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lit_sft.errors import InputError
from lit_sft.readers import READERS, file_rows, numbered
from lit_sft.rows import Row, listed

PARQUET_BRANCH = "refs/convert/parquet"
"""Where the Hub itself keeps datasets converted to Parquet."""


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the Hub; ``token`` None: the environment's.

    ``files``: the repository's files that make the split, as patterns; empty: those that its card or their names say.
    """

    repo_id: str
    config: str | None = None
    split: str = "train"
    token: str | None = field(default=None, repr=False)
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What rows are said to be of."""
        return f"{self.repo_id.rpartition('/')[2]} {self.split}"

    def __str__(self) -> str:
        """In full, where two have one name."""
        return " ".join(part for part in (self.repo_id, self.config, self.split) if part)


def hub_rows(source: HubDataset) -> Iterator[Row]:
    """The rows of a Hub dataset; InputError says why there are none. No code of the repository is ever run."""
    from lit_sft.transfer import hub_token  # the Hub's library, as the next one, is slow to import

    # isort: split
    from datasets import load_dataset

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo_id):
        raise InputError(
            f"--data_repo_id {source.repo_id!r} is not of the form ORG/NAME; --data_file names a local file"
        )
    source = replace(source, token=hub_token(source.token) or None)
    files = {source.split: list(source.files)} if source.files else None
    arguments = {"data_files": files, "split": source.split, "token": source.token}
    try:
        yield from numbered(load_dataset(source.repo_id, source.config, **arguments))
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
