import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lit_sft.shards
from lit_sft.atomic import Manifest
from lit_sft.errors import InputError
from lit_sft.samples import Example
from lit_sft.shards import FACTS, KIND, Shards, write_shards


def example(n_prompt: int, n_response: int, start: int = 0) -> Example:
    ids = list(range(start, start + n_prompt + n_response))
    return Example(ids, [False] * n_prompt + [True] * n_response, n_prompt)


def write(folder: Path, train: list[Example], val: list[Example] = ()) -> Path:
    folder.mkdir(parents=True)
    names = [
        name for split, examples in (("train", train), ("val", val)) for name in write_split(folder, split, examples)
    ]
    Manifest(KIND, {"tokenizer": "0" * 64, "checkpoint_dir": "base", "arguments": {}}).write(folder, names)
    return folder


def write_split(folder: Path, split: str, examples: list[Example]) -> list[str]:
    """The examples are handed over in the wrong order, which is allowed, and with more than their length."""
    facts = {
        "n_prompt": [e.n_prompt for e in examples],
        "n_labels": [sum(e.labels_mask) for e in examples],
        "source": [0 for _ in examples],
        "row": list(range(1, len(examples) + 1)),
    }

    def read(start: int, end: int) -> list[tuple[int, list[int], list[bool]]]:
        return [
            (i, [*examples[i].input_ids, -1], [*examples[i].labels_mask, True]) for i in reversed(range(start, end))
        ]

    lengths = torch.tensor([len(e.input_ids) for e in examples], dtype=torch.int64)
    return write_shards(folder, split, lengths, {name: torch.tensor(fact) for name, fact in facts.items()}, read)


def read(shards: Shards) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in (shards[i] for i in range(len(shards)))]


def counts(shards: Shards) -> list[int]:
    return [shards.n_labels(i) for i in range(len(shards))]


@pytest.fixture
def examples() -> list[Example]:
    draw = random.Random(0)
    return [example(draw.randint(1, 9), draw.randint(1, 9), 2**31 - 40 - i) for i in range(23)]


def test_what_is_on_disk(tmp_path, examples):
    """The contract: tensors only, under these names and dtypes, readable through a memory map."""
    folder = write(tmp_path / "data", examples, examples[:3])
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "train-00000.pt", "val-00000.pt"]
    tensors = torch.load(folder / "train-00000.pt", weights_only=True, mmap=True)
    dtypes = {"input_ids": torch.int32, "labels_mask": torch.bool, "offsets": torch.int64} | FACTS
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dtypes
    assert all(tensor.ndim == 1 for tensor in tensors.values())
    assert tensors["input_ids"].tolist() == [i for e in examples for i in e.input_ids]
    assert tensors["labels_mask"].tolist() == [i for e in examples for i in e.labels_mask]
    ends = [sum(len(e.input_ids) for e in examples[:k]) for k in range(len(examples) + 1)]
    assert tensors["offsets"].tolist() == ends
    assert tensors["n_prompt"].tolist() == [e.n_prompt for e in examples]
    assert tensors["n_labels"].tolist() == [sum(e.labels_mask) for e in examples]
    assert tensors["row"].tolist() == list(range(1, 24))


@pytest.mark.parametrize("shard_tokens", [1, 7, 40, 1 << 26])
def test_round_trip(tmp_path, monkeypatch, examples, shard_tokens):
    monkeypatch.setattr(lit_sft.shards, "SHARD_TOKENS", shard_tokens)
    folder = write(tmp_path / "data", examples, examples[::2])
    names = sorted(path.name for path in folder.glob("train-*"))
    assert names == [f"train-{i:05d}.pt" for i in range(len(names))]
    assert len(names) == {1: 23, 1 << 26: 1}.get(shard_tokens, len(names)) and (shard_tokens > 40 or len(names) > 3)
    for split, expected in (("train", examples), ("val", examples[::2])):
        shards = Shards(folder, split)
        assert read(shards) == [(e.input_ids, e.labels_mask) for e in expected]
        assert shards.lengths.tolist() == [len(e.input_ids) for e in expected]
        assert counts(shards) == [sum(e.labels_mask) for e in expected]
        assert shards.n_cut == 0
        ids, mask = shards[0]
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_more_shards_than_digits_sort_well(tmp_path, monkeypatch):
    monkeypatch.setattr(lit_sft.shards, "SHARD_TOKENS", 1)
    folder = write(tmp_path / "data", [example(1, 1, i) for i in range(12)])
    assert [ids[0] for ids, _ in read(Shards(folder, "train"))] == list(range(12))


