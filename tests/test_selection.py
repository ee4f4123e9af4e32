"""Selection is a pure function of measures: tried on tables made by hand, against plain Python."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sft.errors import InputError
from lit_sft.measures import measure, signatures
from lit_sft.mixing import MixedSource
from lit_sft.prepare_args import PrepareArgs
from lit_sft.prompts import Message
from lit_sft.selection import Selection, select, split_size
from lit_sft.spool import ROW


class Named:
    """Of a stream, only the name is used here."""

    def __init__(self, name: str) -> None:
        self.name = name


def table(*rows: dict) -> np.ndarray:
    """Examples of 10 tokens, 4 of them the prompt, each unlike the others, except for what is given."""
    made = np.zeros(len(rows), ROW)
    for i, row in enumerate(rows):
        defaults = {"row": i + 1, "length": 10, "n_prompt": 4, "text": i, "prompt": i, "question": i}
        values = defaults | {"alphanumeric": 1.0} | row
        values = {"n_needed": values["length"], "n_kept": values["length"], "n_labels": values["length"] - 4} | values
        for name, value in values.items():
            made[name][i] = value
    return made


def chosen(
    rows: np.ndarray, *sources: MixedSource, limit: int = 100, shares: object = None, **flags: object
) -> Selection:
    sources = sources or (MixedSource(Named("d.csv"), flags.get("val_split_fraction", 0.0)),)
    found = np.empty((len(rows), 0), np.uint32) if shares is None else shares
    return select(rows, found, list(sources), PrepareArgs(**{"val_split_fraction": 0.0} | flags), limit, 512)


def source(name: str, **settings: object) -> MixedSource:
    return MixedSource(Named(name), settings.pop("val_split_fraction", 0.0), **settings)


FILTERS = {
    "min_tokens": ("length", [9, 10, 11], 10, "too_short", [1, 2]),
    "max_tokens": ("length", [9, 10, 11], 10, "too_long", [0, 1]),
    "min_response_tokens": ("n_prompt", [3, 4, 5], 6, "short_response", [0, 1]),  # of ten tokens
    "min_alphanumeric_share": ("alphanumeric", [0.2, 0.5, 0.9], 0.5, "few_letters", [1, 2]),
    "max_repetition_share": ("repetition", [0.2, 0.5, 0.9], 0.5, "repetitive", [0, 1]),
}


@pytest.mark.parametrize("flag", FILTERS)
def test_filters(flag):
    field, values, threshold, rule, kept = FILTERS[flag]
    rows = table(*({field: value} for value in values))
    found = chosen(rows, **{flag: threshold}, order="as_given")
    assert found.train.tolist() == kept and found.counts[0][rule] == 1
    assert len(chosen(rows).train) == 3  # off by default
    worst = {"min": 1.0 if "share" in flag else 10**6, "max": 0.0 if "share" in flag else 1}[flag[:3]]
    with pytest.raises(InputError, match=f"no example is left; left out were: 3 {rule.replace('_', ' ')}; relax"):
        chosen(table(*({field: values[0 if flag[:3] == "min" else 2]} for _ in range(3))), **{flag: worst})


def test_scores():
    rows = table({"row": 1}, {"row": 3}, {"row": 4}, {"row": 1, "source": 1})
    rated = source("a", scores=np.array([5.0, 0.0, 4.5, 4.4]), min_score=4.5)
    found = chosen(rows, rated, source("b"), order="as_given")
    assert found.train.tolist() == [0, 1, 3]
    assert [counts["low_score"] for counts in found.counts] == [1, 0]
    for bad, says in (
        ([5.0, np.nan, 1, 1], "no score for row 2 of a"),
        ([5.0], "row 2"),
        ([5.0] * 5, "rates row 5, a"),
    ):
        with pytest.raises(InputError, match=says):
            replace(rated, scores=np.array(bad)).check_scores(4)
    rated.check_scores(4)


@given(hashes=st.lists(st.integers(0, 6), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_of_duplicates_the_first_stays(hashes):
    found = chosen(table(*({"text": value} for value in hashes)), deduplicate="exact", order="as_given")
    assert found.train.tolist() == [i for i, value in enumerate(hashes) if value not in hashes[:i]]
    assert found.counts[0]["duplicates"] == len(hashes) - len(found.train)


def test_what_a_filter_left_out_makes_no_other_a_duplicate():
    rows = table({"text": 7, "length": 3}, {"text": 7})
    assert chosen(rows, deduplicate="exact", min_tokens=5).train.tolist() == [1]


def sample(words: list[str]) -> tuple[Message, ...]:
    return Message("user", "Say something"), Message("assistant", " ".join(words))


def test_near_duplicates():
    """Estimated from signatures; the true Jaccard similarity of word triples is computed here in plain Python."""
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(500)]
    texts = [draw.choices(vocabulary, k=60) for _ in range(40)]
    for i in range(40):
        copy = list(texts[i])
        for _ in range(i % 8):
            copy[draw.randrange(60)] = "changed"
        texts.append(copy)

    def triples(words: list[str]) -> set:
        words = ["say", "something", *words]
        return set(zip(words, words[1:], words[2:], strict=False))

    found = signatures([sample(words) for words in texts])
    rows = table(*({} for _ in texts))
    kept = set(chosen(rows, shares=found, deduplicate="near", near_duplicate_similarity=0.8).train.tolist())
    for i in range(40):
        a, b = triples(texts[i]), triples(texts[40 + i])
        similarity = len(a & b) / len(a | b)
        assert i in kept
        if similarity > 0.92 or similarity < 0.68:  # three standard deviations of the estimate
            assert (40 + i in kept) == (similarity < 0.8), similarity


def test_measures():
    one = measure((Message("user", "What IS it?", "a, b"), Message("assistant", "ab—é 9!")), [1, 2, 3, 1, 2, 3, 1])
    same = measure((Message("user", "what is it", "a b"), Message("assistant", "ab—é 9!")), [])
    assert one.question == same.question and one.prompt != same.prompt and one.text != same.text
    assert one.alphanumeric == pytest.approx(4 / 6) and one.repetition == pytest.approx(2 / 5)  # 123 231 312 123 231
    other = measure((Message("user", "What IS it?", "a, b"), Message("assistant", "No.")), None)
    assert other.prompt == one.prompt and other.text != one.text and other[3:] == (0, 0)
    marks = [measure((Message("user", text), Message("assistant", "x")), None).question for text in ("?!", "!!", "?!")]
    assert marks[0] == marks[2] != marks[1]  # without any word there is nothing to be the same without
    talk = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    assert measure(talk, None).prompt == measure(talk[:2], None).prompt != measure(talk[2:], None).prompt


@pytest.mark.parametrize(("rule", "train", "val"), [("keep", 6, 3), ("move", 8, 1), ("drop", 6, 1)])
def test_leakage(rule, train, val):
    """Of three val examples, which the seed draws, one has a train example's prompt and one its words."""
    rows = table(*({} for _ in range(9)))
    flags = {"val_split_fraction": 0.34, "seed": 3}
    before = chosen(rows, **flags)
    a, b, c = sorted(before.val.tolist())
    there, here = before.train[:2].tolist()
    rows["prompt"][a] = rows["prompt"][there]
    rows["question"][a], rows["question"][b] = rows["question"][there], rows["question"][here]
    found = chosen(rows, **flags, on_leakage=rule)
    assert (found.counts[0]["leaked"], found.counts[0]["leaked_exactly"]) == (2, 1)
    assert (len(found.train), len(found.val)) == (train, val) and c in found.val
    assert {a, b} <= set(found.train) | (set(found.val) if rule == "keep" else set()) or rule == "drop"


