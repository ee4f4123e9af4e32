"""Which examples make step k, as packed rows.

A step is a set of examples that follows from (data, seed, k). Rows, micro-batches, devices and restarts only decide
how the same sum is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from lit_sft.args import TrainArgs
from lit_sft.errors import InputError
from lit_sft.loss import IGNORE_INDEX
from lit_sft.packing import pack
from lit_sft.shards import Shards

DEFAULT_BATCH_SIZE = 64
DEFAULT_ROW_TOKENS = 8192


@dataclass(frozen=True)
class Row:
    """Whole examples one behind the other, with what each position must predict."""

    input_ids: Tensor
    """(T,) int64."""
    labels: Tensor
    """(T,) int64: the next token where it is to be learned, IGNORE_INDEX elsewhere and at each example's end."""
    lengths: list[int]
    examples: list[int]

    def to(self, device: torch.device) -> "Row":
        """The same row with its tensors on ``device``."""
        return Row(self.input_ids.to(device), self.labels.to(device), self.lengths, self.examples)


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    number: int
    """From 1."""
    epoch: int
    """From 1."""
    examples: list[int]
    rows: list[Row]
    """This process's share of the examples."""
    n_labels: int
    """Labelled tokens of the whole step, over all processes: what the summed loss is divided by."""
    n_tokens: int
    """Useful tokens of the whole step."""


class TrainSteps:
    """The run's optimizer steps; ``steps[k]`` is step k, from 1 to ``max_steps``, in any order and at no cost."""

    def __init__(self, shards: Shards, args: TrainArgs, world_size: int = 1, rank: int = 0) -> None:
        """Raises InputError when there is nothing to train on or a row cannot hold the longest example."""
        if not len(shards):
            raise InputError(f"{args.data_dir} holds no training examples")
        self.shards, self.seed, self.world_size, self.rank = shards, args.seed, world_size, rank
        longest = int(shards.lengths.max())
        self.row_tokens = args.micro_batch_tokens or max(DEFAULT_ROW_TOKENS, longest)
        self.row_examples = args.micro_batch_size if args.micro_batch_size > 1 else None
        if longest > self.row_tokens:
            raise InputError(
                f"--micro_batch_tokens {self.row_tokens} is below the longest example of {longest} tokens; "
                "raise it or lower --max_seq_length"
            )
        self.order: tuple[int, Tensor] | None = None  # the epoch last asked for and its permutation
        n = len(shards)
        self.batch_size = args.global_batch_size or min(DEFAULT_BATCH_SIZE, max(1, n // 4))
        self.per_epoch = ceil(n / self.batch_size)
        limits = [args.max_steps, args.epochs * self.per_epoch if args.epochs else None]
        if args.max_iters:
            epochs, rest = divmod(args.max_iters * args.micro_batch_size, n)
            limits.append(epochs * self.per_epoch + ceil(rest / self.batch_size))
        self.max_steps = min(limit for limit in limits if limit is not None)

    def examples(self, number: int) -> list[int]:
        """The examples of step ``number``: a slice of the epoch's permutation; an epoch's last step may be smaller."""
        epoch, within = divmod(number - 1, self.per_epoch)
        if self.order is None or self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = (epoch, torch.randperm(len(self.shards), generator=generator))
        return self.order[1][within * self.batch_size : (within + 1) * self.batch_size].tolist()

    def __getitem__(self, number: int) -> Step:
        examples = self.examples(number)
        rows = pack_rows(self.shards, examples, self.row_tokens, self.row_examples)
        return Step(
            number=number,
            epoch=(number - 1) // self.per_epoch + 1,
            examples=examples,
            rows=[make_row(self.shards, row) for row in rows[self.rank :: self.world_size]],
            n_labels=int(self.shards.n_labels[examples].sum()),
            n_tokens=int(self.shards.lengths[examples].sum()),
        )


def pack_rows(shards: Shards, examples: list[int], max_tokens: int, max_examples: int | None = None) -> list[list[int]]:
    """Distribute ``examples`` over rows; every row is a list of examples."""
    rows = pack(shards.lengths[examples].tolist(), max_tokens, max_examples)
    return [[examples[i] for i in row] for row in rows]


def make_row(shards: Shards, examples: list[int]) -> Row:
    """Read the examples and lay them one behind the other."""
    parts = [shards[i] for i in examples]
    labels = []
    for ids, mask in parts:
        following = torch.full_like(ids, IGNORE_INDEX)
        following[:-1] = torch.where(mask[1:], ids[1:], IGNORE_INDEX)
        labels.append(following)
    return Row(torch.cat([ids for ids, _ in parts]), torch.cat(labels), [len(ids) for ids, _ in parts], examples)


class ValRows:
    """The whole val split as packed rows, this process's share, read anew each time it is iterated."""

    def __init__(self, shards: Shards, row_tokens: int, world_size: int = 1, rank: int = 0) -> None:
        self.shards = shards
        row_tokens = max([row_tokens, *shards.lengths.tolist()])  # training's longest may be shorter
        rows: list[list[int]] = []
        for start in range(0, len(shards), DEFAULT_BATCH_SIZE):  # in stretches: packing's cost grows with their square
            rows += pack_rows(shards, list(range(start, min(start + DEFAULT_BATCH_SIZE, len(shards)))), row_tokens)
        self.rows = rows[rank::world_size]

    def __iter__(self) -> Iterator[Row]:
        return (make_row(self.shards, row) for row in self.rows)
