"""Training speed, side by side in one run: lit_sft, litgpt's LoRA, TRL's SFTTrainer with PEFT.

python benchmarks/train.py --data_file alpaca.json --tokenizer_dir FOLDER [--shapes pythia-31m pythia-160m llama-100m]

Every side trains the same adapter (r 16 on every linear layer of the blocks) on the same random base, the same examples
of at most 512 tokens in the same order, 64 a step, labels on the responses. Useful tokens are those of the examples,
padding and sharing not counted. litgpt and TRL run at each micro-batch of --micro_batches; their best counts. Each run
is a process of its own; the first step warms up. Peak memory is resident, less what the weights take. Losses of the
first step, where every adapter is still zero, show that all compute the same. The order turns with each repetition.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ["torch==2.13.0", "litgpt==0.5.13", "trl==1.16.0", "peft", "requests", "datasets", "sentencepiece"]
SHAPES = {  # transformers' model_type, and FIELDS
    "pythia-31m": ("gpt_neox", (256, 6, 8, 1024)),
    "pythia-160m": ("gpt_neox", (768, 12, 12, 3072)),
    "llama-100m": ("llama", (640, 12, 10, 1728)),
}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
COMMON = {"vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False}
BATCH, LONGEST, RANK = 64, 512, 16


def run_lit_sft(folder: Path, precision: str, micro_batch: int, steps: int) -> dict:
    """The loop of finetune/lora.py, without validation and saving; ``micro_batch`` is micro_batch_tokens."""
    import torch

    from lit_sft import checkpoint, optim, runtime
    from lit_sft.args import LoRATrainArgs
    from lit_sft.batches import TrainSteps
    from lit_sft.loop import train_step
    from lit_sft.lora import apply_lora
    from lit_sft.run import can_share_prefix
    from lit_sft.shards import Shards

    args = LoRATrainArgs(data_dir=str(folder / "data"), precision=precision, micro_batch_tokens=micro_batch)
    train = Shards(args.data_dir, "train")
    fabric = runtime.launch(args)
    checkpoint_dir = folder / "checkpoint"
    train_steps = TrainSteps(train, args, share_prefix=can_share_prefix(args, checkpoint_dir, train))
    weights_mb = resident()
    model = checkpoint.load_model(checkpoint_dir, dtype=runtime.base_dtype(fabric))
    dropout = apply_lora(model, args, args.seed)
    optimizer = optim.build_optimizer(model, optim.master_parameters(model), args)
    weights_mb = max(weights_mb, resident())
    records = []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        record = train_step(fabric, model, optimizer, 2e-4, train_steps[number], args, dropout)
        seconds = time.perf_counter() - began  # with the making of the rows
        records.append({"loss": record["loss"], "tokens": record["n_tokens"], "seconds": seconds})
    return {"steps": records, "weights_mb": weights_mb, "threads": torch.get_num_threads()}


def run_litgpt(folder: Path, precision: str, micro_batch: int, steps: int) -> dict:
    """Its LoRA model and the body of its loop: padded micro-batches, chunked head and loss."""
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox, copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    shape = json.loads((folder / "checkpoint" / "config.json").read_text())
    parts = dict.fromkeys((f"lora_{p}" for p in ("query", "key", "value", "projection", "mlp")), True)
    parts |= {"lora_r": RANK, "lora_alpha": 32, "lora_dropout": 0.0, "lora_head": False}
    names = ("n_embd", "n_layer", "n_head", "intermediate_size")
    common = {name: shape[theirs] for name, theirs in zip(names, FIELDS, strict=True)}
    common |= {"padded_vocab_size": shape["vocab_size"], "vocab_size": shape["vocab_size"], "block_size": 2048}
    if shape["model_type"] == "llama":
        llama = {"norm_class_name": "RMSNorm", "norm_eps": shape["rms_norm_eps"], "mlp_class_name": "LLaMAMLP"}
        llama |= {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
        config = Config(**common, **parts, **llama)
    else:
        config = Config(**common, **parts, rotary_percentage=0.25)
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    hf, state = load_file(folder / "checkpoint" / "model.safetensors"), {}
    if shape["model_type"] == "llama":
        copy_weights_hf_llama(config, {i: {} for i in range(config.n_layer)}, state, hf)
    else:
        hf = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in hf.items()}
        copy_weights_gpt_neox(config, state, hf)
    model = GPT(config).to(dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False)
    mark_only_lora_as_trainable(model)
    del hf, state
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)
    weights_mb = resident()
    model.max_seq_length = LONGEST
    model.train()
    records = []
    for examples in json.loads((folder / "steps.json").read_text())[:steps]:
        began, total, n_labels, n_tokens = time.perf_counter(), 0.0, 0, 0
        for start in range(0, len(examples), micro_batch):
            part = examples[start : start + micro_batch]
            longest = max(len(ids) for ids, _ in part)
            input_ids = torch.zeros(len(part), longest, dtype=torch.int64)
            targets = torch.full((len(part), longest), -100)
            for row, (ids, n_prompt) in enumerate(part):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                targets[row, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
            logits = model(input_ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, targets[..., 1:])
            (loss / (BATCH / micro_batch)).backward()
            here = int((targets[:, 1:] != -100).sum())
            total, n_labels = total + loss.item() * here, n_labels + here
            n_tokens += sum(len(ids) for ids, _ in part)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"loss": total / n_labels, "tokens": n_tokens, "seconds": time.perf_counter() - began})
    return {"steps": records, "weights_mb": weights_mb, "threads": torch.get_num_threads()}


def run_trl(folder: Path, precision: str, micro_batch: int, steps: int) -> dict:
    """SFTTrainer with a LoraConfig on all linear layers, padded; ``micro_batch`` is per_device_train_batch_size."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=dtype)
    weights_mb = resident()
    examples = [example for step in json.loads((folder / "steps.json").read_text())[:steps] for example in step]
    rows = [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in examples]
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.pad_token = tokenizer.eos_token = "a"
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    llama = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = llama if model.config.model_type == "llama" else names
    config = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro_batch, max_steps=steps, use_cpu=True,
        gradient_accumulation_steps=BATCH // micro_batch, learning_rate=2e-4, logging_steps=1, save_strategy="no",
        report_to=[], bf16=False, max_length=LONGEST, gradient_checkpointing=False, disable_tqdm=True,
        train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            marks.append(time.perf_counter())

    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=targets)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=lora, callbacks=[Clock()])  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    records = []
    for k in range(steps):
        tokens = sum(len(ids) for ids, _ in examples[k * BATCH : (k + 1) * BATCH])
        records.append({"loss": losses[k], "tokens": tokens, "seconds": marks[2 * k + 1] - marks[2 * k]})
    return {"steps": records, "weights_mb": weights_mb, "threads": torch.get_num_threads()}


