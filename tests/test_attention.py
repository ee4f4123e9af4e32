"""The kernel that takes all segments at once is given what it must be: here a plain loop stands in for it."""

import pytest
import torch
from test_model import make_model
from torch import Tensor
from torch.library import opcheck

from lit_sft import attention, model
from lit_sft.attention import Layout, Scoring, add_up_rows, gather_rows, packed_attention

LAYOUTS = {
    "examples": Layout([5, 1, 7]),
    "one example": Layout([13]),
    "a shared prefix": Layout([4, 3, 5, 1], [None, 0, 0, None]),
    "nested prefixes": Layout([3, 2, 4, 1, 3], [None, 0, 1, 1, 0]),
    "three deep": Layout([4, 3, 1, 2, 2, 1], [None, 0, 1, 2, 2, 1]),
}


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """torch's ``varlen_attn`` as its documentation and flash attention's describe it, in fp64, one query at a time."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert key.shape[1] == query.shape[1] or enable_gqa
    outputs = torch.zeros_like(query)
    rows = []
    for n in range(len(cu_seq_q) - 1):
        q, k = query[cu_seq_q[n] : cu_seq_q[n + 1]], key[cu_seq_k[n] : cu_seq_k[n + 1]]
        v = value[cu_seq_k[n] : cu_seq_k[n + 1]]
        assert len(q) <= max_q and len(k) <= max_k
        for i in range(len(q)):
            own = len(k) - len(q) + i  # the last query sees the last key
            first = 0 if window_size[0] < 0 else max(0, own - window_size[0])
            heads = []
            for h in range(query.shape[1]):
                g = h // (query.shape[1] // key.shape[1])
                weights = (k[first : own + 1, g] @ q[i, h] * scale).softmax(0)
                heads.append(weights @ v[first : own + 1, g])
            rows.append(torch.stack(heads))
    return outputs + torch.stack(rows)


def plain_varlen_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """Without ``enable_gqa``: fewer key heads are taken without being told."""
    ends = cu_seq_q, cu_seq_k, max_q, max_k
    return plain_varlen(query, key, value, *ends, scale=scale, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("kernel", [plain_varlen, plain_varlen_of_torch_2_11])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_kernel_over_all_segments(
    name: str, groups: int, window: int | None, kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    query, key, value = (torch.randn(1, h, 13, 8, dtype=torch.float64) for h in (4, groups, groups))
    upstream, results = torch.randn(1, 4, 13, 8, dtype=torch.float64), []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    for fits in (False, True):
        monkeypatch.setattr(attention, "takes_spans", lambda *_, fits=fits: fits)
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        mixed = packed_attention(*leaves, layout, Scoring(scale=0.3, window=window))
        results.append([mixed, *torch.autograd.grad(mixed, leaves, upstream)])
    for segments, whole in zip(*results, strict=True):
        assert (segments - whole).norm() <= 1e-12 * segments.norm()


def test_what_cannot_be_kept_apart_is_refused() -> None:
    x = torch.zeros(1, 2, 6, 8)
    for query, layout in ((x, Layout([3, 2])), (x.expand(2, 2, 6, 8), Layout([3, 3]))):
        with pytest.raises(ValueError, match="are no layout of a row"):
            packed_attention(query, query, query, layout, Scoring(scale=1.0))


@pytest.mark.parametrize("spans", [False, True])
def test_a_row_of_another_length_than_its_layout_is_refused(spans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one kernel takes all segments too: offsets do not say how long a row is, nor of how many rows."""
    monkeypatch.setattr(model, "takes_spans", lambda *_: spans)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, *_, **__: torch.zeros_like(query))
    gpt = make_model(n_head=4, n_query_groups=2)
    assert gpt.hidden_states(torch.ones(1, 6, dtype=torch.int64), Layout([4, 2])).shape[1] == 6
    for shape, lengths in (((1, 6), [1]), ((2, 6), [4, 2])):
        with pytest.raises(ValueError, match="are no layout of a row"):
            gpt.hidden_states(torch.ones(shape, dtype=torch.int64), Layout(lengths))


def test_a_layout_whose_segments_all_begin_an_example_is_one_without_parents() -> None:
    for begun in (Layout([3, 2], [None, None]), Layout([3, 2])):
        placed = begun.on(torch.device("cpu"))
        assert placed.spans.keys is None and placed.positions.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.parents])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_are_what_the_compiler_takes_them_for(name: str, dtype: torch.dtype) -> None:
    keys = LAYOUTS[name].on(torch.device("cpu")).spans.keys
    x = torch.randn(13, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    opcheck(gather_rows, (x, *keys))
    opcheck(add_up_rows, (torch.randn(len(keys.index), 2, 8).to(dtype), *keys[1:]))


def test_rows_gathered_often_are_added_up_in_fp32() -> None:
    """A thousand examples that begin alike: in bf16 the sum would stop where a part is below half its last bit."""
    layout = Layout([1] + [1] * 1000, [None] + [0] * 1000)
    keys = layout.on(torch.device("cpu")).spans.keys
    grad = torch.ones(len(keys.index), 1, 1, dtype=torch.bfloat16)
    assert add_up_rows(grad, *keys[1:])[0, 0, 0] == torch.tensor(1001.0).bfloat16()


@pytest.mark.parametrize("lengths", [[9, 4], [700, 600]])
def test_bfloat16_of_short_segments_is_computed_in_fp32(lengths: list[int]) -> None:
    """Which is faster on a CPU and nearer to the truth; long ones stay as they are."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, sum(lengths), 16, dtype=torch.float64).bfloat16() for _ in range(3))
    mixed = packed_attention(query, key, value, Layout(lengths), Scoring(scale=0.25))
    exact = packed_attention(query.double(), key.double(), value.double(), Layout(lengths), Scoring(scale=0.25))
    assert mixed.dtype == torch.bfloat16
    rounded = (mixed - exact.bfloat16()).abs().max()
    assert rounded <= 2**-7 * exact.abs().max()
    assert (rounded == 0 or (mixed != exact.bfloat16()).float().mean() < 0.01) == (max(lengths) < 512)
