"""Shared prefixes against examples computed one by one, in fp64: losses and every gradient."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import make_model

from lit_sft.args import LoRAArgs
from lit_sft.attention import Layout
from lit_sft.batches import RowPlan, make_row, plan_rows
from lit_sft.lora import LoRALinear, apply_lora
from lit_sft.loss import cross_entropy_sum
from lit_sft.prefixes import MIN_SHARED, cut_rows, make_segments, sort_by_tokens

MODELS = {
    "multi-head": {"n_head": 4, "n_query_groups": 4},
    "grouped-query": {"n_head": 4, "n_query_groups": 2},
    "parallel residual": {"n_head": 4, "n_query_groups": 4, "parallel_residual": True, "norm": "layer",
                          "gated_mlp": False, "rotary_size": 4},
    "sliding window": {"n_head": 4, "n_query_groups": 2, "sliding_window": 7, "sliding_layers": (True, False, True)},
    "soft-cap": {"n_head": 4, "n_query_groups": 1, "attention_softcap": 1.0, "logits_softcap": 2.0},
    "alibi": {"n_head": 4, "n_query_groups": 4, "alibi": True, "rotary_size": 0},
    "experts": {"n_head": 4, "n_query_groups": 2, "n_expert": 4, "n_expert_per_token": 2},
    "longrope": {"n_head": 2, "n_query_groups": 2, "rope_type": "longrope", "rope_original_block_size": 64,
                 "rope_short_factors": (1.0, 1.5, 2.0, 3.0), "rope_long_factors": (2.0, 3.0, 4.0, 9.0)},
}  # fmt: skip


class Examples:
    """Stands for Shards: examples in memory."""

    def __init__(self, examples: list[tuple[list[int], list[bool]]]) -> None:
        self.examples = [(torch.tensor(ids), torch.tensor(mask)) for ids, mask in examples]
        self.lengths = torch.tensor([len(ids) for ids, _ in examples])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.examples[index]


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def families_of_examples(labels: str) -> Examples:
    """No prefix at all, two preambles that share a beginning, a nested one, equal examples, one-token suffixes."""
    head, first, second, nested = random_ids(9, 1), random_ids(12, 2), random_ids(11, 3), random_ids(10, 4)
    texts = [
        random_ids(13, 5),
        head + first + random_ids(6, 6),
        head + first + random_ids(1, 7),
        head + second + nested + random_ids(4, 8),
        head + second + nested + random_ids(7, 9),
        head + second + random_ids(1, 10),
        head + second,  # itself the prefix of others
        head + first + random_ids(6, 6),  # equal to another
        random_ids(1, 5) + random_ids(9, 11),  # shares one token with the first: too few
    ]
    n_prompt = {"all": 1, "responses": 8, "last": 10**6}[labels]
    masks = [[i >= min(n_prompt, len(ids) - 1) for i in range(len(ids))] for ids in texts]
    return Examples(list(zip(texts, masks, strict=True)))


def loss_and_gradients(model: torch.nn.Module, rows: list) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for row in rows:
        hidden = model.hidden_states(row.input_ids[None], row.layout)[0, row.positions]
        loss = cross_entropy_sum(hidden, model.lm_head, row.labels, row.counts, model.config.logits_softcap)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", ["all", "responses", "last"])
@pytest.mark.parametrize("max_tokens", [60, 1000])
def test_shared_rows_have_the_loss_and_gradients_of_separate_examples(name: str, labels: str, max_tokens: int) -> None:
    shards = families_of_examples(labels)
    everyone = list(range(len(shards)))
    shared = [make_row(shards, plan) for plan in plan_rows(shards, everyone, max_tokens, None, share_prefix=True)]
    separate = [make_row(shards, RowPlan([i], None)) for i in everyone]
    saved = int(shards.lengths.sum()) - sum(row.input_ids.numel() for row in shared)
    assert saved >= 60 if max_tokens == 1000 else saved > 0
    assert sum(row.n_labels for row in shared) == sum(row.n_labels for row in separate)
    loss, gradients = loss_and_gradients(make_model(**MODELS[name]), shared)
    expected, wanted = loss_and_gradients(make_model(**MODELS[name]), separate)
    assert loss == pytest.approx(expected, rel=1e-12) and gradients.keys() == wanted.keys()
    for parameter, gradient in gradients.items():
        error = (gradient - wanted[parameter]).norm() / wanted[parameter].norm()
        assert error < 1e-12, f"{parameter}: {error:.1e}"


def test_an_adapter_gets_the_same_gradients() -> None:
    shards, gradients = families_of_examples("responses"), []
    everyone = list(range(len(shards)))
    for share in (True, False):
        model = make_model(**MODELS["grouped-query"])
        apply_lora(model, LoRAArgs(lora_r=3, lora_head=True), seed=0)
        for i, module in enumerate(m for m in model.modules() if isinstance(m, LoRALinear)):
            torch.nn.init.normal_(module.lora_B, generator=torch.Generator().manual_seed(i))
        rows = [make_row(shards, plan) for plan in plan_rows(shards, everyone, 100, None, share)]
        gradients.append(loss_and_gradients(model, rows)[1])
    assert all(name.endswith(("lora_A", "lora_B")) for name in gradients[0]) and len(gradients[0]) == 2 * (3 * 7 + 1)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() / gradients[1][name].norm() < 1e-12, name


examples_alike = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=2, max_size=30), st.integers(0, 12)),
    min_size=1,
    max_size=10,
)


@settings(max_examples=100)
@given(examples_alike)
def test_labels_that_examples_share_are_counted(drawn: list[tuple[int, list[int], int]]) -> None:
    """Positions, labels and counts are those of ``unique`` over pairs, in its order."""
    heads = [[0] * 20 + [n % 2] * 9 for n in range(4)]
    texts = [heads[head] + tail for head, tail, _ in drawn]
    shards = Examples(
        [(ids, [i >= n_prompt for i in range(len(ids))]) for ids, (*_, n_prompt) in zip(texts, drawn, strict=True)]
    )
    for plan in plan_rows(shards, list(range(len(texts))), 10**4, None, share_prefix=True):
        row = make_row(shards, plan)
        if row.counts is None:
            continue
        pairs = []
        _, last = make_segments([len(texts[i]) for i in plan.examples], plan.shared)
        starts = [sum(row.layout.lengths[:i]) for i in range(len(row.layout.lengths))]
        for number, end in zip(plan.examples, last, strict=True):
            where = [t for i in row.layout.chains[end] for t in range(starts[i], starts[i] + row.layout.lengths[i])]
            ids, mask = shards[number]
            pairs += [(where[t], int(ids[t + 1])) for t in range(len(ids) - 1) if mask[t + 1]]
        expected, counts = torch.tensor(pairs).unique(dim=0, return_counts=True)
        assert torch.equal(torch.stack([row.positions, row.labels], 1), expected)
        assert torch.equal(row.counts, counts)


def test_longrope_refuses_to_share_between_long_and_short_examples() -> None:
    """A token of an example past the original context turns otherwise than the same token of a short one."""
    config = {**MODELS["longrope"], "rope_original_block_size": 30}
    with pytest.raises(ValueError, match="longrope"):
        make_model(**config).hidden_states(torch.ones(1, 40, dtype=torch.int64), Layout([20, 12, 8], [None, 0, 0]))


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@settings(max_examples=200)
@given(st.lists(st.builds(lambda a, b: [7] * a + b, st.integers(0, 30), tokens), min_size=1, max_size=12))
def test_segments_give_back_every_example(examples: list[list[int]]) -> None:
    """Each example is its chain of segments, and nothing is stored twice that neighbours share."""
    order, shared = sort_by_tokens([torch.tensor(ids) for ids in examples])
    ids = [examples[i] for i in order]
    assert sorted(order) == list(range(len(examples))) and ids == sorted(ids)
    for before, after, n in zip(ids, ids[1:], shared[1:], strict=False):
        common = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        assert n == (common if common >= MIN_SHARED else 0)
    segments, last = make_segments([len(x) for x in ids], shared)
    layout = Layout([s.end - s.start for s in segments], [s.parent for s in segments])
    assert sum(layout.lengths) == sum(map(len, ids)) - sum(shared)
    assert all(s.parent is None or s.parent < number for number, s in enumerate(segments))
    for example, end in zip(ids, last, strict=True):
        parts = [segments[i] for i in layout.chains[end]]
        assert [t for s in parts for t in ids[s.example][s.start : s.end]] == example
        assert [s.start for s in parts] == [0, *(s.end for s in parts[:-1])]


@settings(max_examples=200)
@given(st.lists(tokens, min_size=1, max_size=30), st.integers(60, 300), st.sampled_from([None, 1, 4]))
def test_rows_are_within_bounds_and_balanced(examples: list[list[int]], most: int, most_examples: int | None) -> None:
    order, shared = sort_by_tokens([torch.tensor(ids) for ids in examples])
    lengths = [len(examples[i]) for i in order]
    rows = cut_rows(lengths, shared, most, most_examples)
    assert [i for row in rows for i in row] == list(range(len(examples)))
    tokens = [sum(lengths[i] for i in row) - sum(shared[i] for i in row[1:]) for row in rows]
    assert max(tokens) <= most and (most_examples is None or max(map(len, rows)) <= most_examples)
    if most_examples is None:  # no row more than needed, to within the longest example of each
        assert len(rows) <= 2 * sum(lengths) / most + 1


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        cut_rows([5, 11], [0, 0], 10, None)


@pytest.mark.parametrize("share", [True, False])
def test_a_step_of_the_loop_is_the_same_shared_or_not(tmp_path: Path, share: bool) -> None:
    """Positions, labels and counts of a row, against a plain reading of its examples."""
    shards = families_of_examples("all")
    for plan in plan_rows(shards, list(range(len(shards))), 90, None, share):
        row = make_row(shards, plan)
        seen: dict[tuple, int] = {}
        places = row.layout.positions().tolist()
        chains = {}  # the tokens up to each position of the row
        starts = [0]
        for n in row.layout.lengths:
            starts.append(starts[-1] + n)
        for chain in row.layout.chains:
            text = []
            for i in chain:
                for t in range(starts[i], starts[i + 1]):
                    text.append(int(row.input_ids[t]))
                    chains[t] = tuple(text)
        counts = row.counts.tolist() if row.counts is not None else [1] * len(row.labels)
        for position, label, count in zip(row.positions.tolist(), row.labels.tolist(), counts, strict=True):
            assert len(chains[position]) == places[position] + 1
            key = (chains[position], label)
            seen[key] = seen.get(key, 0) + count
        wanted: dict[tuple, int] = {}
        for i in plan.examples:
            ids, mask = (x.tolist() for x in shards[i])
            for t in range(1, len(ids)):
                if mask[t]:
                    key = (tuple(ids[:t]), ids[t])
                    wanted[key] = wanted.get(key, 0) + 1
        assert seen == wanted
