"""The loop: one step, validation, and when to save. The one place where ``backward`` is called."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_sft.args import TrainArgs
from lit_sft.batches import Row, Step, TrainSteps
from lit_sft.errors import Interrupted, RunFailed
from lit_sft.lora import ExampleDropout
from lit_sft.loss import cross_entropy_sum
from lit_sft.metrics import Metrics
from lit_sft.model import GPT
from lit_sft.runtime import StopSignals, peak_memory, reduce, reduce_gradients

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def fit(
    fabric: Fabric,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    train_steps: TrainSteps,
    val_batches: Iterable[Row],
    args: TrainArgs,
    save: Callable[[int], Path],
    sample: Callable[[int], str],
    dropout: ExampleDropout | None = None,
    done: int = 0,
) -> int:
    """Train from step ``done`` + 1 to the last; gives the last step made, fewer than all when ``max_time`` ran out.

    Args:
        fabric: launched.
        model: on the device, in the base dtype.
        optimizer: over what is trained.
        lr_at: the learning rate of each step.
        train_steps: step number → its examples, as packed rows.
        val_batches: this process's rows of the val split, used whole at each validation.
        args: seed, intervals, clipping and limits.
        save: write the state after a step; gives where.
        sample: the model's answer to the run's fixed prompt, after a step.
        dropout: the adapters' shared dropout, told of each row.
        done: steps already made.

    Raises ``Interrupted``, after saving, when a signal asks for an end, and ``RunFailed``, after saving the state
    before the step, when a loss or gradient is not finite.
    """
    metrics = Metrics(Path(args.out_dir), done, train_steps.max_steps, quiet=not fabric.is_global_zero)
    started, number = time.perf_counter(), done  # all is done where a kill fell between last save and result
    with StopSignals() as signals:
        for number in range(done + 1, train_steps.max_steps + 1):
            try:
                record = train_step(fabric, model, optimizer, lr_at(number), train_steps[number], args, dropout)
            except FloatingPointError as error:
                metrics.close()
                raise RunFailed(f"{error}; the update was not made; saved {save(number - 1)}") from None
            last = number == train_steps.max_steps
            if last or number % args.eval_interval == 0:
                record["val_loss"] = validate(fabric, model, val_batches)
                val_loss = "none" if record["val_loss"] is None else f"{record['val_loss']:.4f}"
                metrics.say(f"step {number}: loss {record['loss']:.4f}, val loss {val_loss}\n{sample(number)}")
            metrics.log(record)
            late = args.max_time is not None and time.perf_counter() - started > args.max_time
            exit_code, late = reduce(fabric, "max", signals.exit_code, late)
            if not (last or exit_code or late or number % args.save_interval == 0):
                continue
            where = save(number)
            if exit_code and not last:
                metrics.close()
                raise Interrupted(
                    f"stopped by a signal after step {number} of {train_steps.max_steps}; saved {where}; "
                    "the same command goes on from there",
                    int(exit_code),
                )
            if late and not last:
                metrics.say(f"--max_time reached after step {number} of {train_steps.max_steps}; saved {where}")
                break
    metrics.close()
    return number


def train_step(
    fabric: Fabric,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    step: Step,
    args: TrainArgs,
    dropout: ExampleDropout | None,
) -> dict:
    """Make one optimizer step; gives its record for metrics.jsonl.

    Raises FloatingPointError, on every process and before anything is updated, when loss or gradient is not finite.
    """
    started = time.perf_counter()
    model.train()
    loss = accumulate_gradients(fabric, model, step, dropout)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reduce_gradients(fabric, parameters)
    (loss,) = reduce(fabric, "sum", loss)
    precision = fabric.strategy.precision  # which scales losses and gradients under fp16
    precision.unscale_gradients(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_norm or math.inf).item()
    scaler_copes = args.precision == "16-mixed"  # it skips an update that overflowed and lowers its scale
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler_copes):
        optimizer.zero_grad()
        raise FloatingPointError(
            f"step {step.number}: loss {loss}, gradient norm {grad_norm}, among examples {str(step.examples)[1:81]}"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    precision.optimizer_step(optimizer)
    optimizer.zero_grad()
    seconds = time.perf_counter() - started
    n_positions = sum(row.input_ids.numel() for row in step.rows)
    return {
        "step": step.number,
        "epoch": step.epoch,
        "loss": loss,
        "lr": learning_rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "n_labels": step.n_labels,
        "n_tokens": step.n_tokens,
        "tokens_per_s": step.n_tokens / seconds,
        "padding_share": 1 - sum(sum(row.lengths) for row in step.rows) / n_positions if n_positions else 0.0,
        "peak_mem_bytes": peak_memory(fabric.device),
        "seconds": seconds,
    }


def accumulate_gradients(fabric: Fabric, model: GPT, step: Step, dropout: ExampleDropout | None = None) -> float:
    """Forward and backward over this process's rows; gives its share of the step's loss.

    What is left on the parameters is this process's part of the gradient of (summed loss / labels of the whole step).
    """
    loss = 0.0
    for row in step.rows:
        row = row.to(fabric.device)
        if dropout is not None:
            dropout.begin_row(step.number, row.examples, row.lengths, fabric.device)
        share = summed_loss(fabric, model, row)[0] / step.n_labels
        fabric.backward(share)
        loss = loss + share.detach()
    return float(loss)


def summed_loss(fabric: Fabric, model: GPT, row: Row) -> tuple[Tensor, int]:
    """Summed loss of one packed row, a scalar, and its labelled positions; only those reach the head."""
    with fabric.autocast():
        hidden = model.hidden_states(row.input_ids[None], row.lengths)[0]
        return cross_entropy_sum(hidden, model.lm_head, row.labels)


@torch.no_grad()
def validate(fabric: Fabric, model: GPT, rows: Iterable[Row]) -> float | None:
    """Mean loss per labelled token over all rows of all processes; None when the val split is empty."""
    model.eval()
    total, n_labels = 0.0, 0
    for row in rows:
        loss, n = summed_loss(fabric, model, row.to(fabric.device))
        total, n_labels = total + loss.item(), n_labels + n
    total, n_labels = reduce(fabric, "sum", total, n_labels)
    return total / n_labels if n_labels else None