@pytest.mark.parametrize("shard_tokens", [30, 1 << 26])
def test_cut_again(tmp_path, monkeypatch, examples, shard_tokens):
    monkeypatch.setattr(lit_sft.shards, "SHARD_TOKENS", shard_tokens)
    folder = write(tmp_path / "data", examples)
    for length in range(10, 19):
        shards = Shards(folder, "train", length)
        expected = [(e.input_ids[:length], e.labels_mask[:length]) for e in examples]
        assert read(shards) == expected
        assert shards.lengths.tolist() == [len(ids) for ids, _ in expected]
        assert counts(shards) == [sum(mask) for _, mask in expected]
        assert shards.n_cut == sum(len(e.input_ids) > length for e in examples)


def test_a_cut_that_leaves_no_label_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lit_sft.shards, "SHARD_TOKENS", 10)
    folder = write(tmp_path / "data", [example(2, 9), example(7, 3), example(1, 1), example(5, 9)], [example(1, 20)])
    with pytest.raises(InputError) as caught:
        Shards(folder, "train", 5)
    said = str(caught.value)
    assert "cut to 5 tokens, 2 train examples keep no label (the first: [1, 3])" in said
    assert "--max_seq_length 8 keeps all" in said and "--max_seq_length 5 --on_overflow drop" in said
    assert counts(Shards(folder, "train", 8)) == [6, 1, 1, 3]
    with pytest.raises(InputError, match="1 train examples keep no label"):
        Shards(folder, "train", 7)
    assert len(Shards(folder, "val", 5)) == 1  # the other split has no part in it


def test_empty_val(tmp_path):
    folder = write(tmp_path / "data", [example(1, 1)])
    for length in (None, 1):
        shards = Shards(folder, "val", length)
        assert (len(shards), shards.lengths.tolist(), counts(shards), shards.n_cut) == (0, [], [], 0)
        assert shards.lengths.dtype == torch.int32


def test_labels_may_have_gaps(tmp_path):
    gaps = Example([5, 6, 7, 8, 9], [False, True, False, True, False], 1)
    folder = write(tmp_path / "data", [gaps])
    cut = Shards(folder, "train", 3)
    assert (counts(cut), read(cut)) == ([1], [([5, 6], [False, True])])  # back to the last label
    assert (gaps.n_needed, [gaps.n_kept(n) for n in (1, 2, 3, 4, 5, 6)]) == (4, [0, 2, 2, 4, 5, 5])


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12),
    shard_tokens=st.integers(1, 30),
    length=st.one_of(st.none(), st.integers(7, 13)),
)
def test_any_shapes(tmp_path_factory, shapes, shard_tokens, length):
    examples = [example(*shape, start=i) for i, shape in enumerate(shapes)]
    before, lit_sft.shards.SHARD_TOKENS = lit_sft.shards.SHARD_TOKENS, shard_tokens
    try:
        folder = write(tmp_path_factory.mktemp("shards") / "data", examples)
    finally:
        lit_sft.shards.SHARD_TOKENS = before
    shards = Shards(folder, "train", length)
    assert read(shards) == [(e.input_ids[:length], e.labels_mask[:length]) for e in examples]
    assert counts(shards) == [sum(mask) for _, mask in read(shards)]
    shutil.rmtree(folder)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(folder: Path) -> None:
    path = folder / "train-00000.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is not prepared: manifest.json missing"),
    "no directory": (lambda f: shutil.rmtree(f), "make it with a scripts/prepare_"),
    "cut manifest": (lambda f: (f / "manifest.json").write_text('{"kind": "da'), "is not a manifest of this lit_sft"),
    "manifest of others": (lambda f: (f / "manifest.json").write_text('{"name": "web app"}'), "is not a manifest"),
    "no object": (lambda f: (f / "manifest.json").write_text("[1]"), "is not a manifest"),
    "binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\0"), "is not a manifest"),
    "newer": (lambda f: edit(f, format_version=99), "has format 99, newer than 1; update lit_sft"),
    "other kind": (lambda f: edit(f, kind="adapter", digest=None), "is a adapter directory, not a data directory"),
    "no shard": (lambda f: (f / "train-00000.pt").unlink(), "train-00000.pt is missing"),
    "cut shard": (lambda f: (f / "train-00000.pt").write_bytes(b"PK"), "has 2 bytes, not "),
    "flipped bit": (flip_a_byte, "differs from its recorded sha256: damaged"),
}


@pytest.mark.parametrize(("damage", "fragment"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused(tmp_path, examples, damage, fragment):
    folder = write(tmp_path / "data", examples)
    damage(folder)
    with pytest.raises(InputError) as caught:
        Shards(folder, "train")
    assert fragment in str(caught.value) and "\n" not in str(caught.value)
