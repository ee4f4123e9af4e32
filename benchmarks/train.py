"""Training speed and memory, side by side in one run: lit_sft, litgpt's LoRA, TRL's SFTTrainer with PEFT.

make bench                                             every shape, made-up data; takes long
python benchmarks/train.py --data_file alpaca.json --tokenizer_dir FOLDER [--shapes pythia-31m] [--repeats 3]
python benchmarks/train.py --growth                    how time and memory grow, lit_sft alone

Every side trains the same adapter (r 16 on every linear layer of the blocks) on the same random base, the same examples
of at most 512 tokens in the same order, 64 a step, labels on the responses. Without --data_file they are made up, with
the lengths of alpaca_lengths.json; see lengths.py. Useful tokens are those of the examples, padding and sharing not
counted. The peers run in an environment of their own, at each micro-batch of --micro_batches, TRL padded, padding-free
and packed; the best of each counts, as the median over --repeats. Each run is a process of its own, and the order turns
with each repetition. The first step warms up. Peak memory is resident, above the loaded model with its adapter. Losses
of the first step, where every adapter is still zero, show that all compute the same; whether TRL's packed rows keep
examples apart is tried on a batch of its own. FLOP/s are those of the useful work, as shapes.py counts it; the ceiling
is that of torch's own matrix products at the shape's sizes, measured before the first run and after the last.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import SHAPES, mean_context

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
PEERS = ("torch==2.13.0", "litgpt==0.5.13", "trl==1.16.0", "peft==0.21.2", "requests", "datasets", "sentencepiece",
         "matplotlib")  # fmt: skip
CPU_SHAPES = ("pythia-31m", "pythia-160m", "llama-100m")
TOOLS = ("lit_sft", "litgpt", "trl", "trl_padding_free", "trl_packing")
BATCH, LONGEST = 64, 512


def main() -> None:
    """Measure, print and write."""
    args = parse()
    if args.growth:
        growth(args)
        return
    python = peers_python(args.venv)
    out = args.out or HERE / "results" / "train_cpu.json"
    result = surroundings() | {"peers": pip_list(python), "shapes": {}}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            result["shapes"][shape] = compare(Path(name), shape, args, python)
        write(out, result)
    subprocess.run([python, HERE / "plots.py", out, out.with_suffix(".svg")], check=True)
    from tables import training_tables

    print(training_tables(result))


def growth(args: argparse.Namespace) -> None:
    """Measure lit_sft alone over lengths and numbers of examples; plot where the peers' environment is there."""
    from growth import COUNTS, LENGTHS, grow

    lengths, counts = args.growth_lengths or list(LENGTHS), args.growth_counts or list(COUNTS)
    tables = grow(lengths, counts, args.steps, args.repeats)
    out = args.out or HERE / "results" / "growth_cpu.json"
    write(out, tables | surroundings())
    if (python := args.venv / "bin" / "python").exists():
        subprocess.run([python, HERE / "plots.py", out, out.with_suffix(".svg")], check=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_file", type=Path, help="JSON of instruction, input, output (default: made up)")
    parser.add_argument("--tokenizer_dir", type=Path, help="folder with tokenizer.json or .model (default: of words)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(CPU_SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-true"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4], help="of litgpt and TRL")
    parser.add_argument("--micro_batch_tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="of lit_sft")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-benchmark", help="environment of the peers")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train_cpu.json, or growth_cpu.json")
    parser.add_argument("--growth", action="store_true", help="lit_sft alone over lengths and numbers of examples")
    parser.add_argument("--growth_lengths", type=int, nargs="+", help="tokens an example")
    parser.add_argument("--growth_counts", type=int, nargs="+", help="numbers of examples")
    args = parser.parse_args()
    if (args.data_file is None) != (args.tokenizer_dir is None):
        parser.error("--data_file and --tokenizer_dir go together")
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first warms up")
    return args


