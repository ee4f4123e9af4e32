"""What a folder of shards holds, counted: lengths, labels, duplicates, leakage, prefixes in common, padding.

It reads the shards alone, one at a time, in stretches of bounded size; nothing here depends on how they were written.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from lit_sft.batches import DEFAULT_BATCH_SIZE, DEFAULT_ROW_TOKENS
from lit_sft.packing import pack
from lit_sft.prefixes import MIN_SHARED as MIN_PREFIX

CHUNK_TOKENS = 1 << 22  # read at once: 16 MiB of ids
SAMPLE = 64 * DEFAULT_BATCH_SIZE  # examples, at most, among which prefixes are looked for and rows are packed
PREFIX_TOKENS = 4096  # how far a prefix is followed
MIN_SHARE = 0.005  # of the sampled tokens; prefixes that save less are counted, not listed


@dataclass(frozen=True)
class SplitFigures:
    """One split, example by example, in the order of its shards."""

    split: str
    paths: list[Path]
    starts: list[int]
    """Number of the first example of each shard."""
    lengths: np.ndarray
    """(N,) int64: tokens."""
    n_labels: np.ndarray
    """(N,) int64: labelled tokens."""
    n_unended: int
    """Examples whose last label is no end token: a response that was cut."""
    wholes: np.ndarray
    """(N,) uint64: a hash of all ids; equal for equal examples."""
    prompts: np.ndarray
    """(N,) uint64: a hash of the ids before the first response; of all where there are none."""
    origins: np.ndarray
    """(N,) int64: source, from 0, × 2³² + row, from 1; what is repeated on purpose has the same."""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, examples: Iterable[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Examples in ascending order: their number, ids (T,) int32 and labels mask (T,) bool."""
        wanted = np.unique(np.fromiter(examples, dtype=np.int64))
        for path, first, end in zip(self.paths, self.starts, [*self.starts[1:], len(self)], strict=True):
            here = wanted[(wanted >= first) & (wanted < end)]
            shard = _open(path) if len(here) else {}
            for i in here.tolist():
                at = slice(*shard["offsets"][i - first : i - first + 2].tolist())
                yield i, shard["input_ids"][at], shard["labels_mask"][at]


@dataclass(frozen=True)
class Prefix:
    """Tokens that examples of the sample begin with, as many as they have in common."""

    ids: list[int]
    n_examples: int


@dataclass(frozen=True)
class Sharing:
    """What would be saved if each prefix of MIN_PREFIX tokens or more were computed once per step."""

    n_sampled: int
    n_tokens: int
    n_saved: int
    prefixes: list[Prefix] = field(default_factory=list)
    """Those that most is saved by, each as long as its examples agree; one may go on from another."""


def measure(folder: Path, split: str, stop_ids: Iterable[int] = ()) -> SplitFigures:
    """Count what the shards of ``split`` in ``folder`` hold; 40 bytes of memory an example."""
    paths, starts, stops = sorted(folder.glob(f"{split}-*.pt")), [], frozenset(stop_ids)
    lengths, n_labels, wholes, prompts, unended = array("q"), array("q"), array("Q"), array("Q"), 0
    origins = [np.empty(0, dtype=np.int64)]
    for path in paths:
        starts.append(len(lengths))
        shard = _open(path)
        origins.append((shard["source"].astype(np.int64) << 32) + shard["row"])
        for ids, mask, ends, n_prompts in _chunks(shard):
            content = memoryview(ids.tobytes())
            for start, end, n_prompt in zip(ends, ends[1:], n_prompts, strict=False):
                lengths.append(end - start)
                n_labels.append(mask.count(1, start, end))
                wholes.append(_hash(content[4 * start : 4 * end]))
                # one token is BOS alone: plain text, which asks nothing
                prompts.append(_hash(content[4 * start : 4 * (start + n_prompt)]) if n_prompt > 1 else wholes[-1])
                unended += bool(stops) and int(ids[mask.rfind(1, start, end)]) not in stops
    columns = (np.frombuffer(column, dtype=column.typecode) for column in (lengths, n_labels, wholes, prompts))
    lengths, n_labels, wholes, prompts = columns
    return SplitFigures(split, paths, starts, lengths, n_labels, unended, wholes, prompts, np.concatenate(origins))


