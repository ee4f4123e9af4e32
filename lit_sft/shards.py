"""Prepared examples on disk: tensors only, memory-mapped, described by a manifest."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sft.atomic import Manifest
from lit_sft.errors import InputError
from lit_sft.layout import MANIFEST, check_data_dir, shard_name
from lit_sft.prompts import check_prompt_facts

KIND = "data"
SHARD_TOKENS = 1 << 24  # 64 MiB of int32 ids in a shard
FACTS = {"n_prompt": torch.int32, "n_labels": torch.int32, "source": torch.int16, "row": torch.int32}
"""What is stored of each example beside its tokens: those before its first response, those labelled, the number of its
source from 0 and its row there from 1."""


def write_shards(
    directory: Path,
    split: str,
    lengths: Tensor,
    facts: dict[str, Tensor],
    read: Callable[[int, int], Iterable[tuple[int, Any, Any]]],
) -> list[str]:
    """Write the examples of one split in order; gives the names of the files.

    A shard holds ``input_ids`` (tokens,) int32, ``labels_mask`` (tokens,) bool, ``offsets`` (examples + 1,) int64 and
    each of FACTS (examples,). Memory: one shard's.

    Args:
        directory: where they go.
        split: train or val.
        lengths: (N,) int64, tokens of each example.
        facts: each of FACTS, (N,).
        read: ``read(start, end)`` gives, in any order, every example from start to end - 1: its number, at least
            ``lengths`` of its ids, and its labels mask, as whatever ``torch.as_tensor`` takes.
    """
    names: list[str] = []
    ends = lengths.cumsum(0)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        # up to and with the example that fills the shard
        end = min(int(torch.searchsorted(ends, before + SHARD_TOKENS)) + 1, len(lengths))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[start:end] - before])
        input_ids = torch.empty(int(offsets[-1]), dtype=torch.int32)
        labels_mask = torch.empty(int(offsets[-1]), dtype=torch.bool)
        places = offsets.tolist()
        for i, ids, mask in read(start, end):
            here, n = slice(places[i - start], places[i - start + 1]), places[i - start + 1] - places[i - start]
            input_ids[here], labels_mask[here] = torch.as_tensor(ids[:n]), torch.as_tensor(mask[:n])
        tensors = {"input_ids": input_ids, "labels_mask": labels_mask, "offsets": offsets}
        # clones: torch.save writes the whole storage of what it is given
        tensors |= {name: facts[name][start:end].to(dtype).clone() for name, dtype in FACTS.items()}
        names.append(shard_name(split, len(names)))
        _save(tensors, directory / names[-1])
        start = end
    return names


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:  # torch's own complaint hides the disk's
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard; whatever else it holds is not run."""
    try:
        shard = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no shard of lit_sft, and was not run ({why}); prepare the data again") from None
    if not isinstance(shard, dict) or not all(map(_is_plain, shard.values())):
        raise InputError(f"{path} is no shard of lit_sft: it holds no tensors by name; prepare the data again")
    if lacks := {"input_ids", "labels_mask", "offsets"} - shard.keys():
        raise InputError(f"{path} is no shard of lit_sft: {sorted(lacks)[0]} is missing; prepare the data again")
    ids, mask, offsets = shard["input_ids"], shard["labels_mask"], shard["offsets"]
    kinds = (ids.dtype, mask.dtype, offsets.dtype) == (torch.int32, torch.bool, torch.int64)
    there = {name: dtype for name, dtype in FACTS.items() if name in shard}
    kinds &= all((shard[name].dtype, len(shard[name])) == (dtype, len(offsets) - 1) for name, dtype in there.items())
    if not kinds or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or len(ids) != len(mask):
        raise InputError(f"{path} is no shard of lit_sft: its tensors do not fit together; prepare the data again")
    if "n_labels" in shard and ((shard["n_labels"] < 1).any() or shard["n_labels"].sum() != mask.sum()):
        raise InputError(f"{path} is no shard of lit_sft: its labels are not as many as told; prepare the data again")
    if (offsets.diff() < 1).any() or offsets.max() > len(ids) or offsets.min() < 0 or ids.min() < 0:
        raise InputError(f"{path} is no shard of lit_sft: its offsets or ids cannot be; prepare the data again")
    return shard


