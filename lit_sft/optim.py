"""AdamW over fp32 parameters, and the learning rate of each step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_sft.args import TrainArgs


def master_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer updates: every trainable parameter by name, in fp32 or better.

    A parameter stored in 16 bits gets an fp32 master: its gradients are accumulated there as they arrive, and
    ``publish`` rounds the updated master back after each step. Without it 16-bit weights lose small updates.
    """
    masters = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype.itemsize >= 4:
            masters[name] = parameter
            continue
        masters[name] = master = nn.Parameter(parameter.detach().float())

        def collect(low: Tensor, master: nn.Parameter = master) -> None:
            master.grad = low.grad.float() if master.grad is None else master.grad.add_(low.grad)
            low.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
    return masters


def build_optimizer(model: nn.Module, masters: dict[str, nn.Parameter], args: TrainArgs) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over ``masters``; each step reaches ``model``."""
    fused = args.precision != "16-mixed"  # fused, it would unscale gradients itself, and those could not be clipped
    optimizer = torch.optim.AdamW(masters.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=fused)
    pairs = _pairs(masters, model)  # none where all is trained in fp32: a walk over the model costs a millisecond
    optimizer.register_step_post_hook(lambda *_: _copy(pairs))
    return optimizer


def publish(masters: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Copy masters into the model's own parameters, where they are not the same."""
    _copy(_pairs(masters, model))


def _pairs(masters: dict[str, nn.Parameter], model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The model's own parameters that have a master apart, with it."""
    named = [(parameter, masters.get(name)) for name, parameter in model.named_parameters()]
    return [(parameter, master) for parameter, master in named if master is not None and master is not parameter]


@torch.no_grad()
def _copy(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    for parameter, master in pairs:
        parameter.copy_(master)


def warmup_steps(args: TrainArgs, max_steps: int) -> int:
    """Steps of warmup: as asked, but at most a tenth of the run."""
    return min(args.lr_warmup_steps, max_steps // 10)


def lr_schedule(args: TrainArgs, max_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step (from 1): linear warmup, then the chosen shape down to min_lr.

    The first step's rate is above 0 and the first step after warmup has the full rate.
    """
    warmup = warmup_steps(args, max_steps)

    def lr_at(step: int) -> float:
        if step <= warmup:
            return args.learning_rate * step / warmup
        progress = (step - 1 - warmup) / max(1, max_steps - warmup)
        height = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "constant": 1.0,
        }[args.lr_schedule]
        return args.min_lr + (args.learning_rate - args.min_lr) * height

    return lr_at