def _open(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard, mapped into memory until the last of them is forgotten."""
    return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True, mmap=True).items()}


def _chunks(shard: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, bytes, list[int], list[int]]]:
    """Whole examples, as many as fit: ids, labels mask as bytes, where each begins and the last ends, n_prompt."""
    offsets, first = shard["offsets"], 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, "right")) - 1)
        here = slice(offsets[first], offsets[last])
        ends = (offsets[first : last + 1] - here.start).tolist()
        n_prompts = shard["n_prompt"][first:last].tolist()
        yield shard["input_ids"][here], shard["labels_mask"][here].tobytes(), ends, n_prompts
        first = last


def _hash(content: memoryview) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest())


def repeats(hashes: np.ndarray, origins: np.ndarray) -> tuple[int, int, int]:
    """How many repeat an earlier one of another origin; the number of one that most do, and how many these then are."""
    firsts = np.sort(np.unique(origins, return_index=True)[1])
    if not len(firsts):
        return 0, 0, 0
    _, first, counts = np.unique(hashes[firsts], return_index=True, return_counts=True)
    most = int(counts.max())
    return len(firsts) - len(counts), int(firsts[first[counts == most].min()]), most


def shuffled(n: int) -> np.ndarray:
    """The numbers below ``n`` in the one order that every estimate here draws from: (n,) int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()


def padded_tokens(lengths: np.ndarray, size: int) -> int:
    """Tokens computed when every ``size`` examples in turn are padded to the longest of them."""
    full = len(lengths) // size * size
    rest = lengths[full:]
    return size * int(lengths[:full].reshape(-1, size).max(1).sum()) + len(rest) * int(rest.max(initial=0))


def packed_rows(lengths: np.ndarray) -> list[list[list[int]]]:
    """Per step the rows of the training engine's packing, each the lengths of its examples."""
    steps = np.split(lengths, range(DEFAULT_BATCH_SIZE, len(lengths), DEFAULT_BATCH_SIZE))
    row_tokens = max(DEFAULT_ROW_TOKENS, int(lengths.max(initial=0)))
    return [[step[row].tolist() for row in pack(step.tolist(), row_tokens)] for step in steps if len(step)]


def measure_sharing(figures: SplitFigures) -> Sharing:
    """Look for common prefixes among at most SAMPLE examples, each followed for PREFIX_TOKENS tokens."""
    order = shuffled(len(figures))[:SAMPLE].tolist()
    # big-endian bytes sort as the ids do
    keys = {i: ids[:PREFIX_TOKENS].astype(">u4").tobytes() for i, ids, _ in figures.read(order)}
    saved = 0
    for start in range(0, len(order), DEFAULT_BATCH_SIZE):
        step = sorted(keys[i] for i in order[start : start + DEFAULT_BATCH_SIZE])
        # sorted, an example shares most with the one before it, so nothing else need be compared
        saved += sum(n for a, b in pairwise(step) if (n := _n_common(a, b)) >= MIN_PREFIX)
    n_tokens = int(figures.lengths[order].sum())
    return Sharing(len(order), n_tokens, saved, _most_common_prefixes(sorted(keys.values())))


def _n_common(a: bytes, b: bytes) -> int:
    """Tokens that both begin with."""
    n = min(len(a), len(b))
    different = np.frombuffer(a[:n], np.uint32) != np.frombuffer(b[:n], np.uint32)
    return int(different.argmax()) if different.any() else n // 4


def _most_common_prefixes(keys: list[bytes], count: int = 5) -> list[Prefix]:
    """Of the trie of ``keys``, which are sorted, the nodes that save most beyond the nodes above them."""
    found, nested = [], []  # nested: length and first key of each prefix that the last key seen still has
    for i, n in enumerate([*(_n_common(a, b) for a, b in pairwise(keys)), 0]):
        first = i
        while nested and nested[-1][0] > n:
            length, first = nested.pop()
            above = max(nested[-1][0] if nested else 0, n if n >= MIN_PREFIX else 0)
            found.append(((length - above) * (i - first), length, first, i + 1 - first))
        if n >= MIN_PREFIX and (not nested or nested[-1][0] < n):
            nested.append((n, first))
    best = sorted(found, key=lambda f: (-f[0], f[2], f[1]))[:count]
    least = MIN_SHARE * sum(map(len, keys)) / 4
    return [
        Prefix(np.frombuffer(keys[i][: 4 * n], ">u4").tolist(), many) for saved, n, i, many in best if saved >= least
    ]
