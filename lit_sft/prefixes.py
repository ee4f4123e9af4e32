"""Shared prefixes: where examples of a row begin with the same tokens, those are stored and computed once.

A row is then a forest of segments: a segment continues another, or begins an example. A causal model's states at a
token depend on the tokens before it alone, so what a shared token computes is exact for every example that has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from torch import Tensor

MIN_SHARED = 8  # tokens: two examples that begin alike for less are not worth a segment of their own


@dataclass(frozen=True)
class Segment:
    """A stretch of one example's tokens in a row, on behalf of every example that shares it."""

    example: int
    """Whose tokens are taken, as an index into the examples of the row."""
    start: int
    end: int
    parent: int | None
    """The segment that it continues, by its number in the row; None: it begins an example."""


def sort_by_tokens(examples: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Examples in the order of their tokens, in which those that begin alike are neighbours.

    Args:
        examples: the ids of each, (T,).

    Returns:
        Indices into ``examples``, and for each but the first how many tokens it shares with the one before, 0 where
        that is below MIN_SHARED. Sharing within a row of neighbours saves exactly these.
    """
    tokens = [ids.tolist() for ids in examples]
    order = sorted(range(len(tokens)), key=lambda i: (tokens[i], i))
    common = [_common(tokens[a], tokens[b]) for a, b in pairwise(order)]
    return order, [0, *(n if n >= MIN_SHARED else 0 for n in common)]


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C: much faster than token by token
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def cut_rows(lengths: list[int], shared: list[int], max_tokens: int, max_examples: int | None) -> list[range]:
    """Cut sorted examples into as few rows as fit, of nearly equal length once prefixes are shared within a row.

    Args:
        lengths: tokens of each example, every one at most ``max_tokens``.
        shared: of ``sort_by_tokens``.
        max_tokens: most tokens of a row, a shared one counted once.
        max_examples: most examples of a row; None: any number.
    """
    rows = _fill(lengths, shared, max_tokens, max_examples)
    if rows is None:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into a row of {max_tokens}")
    low = ceil((sum(lengths) - sum(shared)) / max(len(rows), 1))
    high = max_tokens
    while low < high:  # the least length at which no row more is needed
        middle = (low + high) // 2
        shorter = _fill(lengths, shared, middle, max_examples)
        if shorter is not None and len(shorter) <= len(rows):
            rows, high = shorter, middle
        else:
            low = middle + 1
    return rows


def _fill(lengths: list[int], shared: list[int], max_tokens: int, max_examples: int | None) -> list[range] | None:
    """Rows filled one after the other; None when an example is longer than a row."""
    rows, start, filled = [], 0, 0
    for i, length in enumerate(lengths):
        added = length - (shared[i] if i > start else 0)
        if i > start and (filled + added > max_tokens or (max_examples and i - start >= max_examples)):
            rows.append(range(start, i))
            start, filled, added = i, 0, length
        if length > max_tokens:
            return None
        filled += added
    return [*rows, range(start, len(lengths))] if lengths else []


def make_segments(lengths: list[int], shared: list[int]) -> tuple[list[Segment], list[int | None]]:
    """The segments of one row of sorted examples.

    Args:
        lengths: tokens of each.
        shared: tokens that each shares with the one before; the first one's is not read.

    Returns:
        The segments, every one behind its parent; and for each example its last segment.
    """
    segments: list[Segment] = []
    last: list[int | None] = [None] * len(lengths)
    # (first and past the last example, tokens they have in common so far, the segment that holds the last of those)
    waiting: list[tuple[int, int, int, int | None]] = [(0, len(lengths), 0, None)]
    while waiting:
        low, high, depth, parent = waiting.pop()
        common = min(shared[low + 1 : high]) if high - low > 1 else lengths[low]
        if common > depth:
            segments.append(Segment(low, depth, common, parent))
            parent = len(segments) - 1
        if high - low == 1:
            last[low] = parent
            continue
        bounds = [low, *(i for i in range(low + 1, high) if shared[i] == common), high]
        groups = [(a, b, common, parent) for a, b in pairwise(bounds)]
        waiting += reversed(groups)  # so that the row is in the order of its examples
    return segments, last
