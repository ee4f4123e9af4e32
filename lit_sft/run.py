"""The folder of a run: who may write it, what it was started with, whether it goes on or starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

from lit_sft.args import TrainArgs
from lit_sft.atomic import lock, sweep, write_atomically
from lit_sft.batches import TrainSteps
from lit_sft.checkpoint import base_fingerprint, go_back, newest_state, prune_states, save_state
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.layout import (
    ADAPTER_DIR,
    DONE,
    METRICS,
    MODEL_DIR,
    RUN_ARGUMENTS,
    RUN_INPUTS,
    STATES_DIR,
    state_name,
)
from lit_sft.optim import warmup_steps
from lit_sft.shards import Shards
from lit_sft.tokenizer import Tokenizer

# what may change when a run goes on: it decides where, how fast and how often, never what is computed
FREE = {
    "debug", "out_dir", "resume", "device", "devices", "micro_batch_size", "micro_batch_tokens", "max_time",
    "eval_interval", "save_interval", "keep_last", "sample_prompt", "checkpoint_dir", "data_dir", "max_iters", "epochs",
}  # fmt: skip
PLACES = ("device", "devices", "micro_batch_size", "micro_batch_tokens")  # those of them that move the last bits

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def check_shards(train: Shards, val: Shards, tokenizer: Tokenizer, checkpoint_dir: Path) -> None:
    """Refuse shards that another tokenizer made, or whose ids or lengths are more than the model takes."""
    facts = train.manifest.facts
    if facts["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"the shards were made with the tokenizer of {facts['checkpoint_dir']}, not with that of {checkpoint_dir}; "
            f"prepare the data again with --checkpoint_dir {checkpoint_dir}"
        )
    config = ModelConfig.from_dir(checkpoint_dir)
    block_size, vocab_size = config.block_size, config.vocab_size
    largest = max((int(part["input_ids"].max()) for shards in (train, val) for part in shards.shards), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"the shards hold token id {largest}, {checkpoint_dir} has embeddings for ids below {vocab_size}: its "
            "tokenizer files and its config.json do not belong together; download the checkpoint again"
        )
    longest = max(int(shards.lengths.max()) if len(shards) else 0 for shards in (train, val))
    if longest > block_size:
        raise InputError(
            f"the longest example has {longest} tokens, the context of {checkpoint_dir} is {block_size}; "
            f"add --max_seq_length {block_size}"
        )


def resolve_args(args: TrainArgs, checkpoint_dir: Path, precision: str, steps: TrainSteps) -> TrainArgs:
    """The arguments with every default filled in, as they are saved and compared on resume."""
    return replace(
        args,
        checkpoint_dir=str(checkpoint_dir),
        precision=precision,
        global_batch_size=steps.batch_size,
        micro_batch_tokens=steps.row_tokens,
        max_steps=steps.max_steps,
    )


@contextmanager
def open_run(args: TrainArgs, shards: Shards, fabric: Fabric) -> Iterator[Path | None]:
    """Hold the run's folder, and give the saved state to go on from, None for a new run; the same on every process.

    Args:
        args: resolved; written to run.yaml of a new run, compared with it when one goes on.
        shards: the training data, which must not have changed either.
        fabric: its first process does all reading and writing.

    Raises InputError when the folder is in use, holds a finished run, or a run of other arguments, data or base.
    """
    with ExitStack() as held:
        state = refusal = None
        if fabric.is_global_zero:
            try:
                _check_resume(args)
                held.enter_context(lock(Path(args.out_dir)))
                state = _start_or_go_on(args, shards)
            except InputError as error:
                refusal = str(error)
        state, refusal = fabric.broadcast((state, refusal))
        if refusal:
            raise InputError(refusal)
        yield state


def _start_or_go_on(args: TrainArgs, shards: Shards) -> Path | None:
    out_dir = Path(args.out_dir)
    path, inputs_path = out_dir / RUN_ARGUMENTS, out_dir / RUN_INPUTS
    arguments = {k: v for k, v in asdict(args).items() if k != "debug"}
    inputs = {
        "base_fingerprint": base_fingerprint(Path(args.checkpoint_dir)),
        "data_fingerprint": "+".join(fact["sha256"] for _, fact in sorted(shards.manifest.files.items())),
    }
    epochs = args.max_steps / math.ceil(len(shards) / args.global_batch_size)
    print(f"{args.checkpoint_dir} + {args.data_dir} → {out_dir}, {args.precision}")
    print(
        f"{len(shards):,} training examples, {args.global_batch_size} a step: {args.max_steps} steps, {epochs:.3g} "
        f"epochs, learning rate {args.learning_rate:g} after {warmup_steps(args, args.max_steps)} steps of warmup"
    )
    if shards.n_cut:
        print(f"--max_seq_length {args.max_seq_length} cuts or leaves out {shards.n_cut} examples")
    state = None
    if path.is_file():
        if any((out_dir / STATES_DIR).glob("step-*")):  # a run that saved nothing may start anew with other arguments
            _compare(_recorded(out_dir), arguments | inputs, out_dir)
        sweep(out_dir)
        sweep(out_dir / STATES_DIR)
        state = newest_state(out_dir) if args.resume == "auto" else go_back(Path(args.resume))
        print(f"going on from {state}" if state else "the run had saved nothing yet; it starts anew")
    write_atomically(inputs_path, json.dumps(inputs, indent=2) + "\n")
    write_atomically(path, yaml.safe_dump(arguments, sort_keys=False))
    return state


def _check_resume(args: TrainArgs) -> None:
    """Refuse what can be refused before anything, the lock included, is written."""
    out_dir = Path(args.out_dir)
    if (out_dir / DONE).is_file():
        raise InputError(f"{out_dir} holds a finished run; name another --out_dir (--resume is for unfinished ones)")
    if not (out_dir / RUN_ARGUMENTS).is_file():
        if args.resume not in ("auto", "never"):
            raise InputError(f"--resume {args.resume}: {out_dir} holds no run to go on with")
        if found := [name for name in (METRICS, STATES_DIR, ADAPTER_DIR, MODEL_DIR) if (out_dir / name).exists()]:
            raise InputError(
                f"{out_dir} holds {found[0]} but no {RUN_ARGUMENTS}: no run to go on with; name another --out_dir"
            )
    elif args.resume == "never":
        raise InputError(f"{out_dir} holds an unfinished run; --resume auto goes on, or name another --out_dir")
    elif args.resume != "auto" and Path(args.resume).resolve().parent != (out_dir / STATES_DIR).resolve():
        raise InputError(f"--resume {args.resume}: no saved state; a folder of {out_dir / STATES_DIR} can be named")


def _recorded(out_dir: Path) -> dict:
    """What a run was started with; InputError when its files do not say."""
    try:
        arguments = yaml.safe_load((out_dir / RUN_ARGUMENTS).read_text())
        return arguments | json.loads((out_dir / RUN_INPUTS).read_text())
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{out_dir} does not say what its run was started with ({why}); name another") from None


def _compare(before: dict, now: dict, out_dir: Path) -> None:
    moved = [f"{k} {now[k]} instead of {before.get(k)}" for k in PLACES if before.get(k) != now[k]]
    if moved:
        print(f"going on with {', '.join(moved)}: the same computation, equal to rounding")
    changed = [k for k in now if k not in FREE and before.get(k) != now[k]]
    if changed:
        differences = ", ".join(f"{k}: {before.get(k)!r} then, {now[k]!r} now" for k in changed)
        raise InputError(
            f"{out_dir} holds an unfinished run that computes something else ({differences}); "
            "give it the same arguments, or name another --out_dir"
        )


def saver(
    fabric: Fabric,
    args: TrainArgs,
    weights_name: str,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extra: dict[str, str],
) -> Callable[[int], Path]:
    """The loop's ``save``: writes the state after a step, prunes old ones, and has the other processes wait."""

    def save(step: int) -> Path:
        out_dir = Path(args.out_dir)
        if fabric.is_global_zero:
            save_state(out_dir, step, weights_name, trained, optimizer, extra)
            prune_states(out_dir, args.keep_last)
        fabric.barrier()
        return out_dir / STATES_DIR / state_name(step)

    return save


def finish(args: TrainArgs, last: int, result: Path) -> None:
    """Mark the run as done, unless ``max_time`` ended it early, and say what to do with ``result``."""
    if last == args.max_steps:
        write_atomically(Path(args.out_dir) / DONE, f"{last} steps\n")
    flag = "adapter_dir" if result.name == ADAPTER_DIR else "checkpoint_dir"
    print(f'saved {result}; try it: python scripts/generate.py --{flag} {result} --prompt "…"')
