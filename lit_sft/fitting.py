"""Which settings fit into the device's memory: --estimate, --micro_batch_tokens auto, advice when memory ran out."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

import torch

from lit_sft.args import EstimateArgs, FullTrainArgs, LoRATrainArgs, TrainArgs
from lit_sft.attention import Layout
from lit_sft.batches import DEFAULT_ROW_TOKENS, Row, TrainSteps
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.estimate import Memory, measure
from lit_sft.layout import check_checkpoint_dir
from lit_sft.loss import CUDA_LOGITS
from lit_sft.memory import TIDY_HEAP, free_memory, resident_memory
from lit_sft.quantize import NF4, has_nf4
from lit_sft.run import can_share_prefix
from lit_sft.run_inputs import going_on
from lit_sft.runtime import BASE_DTYPE, default_precision, pick_device
from lit_sft.shards import Shards

LONGEST_ROW = {"cpu": DEFAULT_ROW_TOKENS}  # longer ones are not faster there; elsewhere:
LONGEST_ROW_ON_GPU = 32_768
CUDA_CONTEXT = 600e6  # bytes of a GPU that the driver takes before the first tensor; assumed
# glibc keeps what is freed in holes that torch's aligned tensors fit into badly: what a step takes beside the weights
# was measured at 1.9 times its tensors, with every block checkpointed, and so freed and made again, at 2.3 times, and
# at more in long runs of a small model. None of it where this variable of glibc's gives large blocks their own pages.
HEAP_SLACK, CHECKPOINTED_SLACK = 0.9, 1.35
LIBRARIES = 60_000_000  # bytes of code and buffers that a CPU's libraries take with the first step; measured
PACKED_COPIES = 2  # of the head's matrix, the largest, which a product lays out anew for itself
GPU_SLACK = 0.05  # assumed of an allocator that rounds and splits
ASSUMED_PROMPT = 1024  # tokens that are answered between steps, where no data say how long examples are


@dataclass
class Plan:
    """One run whose memory is asked for, and what it may change to fit."""

    args: TrainArgs
    """precision given; micro_batch_tokens may be auto."""
    config: ModelConfig
    train: Shards | None
    """None: rows are one example of micro_batch_tokens."""
    share_prefix: bool
    device: str
    """cpu, cuda or mps."""
    room: int
    """Bytes that the run may take in all, on a CPU the process as it stands included."""

    @property
    def longest(self) -> int:
        """Tokens of the longest example, which a row must hold."""
        return int(self.train.lengths.max()) if self.train is not None else 1

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt that is answered between steps, at most those of the longest example."""
        return self.longest if self.train is not None else ASSUMED_PROMPT

    def row(self, args: TrainArgs) -> Row:
        """The heaviest row of the run."""
        if self.train is not None:
            return TrainSteps(self.train, args, args.devices, 0, self.share_prefix).heaviest_row()
        n = min(args.micro_batch_tokens or DEFAULT_ROW_TOKENS, self.config.block_size)
        ids = torch.zeros(n, dtype=torch.int64)
        return Row(ids, Layout([n]), torch.arange(n - 1), ids[1:], None, [0])

    def needed(self, args: TrainArgs) -> tuple[Memory, Row, int]:
        """What the tensors take, the heaviest row, and the peak of the whole in bytes."""
        row = self.row(args)
        measured, gathered = row, 0
        if self.device == "cuda" and self._in_one_kernel(args):
            # what is measured is a CPU's attention, which keeps more the more segments there are; this keeps as of one
            measured = replace(row, layout=Layout([row.input_ids.numel()]))
            gathered = self._gathered(row, args)
        memory = measure(args, self.config, measured, min(self.n_prompt, row.input_ids.numel()))
        memory = replace(memory, train=memory.train + gathered)
        fixed = memory.weights + memory.trained + memory.optimizer
        held = self._logits(args)
        if self.device == "cpu":
            held = resident_memory() + self._libraries(args) + memory.host
        return memory, row, int(held + fixed + (memory.peak - fixed) * (1 + self._slack(args)))

    def _in_one_kernel(self, args: TrainArgs) -> bool:
        """True where a GPU attends within all segments of a row at once, over all keys up to the query's own."""
        config = self.config
        masked = config.attention_softcap is not None or config.alibi or any(config.sliding_layers)
        return args.precision in ("bf16-true", "bf16-mixed") and not masked

    def _gathered(self, row: Row, args: TrainArgs) -> int:
        """Bytes of the keys and values that a GPU keeps for backward again for each segment that sees them."""
        n_again = sum(row.layout.n_keys()) - row.input_ids.numel()
        one = 2 * self.config.n_query_groups * self.config.head_size * torch.bfloat16.itemsize
        n_layers = self.config.n_layer
        if args.checkpoint_every:  # the others are computed one at a time
            n_layers = n_layers - -(-n_layers // args.checkpoint_every) + 1
        return n_again * one * n_layers

    def _slack(self, args: TrainArgs) -> float:
        if self.device != "cpu":
            return GPU_SLACK
        if TIDY_HEAP in os.environ:
            return 0.0
        share = 1 / args.checkpoint_every if args.checkpoint_every else 0.0
        return HEAP_SLACK + share * (CHECKPOINTED_SLACK - HEAP_SLACK)

    def _logits(self, args: TrainArgs) -> int:
        """What a GPU's larger chunks of logits take, in the model's precision and in fp32; those measured are small."""
        return CUDA_LOGITS * (BASE_DTYPE[args.precision].itemsize + 4)

    def _libraries(self, args: TrainArgs) -> int:
        head = self.config.vocab_size * self.config.n_embd * BASE_DTYPE[args.precision].itemsize
        return LIBRARIES + PACKED_COPIES * head

    def row_lengths(self, highest: int) -> list[int]:
        """Values of micro_batch_tokens to choose from: ``highest`` and its halves, down to the longest example."""
        values = [highest]
        while values[-1] // 2 >= max(self.longest, 256):
            values.append(values[-1] // 2)
        return [max(value, self.longest) for value in values]

    def choices(self, highest: int, started: bool = False) -> Iterator[tuple[str, int]]:
        """Settings as flags, with the bytes that each needs; those that cost the least speed come first.

        ``started``: only what a run may change that has begun.
        """
        fits = False
        for settings in self._settings(started):
            if fits and settings.get("offload"):  # which is for where nothing else fits
                continue
            for n_tokens in self.row_lengths(highest):  # the longest that fits is enough
                changes = {"micro_batch_tokens": n_tokens} | settings
                changed = {name: value for name, value in changes.items() if value != getattr(self.args, name)}
                flags = [f"--{name} {str(value).lower()}" for name, value in changed.items()]
                needed = self.needed(replace(self.args, **changes))[2]
                yield " ".join(flags) or "as asked", needed
                if needed <= self.room:
                    fits = True
                    break

    def _settings(self, started: bool) -> Iterator[dict]:
        """Settings that ``choices`` tries at each length of a row, by flag."""
        lora = isinstance(self.args, LoRATrainArgs)
        quantize = [{"quantize": NF4}] if lora and not self.args.quantize and not started and has_nf4() else []
        kinds: list[dict] = [{}, *quantize]
        offload = lora and self.args.offload  # of which every block is computed again anyway
        blocks = dict.fromkeys([self.args.activation_checkpointing] + ["all"] * (not offload))
        for kind, checkpointing in product(kinds, blocks):
            yield {"activation_checkpointing": checkpointing} | kind
        if lora and not offload and self.device == "cuda" and self.args.devices == 1:
            kept = self.args.activation_checkpointing == "none"
            for kind in kinds:
                yield {"activation_checkpointing": "none" if kept else "all", "offload": True} | kind

    def advice(self, n_tokens: int, started: bool = True) -> str:
        """Flags to use where a row of ``n_tokens`` did not fit, ``started``: in a run that has begun."""
        for flags, needed in self.choices(max(n_tokens // 2, self.longest), started):
            if needed <= self.room:
                return f"{flags} (it is predicted to need {needed / 1e9:.1f} of {self.room / 1e9:.1f} GB)"
        return f"--max_seq_length {self.longest // 2} in another --out_dir: no other setting is predicted to fit"


def make_plan(args: TrainArgs, checkpoint_dir: Path, train: Shards | None, device: str, precision: str) -> Plan:
    """The plan of a run on ``device`` as it is now."""
    share = train is not None and can_share_prefix(args, checkpoint_dir, train)
    config = ModelConfig.from_dir(checkpoint_dir)
    return Plan(
        replace(args, precision=precision),
        config,
        train,
        share,
        device,
        free_memory(device) // (args.devices if device == "cpu" else 1),
    )


def plan_elsewhere(args: EstimateArgs) -> Plan:
    """The plan of scripts/estimate.py: for a GPU of ``--device_memory_gb``, else for the device here as it is now."""
    train = Shards(args.data_dir, "train", args.max_seq_length) if args.data_dir else None
    checkpoint_dir = check_checkpoint_dir(args.checkpoint_dir or train.manifest.facts["checkpoint_dir"])
    device = "cuda" if args.device_memory_gb else pick_device(args.device)
    # of a GPU that is not here bfloat16 is assumed
    precision = args.precision or ("bf16-true" if args.device_memory_gb else default_precision(device))
    run: TrainArgs = args
    if args.full:
        names = {f.name for f in fields(FullTrainArgs)} - {"data_dir"}
        run = FullTrainArgs(data_dir=args.data_dir or "-", **{name: getattr(args, name) for name in names})
    if args.micro_batch_tokens == "auto":
        run = replace(run, micro_batch_tokens=None)
    if args.device_memory_gb is None:
        return make_plan(run, checkpoint_dir, train, device, precision)
    plan = make_plan(run, checkpoint_dir, train, "cpu", precision)
    return replace(plan, device=device, room=int(args.device_memory_gb * 1e9 - CUDA_CONTEXT))


def choose_settings(args: TrainArgs, plan: Plan) -> TrainArgs:
    """The arguments with what was auto chosen: the run's own, or the least recomputation, then the longest row, to fit.

    InputError, with what would fit, when not even the longest example is predicted to.
    """
    asked = [name for name in ("micro_batch_tokens", "activation_checkpointing") if getattr(args, name) == "auto"]
    if not asked:
        return args
    if before := going_on(args):
        return replace(args, **{name: before[name] for name in asked})
    rows, blocks = [args.micro_batch_tokens], [args.activation_checkpointing]
    if "micro_batch_tokens" in asked:
        rows = plan.row_lengths(max(LONGEST_ROW.get(plan.device, LONGEST_ROW_ON_GPU), plan.longest))
    if "activation_checkpointing" in asked:
        blocks = ["none", "4", "2", "all"]
    for checkpointing, n_tokens in product(blocks, rows):
        chosen = replace(args, micro_batch_tokens=n_tokens, activation_checkpointing=checkpointing)
        if plan.needed(replace(chosen, precision=plan.args.precision))[2] <= plan.room:
            return chosen
    flags = " ".join(f"--{name} auto" for name in asked)
    raise InputError(
        f"{flags}: the longest example, {plan.longest} tokens, is not predicted to fit into "
        f"{plan.room / 1e9:.1f} GB; try {plan.advice(plan.longest, False)}"
    )


def show_estimate(plan: Plan) -> None:
    """Print what the run would take, and which settings fit."""
    args = choose_settings(plan.args, plan)
    if args.micro_batch_tokens is None:
        args = replace(args, micro_batch_tokens=max(DEFAULT_ROW_TOKENS, plan.longest))
    plan = replace(plan, args=args)
    memory, row, peak = plan.needed(args)
    shown = f"{len(row.examples)} examples: {', '.join(map(str, row.examples[:10]))}{', …' * (len(row.examples) > 10)}"
    if plan.train is None:
        shown = "assumed: one example"
    print(f"{plan.args.precision} on {plan.device}, heaviest row {row.input_ids.numel():,} tokens ({shown})")
    parts = {"weights": memory.weights, "adapter or masters": memory.trained, "optimizer": memory.optimizer}
    parts |= {"activations, gradients": memory.activations, "validation in all": memory.validate, "peak": peak}
    if memory.host:
        parts |= {"of the host's memory": memory.host}
    for name, size in parts.items():
        print(f"  {name:24} {size / 1e9:8.2f} GB")
    print(f"  {'memory for the run':24} {plan.room / 1e9:8.2f} GB")
    print("settings, and what each is predicted to need:")
    for flags, needed in plan.choices(args.micro_batch_tokens):
        print(f"  {needed / 1e9:8.2f} GB  {'fits' if needed <= plan.room else 'too large':10} {flags}")
    sys.stdout.flush()