def peers_python(venv: Path) -> Path:
    """The Python that has litgpt and TRL; its environment is made if it is not there."""
    python, done = venv / "bin" / "python", venv / "installed"
    if not done.exists() or done.read_text() != "\n".join(PEERS):
        print(f"installing {', '.join(PEERS)} into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        done.write_text("\n".join(PEERS))
    return python


def surroundings() -> dict:
    """What the figures were taken on and with."""
    import torch

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    flags = set(Path("/proc/cpuinfo").read_text().split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    outside = re.compile(r"^(/|\.\./).*/")  # where things lie on one machine is of no use on another
    return {
        "command": " ".join(
            ["python", f"benchmarks/{Path(sys.argv[0]).name}", *(outside.sub("", a) for a in sys.argv[1:])]
        ),
        "commit": commit.strip(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_flags": sorted(flags),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def pip_list(python: Path) -> dict[str, str]:
    """The versions of the peers and what they compute with."""
    lines = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    named = ("litgpt", "trl", "peft", "transformers", "torch", "accelerate", "lightning", "datasets")
    return dict(line.split("==") for line in lines.split() if line.split("==")[0] in named)


def make_inputs(folder: Path, shape: str, args: argparse.Namespace, python: Path) -> None:
    """Checkpoint, shards, and the same examples as lists for the others, in folder/steps.json."""
    from lengths import made_up_rows, write_tokenizer

    from lit_sft.args import ConvertArgs
    from lit_sft.batches import TrainSteps
    from lit_sft.convert import convert_checkpoint
    from lit_sft.prepare import prepare
    from lit_sft.prepare_args import PrepareArgs
    from lit_sft.shards import Shards

    checkpoint, data_file = folder / "checkpoint", args.data_file
    subprocess.run([python, HERE / "peers.py", "--make_checkpoint", checkpoint, "--shape", shape], check=True)
    if data_file is None:
        data_file = folder / "made_up.json"
        data_file.write_text(json.dumps(made_up_rows(BATCH * args.steps, SHAPES[shape].vocab_size)))
        write_tokenizer(checkpoint, SHAPES[shape].vocab_size)
    else:
        for path in args.tokenizer_dir.iterdir():
            shutil.copy(path, checkpoint)
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(checkpoint)))
    n = len(json.loads(data_file.read_text())) // BATCH * BATCH  # whole steps of 64, which all sides can make
    prepare(PrepareArgs(checkpoint_dir=str(checkpoint), destination_path=str(folder / "data"), max_examples=n,
                        max_seq_length=LONGEST, prompt_style="alpaca", val_split_fraction=0, num_workers=1),
            data_file, "data")  # fmt: skip
    from engine import lora_args

    train = Shards(folder / "data", "train")
    order = TrainSteps(train, lora_args(folder / "data", global_batch_size=BATCH))
    if order.per_epoch < args.steps:
        raise SystemExit(f"{args.steps} steps of {BATCH} examples are more than the {n} examples make")
    plain = [[(ids.tolist(), int(mask.int().argmax())) for ids, mask in map(train.__getitem__, order.examples(k))]
             for k in range(1, args.steps + 1)]  # fmt: skip
    (folder / "steps.json").write_text(json.dumps(plain))


def compare(folder: Path, shape: str, args: argparse.Namespace, python: Path) -> dict:
    """Every run of one shape, and the best of each side."""
    make_inputs(folder, shape, args, python)
    examples = [example for step in json.loads((folder / "steps.json").read_text())[1:] for example in step]
    lengths = [len(ids) for ids, _ in examples]
    facts = {"tokens_an_example": statistics.mean(lengths), "mean_context": mean_context(lengths)}
    facts |= {"labelled": 1 - sum(n_prompt for _, n_prompt in examples) / sum(lengths)}
    facts |= {"flop_per_token": SHAPES[shape].flop_per_token(facts["labelled"], facts["mean_context"])}
    before = ceilings(shape, args.precisions)
    apart = {tool: isolation(tool, folder, python) for tool in args.tools if tool.startswith("trl_")}
    kinds = [(tool, precision, size) for precision in args.precisions for tool in args.tools
             for size in (args.micro_batch_tokens if tool == "lit_sft" else args.micro_batches)]  # fmt: skip
    runs = []
    for repeat in range(args.repeats):
        turn = repeat * len(kinds) // args.repeats
        for tool, precision, size in kinds[turn:] + kinds[:turn]:
            runs.append(measured(tool, python, folder, precision, size, args.steps))
            print(f"{shape:12} {precision:9} {tool:16} {size:5} {said(runs[-1])}", flush=True)
    after = ceilings(shape, args.precisions)
    ceiling = {p: max(before[p]["flop_per_s"], after[p]["flop_per_s"]) for p in args.precisions}
    return {"facts": facts, "ceiling_flop_per_s": ceiling, "ceilings": [before, after], "isolation": apart,
            "best": best(runs, facts["flop_per_token"], ceiling), "runs": runs}  # fmt: skip


def ceilings(shape: str, precisions: list[str]) -> dict:
    """Torch's own matrix products at the sizes of ``shape``, 2,048 rows."""
    import torch
    from ceilings import ceiling, product_rates

    found = {}
    for precision in precisions:
        dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
        rates = product_rates(SHAPES[shape], 2048, dtype, "cpu")
        found[precision] = {"flop_per_s": ceiling(SHAPES[shape], rates), "products": rates}
    return found


def isolation(tool: str, folder: Path, python: Path) -> dict:
    """Whether a row of several examples has their separate losses in that mode of TRL."""
    from measure import start

    command = [python, HERE / "peers.py", "--tool", f"{tool}_isolation", "--folder", folder, "--precision", "32-true"]
    found = start([*command, "--micro_batch", 4, "--steps", 2], {})
    print(f"{tool}: {found}", flush=True)
    return found


def measured(tool: str, python: Path, folder: Path, precision: str, micro_batch: int, n_steps: int) -> dict:
    """One run in a process of its own."""
    from measure import start

    ours = tool == "lit_sft"
    command = [sys.executable, HERE / "engine.py"] if ours else [python, HERE / "peers.py"]
    command += ["--tool", tool, "--folder", folder, "--precision", precision, "--micro_batch", micro_batch]
    run = start([*command, "--steps", n_steps], {"PYTHONPATH": str(ROOT)} if ours else {})
    run |= {"tool": tool, "micro_batch": micro_batch, "precision": precision}
    if "failed" in run:
        return run
    timed = run["steps"][1:]
    run["tokens_per_s"] = sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed)
    run["above_weights_mb"] = run["peak_mb"] - run["weights_mb"]
    return run


def said(run: dict) -> str:
    """One line on a run."""
    if "failed" in run:
        return f"failed: {run['failed'].strip().splitlines()[-1]}"
    losses = f"losses {run['steps'][0]['loss']:.4f} … {run['steps'][-1]['loss']:.4f}"
    return (f"{run['tokens_per_s']:8,.0f} tokens/s {run['above_weights_mb']:7,.0f} MB, "
            f"first step after {run['first_step_s']:.0f} s, {losses}, load {run['load_before']:.1f}")  # fmt: skip


def best(runs: list[dict], flop_per_token: float, ceiling: dict[str, float]) -> list[dict]:
    """Of each side and precision the micro-batch with the highest median, and what it took."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        if "failed" not in run:
            groups.setdefault((run["precision"], run["tool"], run["micro_batch"]), []).append(run)
    entries: dict[tuple, dict] = {}
    for (precision, tool, size), same in groups.items():
        median = {name: statistics.median(run[name] for run in same)
                  for name in ("tokens_per_s", "above_weights_mb", "first_step_s")}  # fmt: skip
        flop = median["tokens_per_s"] * flop_per_token
        entry = {"tool": tool, "precision": precision, "micro_batch": size, **median, "repeats": len(same)}
        entry |= {"first_loss": same[0]["steps"][0]["loss"], "last_loss": same[0]["steps"][-1]["loss"]}
        entry |= {"flop_per_s": flop, "share_of_ceiling": flop / ceiling[precision]}
        held = entries.get((precision, tool))
        if held is None or held["tokens_per_s"] < entry["tokens_per_s"]:
            entries[precision, tool] = entry
    return list(entries.values())


def write(out: Path, result: dict) -> None:
    """Write the raw figures."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
