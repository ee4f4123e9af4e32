"""The other sides of the benchmarks: litgpt's LoRA, TRL's SFTTrainer with PEFT, transformers' Trainer with PEFT.

Imports nothing of lit_sft. ``python benchmarks/peers.py`` with a worker's flags is one run on a CPU.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import measure
import torch
from measure import draw_weight, settle, since_start, synchronize
from shapes import ALPHA, BLOCK_SIZE, RANK, SHAPES, Shape
from torch import Tensor, nn

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
Examples = list[tuple[list[int], int]]  # ids, and how many of them are the prompt
TARGETS = {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_checkpoint(folder: Path, shape: Shape) -> None:
    """A random model of this shape as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.model_type, **shape.hf_config())
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def steps_of(folder: Path, n_steps: int) -> list[Examples]:
    """The examples of each step, the same and in the same order as lit_sft's."""
    return json.loads((folder / "steps.json").read_text())[:n_steps]


# --- litgpt ---


def litgpt_model(shape: Shape, eps: float, weights: dict[str, Tensor], dtype: torch.dtype, device: str) -> nn.Module:
    """The LoRA model of litgpt with ``weights``, which have transformers' names."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox, copy_weights_hf_llama

    parts = dict.fromkeys((f"lora_{p}" for p in ("query", "key", "value", "projection", "mlp")), True)
    parts |= {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_head": False}
    sizes = {"n_embd": shape.hidden_size, "n_layer": shape.num_hidden_layers, "n_head": shape.num_attention_heads}
    sizes |= {"intermediate_size": shape.intermediate_size, "padded_vocab_size": shape.vocab_size}
    sizes |= {"vocab_size": shape.vocab_size, "block_size": BLOCK_SIZE, "n_query_groups": shape.n_kv_heads}
    state: dict[str, Tensor] = {}
    if shape.model_type == "llama":
        llama = {"norm_class_name": "RMSNorm", "norm_eps": eps, "mlp_class_name": "LLaMAMLP"}
        llama |= {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
        config = Config(**sizes, **parts, **llama)
        copy_weights_hf_llama(config, {}, state, weights)
    else:
        config = Config(**sizes, **parts, rotary_percentage=0.25)
        theirs = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in weights.items()}
        copy_weights_gpt_neox(config, state, theirs)
    wide = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a large model would not fit into a device's memory twice
    try:
        with torch.device(device):
            model = GPT(config)
    finally:
        torch.set_default_dtype(wide)
    loaded = model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False)
    if wrong := [name for name in loaded.missing_keys if "lora_" not in name] + loaded.unexpected_keys:
        raise RuntimeError(f"litgpt's model and these weights differ: {wrong[:3]}")
    mark_only_lora_as_trainable(model)
    model.train()
    return model


def litgpt_step(model: nn.Module, optimizer: torch.optim.Optimizer, examples: Examples, micro_batch: int) -> dict:
    """The body of litgpt's loop: padded micro-batches, chunked head and loss."""
    from litgpt.utils import chunked_cross_entropy

    device = next(model.parameters()).device
    began, total, n_labels = time.perf_counter(), 0.0, 0
    starts = range(0, len(examples), micro_batch)
    for start in starts:
        input_ids, targets = padded(examples[start : start + micro_batch])
        logits = model(input_ids.to(device), lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, targets[..., 1:].to(device))
        (loss / len(starts)).backward()
        here = int((targets[:, 1:] != -100).sum())
        total, n_labels = total + loss.item() * here, n_labels + here
    optimizer.step()
    optimizer.zero_grad()
    synchronize(device)
    tokens = sum(len(ids) for ids, _ in examples)
    return {"loss": total / n_labels, "tokens": tokens, "seconds": time.perf_counter() - began}


