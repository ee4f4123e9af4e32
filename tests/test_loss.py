import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_sft import loss
from lit_sft.loss import IGNORE_INDEX, cross_entropy_sum


def inputs(T: int = 23, C: int = 8, V: int = 31) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, V, (T,))
    labels[torch.rand(T) < 0.4] = IGNORE_INDEX
    return torch.randn(T, C, dtype=torch.float64), nn.Linear(C, V, bias=True).double(), labels


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("head_trains", [True, False])
def test_sum_and_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, chunk: int, head_trains: bool) -> None:
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk)
    hidden, head, labels = inputs()
    head.requires_grad_(head_trains)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    total, n = cross_entropy_sum(ours, head, labels)
    expected = F.cross_entropy(head(plain), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    assert n == int((labels != IGNORE_INDEX).sum()) and torch.allclose(total, expected, rtol=1e-13)
    wanted = [plain, *(p for p in head.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(expected / 7, wanted)
    (total / 7).backward()
    assert torch.allclose(ours.grad, grads[0], rtol=1e-12, atol=1e-14)
    for parameter, grad in zip(head.parameters(), grads[1:], strict=False):
        assert torch.allclose(parameter.grad, grad, rtol=1e-12, atol=1e-14)
    if not head_trains:
        assert head.weight.grad is None


def test_no_labels_is_zero_and_nothing_flows() -> None:
    hidden, head, labels = inputs()
    hidden.requires_grad_()
    total, n = cross_entropy_sum(hidden, head, torch.full_like(labels, IGNORE_INDEX))
    total.backward()
    assert (total.item(), n) == (0.0, 0) and not hidden.grad.any()


def test_the_logits_of_a_row_are_never_held_at_once() -> None:
    """The head is called on chunks of labelled rows only."""
    hidden, head, labels = inputs(T=2000)
    seen = []
    head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with torch.no_grad():
        _, n = cross_entropy_sum(hidden, head, labels)
    assert sum(seen) == n < 2000 and max(seen) <= loss.CHUNK_ROWS


def test_low_precision_is_summed_in_fp32() -> None:
    hidden, head, labels = inputs(T=3000)
    total, _ = cross_entropy_sum(hidden.bfloat16(), head.bfloat16(), labels)
    logits = F.linear(hidden.bfloat16(), head.weight, head.bias).float()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    assert total.dtype == torch.float32 and torch.allclose(total, expected, rtol=1e-4)
