"""The memory that --estimate predicts against the most that a run held, for six settings on a CPU.

python benchmarks/estimate.py [--shape pythia-31m|small] [--steps 4] [--out benchmarks/results/estimate_cpu.json]

Each prediction and each run is a process of its own, with the variable of glibc's that docs/performance.md recommends
where memory is short; --no-tidy_heap leaves the heap as it is. A run is the training command as a user starts it:
loading, steps, validation, a sample, saving; what it held is VmHWM of /proc/self/status, which unlike ru_maxrss does
not begin with what the parent had. Weights are random, examples are made up: 256, of 60 to 400 tokens. "above" is
without what the process holds before the model: interpreter, torch, lightning.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIDY_HEAP = "MALLOC_MMAP_THRESHOLD_"
sys.path.insert(0, str(ROOT))
SHAPES = {  # transformers' model_type, hidden, layers, heads, intermediate, vocabulary
    "pythia-31m": ("gpt_neox", 256, 6, 8, 1024, 50304),
    "small": ("llama", 256, 4, 8, 688, 4000),
}
SETTINGS = {
    "LoRA fp32": ("lora", {"micro_batch_tokens": 4096}),
    "LoRA fp32, half rows": ("lora", {"micro_batch_tokens": 2048}),
    "LoRA bf16": ("lora", {"micro_batch_tokens": 4096, "precision": "bf16-true"}),
    "LoRA NF4": ("lora", {"micro_batch_tokens": 4096, "quantize": "nf4"}),
    "LoRA fp32, checkpointing": ("lora", {"micro_batch_tokens": 4096, "activation_checkpointing": "all"}),
    "full fp32": ("full", {"micro_batch_tokens": 4096}),
}


def make_inputs(folder: Path, shape: str) -> None:
    """A converted checkpoint with random weights, and data for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from demo.make_checkpoint import train_tokenizer
    from lit_sft.args import ConvertArgs
    from lit_sft.convert import convert_checkpoint
    from lit_sft.prepare import prepare
    from lit_sft.prepare_args import PrepareArgs
    from lit_sft.rows import Columns

    model_type, hidden, layers, heads, intermediate, vocabulary = SHAPES[shape]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": intermediate, "vocab_size": vocabulary, "max_position_embeddings": 4096}
    config = AutoConfig.for_model(model_type, **sizes, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.model").write_bytes(train_tokenizer())
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(folder / "model")))
    draw = random.Random(0)
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = ((f"Write {n} numbers.", [draw.randint(0, 999) for _ in range(n)]) for n in
                (draw.randint(5, 90) for _ in range(256)))  # fmt: skip
        csv.writer(file).writerows([("instruction", "output"), *((a, " ".join(map(str, b))) for a, b in rows)])
    args = PrepareArgs(checkpoint_dir=str(folder / "model"), destination_path=str(folder / "data"), num_workers=1)
    prepare(args, folder / "rows.csv", "rows", Columns())


def arguments(folder: Path, setting: str, steps: int):
    """What the training command is given."""
    from lit_sft.args import FullTrainArgs, LoRATrainArgs

    kind, flags = SETTINGS[setting]
    common = {"data_dir": str(folder / "data"), "out_dir": str(folder / f"out-{os.getpid()}"), "device": "cpu"}
    return (LoRATrainArgs if kind == "lora" else FullTrainArgs)(**common, max_steps=steps, **flags)


def predict(folder: Path, setting: str, steps: int) -> dict:
    """The training command up to where it would print the estimate."""
    from finetune import full, lora
    from lit_sft import fitting
    from lit_sft.memory import resident_memory

    found = {}

    def keep(plan: fitting.Plan) -> None:
        found["before"] = resident_memory()
        memory, _, found["peak"] = plan.needed(plan.args)
        found["tensors"] = memory.peak

    fitting.show_estimate = keep
    args = arguments(folder, setting, steps)
    args.estimate = True
    (lora if SETTINGS[setting][0] == "lora" else full).main(args)
    return found


def run(folder: Path, setting: str, steps: int) -> dict:
    """The training command."""
    from finetune import full, lora

    (lora if SETTINGS[setting][0] == "lora" else full).main(arguments(folder, setting, steps))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak": int(status["VmHWM"].split()[0]) * 1024}


def compare(folder: Path, setting: str, steps: int, tidy_heap: bool) -> dict:
    """Prediction and run of one setting."""
    environment = {k: v for k, v in os.environ.items() if k != TIDY_HEAP}
    environment |= {TIDY_HEAP: "1048576"} if tidy_heap else {}
    results = []
    for work in ("predict", "run"):
        command = [sys.executable, __file__, "--work", work, "--folder", folder, "--setting", setting]
        done = subprocess.run([*map(str, command), "--steps", str(steps)], capture_output=True, text=True, cwd=ROOT,
                              env=environment)  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        results.append(json.loads(done.stdout.splitlines()[-1]))
    predicted, measured = results
    before = predicted["before"]
    return {
        "setting": setting,
        "before_mb": before / 1e6,
        "tensors_mb": predicted["tensors"] / 1e6,
        "predicted_mb": predicted["peak"] / 1e6,
        "measured_mb": measured["peak"] / 1e6,
        "error": predicted["peak"] / measured["peak"] - 1,
        "error_above": (predicted["peak"] - before) / (measured["peak"] - before) - 1,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="pythia-31m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "estimate_cpu.json")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tidy_heap", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", choices=["predict", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        with contextlib.redirect_stdout(io.StringIO()):
            result = {"predict": predict, "run": run}[args.work](args.folder, args.setting, args.steps)
        print(json.dumps(result))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), args.shape)
        for setting in args.settings:
            results.append(compare(Path(name), setting, args.steps, args.tidy_heap))
            text = "{setting:26} predicted {predicted_mb:7,.0f} MB, measured {measured_mb:7,.0f} MB: {error:+.1%}, "
            print((text + "above what was there before {error_above:+.1%}").format(**results[-1]), flush=True)
    import torch

    facts = {"torch": torch.__version__, "shape": args.shape, "steps": args.steps, "threads": torch.get_num_threads()}
    args.out.write_text(json.dumps(facts | {"runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
