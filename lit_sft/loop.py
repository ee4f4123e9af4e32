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
from lit_sft.batches import Ahead, Row, Step, TrainSteps
from lit_sft.errors import Interrupted, RunFailed
from lit_sft.lora import ExampleDropout
from lit_sft.loss import cross_entropy_sum
from lit_sft.memory import peak_memory, ran_out
from lit_sft.metrics import Metrics, shown
from lit_sft.model import GPT
from lit_sft.runtime import StopSignals, autocast, exchange, reduce, reduce_gradients

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from lit_sft.run import Saver

MOST_SKIPPED = 10  # steps in a row without an update: then it is not the data


def fit(
    fabric: Fabric,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    train_steps: TrainSteps,
    val_batches: Iterable[Row],
    args: TrainArgs,
    save: Saver,
    sample: Callable[[int], str],
    dropout: ExampleDropout | None = None,
    done: int = 0,
    advise: Callable[[int], str] | None = None,
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
        save: writes the state after a step; gives where.
        sample: the model's answer to the run's fixed prompt, after a step.
        dropout: the adapters' shared dropout, told of each row.
        done: steps already made.
        advise: what to change where a row of so many tokens does not fit into memory.

    Raises ``Interrupted``, after saving, when a signal asks for an end, and ``RunFailed``, after saving the state
    before the step, when a loss or gradient is not finite or the step does not fit into memory.
    """
    save.begin(done)
    metrics = Metrics(Path(args.out_dir), done, train_steps.max_steps, quiet=not fabric.is_global_zero)
    n_skipped = int(*reduce(fabric, "max", metrics.n_skipped))
    started, ahead = time.perf_counter(), Ahead(train_steps, fabric.device)
    saved, number = started, done  # all is done where a kill fell between last save and result
    with StopSignals() as signals:
        for number in range(done + 1, train_steps.max_steps + 1):
            step = ahead.take(number)
            try:
                record = train_step(fabric, model, optimizer, lr_at(number), step, args, dropout, ahead.prepare_next)
            except (FloatingPointError, MemoryError) as error:
                metrics.close()
                where = save(number - 1)
                why = _explain(error, fabric, model, train_steps, number, advise)
                raise RunFailed(f"{error}: {why}; the update was not made, saved {where}") from None
            n_skipped = n_skipped + 1 if record.get("skipped") else 0
            if n_skipped:
                metrics.say(f"step {number}: loss or gradient is not finite; no update is made")
            if n_skipped > MOST_SKIPPED:
                metrics.close()
                raise RunFailed(f"{n_skipped} steps in a row without a finite loss; saved {save(number - 1)}")
            last, best = number == train_steps.max_steps, False
            if last or number % args.eval_interval == 0:
                record["val_loss"] = validate(fabric, model, val_batches)
                best = save.is_best(number, record["val_loss"])
                losses = f"loss {shown(record['loss'])}, val loss {shown(record['val_loss'])}"
                metrics.say(f"step {number}: {losses}\n{sample(number)}")
            metrics.log(record)
            now = time.perf_counter()
            late = args.max_time is not None and now - started > args.max_time
            due = args.save_minutes is not None and now - saved > 60 * args.save_minutes
            code, late, due = reduce(fabric, "max", signals.exit_code, late, due)
            if not (last or code or late or due or best or number % args.save_interval == 0):
                continue
            metrics.flush()
            where, saved = save(number), time.perf_counter()
            reached = f"after step {number} of {train_steps.max_steps}"
            if code and not last:
                metrics.close()
                same = "the same command" if args.resume == "auto" else "the command without --resume"
                raise Interrupted(f"stopped by a signal {reached}; saved {where}; {same} goes on from there", int(code))
            if late and not last:
                metrics.say(f"--max_time reached {reached}; saved {where}")
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
    meanwhile: Callable[[], object] | None = None,
) -> dict:
    """Make one optimizer step; gives its record for metrics.jsonl.

    ``meanwhile`` is called once all of the backward pass is queued, while a GPU still computes it: the host waits for
    the GPU only then, once a step.

    Where loss or gradient is not finite nothing is updated: FloatingPointError on every process, or with
    ``on_nonfinite`` "skip" a record that says so. MemoryError, on every process, where one has too little for its rows.
    """
    started = time.perf_counter()
    if not model.training:
        model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss, too_large = torch.zeros((), device=fabric.device), False
    try:
        loss = accumulate_gradients(fabric, model, step, dropout)
    except Exception as error:
        if not ran_out(error):
            raise
        too_large = True  # what the rows took is given back when this block ends
    if too_large:
        optimizer.zero_grad()
    reduce_gradients(fabric, parameters)
    n_too_large = too_large
    if fabric.world_size > 1:
        total, n_too_large = reduce(fabric, "sum", float(loss), too_large)
        loss = torch.tensor(total, dtype=torch.float32 if fabric.device.type == "mps" else torch.float64)
    if n_too_large:
        optimizer.zero_grad()
        whose = "this" if too_large else "another"
        raise MemoryError(f"step {step.number} does not fit into the memory of {whose} device")
    precision = fabric.strategy.precision  # which scales losses and gradients under fp16
    scaler_copes = args.precision == "16-mixed"  # it skips an update that overflowed and lowers its scale
    if scaler_copes and not step.rows:
        precision.scaler.scale(torch.zeros((), device=fabric.device))  # as a backward pass would have begun
    precision.unscale_gradients(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # on a GPU the update is queued before the host waits, and the GPU leaves it out where not all is finite
    queued = fabric.device.type == "cuda" and not scaler_copes
    if queued:
        optimizer.found_inf = 1 - (loss.to(grad_norm).isfinite() & grad_norm.isfinite()).float()
        precision.optimizer_step(optimizer)
    if meanwhile is not None:
        meanwhile()
    loss, grad_norm = torch.stack([loss, grad_norm.to(loss)]).tolist()  # here the host waits
    skipped = not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler_copes)
    if not skipped and not queued:
        precision.optimizer_step(optimizer)
    elif scaler_copes:
        precision.scaler.update()  # it counts on one for each unscaling
    optimizer.zero_grad()
    if skipped and args.on_nonfinite == "stop":
        raise FloatingPointError(f"step {step.number}: loss {loss}, gradient norm {grad_norm}")
    seconds = time.perf_counter() - started
    return {
        "step": step.number,
        "epoch": step.epoch,
        "loss": loss,
        "lr": learning_rate,
        "grad_norm": grad_norm,
        "n_labels": step.n_labels,
        "n_tokens": step.n_tokens,
        "tokens_per_s": step.n_tokens / seconds,
        "padding_share": _padding_share(step.rows),
        "peak_mem_bytes": peak_memory(fabric.device),
        "seconds": seconds,
        **({"skipped": True} if skipped else {}),
    }


def _padding_share(rows: list[Row]) -> float:
    """Share of the computed positions that hold no token; 0 where there are none."""
    n_positions = sum(row.input_ids.numel() for row in rows)
    return 1 - sum(sum(row.layout.lengths) for row in rows) / n_positions if n_positions else 0.0


def _explain(
    error: Exception,
    fabric: Fabric,
    model: GPT,
    steps: TrainSteps,
    number: int,
    advise: Callable[[int], str] | None,
) -> str:
    """What in step ``number`` made it fail; given when all processes have it, as the first to fail ends the others."""
    if isinstance(error, MemoryError):
        why = _heaviest_row(steps, number, advise)
    else:
        why = _culprits(fabric, model, steps, number)
    with exchange():
        fabric.barrier()
    return why


@torch.no_grad()
def _culprits(fabric: Fabric, model: GPT, steps: TrainSteps, number: int) -> str:
    """Which examples of this process's rows have a loss that is not finite by itself; all of the step when none has."""
    model.eval()
    examples = [i for row in steps[number].rows for i in row.examples]
    losses = [float(summed_loss(fabric, model, steps.alone(i).to(fabric.device))) for i in examples]
    if culprits := [i for i, loss in zip(examples, losses, strict=True) if not math.isfinite(loss)]:
        return f"from the train split's examples {listed(culprits)}"
    return f"though each example's own loss is finite, among {listed(steps.examples(number))}"


def _heaviest_row(steps: TrainSteps, number: int, advise: Callable[[int], str] | None) -> str:
    """The longest row of a step that does not fit into memory, and what to lower."""
    row = steps.heaviest_of([number])
    n_tokens, longest = row.input_ids.numel(), int(steps.shards.lengths.max())
    lower = f"the same command goes on with --micro_batch_tokens {max(n_tokens // 2, longest)}"
    if n_tokens > longest and advise:
        lower = f"the same command goes on with {advise(n_tokens)}"
    if n_tokens <= longest:
        lower = f"start another run with --max_seq_length {longest // 2}"
    return f"its longest packed row has {n_tokens} tokens (the train split's examples {listed(row.examples)}); {lower}"


def listed(examples: list[int]) -> str:
    """The first twenty numbers of examples."""
    return ", ".join(map(str, examples[:20])) + (", …" if len(examples) > 20 else "")


def accumulate_gradients(fabric: Fabric, model: GPT, step: Step, dropout: ExampleDropout | None = None) -> Tensor:
    """Forward and backward over this process's rows; gives its share of the step's loss, a scalar on the device.

    What is left on the parameters is this process's part of the gradient of (summed loss / labels of the whole step).
    """
    loss = torch.zeros((), dtype=torch.float32, device=fabric.device)
    for row in step.rows:
        row = row.to(fabric.device)
        if dropout is not None:
            dropout.begin_row(step.number, row.examples, row.layout.lengths, fabric.device)
        share = summed_loss(fabric, model, row) / step.n_labels
        fabric.backward(share)
        loss = loss + share.detach()
    return loss


def summed_loss(fabric: Fabric, model: GPT, row: Row) -> Tensor:
    """Summed loss of one packed row, a scalar; only its labelled positions reach the head."""
    with autocast(fabric):
        hidden = model.hidden_states(row.input_ids[None], row.layout).squeeze(0)[row.positions]
        return cross_entropy_sum(hidden, model.lm_head, row.labels, row.counts, model.config.logits_softcap)


@torch.no_grad()
def validate(fabric: Fabric, model: GPT, rows: Iterable[Row]) -> float | None:
    """Mean loss per labelled token over all rows of all processes; None when the val split is empty."""
    model.eval()
    total, n_labels = 0.0, 0
    for row in rows:
        total += summed_loss(fabric, model, row.to(fabric.device)).item()
        n_labels += row.n_labels
    total, n_labels = reduce(fabric, "sum", total, n_labels)
    return total / n_labels if n_labels else None
