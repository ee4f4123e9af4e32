"""The kernel that takes all segments at once is given what it must be: here a plain loop stands in for it."""

import pytest
import torch
from torch import Tensor

from lit_sft import attention
from lit_sft.attention import Layout, Scoring, packed_attention

LAYOUTS = {
    "examples": Layout([5, 1, 7]),
    "one example": Layout([13]),
    "a shared prefix": Layout([4, 3, 5, 1], [None, 0, 0, None]),
    "nested prefixes": Layout([3, 2, 4, 1, 3], [None, 0, 1, 1, 0]),
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
