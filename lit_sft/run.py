"""The folder of a run: who may write it, what it was started with, whether it goes on or starts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

from lit_sft.args import LoRAArgs, TrainArgs
from lit_sft.atomic import discard, sweep, write_atomically
from lit_sft.batches import TrainSteps
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError, Interrupted, RunFailed
from lit_sft.layout import (
    ADAPTER_DIR,
    DONE,
    MANIFEST,
    METRICS,
    MODEL_DIR,
    RUN_ARGUMENTS,
    RUN_INPUTS,
    STATES_DIR,
    saved_states,
    state_name,
)
from lit_sft.locks import LOCK, lock
from lit_sft.optim import warmup_steps
from lit_sft.output import tell
from lit_sft.run_inputs import arguments_of, compare, inputs_of, recorded
from lit_sft.run_report import write_run_report
from lit_sft.runtime import on_first, precision
from lit_sft.shards import Shards
from lit_sft.states import load_state, named_state, newest_state, prune_states, save_state, set_aside_after
from lit_sft.tokenizer import Tokenizer

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
    parts = [part for shards in (train, val) for part in shards.shards]
    largest = max((int(part["input_ids"].max()) for part in parts), default=0)
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


def can_share_prefix(args: TrainArgs, checkpoint_dir: Path, train: Shards) -> bool:
    """Whether computing shared beginnings once is asked for and exact for this model and these examples."""
    config = ModelConfig.from_dir(checkpoint_dir)
    longest = int(train.lengths.max()) if len(train) else 0
    # dropout's masks are each example's own; longrope turns the tokens of long examples otherwise
    dropped = isinstance(args, LoRAArgs) and args.lora_dropout > 0
    turned = config.rope_type == "longrope" and longest > config.rope_original_block_size
    return args.share_prefix and not dropped and not turned


def resolve_args(args: TrainArgs, checkpoint_dir: Path, fabric: Fabric, steps: TrainSteps) -> TrainArgs:
    """The arguments with every default filled in, as they are saved and compared on resume."""
    quantize = getattr(args, "quantize", None)
    return replace(
        args,
        **({"quantize": quantize.removeprefix("bnb.")} if quantize else {}),  # Lit-GPT's spelling of the same
        checkpoint_dir=str(checkpoint_dir),
        precision=precision(fabric),
        compile=fabric.device.type == "cuda" if args.compile is None else args.compile,
        global_batch_size=steps.batch_size,
        micro_batch_tokens=steps.row_tokens,
        max_steps=steps.max_steps,
    )


@contextmanager
def open_run(given: TrainArgs, args: TrainArgs, steps: TrainSteps, fabric: Fabric) -> Iterator[Path | None]:
    """Hold the run's folder, and give the saved state to go on from, None for a new run; the same on every process.

    Args:
        given: the arguments as they were given; written to run.yaml, a --config for other runs.
        args: resolved; recorded for a new run, compared with the record when one goes on.
        steps: of the training data, which must not have changed either.
        fabric: its first process does all reading and writing.

    Raises InputError when the folder is in use, holds a finished run, or a run of other arguments, data or base.
    """
    out_dir, there = Path(args.out_dir), _names(Path(args.out_dir))
    with ExitStack() as held:

        def start() -> Path | None:
            _check_resume(args)
            held.enter_context(lock(out_dir))
            return _start_or_go_on(given, args, steps, fabric.device)

        state = on_first(fabric, start)
        try:
            yield state
        except (InputError, OSError):
            if fabric.is_global_zero:
                _forget_unstarted(out_dir, there)
            raise
        except (Interrupted, RunFailed):
            with suppress(OSError, ValueError):  # what the run ends with matters more
                if fabric.is_global_zero:
                    _report(args)
            raise


def _report(args: TrainArgs) -> None:
    """Write the page about the run."""
    write_run_report(Path(args.out_dir), arguments_of(args), args.max_steps)


def _names(out_dir: Path) -> set[str] | None:
    """What is in the folder; None where there is none."""
    return {path.name for path in out_dir.iterdir()} if out_dir.is_dir() else None


def _forget_unstarted(out_dir: Path, there: set[str] | None) -> None:
    """Remove what this process made of a run that was refused before its first step, but nothing that was ``there``."""
    if any((out_dir / name).exists() for name in (METRICS, STATES_DIR)):
        return
    for name in {RUN_ARGUMENTS, RUN_INPUTS, LOCK} - (there or set()):
        (out_dir / name).unlink(missing_ok=True)
    if there is None:
        with suppress(OSError):  # something else is in it
            out_dir.rmdir()


def _start_or_go_on(given: TrainArgs, args: TrainArgs, steps: TrainSteps, device: torch.device) -> Path | None:
    out_dir, shards = Path(args.out_dir), steps.shards
    path, inputs_path = out_dir / RUN_ARGUMENTS, out_dir / RUN_INPUTS
    arguments, inputs = arguments_of(args), inputs_of(args, shards, device)
    epochs = f"{args.max_steps / steps.per_epoch:.3g}"
    limits = [steps.limit] + ([f"--max_time {args.max_time:g} if that is sooner"] if args.max_time else [])
    tell(f"{args.checkpoint_dir} + {args.data_dir} → {out_dir}, {args.precision}")
    tell(
        f"{len(shards):,} training examples, {args.global_batch_size} a step: {args.max_steps} steps, "
        f"{epochs} epoch{'s' * (epochs != '1')}, which {' or '.join(limits)} ends; learning rate "
        f"{args.learning_rate:g} after {warmup_steps(args, args.max_steps)} steps of warmup"
    )
    if shards.n_cut:
        tell(f"--max_seq_length {args.max_seq_length} cuts or leaves out {shards.n_cut} examples")
    state = None
    if path.is_file():
        if saved_states(out_dir):  # a run that saved nothing may start anew with other arguments
            compare(recorded(out_dir), arguments | inputs, steps.limit, args.extend)
            _check_longer(args, steps, out_dir)
        sweep(out_dir)
        sweep(out_dir / STATES_DIR)
        state = newest_state(out_dir) if args.resume == "auto" else named_state(out_dir, Path(args.resume))
        tell(f"going on from {state}" if state else "the run had saved nothing yet; it starts anew")
    (out_dir / DONE).unlink(missing_ok=True)  # of a run that is extended; before its record says so
    record = {**inputs, "arguments": arguments}
    texts = {
        inputs_path: json.dumps(record, indent=2) + "\n",
        path: yaml.safe_dump(arguments_of(given), sort_keys=False),
    }
    for file, text in texts.items():
        if not file.is_file() or file.read_bytes() != text.encode():
            write_atomically(file, text)
    return state


def _check_longer(args: TrainArgs, steps: TrainSteps, out_dir: Path) -> None:
    """Require that a finished run is given more steps."""
    if (out_dir / DONE).is_file() and recorded(out_dir)["max_steps"] >= args.max_steps:
        raise InputError(
            f"--extend true: {out_dir} has made its {args.max_steps} steps, {steps.limit} asks for no more; raise it"
        )


def _check_resume(args: TrainArgs) -> None:
    """Refuse what can be refused before anything, the lock included, is written."""
    out_dir = Path(args.out_dir)
    if (out_dir.exists() or out_dir.is_symlink()) and not out_dir.is_dir():
        raise InputError(f"{out_dir} is no folder, so a run cannot be written there; name another --out_dir")
    if (out_dir / MANIFEST).is_file():
        what = f"{out_dir} holds something else that lit_sft wrote, whose files a run would replace"
        raise InputError(f"{what}; name another --out_dir")
    if (out_dir / DONE).is_file() and not args.extend:
        raise InputError(
            f"{out_dir} holds a finished run; --extend true with a larger --epochs or --max_steps gives it more steps, "
            "or name another --out_dir"
        )
    if (out_dir / DONE).is_file() and not saved_states(out_dir):
        raise InputError(
            f"--extend true: {out_dir} holds a finished run without a saved state to go on from; start a new run from "
            f"its adapter with --init_from {out_dir} and another --out_dir"
        )
    if not (out_dir / RUN_ARGUMENTS).is_file():
        if args.extend:
            raise InputError(f"--extend true: {out_dir} holds no run to extend; name its --out_dir")
        if args.resume not in ("auto", "never"):
            raise InputError(f"--resume {args.resume}: {out_dir} holds no run to go on with")
        if found := [name for name in (METRICS, STATES_DIR, ADAPTER_DIR, MODEL_DIR) if (out_dir / name).exists()]:
            raise InputError(
                f"{out_dir} holds {found[0]} but no {RUN_ARGUMENTS}: no run to go on with; name another --out_dir"
            )
    elif not (out_dir / RUN_INPUTS).exists():  # which is written before it
        raise InputError(
            f"{out_dir} holds a {RUN_ARGUMENTS} but no {RUN_INPUTS} of a run; name another --out_dir (a saved state in "
            "it can be generated from, merged and exported)"
        )
    elif args.resume == "never":
        raise InputError(f"{out_dir} holds an unfinished run; --resume auto goes on, or name another --out_dir")
    elif args.resume != "auto":
        named_state(out_dir, Path(args.resume))


class Saver:
    """The loop's ``save``: writes the state after a step on the first process, and deletes old ones."""

    def __init__(
        self,
        fabric: Fabric,
        args: TrainArgs,
        weights_name: str,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        extra: dict[str, str],
    ) -> None:
        self.fabric, self.args, self.weights_name, self.extra = fabric, args, weights_name, extra
        self.trained, self.optimizer = trained, optimizer
        self.best_step: int | None = None
        self.best_val_loss: float | None = None

    def restore(self, state: Path | None) -> int:
        """Go on from ``state``, in place; gives the steps done. InputError when the disk has no room for states."""
        on_first(self.fabric, self._check_room)
        if state is None:
            return 0
        facts = load_state(state, self.weights_name, self.trained, self.optimizer)
        if facts["scaler"]:  # of fp16's losses and gradients
            self.fabric.strategy.precision.load_state_dict(facts["scaler"])
        self.best_step, self.best_val_loss = facts["best_step"], facts["best_val_loss"]
        return facts["step"]

    def begin(self, done: int) -> None:
        """Make way for the steps after ``done``: states of later ones, and a result that they will outdate."""

        def make_way() -> None:
            out_dir = Path(self.args.out_dir)
            set_aside_after(out_dir, done)
            for result in (out_dir / ADAPTER_DIR, out_dir / MODEL_DIR):  # of a run that --max_time ended
                if done < self.args.max_steps and result.is_dir():
                    discard(result)

        on_first(self.fabric, make_way)

    def _check_room(self) -> None:
        needed = 3 * sum(4 * p.numel() for p in self.trained.values())  # each parameter and AdamW's two slots, fp32
        if (free := shutil.disk_usage(self.args.out_dir).free) < needed:
            raise InputError(
                f"{self.args.out_dir} has {free / 1e9:.1f} GB free, a saved state takes {needed / 1e9:.1f} GB; "
                "make room, or name another --out_dir"
            )

    def is_best(self, step: int, val_loss: float | None) -> bool:
        """Whether the state after ``step`` is to be kept for its val loss, the lowest so far."""
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if not self.args.keep_best or val_loss is None or not val_loss < best:
            return False
        self.best_step, self.best_val_loss = step, val_loss
        return True

    def __call__(self, step: int) -> Path:
        """Save the state after ``step``, whose directory is given; one that is there is this one, and stays."""
        directory = Path(self.args.out_dir) / STATES_DIR / state_name(step)
        facts = {"best_step": self.best_step, "best_val_loss": self.best_val_loss}
        facts["scaler"] = self.fabric.strategy.precision.state_dict()

        def write() -> None:
            if not directory.exists():
                out_dir = Path(self.args.out_dir)
                save_state(out_dir, step, self.weights_name, self.trained, self.optimizer, facts, self.extra)
                prune_states(out_dir, self.args.keep_last, self.best_step)

        on_first(self.fabric, write)
        return directory


def finish(args: TrainArgs, last: int, result: Path, save: Saver) -> None:
    """Write the run's page, mark it as done unless ``max_time`` ended it early, say what to do with ``result``."""
    _report(args)
    if last == args.max_steps:
        write_atomically(Path(args.out_dir) / DONE, f"{last} steps\n")
    if save.best_step not in (None, last):
        where = Path(args.out_dir) / STATES_DIR / state_name(save.best_step)
        tell(f"the lowest val loss, {save.best_val_loss:.4f}, was after step {save.best_step}: {where}")
    flag = "adapter_dir" if result.name == ADAPTER_DIR else "checkpoint_dir"
    tell(f'saved {result}; try it: python scripts/generate.py --{flag} {result} --prompt "…"')
