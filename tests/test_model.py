import pytest
import torch

from lit_sft import GPT, KVCache, ModelConfig
from lit_sft.attention import Layout, Scoring, packed_attention

CONFIGS = {
    "multi-head": {"n_head": 4, "n_query_groups": 4},
    "grouped-query": {"n_head": 4, "n_query_groups": 2},
    "multi-query, biases": {"n_head": 4, "n_query_groups": 1, "qkv_bias": True, "projection_bias": True},
    "llama3 rope, tied": {"n_head": 2, "n_query_groups": 2, "rope_type": "llama3", "rope_factor": 8.0,
                          "rope_original_block_size": 16, "tie_embeddings": True},
}  # fmt: skip


def make_model(seed: int = 0, **fields: object) -> GPT:
    torch.manual_seed(seed)
    shape = {"block_size": 64, "vocab_size": 50, "n_layer": 3, "n_embd": 32, "head_size": 8, "intermediate_size": 40}
    return GPT(ModelConfig(**{**shape, **fields})).double().eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_is_its_examples_one_by_one(name: str) -> None:
    """States and every gradient, in fp64, for examples of length 1, equal lengths and one alone."""
    lengths = [7, 1, 12, 7, 30]
    row = ids(1, sum(lengths))
    packed, separate = make_model(**CONFIGS[name]), make_model(**CONFIGS[name])
    states = packed.hidden_states(row, Layout(lengths))
    alone = [separate.hidden_states(part) for part in row.split(lengths, dim=1)]
    assert torch.allclose(states, torch.cat(alone, 1), rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(states)
    (states * weights).sum().backward()
    sum((a * w).sum() for a, w in zip(alone, weights.split(lengths, 1), strict=True)).backward()
    for (n, p), q in zip(packed.named_parameters(), separate.parameters(), strict=True):
        if p.grad is None:  # the head, which hidden_states does not reach
            assert n == "lm_head.weight" and q.grad is None
        else:
            assert torch.allclose(p.grad, q.grad, rtol=1e-11, atol=1e-13), n


def test_packing_without_isolation_would_be_seen() -> None:
    model, row = make_model(**CONFIGS["grouped-query"]), ids(1, 20)
    assert (model.hidden_states(row, Layout([8, 12])) - model.hidden_states(row, Layout([20]))).abs().max() > 1e-3


def test_packed_attention_against_a_plain_masked_softmax() -> None:
    torch.manual_seed(0)
    lengths, H, G, D = [5, 1, 9], 6, 2, 4
    T = sum(lengths)
    query, key, value = (torch.randn(1, n, T, D, dtype=torch.float64) for n in (H, G, G))
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    wide_key, wide_value = (x.repeat_interleave(H // G, dim=1) for x in (key, value))
    scores = (query @ wide_key.transpose(-1, -2) / D**0.5).masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ wide_value
    assert torch.allclose(
        packed_attention(query, key, value, Layout(lengths), Scoring(D**-0.5)), expected, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [9, 1, 1, 6, 3]])
def test_decoding_with_the_cache_equals_the_full_forward(name: str, chunks: list[int]) -> None:
    model, row = make_model(**CONFIGS[name]), ids(2, 20)
    cache = KVCache(model.config, 2, 20, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in row.split(chunks, dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), model(row), rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="holds 20 tokens"):
            model(row[:, :1], cache=cache)


def test_positions_beyond_block_size_are_computed_not_wrapped() -> None:
    model = make_model(**CONFIGS["multi-head"])
    with torch.no_grad():
        assert model(ids(1, 80)).isfinite().all()


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_blocks_have_the_same_gradients(every: int) -> None:
    """Dropout in adapters and experts included: what is computed again is what was computed."""
    from lit_sft.args import LoRAArgs
    from lit_sft.lora import apply_lora, lora_state_dict

    row, gradients, calls = ids(1, 20), [], []
    for checkpoint_every in (0, every):
        model = make_model(n_head=4, n_query_groups=2, n_expert=4, n_expert_per_token=2)
        dropout = apply_lora(model, LoRAArgs(lora_r=3, lora_dropout=0.3), seed=0)
        for i, (name, p) in enumerate(lora_state_dict(model).items()):
            if name.endswith("B"):
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
        dropout.begin_row(1, [5, 6], [12, 8], torch.device("cpu"))
        model.checkpoint_every, seen = checkpoint_every, []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        (model.train().hidden_states(row, Layout([12, 8])) ** 3).sum().backward()
        gradients.append({name: p.grad for name, p in lora_state_dict(model).items()})
        calls.append(len(seen))
    assert calls == [3, 3 + len(range(0, 3, every))]
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-12 * gradient.norm(), name
