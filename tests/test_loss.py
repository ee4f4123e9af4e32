import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_sft import loss
from lit_sft.loss import cross_entropy_sum


def inputs(T: int = 23, C: int = 8, V: int = 31, bias: bool = True) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, V, (T,))
    return torch.randn(T, C, dtype=torch.float64), nn.Linear(C, V, bias).double(), labels


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_sum_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, chunk: int, head_trains: bool, bias: bool, counted: bool, softcap: float | None
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(loss, "CPU_LOGITS", 1)
    monkeypatch.setattr(loss, "STRIP_ROWS", 5)
    hidden, head, labels = inputs(bias=bias)
    counts = torch.arange(1, len(labels) + 1) if counted else None
    times = counts if counted else torch.ones(len(labels), dtype=torch.int64)
    head.requires_grad_(head_trains)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    total = cross_entropy_sum(ours, head, labels, counts, softcap)
    logits = head(plain) if softcap is None else softcap * torch.tanh(head(plain) / softcap)
    expected = F.cross_entropy(logits.repeat_interleave(times, 0), labels.repeat_interleave(times), reduction="sum")
    assert torch.allclose(total, expected, rtol=1e-13)
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
    total = cross_entropy_sum(hidden[:0], head, labels[:0])
    total.backward()
    assert total.item() == 0.0 and not hidden.grad.any()


def test_the_logits_of_a_row_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is called on chunks of rows, all alike."""
    monkeypatch.setattr(loss, "CPU_LOGITS", 1)
    hidden, head, labels = inputs(T=2000)
    seen = []
    head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with torch.no_grad():
        cross_entropy_sum(hidden, head, labels)
    assert seen == [250] * 8 and max(seen) <= loss.CHUNK_ROWS


@pytest.mark.parametrize("vocab_size", [800, 32_000, 50_304, 256_000])
@pytest.mark.parametrize("n", [0, 1, 255, 512, 4097, 100_000])
def test_chunks_are_alike_and_their_logits_bounded(n: int, vocab_size: int) -> None:
    for cuda, elements in ((False, loss.CPU_LOGITS), (True, loss.CUDA_LOGITS)):
        rows = loss.chunk_rows(n, vocab_size, cuda)
        assert rows >= 1 and (rows <= loss.CHUNK_ROWS or rows * vocab_size <= elements)
        assert cuda or loss.chunk_rows(min(n, loss.CHUNKS * rows), vocab_size) == rows, "as --estimate has it"
        assert rows * -(-n // rows) - n < max(1, -(-n // rows)), "the last chunk is short by less than a row each"


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.11 has no fused loss to compare with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_fused_loss_of_torch(dtype: torch.dtype) -> None:
    hidden, head, labels = inputs(T=300, C=32, V=997, bias=False)
    hidden, head = hidden.to(dtype), head.to(dtype).requires_grad_(False)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    total = cross_entropy_sum(ours, head, labels)
    expected = F.linear_cross_entropy(theirs, head.weight, labels, reduction="sum")
    total.backward()
    expected.backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(total, expected.float(), rtol=tolerance)
    assert (ours.grad - theirs.grad).norm() < tolerance * theirs.grad.norm()


def test_counted_losses_are_summed_in_fp32_under_autocast_too() -> None:
    """A product of losses and counts would be one that autocast rounds."""
    hidden, head, labels = inputs(T=3000, C=16, bias=False)
    hidden, head, counts = hidden.float(), head.float().requires_grad_(False), torch.randint(1, 9, (3000,))
    with torch.autocast("cpu", torch.bfloat16):
        total = cross_entropy_sum(hidden, head, labels, counts)
        logits = head(hidden).float()
    expected = F.cross_entropy(logits, labels, reduction="none").double() @ counts.double()
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_nothing_is_differentiated_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation of a trained head would otherwise make its gradients for each row."""
    wanted, losses = [], loss._losses
    monkeypatch.setattr(loss, "_losses", lambda *args: (wanted.append(args[-1]), losses(*args))[1])
    hidden, head, labels = inputs()
    with torch.no_grad():
        without = cross_entropy_sum(hidden, head, labels)
    within = cross_entropy_sum(hidden, head, labels)
    assert wanted == [False, True] and torch.equal(without, within.detach())


def test_low_precision_is_summed_in_fp32() -> None:
    hidden, head, labels = inputs(T=3000)
    total = cross_entropy_sum(hidden.bfloat16(), head.bfloat16(), labels)
    logits = F.linear(hidden.bfloat16(), head.weight, head.bias).float()
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert total.dtype == torch.float32 and torch.allclose(total, expected, rtol=1e-4)