def _is_plain(value: object) -> bool:
    """Whether it is a vector whose elements all are in the file: not sparse, not on "meta", not one repeated."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.dim() == 1 and value.is_contiguous()


class Shards:
    """The examples of one split of a data_dir, read through memory maps.

    Attributes:
        lengths: (N,) int32, tokens of each example, after the cut.
        n_cut: examples that the cut shortened or, where the data were prepared so, left out.
    """

    def __init__(self, data_dir: str | Path, split: str, max_seq_length: int | None = None) -> None:
        """Open ``split`` (train or val); ``max_seq_length`` applies the overflow rule of the data again.

        Raises InputError when the directory is not prepared or damaged, and when a cut leaves an example no label.
        """
        directory = check_data_dir(data_dir)
        self.manifest = Manifest.read(directory, KIND)
        self._check_facts(directory)
        self.manifest.check_files(directory)
        names = sorted(name for name in self.manifest.files if name.startswith(f"{split}-"))
        self.shards = [_load(directory / name) for name in names]
        if any(FACTS.keys() - shard.keys() for shard in self.shards):
            raise InputError(f"{directory} was prepared by an earlier lit_sft; run its prepare script again")
        self.firsts = [0]
        for shard in self.shards:
            self.firsts.append(self.firsts[-1] + len(shard["offsets"]) - 1)
        self.lengths = self._gather(lambda shard: shard["offsets"].diff().int())
        self.kept: Tensor | None = None  # which of the stored examples these are; None: all
        self.n_cut = 0
        if max_seq_length is not None:
            self._cut(directory, split, max_seq_length)

    def _check_facts(self, directory: Path) -> None:
        """InputError when the manifest lacks what is read of it later."""
        facts = self.manifest.facts
        kinds = {"tokenizer": str, "checkpoint_dir": str, "arguments": dict}
        if wrong := [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]:
            found = facts.get(wrong[0], "missing")
            raise InputError(f"{directory / MANIFEST}: {wrong[0]} is {found!r}; prepare the data again")
        check_prompt_facts(facts, directory / MANIFEST)

    def _gather(self, of_shard: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int32), *map(of_shard, self.shards)])

    def _cut(self, directory: Path, split: str, limit: int) -> None:
        """Apply the overflow rule. Prompts are never cut, and a dialogue is cut back to its last label."""
        rule = self.manifest.facts.get("arguments", {}).get("on_overflow", "truncate")
        too_long = (self.lengths > limit).nonzero().flatten()
        self.n_cut = len(too_long)
        if self.n_cut and rule == "error":
            raise InputError(f"{directory}: {self.n_cut} {split} examples are longer than {limit} tokens")
        if rule == "drop":
            if self.n_cut:
                self.kept = (self.lengths <= limit).nonzero().flatten().int()
                self.lengths = self.lengths[self.kept]
            return
        n_prompt = self._gather(lambda shard: shard["n_prompt"])[too_long]
        if empty := too_long[n_prompt >= limit].tolist():
            needed = int(n_prompt.max()) + 1
            raise InputError(
                f"{directory}: cut to {limit} tokens, {len(empty)} {split} examples keep no label (the first: "
                f"{empty[:5]}); --max_seq_length {needed} keeps all, or prepare the data again with "
                f"--max_seq_length {limit} --on_overflow drop"
            )
        self.lengths[too_long] = limit
        for i in too_long.tolist():
            self.lengths[i] = int(self[i][1].nonzero()[-1]) + 1

    def n_labels(self, index: int) -> int:
        """Labelled tokens of example ``index``."""
        shard, i = self._find(index)
        whole = int(self.lengths[index]) == int(shard["offsets"][i + 1] - shard["offsets"][i])
        return int(shard["n_labels"][i] if whole else self[index][1].sum())

    def fact(self, name: str, index: int) -> Tensor:
        """One of FACTS of example ``index``, a scalar, as it was before any cut."""
        shard, i = self._find(index)
        return shard[name][i]

    def _find(self, index: int) -> tuple[dict[str, Tensor], int]:
        """The shard with example ``index`` and its number there."""
        stored = int(index if self.kept is None else self.kept[index])
        shard = bisect_right(self.firsts, stored) - 1
        return self.shards[shard], stored - self.firsts[shard]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Example ``index``: its ids (T,) int64 and labels mask (T,) bool."""
        shard, i = self._find(index)
        start = int(shard["offsets"][i])
        here = slice(start, start + int(self.lengths[index]))
        return shard["input_ids"][here].long(), shard["labels_mask"][here]
