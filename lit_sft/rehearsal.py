"""The rehearsal: before the first step the longest row of the run is computed and undone, to know that it fits."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lit_sft.args import TrainArgs
from lit_sft.batches import Step, TrainSteps
from lit_sft.errors import InputError
from lit_sft.fitting import Plan
from lit_sft.loop import listed, train_step
from lit_sft.lora import ExampleDropout
from lit_sft.model import GPT
from lit_sft.optim import publish

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def rehearse(
    fabric: Fabric,
    model: GPT,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: TrainSteps,
    args: TrainArgs,
    plan: Plan,
    done: int,
    dropout: ExampleDropout | None = None,
) -> None:
    """Make an optimizer step, twice, of the run's heaviest row alone, and put every bit back where it was.

    Twice, because the first one makes the optimizer's slots after it has computed the row.

    ``done``: steps made before, after which only some settings may change.

    Raises InputError, which names the row's examples and a setting that is predicted to fit, when it does not fit.
    """
    row = steps.heaviest_row()
    step = Step(0, 0, row.examples, [row], row.n_labels, row.input_ids.numel())
    precision = fabric.strategy.precision
    scaler = deepcopy(precision.state_dict())
    # not in the GPU's memory, which the row may need
    slots = tree_map(_on_cpu, optimizer.state_dict())
    before = {name: _on_cpu(p.detach()) for name, p in trained.items()}
    too_large = None
    try:
        with suppress(FloatingPointError):  # the run itself says it better, with the number of its step
            for _ in range(2):
                train_step(fabric, model, optimizer, args.learning_rate, step, args, dropout)
    except (MemoryError, torch.OutOfMemoryError) as error:
        too_large = str(error).splitlines()[0]
    if too_large is not None:
        optimizer.zero_grad()
        raise InputError(
            f"the run's longest row, {row.input_ids.numel()} tokens (the train split's examples "
            f"{listed(row.examples)}), does not fit into memory ({too_large}); "
            f"try {plan.advice(row.input_ids.numel(), started=done > 0)}"
        )
    optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])
    publish(trained, model)
    optimizer.state.clear()
    optimizer.load_state_dict(slots)
    if scaler:
        precision.load_state_dict(scaler)


def _on_cpu(value: object) -> object:
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
