"""lit_sft's side of the benchmarks, from its own public pieces: data, a model, timed steps of its loop.

Needs neither datasets nor jsonargparse. ``python benchmarks/engine.py`` with a worker's flags is one run on a CPU.
"""

import time
from collections import Counter
from functools import partial
from pathlib import Path

import measure
import torch
from lengths import Example
from measure import draw_weight, settle, since_start
from profiling import profile
from shapes import ALPHA, RANK, SHAPES, Shape

from lit_sft import checkpoint, optim, runtime
from lit_sft.args import LoRATrainArgs
from lit_sft.atomic import Manifest, publish_directory
from lit_sft.batches import Ahead, TrainSteps
from lit_sft.config import ModelConfig
from lit_sft.experts import group_experts
from lit_sft.families import find_family
from lit_sft.joined import join_products
from lit_sft.loop import train_step
from lit_sft.lora import apply_lora
from lit_sft.model import GPT
from lit_sft.quantize import is_quantized, place_quantized, quantized
from lit_sft.run import can_share_prefix
from lit_sft.shards import KIND, Shards, write_shards


def lora_args(data_dir: Path, **settings: object) -> LoRATrainArgs:
    """The arguments of a run with the benchmarks' adapter."""
    return LoRATrainArgs(data_dir=str(data_dir), lora_r=RANK, lora_alpha=ALPHA, **settings)


def write_data(directory: Path, examples: list[Example]) -> Path:
    """A data_dir of these examples, in this order in every epoch."""
    lengths = torch.tensor([len(example.ids) for example in examples])
    prompts = torch.tensor([example.n_prompt for example in examples])
    facts = {"n_prompt": prompts, "n_labels": lengths - prompts, "source": torch.zeros_like(lengths)}
    facts |= {"row": torch.arange(1, len(examples) + 1)}

    def read(start: int, end: int):
        for i in range(start, end):
            ids = torch.tensor(examples[i].ids, dtype=torch.int32)
            yield i, ids, torch.arange(len(ids)) >= examples[i].n_prompt

    with publish_directory(directory, KIND) as folder:
        names = write_shards(folder, "train", lengths, facts, read)
        made = {"tokenizer": "none: ids are random", "checkpoint_dir": "none", "arguments": {}}
        Manifest(KIND, {"order": "as_given"} | made).write(folder, names)
    return directory


def model_config(shape: Shape) -> tuple[ModelConfig, dict[str, str]]:
    """The model's config; and of each parameter the name that transformers has for it alone, or ours."""
    hf_config = shape.hf_config() | {"model_type": shape.model_type}
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    names = family.names(config)
    with torch.device("meta"):
        theirs = {name: names.hf_name(name) for name, _ in GPT(config).named_parameters()}
    times = Counter(theirs.values())  # q, k and v may be one tensor there
    return config, {ours: name if times[name] == 1 else ours for ours, name in theirs.items()}


@torch.no_grad()
def random_model(shape: Shape, device: str, dtype: torch.dtype, quantize: str | None = None) -> GPT:
    """A model with random weights, drawn on the device one after the other and quantized at once if asked for."""
    config, names = model_config(shape)
    with torch.device("meta"):
        model = GPT(config)
    weights, narrow = {}, {}
    for name, parameter in model.named_parameters():
        weight = draw_weight(names[name], parameter.shape, device, dtype)
        if quantize and is_quantized(model, name):
            narrow[name] = quantized(weight, quantize)
            weight = weight.to("meta")
        weights[name] = weight
    model.load_state_dict(weights, assign=True)
    for name, layer in narrow.items():
        place_quantized(model, name, layer)
    return model


class Training:
    """A model with its adapter and optimizer, and steps over data that may change on the way."""

    def __init__(self, model: GPT, args: LoRATrainArgs, compiled: bool) -> None:
        """``compiled``: whether the blocks are."""
        self.fabric, self.model = runtime.launch(args), model
        self.configure(args)
        self.dropout = apply_lora(model, args, args.seed)
        if self.fabric.device.type == "cuda":
            join_products(model)
        group_experts(model)
        if compiled:
            model.compile_blocks()
        self.optimizer = optim.build_optimizer(model, optim.master_parameters(model), args)

    def configure(self, args: LoRATrainArgs) -> None:
        """Set the model's own switches, as finetune/lora.py does once it is loaded."""
        self.model.checkpoint_every = args.checkpoint_every

    def run(self, steps: TrainSteps, args: LoRATrainArgs, first: int, last: int) -> list[dict]:
        """Make steps ``first`` to ``last`` of ``steps``; gives loss, useful tokens, labels and seconds of each."""
        self.configure(args)
        records, ahead = [], Ahead(steps, self.fabric.device)
        for number in range(first, last + 1):
            began = time.perf_counter()
            step = ahead.take(number)  # the next one is made meanwhile, as the loop does
            rows_s = time.perf_counter() - began
            then = partial(ahead.prepare, number + 1) if number < last else None
            record = train_step(self.fabric, self.model, self.optimizer, 2e-4, step, args, self.dropout, then)
            records.append({
                "loss": record["loss"], "tokens": record["n_tokens"], "labels": record["n_labels"],
                "seconds": time.perf_counter() - began, "rows_s": rows_s, "rows": len(step.rows),
                "computed": sum(row.input_ids.numel() for row in step.rows),
            })  # fmt: skip
        return records


def run_lit_sft(folder: Path, precision: str, micro_batch: int, n_steps: int) -> dict:
    """What finetune/lora.py does, without validation and saving; ``micro_batch`` is micro_batch_tokens."""
    args = lora_args(folder / "data", precision=precision, micro_batch_tokens=micro_batch, device="cpu",
                     global_batch_size=64)  # fmt: skip
    train = Shards(args.data_dir, "train")
    checkpoint_dir = folder / "checkpoint"
    steps = TrainSteps(train, args, share_prefix=can_share_prefix(args, checkpoint_dir, train))
    model = checkpoint.load_model(checkpoint_dir, dtype=runtime.BASE_DTYPE[precision])
    training = Training(model, args, compiled=False)
    weights_mb = settle(model.parameters())
    records = training.run(steps, args, 1, 1)
    first = since_start()
    records += training.run(steps, args, 2, n_steps)
    return {"steps": records, "weights_mb": weights_mb, "peak_mb": measure.peak(), "first_step_s": first}


def grow(folder: Path, precision: str, micro_batch: int, n_steps: int) -> dict:
    """As ``run_lit_sft`` on a random 31M model, over the data that benchmarks/growth.py has put into ``folder``."""
    args = lora_args(folder, precision=precision, micro_batch_tokens=micro_batch, device="cpu",
                     global_batch_size=max(1, 16384 // int(Shards(folder, "train").lengths.max())))  # fmt: skip
    model = random_model(SHAPES["pythia-31m"], "cpu", runtime.BASE_DTYPE[precision])
    training = Training(model, args, compiled=False)
    weights_mb = settle(model.parameters())
    steps = TrainSteps(Shards(folder, "train"), args, share_prefix=True)
    records = training.run(steps, args, 1, n_steps)
    run = {"steps": records, "weights_mb": weights_mb, "peak_mb": measure.peak(), "first_step_s": since_start()}
    found = profile(lambda: training.run(steps, args, n_steps, n_steps), "cpu", SHAPES["pythia-31m"])
    return run | {"attention_share": found["categories"].get("attention", 0.0) / found["profiled_seconds"]}


if __name__ == "__main__":
    measure.work({"lit_sft": run_lit_sft, "growth": grow})