RUNS = {"lit_sft": run_lit_sft, "litgpt": run_litgpt, "trl": run_trl}


def resident() -> float:
    """Memory of the process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def make_inputs(folder: Path, shape: str, data_file: Path, tokenizer_dir: Path, steps: int) -> None:
    """Checkpoint, shards, and the same examples as lists for the others."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_sft.args import ConvertArgs, LoRATrainArgs, PrepareArgs
    from lit_sft.batches import TrainSteps
    from lit_sft.convert import convert_checkpoint
    from lit_sft.prepare import prepare
    from lit_sft.shards import Shards

    model_type, values = SHAPES[shape]
    fields = dict(zip(FIELDS, values, strict=True))
    torch.manual_seed(0)
    hf_config = AutoConfig.for_model(model_type, **COMMON, **fields, initializer_range=fields["hidden_size"] ** -0.5)
    AutoModelForCausalLM.from_config(hf_config).save_pretrained(folder / "checkpoint")
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder / "checkpoint")
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(folder / "checkpoint")))
    args = PrepareArgs(checkpoint_dir=str(folder / "checkpoint"), destination_path=str(folder / "data"),
                       max_seq_length=LONGEST, prompt_style="alpaca", val_split_fraction=0, num_workers=1)  # fmt: skip
    prepare(args, data_file, "data")
    train = Shards(folder / "data", "train")
    order = TrainSteps(train, LoRATrainArgs(data_dir=str(folder / "data"), global_batch_size=BATCH))
    plain = [[(ids.tolist(), int(mask.int().argmax())) for ids, mask in map(train.__getitem__, order.examples(k))]
             for k in range(1, steps + 1)]  # fmt: skip
    (folder / "steps.json").write_text(json.dumps(plain))