def padded(examples: Examples) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``labels`` of a micro-batch, both (B, T): padded with 0 and -100."""
    longest = max(len(ids) for ids, _ in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), -100)
    for row, (ids, n_prompt) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
    return input_ids, labels


def litgpt_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As litgpt's finetune_lora makes it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)


def run_litgpt(folder: Path, precision: str, micro_batch: int, n_steps: int) -> dict:
    """Steps of ``micro_batch`` examples at a time on a CPU."""
    from safetensors.torch import load_file

    hf_config = json.loads((folder / "checkpoint" / "config.json").read_text())
    shape = Shape(**{name: hf_config.get(name) for name in Shape.__dataclass_fields__})
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    model = litgpt_model(shape, hf_config.get("rms_norm_eps", 1e-5), weights, DTYPES[precision], "cpu")
    model.max_seq_length = 512
    del weights
    optimizer = litgpt_optimizer(model)
    weights_mb = settle(model.parameters())
    records, first = [], 0.0
    for examples in steps_of(folder, n_steps):
        records.append(litgpt_step(model, optimizer, examples, micro_batch))
        first = first or since_start()
    return {"steps": records, "weights_mb": weights_mb, "peak_mb": measure.peak(), "first_step_s": first}


class Litgpt:
    """The LoRA of litgpt on a random model drawn on the device."""

    def __init__(self, name: str, device: str, longest: int) -> None:
        """``longest``: tokens of the longest example."""
        self.model = litgpt_model(SHAPES[name], 1e-6, drawn_weights(SHAPES[name], device), torch.bfloat16, device)
        self.model.max_seq_length = longest
        self.optimizer = litgpt_optimizer(self.model)

    def run(self, steps: list[Examples], micro_batch: int) -> list[dict]:
        """One step over each of these examples; gives their records."""
        return [litgpt_step(self.model, self.optimizer, examples, micro_batch) for examples in steps]


# --- TRL on a CPU ---


def trl_trainer(folder: Path, precision: str, micro_batch: int, n_steps: int, mode: str) -> object:
    """An SFTTrainer with a LoraConfig on all linear layers.

    Args:
        folder: with checkpoint/ and steps.json.
        precision: of the base.
        micro_batch: examples of a forward; with "packing" rows of as many times 512 tokens, one a forward.
        n_steps: optimizer steps; as many examples are taken.
        mode: "padded"; "padding_free", which concatenates the examples of a forward; or "packing", best-fit rows.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=DTYPES[precision])
    examples = [example for step in steps_of(folder, n_steps) for example in step]
    rows = [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in examples]
    per_step = len(examples) // n_steps
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.pad_token = tokenizer.eos_token = "a"
    packing = mode == "packing"
    accumulated = per_step // micro_batch
    if packing:  # about as many rows a step as its examples fill
        row_tokens = 512 * micro_batch
        accumulated = max(1, round(sum(len(ids) for ids, _ in examples) / n_steps / row_tokens))
    config = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=1 if packing else micro_batch, max_steps=n_steps,
        use_cpu=True, gradient_accumulation_steps=accumulated, learning_rate=2e-4, logging_steps=1, save_strategy="no",
        report_to=[], bf16=False, gradient_checkpointing=False, disable_tqdm=True, train_sampling_strategy="sequential",
        max_length=row_tokens if packing else None, packing=packing, padding_free=mode == "padding_free",
        dataset_kwargs=None if packing else {"skip_prepare_dataset": True},
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[model.config.model_type])
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                      peft_config=lora)  # fmt: skip