def test_the_overflow_rules():
    """Limit 8: the second needs 8 of its 10 tokens, the third keeps 7 when cut, the last one nothing."""
    rows = table({"length": 8}, {"n_needed": 8, "n_kept": 8}, {"n_kept": 7}, {"n_prompt": 9, "n_kept": 0})
    assert chosen(rows, limit=8, on_overflow="drop").dropped.tolist() == [2, 3]
    with pytest.raises(
        InputError, match=r"1 examples keep no label when cut \(d.csv row 4\); --max_seq_length 10 keeps"
    ):
        chosen(rows, limit=8)
    assert sorted(chosen(rows[:3], limit=8).train) == [0, 1, 2]
    with pytest.raises(
        InputError, match=r"2 examples are longer than that .d.csv row 3, d.csv row 4.; --max_seq_length"
    ):
        chosen(rows, limit=8, on_overflow="error")
    with pytest.raises(InputError, match="no example is left; the shortest has 8 tokens"):
        chosen(rows, limit=5, on_overflow="drop")


def test_splits_are_of_each_source():
    rows = table(*({"source": i % 3} for i in range(90)))
    found = chosen(rows, source("a", val_split_fraction=0.5), source("b"), source("c", val_split_fraction=0.1))
    assert Counter(rows["source"][found.val].tolist()) == {0: 15, 2: 3}
    assert sorted([*found.train, *found.val]) == list(range(90))
    assert not chosen(rows[:1], source("a", val_split_fraction=0.9)).val.size and split_size(0, 0.5) == 0


