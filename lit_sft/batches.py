"""Which examples make step k, as packed rows.

A step is a set of examples that follows from (data, seed, k). Rows, micro-batches, devices and restarts only decide
how the same sum is computed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from lit_sft.args import TrainArgs
from lit_sft.attention import Layout
from lit_sft.errors import InputError
from lit_sft.packing import pack
from lit_sft.prefixes import cut_rows, make_segments, sort_by_tokens
from lit_sft.shards import Shards
from lit_sft.upload import upload

DEFAULT_BATCH_SIZE = 64
DEFAULT_ROW_TOKENS = 8192
LOOKED_AT = 400  # steps, in search of the longest row: a second at most


@dataclass(frozen=True)
class Row:
    """Examples in one sequence, and what is to be predicted where."""

    input_ids: Tensor
    """(T,) int64."""
    layout: Layout
    """Which tokens are whose: one segment for each example, unless some share their beginnings."""
    positions: Tensor
    """(N,) int64: the positions that predict a label; one may do so more than once, for examples that part there."""
    labels: Tensor
    """(N,) int64: the token that follows."""
    counts: Tensor | None
    """(N,) int64: for how many examples it does; None: for one each."""
    examples: list[int]

    @property
    def n_labels(self) -> int:
        """Labelled tokens of all its examples."""
        return len(self.labels) if self.counts is None else int(self.counts.sum())

    def to(self, device: torch.device) -> "Row":
        """The same row with its tensors on ``device``, those of its layout among them; itself where they are."""
        if self.input_ids.device == device and device.type != "cpu":
            return self
        own = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        of_layout = {f"layout.{name}": x for name, x in self.layout.tensors().items()}  # both have positions
        moved = upload(own | of_layout, device)
        self.layout.place({name.partition(".")[2]: moved.pop(name) for name in of_layout})
        return replace(self, **moved)


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
    """Useful tokens of the whole step: those of its examples, shared ones counted for each."""


class TrainSteps:
    """The run's optimizer steps; ``steps[k]`` is step k, from 1 to ``max_steps``, in any order and at no cost."""

    def __init__(
        self, shards: Shards, args: TrainArgs, world_size: int = 1, rank: int = 0, share_prefix: bool = False
    ) -> None:
        """``share_prefix``: compute what examples of a row begin with alike once.

        Raises InputError when there is nothing to train on or a row cannot hold the longest example.
        """
        if not len(shards):
            raise InputError(f"{args.data_dir} holds no training examples")
        self.shards, self.seed, self.world_size, self.rank = shards, args.seed, world_size, rank
        self.share_prefix = share_prefix
        longest = int(shards.lengths.max())
        self.row_tokens = args.micro_batch_tokens or max(DEFAULT_ROW_TOKENS, longest)
        self.row_examples = args.micro_batch_size if args.micro_batch_size > 1 else None
        if longest > self.row_tokens:
            raise InputError(
                f"--micro_batch_tokens {self.row_tokens} is below the longest example of {longest} tokens; "
                "raise it or lower --max_seq_length"
            )
        self.shuffled = shards.manifest.facts.get("order", "shuffle") == "shuffle"
        self.order: tuple[int, Tensor] | None = None  # the epoch last asked for and its permutation
        n = len(shards)
        self.batch_size = args.global_batch_size or min(DEFAULT_BATCH_SIZE, max(1, n // 4))
        self.per_epoch = ceil(n / self.batch_size)
        limits = {}
        if args.max_steps:
            limits[f"--max_steps {args.max_steps}"] = args.max_steps
        if args.max_iters:
            epochs, rest = divmod(args.max_iters * args.micro_batch_size, n)
            limits[f"--max_iters {args.max_iters}"] = epochs * self.per_epoch + ceil(rest / self.batch_size)
        if args.epochs:
            limits[f"--epochs {args.epochs}"] = args.epochs * self.per_epoch
        self.limit = min(limits, key=limits.__getitem__)
        self.max_steps = limits[self.limit]

    def examples(self, number: int) -> list[int]:
        """The examples of step ``number``: a slice of the epoch's permutation, or of the order the data prescribe.

        An epoch is spread evenly: its steps differ by one example at most, and none exceeds the batch size.
        """
        epoch, within = divmod(number - 1, self.per_epoch)
        n = len(self.shards)
        start, end = within * n // self.per_epoch, (within + 1) * n // self.per_epoch
        if not self.shuffled:
            return list(range(start, end))
        if self.order is None or self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = (epoch, torch.randperm(n, generator=generator, dtype=torch.int32))
        return self.order[1][start:end].tolist()

    def heaviest_row(self) -> Row:
        """The longest row of the run, over all processes.

        Of a run of more than LOOKED_AT steps it is one that none exceeds: the longest examples, the last one cut.
        """
        if self.max_steps <= LOOKED_AT:
            return self.heaviest_of(range(1, self.max_steps + 1))
        order = self.shards.lengths.argsort(descending=True, stable=True)[: self.row_examples or self.batch_size]
        n_taken = int((self.shards.lengths[order].cumsum(0) < self.row_tokens).sum()) + 1
        return _cut(make_row(self.shards, RowPlan(order[:n_taken].tolist(), None)), self.row_tokens)

    def heaviest_of(self, numbers: Iterable[int]) -> Row:
        """The longest row of these steps, over all processes."""
        plans = (plan for number in numbers for plan in self._plan(self.examples(number)))
        lengths = self.shards.lengths
        return make_row(
            self.shards, max(plans, key=lambda p: int(lengths[p.examples].sum()) - sum((p.shared or [0])[1:]))
        )

    def _plan(self, examples: list[int]) -> list["RowPlan"]:
        """The rows of all processes; shorter ones than need be where there would be none for some of them."""
        lengths, max_tokens = self.shards.lengths[examples], self.row_tokens
        longest = int(lengths.max())
        if self.world_size > 1:
            max_tokens = min(max_tokens, max(longest, ceil(1.1 * int(lengths.sum()) / self.world_size)))
        while True:
            rows = plan_rows(self.shards, examples, max_tokens, self.row_examples, self.share_prefix)
            if len(rows) >= self.world_size or max_tokens == longest:
                return rows
            max_tokens = max(longest, max_tokens * 7 // 8)  # what is shared left them too few

    def alone(self, example: int) -> Row:
        """A row of one example."""
        return make_row(self.shards, RowPlan([example], None))

    def __getitem__(self, number: int) -> Step:
        examples = self.examples(number)
        rows = self._plan(examples)
        return Step(
            number=number,
            epoch=(number - 1) // self.per_epoch + 1,
            examples=examples,
            rows=[make_row(self.shards, row) for row in rows[self.rank :: self.world_size]],
            n_labels=sum(map(self.shards.n_labels, examples)),
            n_tokens=int(self.shards.lengths[examples].sum()),
        )


class Ahead:
    """The steps of a run one after the other, each made and moved while the device computes the one before."""

    def __init__(self, steps: TrainSteps, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.taken, self.made = 0, None

    def prepare(self, number: int) -> None:
        """Make step ``number``, if the run has one, for a later ``take``."""
        if number > self.steps.max_steps:
            self.made = None
            return
        step = self.steps[number]
        if self.device.type != "cpu":  # nothing is to be moved there, and a row's layout is made when it is needed
            step = replace(step, rows=[row.to(self.device) for row in step.rows])
        self.made = step

    def take(self, number: int) -> Step:
        """Step ``number``, made before or now."""
        if self.made is None or self.made.number != number:
            self.prepare(number)
        self.taken = number
        return self.made

    def prepare_next(self) -> None:
        """Make the step after the one last taken."""
        self.prepare(self.taken + 1)


class RowPlan(NamedTuple):
    """Which examples make a row, before they are read."""

    examples: list[int]
    shared: list[int] | None
    """How many tokens each shares with the one before it; None: nothing is shared."""


def plan_rows(
    shards: Shards, examples: list[int], max_tokens: int, max_examples: int | None, share_prefix: bool
) -> list[RowPlan]:
    """Distribute ``examples`` over rows."""
    lengths = shards.lengths[examples].tolist()
    if not share_prefix:
        return [RowPlan([examples[i] for i in row], None) for row in pack(lengths, max_tokens, max_examples)]
    order, shared = sort_by_tokens([shards[i][0] for i in examples])
    rows = cut_rows([lengths[i] for i in order], shared, max_tokens, max_examples)
    return [RowPlan([examples[order[i]] for i in row], [shared[i] for i in row]) for row in rows]


def make_row(shards: Shards, plan: RowPlan) -> Row:
    """Read the examples of a row; those that begin alike have their common tokens once."""
    parts = [shards[i] for i in plan.examples]
    lengths = [len(ids) for ids, _ in parts]
    segments, last = make_segments(lengths, plan.shared or [0] * len(lengths))
    parents = [segment.parent for segment in segments]
    layout = Layout([s.end - s.start for s in segments], parents if any(p is not None for p in parents) else None)
    input_ids = torch.cat([parts[s.example][0][s.start : s.end] for s in segments])
    starts = [0, *accumulate(layout.lengths)]
    positions, labels = [], []
    for (ids, mask), end in zip(parts, last, strict=True):
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in layout.chains[end]])
        labelled = mask[1:].nonzero().flatten()
        positions.append(where[labelled])
        labels.append(ids[labelled + 1])
    positions, labels, counts = torch.cat(positions), torch.cat(labels), None
    if layout.shares:  # a shared label is computed once, and counts as often as there are examples that have it
        n_ids = int(input_ids.max()) + 1
        # position and label in one number: pairs as rows of a matrix take ten times as long
        pairs, counts = (positions * n_ids + labels).unique(return_counts=True)
        positions, labels = pairs // n_ids, pairs % n_ids
    return Row(input_ids, layout, positions, labels, counts, plan.examples)


def _cut(row: Row, n_tokens: int) -> Row:
    """The first tokens of a row in which nothing is shared."""
    ends = [min(end, n_tokens) for end in accumulate(row.layout.lengths)]
    lengths = [end - start for start, end in pairwise([0, *ends])]
    kept = row.positions < n_tokens
    cut = {"positions": row.positions[kept], "labels": row.labels[kept]}
    return replace(row, input_ids=row.input_ids[:n_tokens], layout=Layout(lengths), **cut)


class ValRows:
    """The whole val split as packed rows, this process's share, read anew each time it is iterated."""

    def __init__(
        self, shards: Shards, row_tokens: int, world_size: int = 1, rank: int = 0, share_prefix: bool = False
    ) -> None:
        self.shards = shards
        longest = int(shards.lengths.max()) if len(shards) else 0  # training's may be shorter
        row_tokens = max(row_tokens, longest)
        rows: list[RowPlan] = []
        for start in range(0, len(shards), DEFAULT_BATCH_SIZE):  # in stretches: packing's cost grows with their square
            stretch = list(range(start, min(start + DEFAULT_BATCH_SIZE, len(shards))))
            rows += plan_rows(shards, stretch, row_tokens, None, share_prefix)
        self.rows = rows[rank::world_size]

    def __iter__(self) -> Iterator[Row]:
        return (make_row(self.shards, row) for row in self.rows)
