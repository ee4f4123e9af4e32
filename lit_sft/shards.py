"""Prepared examples on disk: tensors only, memory-mapped, described by a manifest."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_sft.atomic import Manifest
from lit_sft.errors import InputError
from lit_sft.layout import check_data_dir, shard_name

KIND = "data"
SHARD_TOKENS = 1 << 26  # 256 MiB of int32 ids in a shard


@dataclass(frozen=True)
class Example:
    """One sample as the model sees it."""

    input_ids: list[int]
    labels_mask: list[bool]
    """Which tokens are to be predicted; never the first, which nothing comes before."""
    n_prompt: int
    """Tokens before the first response."""

    @property
    def n_needed(self) -> int:
        """Tokens up to the last label: what comes after it teaches nothing."""
        return next(i for i in range(len(self.labels_mask), 0, -1) if self.labels_mask[i - 1])

    def cut(self, length: int) -> "Example":
        """The first ``length`` tokens."""
        if length >= len(self.input_ids):
            return self
        return Example(self.input_ids[:length], self.labels_mask[:length], self.n_prompt)


def write_shards(directory: Path, split: str, examples: Iterable[Example]) -> list[str]:
    """Write the examples of one split in order; gives the names of the files.

    A shard holds ``input_ids`` (tokens,) int32, ``labels_mask`` (tokens,) bool and ``offsets`` (examples + 1,) int64.
    """
    names: list[str] = []
    ids: list[int] = []
    mask: list[bool] = []
    offsets = [0]

    def flush() -> None:
        tensors = {
            "input_ids": torch.tensor(ids, dtype=torch.int32),
            "labels_mask": torch.tensor(mask, dtype=torch.bool),
            "offsets": torch.tensor(offsets, dtype=torch.int64),
        }
        names.append(shard_name(split, len(names)))
        torch.save(tensors, directory / names[-1])
        ids.clear(), mask.clear(), offsets.__delitem__(slice(1, None))

    for example in examples:
        ids += example.input_ids
        mask += example.labels_mask
        offsets.append(len(ids))
        if len(ids) >= SHARD_TOKENS:
            flush()
    if len(offsets) > 1:
        flush()
    return names


class Shards:
    """The examples of one split of a data_dir, read through memory maps.

    Attributes:
        lengths: (N,) int64, tokens of each example, after the cut.
        n_cut: examples that the cut shortened or, where the data were prepared so, left out.
        n_labels: (N,) int64, labelled tokens of each.
    """

    def __init__(self, data_dir: str | Path, split: str, max_seq_length: int | None = None) -> None:
        """Open ``split`` (train or val); ``max_seq_length`` applies the overflow rule of the data again.

        Raises InputError when the directory is not prepared or damaged, and when a cut leaves an example no label.
        """
        directory = check_data_dir(data_dir)
        self.manifest = Manifest.read(directory, KIND)
        self.manifest.check_files(directory)
        names = sorted(name for name in self.manifest.files if name.startswith(f"{split}-"))
        self.shards = [torch.load(directory / name, weights_only=True, mmap=True) for name in names]
        offsets = [shard["offsets"] for shard in self.shards]
        self.starts = torch.cat([o[:-1] for o in offsets]) if offsets else torch.empty(0, dtype=torch.int64)
        full = torch.cat([o.diff() for o in offsets]) if offsets else torch.empty(0, dtype=torch.int64)
        self.shard_of = torch.cat([torch.full((len(o) - 1,), i) for i, o in enumerate(offsets)]) if offsets else full
        rule = self.manifest.facts.get("arguments", {}).get("on_overflow", "truncate")
        fits = full <= (max_seq_length or torch.inf)
        self.n_cut = int((~fits).sum())
        if self.n_cut and rule == "error":
            raise InputError(f"{directory}: {self.n_cut} {split} examples are longer than {max_seq_length} tokens")
        if rule == "drop":
            self.starts, full, self.shard_of = self.starts[fits], full[fits], self.shard_of[fits]
        self.lengths = full if max_seq_length is None else full.clamp(max=max_seq_length)
        self.n_labels = self._count_labels()
        if empty := (self.n_labels == 0).nonzero().flatten().tolist():
            raise self._refusal(directory, split, empty, full)

    def _refusal(self, directory: Path, split: str, empty: list[int], full: Tensor) -> InputError:
        """What to do about the examples ``empty``, which a cut from their ``full`` lengths leaves no label."""
        self.lengths, cut_to = full, int(self.lengths.max())
        needed = max(int(self[i][1].int().argmax()) for i in empty) + 1
        return InputError(
            f"{directory}: cut to {cut_to} tokens, {len(empty)} {split} examples keep no label (the first: "
            f"{empty[:5]}); --max_seq_length {needed} keeps all, or prepare the data again with "
            f"--max_seq_length {cut_to} --on_overflow drop"
        )

    def _count_labels(self) -> Tensor:
        counts = []
        for i, shard in enumerate(self.shards):
            here = self.shard_of == i
            running = torch.cat([torch.zeros(1, dtype=torch.int64), shard["labels_mask"].cumsum(0)])
            counts.append(running[self.starts[here] + self.lengths[here]] - running[self.starts[here]])
        return torch.cat(counts) if counts else torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Example ``index``: its ids (T,) int64 and labels mask (T,) bool."""
        shard = self.shards[int(self.shard_of[index])]
        here = slice(int(self.starts[index]), int(self.starts[index] + self.lengths[index]))
        return shard["input_ids"][here].long(), shard["labels_mask"][here]