def measured(tool: str, python: Path, folder: Path, precision: str, micro_batch: int, steps: int) -> dict:
    """One run in a process of its own."""
    command = [python, __file__, "--run", tool, "--folder", folder, "--precision", precision]
    command += ["--micro_batch", micro_batch, "--steps", steps]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(ROOT)} if tool == "lit_sft" else {}
    load = os.getloadavg()[0]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"tool": tool, "micro_batch": micro_batch, "precision": precision, "failed": done.stderr[-800:]}
    result = json.loads(done.stdout.splitlines()[-1])
    timed = result["steps"][1:]
    result["tokens_per_s"] = sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed)
    result["above_weights_mb"] = result["peak_mb"] - result["weights_mb"]
    return result | {"tool": tool, "micro_batch": micro_batch, "precision": precision, "load_before": load}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_file", type=Path, help="JSON of instruction, input, output")
    parser.add_argument("--tokenizer_dir", type=Path, help="folder with tokenizer.json or tokenizer.model")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-true"])
    parser.add_argument("--tools", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4], help="of litgpt and TRL")
    parser.add_argument("--micro_batch_tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="of lit_sft")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-benchmark", help="environment of litgpt and TRL")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_cpu.json")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--micro_batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        result = RUNS[args.run](args.folder, args.precision, args.micro_batch, args.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result | {"peak_mb": peak}))
        return
    python = args.venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", args.venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    runs = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            make_inputs(Path(name), shape, args.data_file, args.tokenizer_dir, args.steps)
            kinds = [(tool, precision, size) for precision in args.precisions for tool in args.tools
                     for size in (args.micro_batch_tokens if tool == "lit_sft" else args.micro_batches)]  # fmt: skip
            for repeat in range(args.repeats):
                for tool, precision, size in kinds[repeat % len(kinds) :] + kinds[: repeat % len(kinds)]:
                    side = Path(sys.executable) if tool == "lit_sft" else python
                    run = measured(tool, side, Path(name), precision, size, args.steps) | {"shape": shape}
                    runs.append(run)
                    said = run.get("failed") or (
                        f"{run['tokens_per_s']:8,.0f} tokens/s {run['above_weights_mb']:7,.0f} MB above the weights, "
                        f"first loss {run['steps'][0]['loss']:.4f}, last {run['steps'][-1]['loss']:.4f}, "
                        f"load {run['load_before']:.1f}"
                    )
                    print(f"{shape:12} {precision:9} {tool:8} {size:5} {said}", flush=True)
    best: dict[str, dict] = {}
    for run in runs:
        if "failed" in run:
            continue
        same = [r["tokens_per_s"] for r in runs if "failed" not in r
                and all(r[k] == run[k] for k in ("shape", "precision", "tool", "micro_batch"))]  # fmt: skip
        key = f"{run['shape']} {run['precision']} {run['tool']}"
        entry = {"tokens_per_s": statistics.median(same), "micro_batch": run["micro_batch"],
                 "above_weights_mb": run["above_weights_mb"], "first_loss": run["steps"][0]["loss"]}  # fmt: skip
        if key not in best or entry["tokens_per_s"] > best[key]["tokens_per_s"]:
            best[key] = entry
    listing = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    named = ("litgpt", "trl", "peft", "transformers", "torch")
    versions = dict(line.split("==") for line in listing.split() if line.split("==")[0] in named)
    summary = {"best": best, "versions": versions, "cores": os.cpu_count(), "runs": runs,
               "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]])}  # fmt: skip
    args.out.write_text(json.dumps(summary, indent=2) + "\n")
    for key, entry in best.items():
        print(f"{key:36} {entry['tokens_per_s']:8,.0f} tokens/s at {entry['micro_batch']:5} "
              f"{entry['above_weights_mb']:7,.0f} MB above the weights")  # fmt: skip


if __name__ == "__main__":
    main()
