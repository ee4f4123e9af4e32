import pytest
import torch
from torch import nn

from lit_sft.args import TrainArgs
from lit_sft.optim import build_optimizer, lr_schedule, master_parameters, warmup_steps


def rates(max_steps: int, **args: object) -> list[float]:
    lr_at = lr_schedule(TrainArgs(learning_rate=1.0, **args), max_steps)
    return [lr_at(step) for step in range(1, max_steps + 1)]


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_schedule_is_that_of_transformers_one_step_on(shape: str) -> None:
    """transformers' first step has learning rate 0 under warmup; ours begins where its second does."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(shape, optimizer, num_warmup_steps=10, num_training_steps=100)
    expected = []
    for _ in range(100):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(100, lr_schedule=shape, lr_warmup_steps=10)
    assert ours[:10] == pytest.approx(expected[1:11]) and ours[10:] == pytest.approx(expected[10:])


def test_warmup_is_capped_by_the_length_of_the_run() -> None:
    """LIMA's 1,000 iterations gave Lit-GPT 31 updates, all of them in warmup and the first at learning rate 0."""
    assert warmup_steps(TrainArgs(lr_warmup_steps=100), 31) == 3
    ours = rates(31, lr_warmup_steps=100)
    assert ours[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0]) and min(ours) > 0
    assert rates(1, lr_warmup_steps=100) == [1.0]


def test_min_lr_and_constant() -> None:
    assert rates(5, lr_schedule="constant", lr_warmup_steps=0) == [1.0] * 5
    assert 0.1 < rates(50, min_lr=0.1, lr_warmup_steps=0)[-1] < 0.11


def test_sixteen_bit_weights_follow_fp32_masters() -> None:
    """Updates far below bf16's resolution add up, and gradients of several backwards are summed in fp32."""
    torch.manual_seed(0)
    low, reference = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    low = low.bfloat16()
    with torch.no_grad():
        reference.weight.copy_(low.weight)
    args = TrainArgs(learning_rate=1e-5, weight_decay=0.0)
    masters = master_parameters(low)
    optimizer = build_optimizer(low, masters, args)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-5, weight_decay=0.0)
    start = low.weight.detach().clone()
    for _ in range(300):
        for x in torch.eye(8).split(3):
            low(x.bfloat16()).float().sum().backward()
            reference(x).sum().backward()
        optimizer.step(), plain.step()
        optimizer.zero_grad(), plain.zero_grad()
    assert masters["weight"].dtype == torch.float32 and low.weight.grad is None
    assert torch.allclose(masters["weight"], reference.weight, atol=1e-6)
    assert torch.equal(low.weight, masters["weight"].bfloat16()) and not torch.equal(low.weight, start)


def test_wide_parameters_are_their_own_masters_and_frozen_ones_have_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    masters = master_parameters(model)
    assert list(masters) == ["0.weight", "0.bias"] and masters["0.weight"] is model[0].weight
