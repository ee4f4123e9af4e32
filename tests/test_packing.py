from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sft.packing import pack


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
