import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sft.packing import bucket_length, pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200), st.none() | st.integers(1, 7))
def test_every_example_is_in_one_row_that_fits(lengths: list[int], max_tokens: int, max_examples: int | None) -> None:
    rows = pack(lengths, max_tokens, max_examples)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= max_tokens for row in rows)
    assert max_examples is None or all(len(row) <= max_examples for row in rows)
    assert rows == pack(lengths, max_tokens, max_examples)


def test_rows_are_balanced() -> None:
    lengths = [(i * 37) % 400 + 20 for i in range(64)]
    filled = [sum(lengths[i] for i in row) for row in pack(lengths, 4096)]
    assert len(filled) == -(-sum(lengths) // 4096) and min(filled) > 0.97 * max(filled)


def test_one_row_when_all_fit() -> None:
    assert pack([3, 1, 2], 6) == [[0, 1, 2]]


def test_buckets() -> None:
    lengths = [bucket_length(n) for n in range(1, 9000)]
    assert all(n <= padded < n + max(64, n / 16) for n, padded in enumerate(lengths, 1))
    assert all(bucket_length(padded) == padded for padded in set(lengths)) and lengths == sorted(lengths)
    for low, high in pairwise([512, 1024, 2048, 4096, 8192]):
        assert len({padded for padded in lengths if low < padded <= high}) <= 16


@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192])
@pytest.mark.parametrize("batch_size", [64, 128])
def test_hardly_anything_is_padded_and_rows_are_balanced(max_tokens: int, batch_size: int) -> None:
    """Lengths distributed as in instruction data: log-normal around 200 tokens, none above 800."""
    draw, useful, computed = random.Random(batch_size), 0, 0
    for _ in range(10):
        lengths = [min(800, round(math.exp(draw.gauss(5.3, 0.5)))) for _ in range(batch_size)]
        rows = [sum(lengths[i] for i in row) for row in pack(lengths, max_tokens)]
        assert len(rows) <= math.ceil(sum(lengths) / max_tokens) + 1
        assert max(rows) <= 1.1 * min(rows)
        useful, computed = useful + sum(rows), computed + sum(map(bucket_length, rows))
    assert useful >= 0.97 * computed