def run_trl(mode: str) -> measure.Run:
    """The run of one of ``trl_trainer``'s modes."""

    def run(folder: Path, precision: str, micro_batch: int, n_steps: int) -> dict:
        trainer = trl_trainer(folder, precision, micro_batch, n_steps, mode)
        clock = add_clock(trainer)
        weights_mb = settle(trainer.model.parameters())
        trainer.train()
        size = trainer.args.gradient_accumulation_steps * trainer.args.per_device_train_batch_size
        rows = trainer.train_dataset["input_ids"]
        tokens = [sum(map(len, rows[k * size : (k + 1) * size])) for k in range(n_steps)]
        tokens = [n or sum(map(len, rows)) // n_steps for n in tokens]  # packed rows may be too few for the last step
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        records = [{"loss": losses[k], "tokens": tokens[k], "seconds": clock.ends[k] - clock.begins[k]}
                   for k in range(n_steps)]  # fmt: skip
        return {"steps": records, "weights_mb": weights_mb, "peak_mb": measure.peak(), "first_step_s": clock.first}

    return run


def add_clock(trainer: object) -> object:
    """Give a Trainer a callback that notes when its optimizer steps begin and end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begins: list[float] = []
            self.ends: list[float] = []
            self.first = 0.0

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.begins.append(time.perf_counter())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.first = self.first or since_start()

    clock = Clock()
    trainer.add_callback(clock)
    return clock


def isolation(mode: str) -> measure.Run:
    """Whether a row of that mode gives each of its examples the logits that it has alone."""

    def run(folder: Path, precision: str, micro_batch: int, n_steps: int) -> dict:
        trainer = trl_trainer(folder, precision, micro_batch, n_steps, mode)
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.model.train()
        labels = batch.pop("labels")
        with torch.no_grad():
            together = model(**batch, use_cache=False).logits[0]
            ids = batch["input_ids"][0]
            starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), len(ids)]
            parts = list(pairwise(starts))
            apart = torch.cat([model(input_ids=ids[None, a:b], use_cache=False).logits[0] for a, b in parts])
            as_one = model(input_ids=ids[None], use_cache=False).logits[0]  # if they saw each other
        largest = float((together - apart).abs().max())
        return {
            "examples": len(parts),
            "row_tokens": len(ids),
            "labels": int((labels != -100).sum()),
            "attention": model.config._attn_implementation,
            "largest_logit_difference": largest,
            "difference_as_one_example": float((as_one - apart).abs().max()),
            "isolated": largest < 1e-3,
        }

    return run


# --- transformers' Trainer on a device ---


def drawn_weights(shape: Shape, device: str) -> dict[str, Tensor]:
    """Random weights under transformers' names, in bf16 on the device; the same that lit_sft draws there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **shape.hf_config()))
    return {n: draw_weight(n, p.shape, device, torch.bfloat16) for n, p in model.named_parameters()}


class Transformers:
    """A random model in bf16 with peft's adapter, trained by transformers' Trainer with SDPA, as often as asked."""

    def __init__(self, name: str, device: str, liger: bool = False) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = SHAPES[name]
        config = AutoConfig.for_model(shape.model_type, **shape.hf_config())
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        with torch.no_grad():
            for each, parameter in model.named_parameters():
                parameter.copy_(draw_weight(each, parameter.shape, device, torch.bfloat16))
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[shape.model_type])
        self.model, self.device, self.liger = get_peft_model(model, lora), device, liger

    def run(
        self, examples: Examples, micro_batch: int, grouped: bool, batch: int = 64
    ) -> tuple[list[dict], list[float]]:
        """Steps of ``batch`` of ``examples``, grouped by length or in their order.

        Returns the records of all steps but the first, and the losses of all; raises torch.OutOfMemoryError.
        """
        from transformers import Trainer, TrainingArguments

        micro_batch = min(micro_batch, batch)
        n_steps = len(examples) // batch
        settings = TrainingArguments(
            output_dir="trainer", per_device_train_batch_size=micro_batch, max_steps=n_steps, learning_rate=2e-4,
            gradient_accumulation_steps=batch // micro_batch, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, train_sampling_strategy="group_by_length" if grouped else "sequential", seed=0,
            use_cpu=self.device == "cpu", bf16=False, use_liger_kernel=self.liger, remove_unused_columns=False,
        )  # fmt: skip
        seen: list[int] = []  # useful tokens of each forward

        def collate(rows: list[dict]) -> dict[str, Tensor]:
            seen.append(sum(len(row["input_ids"]) for row in rows))
            input_ids, labels = padded([(row["input_ids"], row["n_prompt"]) for row in rows])
            mask = torch.zeros_like(input_ids)
            for i, row in enumerate(rows):
                mask[i, : len(row["input_ids"])] = 1
            return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}

        rows = [{"input_ids": ids, "n_prompt": n_prompt} for ids, n_prompt in examples]
        trainer = Trainer(self.model, settings, data_collator=collate, train_dataset=rows)
        clock = add_clock(trainer)
        try:
            trainer.train()
        finally:
            self.model.zero_grad()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        per_step = settings.gradient_accumulation_steps
        tokens = [sum(seen[k * per_step : (k + 1) * per_step]) for k in range(n_steps)]
        records = [{"tokens": n, "seconds": end - begin}
                   for n, begin, end in zip(tokens, clock.begins, clock.ends, strict=True)]  # fmt: skip
        del trainer
        gc.collect()
        return records[1:], losses


TOOLS: dict[str, Callable] = {"litgpt": run_litgpt, "trl": run_trl("padded")}
TOOLS |= {f"trl_{mode}": run_trl(mode) for mode in ("padding_free", "packing")}
TOOLS |= {f"trl_{mode}_isolation": isolation(mode) for mode in ("padding_free", "packing")}

if __name__ == "__main__":
    if "--make_checkpoint" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--make_checkpoint", type=Path)
        parser.add_argument("--shape", choices=SHAPES)
        arguments = parser.parse_args()
        make_checkpoint(arguments.make_checkpoint, SHAPES[arguments.shape])
    else:
        measure.work(TOOLS)
