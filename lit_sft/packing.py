"""Which examples share a packed row: balanced rows of whole examples, nothing padded, nothing cut."""

from heapq import heappop, heappush
from math import ceil


def pack(lengths: list[int], max_tokens: int, max_examples: int | None = None) -> list[list[int]]:
    """Distribute examples over as few rows as fit, of nearly equal length.

    Args:
        lengths: tokens of each example, every one at most ``max_tokens``.
        max_tokens: most tokens of a row.
        max_examples: most examples of a row; None: any number.

    Returns:
        The rows, each a list of indices into ``lengths`` in ascending order. The result follows from the arguments
        alone. Longest-processing-time-first (Graham 1969) balances; a row more is opened until all fit.

    Raises ValueError when an example is longer than a row.
    """
    if max(lengths, default=0) > max_tokens:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into a row of {max_tokens}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n_rows = max(ceil(sum(lengths) / max_tokens), ceil(len(lengths) / max_examples) if max_examples else 1)
    while (rows := _balance(order, lengths, n_rows, max_tokens, max_examples)) is None:
        n_rows += 1
    return [sorted(row) for row in rows if row]


def bucket_length(n_tokens: int) -> int:
    """The length to which a row is padded where shapes must repeat, as for compiled kernels and graphs.

    Multiples of 64, and of a 32nd of the next power of two: at most 16 lengths between one power and the next, and at
    most 6 % of padding from 1,024 tokens on, 2 % on average over balanced rows.
    """
    step = max(64, (1 << (n_tokens - 1).bit_length()) // 32)
    return -(-n_tokens // step) * step


def _balance(
    order: list[int], lengths: list[int], n_rows: int, max_tokens: int, max_examples: int | None
) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    shortest_first = [(0, r) for r in range(n_rows)]
    for i in order:
        filled, r = heappop(shortest_first)
        if filled + lengths[i] > max_tokens:
            return None
        rows[r].append(i)
        if max_examples is None or len(rows[r]) < max_examples:
            heappush(shortest_first, (filled + lengths[i], r))
    return rows