def test_the_seed_decides_what_is_held_out_and_drawn():
    rows = table(*({} for _ in range(1000)))
    half = source("a", max_examples=500, val_split_fraction=0.1)
    found = [chosen(rows, half, seed=seed) for seed in (0, 1, 2, 0)]
    assert all((len(f.train), len(f.val), f.counts[0]["not_drawn"]) == (450, 50, 500) for f in found)
    for name in ("train", "val"):
        sets = [set(getattr(f, name).tolist()) for f in found]
        assert sets[0] == sets[3] and len(sets[0] & sets[1]) < 0.7 * len(sets[0]) > len(sets[1] & sets[2])
    assert (found[0].train == found[3].train).all()
    assert 380 < np.mean(found[0].train) < 620 and 300 < np.mean(found[0].val) < 700  # from all over the data


def test_weights_are_shares_of_an_epoch():
    """The scarce source is taken whole, others are drawn from; what is repeated counts as often."""
    rows = table(*({"source": int(i >= 100)} for i in range(1100)))
    found = chosen(rows, source("a", weight=1.0), source("b", weight=3.0))
    assert Counter(rows["source"][found.train].tolist()) == {0: 100, 1: 300}
    assert [counts["not_drawn"] for counts in found.counts] == [0, 700]
    twice = chosen(rows, source("a", weight=1, repeat=2), source("b", weight=3))
    assert Counter(rows["source"][twice.train].tolist()) == {0: 200, 1: 600}
    assert set(Counter(twice.train[rows["source"][twice.train] == 0].tolist()).values()) == {2}
    split = chosen(rows, source("a", weight=1, val_split_fraction=0.2), source("b", weight=3, val_split_fraction=0.1))
    assert Counter(rows["source"][split.train].tolist()) == {0: 80, 1: 240}
    assert Counter(rows["source"][split.val].tolist()) == {0: 20, 1: 100}
    capped = chosen(rows, source("a", weight=1.0, max_examples=10), source("b", weight=1.0))
    assert Counter(rows["source"][capped.train].tolist()) == {0: 10, 1: 10}
    with pytest.raises(InputError, match="b has no example left to give its weight to"):
        chosen(rows[:100], source("a", weight=1.0), source("b", weight=1.0))


def test_a_source_may_be_val_as_a_whole():
    rows = table(*({"source": int(i >= 6)} for i in range(9)))
    found = chosen(rows, source("a"), source("b", val_split_fraction=1.0))
    assert (sorted(found.train), sorted(found.val)) == (list(range(6)), [6, 7, 8])


def test_val_is_never_repeated():
    rows = table(*({} for _ in range(20)))
    found = chosen(rows, source("a", repeat=3, val_split_fraction=0.25))
    assert len(found.val) == len(set(found.val)) == 5 and Counter(Counter(found.train.tolist()).values()) == {3: 15}


def test_orders():
    rows = table(*({"source": i // 4, "length": 30 - 7 * i % 11} for i in range(8)))
    sources = source("a"), source("b", repeat=2)
    given_twice = [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert chosen(rows, *sources, order="as_given").train.tolist() == given_twice
    by_length = chosen(rows, *sources, order="length").train
    assert rows["length"][by_length].tolist() == sorted(rows["length"][given_twice].tolist())
    by_source = chosen(rows, *sources, order="source").train.tolist()
    assert sorted(by_source) == sorted(given_twice) and {*by_source[:4]} == {0, 1, 2, 3}
    shuffled = chosen(rows, *sources).train.tolist()
    assert sorted(shuffled) == sorted(given_twice) and shuffled != given_twice
    assert shuffled == chosen(rows, *sources).train.tolist() != chosen(rows, *sources, seed=1).train.tolist()
