"""Everything to be measured on one large GPU, in one command.

python benchmarks/gpu.py --out results [--budget_s 1500] [--parts ceilings bf16 …]
python benchmarks/gpu.py --out results --device cpu --shape tiny --large_shape tiny --micro_batch_tokens 1024

Parts, each a process of its own: the machine's ceilings; lit_sft in bf16 (with and without shared prefixes), FP8 and
NF4 over lengths like Alpaca's and LIMA's at several micro_batch_tokens; transformers + peft, length-grouped, at every
micro-batch until memory ends; litgpt, TRL and Liger where they can be imported; the large shape on a LIMA-sized epoch;
where a step's time goes; and a whole epoch of 51,759 examples. Weights are random and drawn on the device, the same
ones on every side; ids are random, lengths real (alpaca_lengths.json), LIMA's assumed (lengths.py).

Each finding is a line of OUT/<part>.jsonl as soon as it is there; OUT/gpu.json holds all of them after each part. A
part that was not reached within --budget_s is missing there, and a later call with --parts adds it. The tables:
python benchmarks/tables.py OUT/gpu.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from gpu_parts import PARTS
from measure import STARTED
from shapes import SHAPES

HERE = Path(__file__).parent


def machine(device: str) -> dict:
    """What the figures are taken on and with."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("torch", "triton", "transformers", "peft", "accelerate", "lightning", "bitsandbytes", "litgpt", "trl",
             "liger_kernel", "unsloth")  # fmt: skip
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "device": f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" if gpu else "cpu",
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": {name: found for name in names if (found := of(name))},
    }


def lines(path: Path) -> Iterator[dict]:
    """The findings of one part so far; a line that a kill cut short is none."""
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)


def run_part(name: str, args: argparse.Namespace, rest: float) -> None:
    """One part in its own process, ended when the budget is."""
    path = args.out / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    environment = os.environ | {STARTED: str(time.time()), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    print(f"== {name}, {rest:.0f} s left", flush=True)
    with (args.out / f"{name}.log").open("w") as log:
        try:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", name], env=environment,
                                  stdout=log, stderr=subprocess.STDOUT, timeout=rest)  # fmt: skip
            ended = None if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "the time was up"
    if ended:
        said = (args.out / f"{name}.log").read_text()[-1500:]
        with path.open("a") as file:
            file.write("\n" + json.dumps({"ended": ended, "log": said}) + "\n")
        print(f"{name}: {ended}\n{said}", flush=True)


def main() -> None:
    """Run the parts that fit into the budget; write after each; print the tables."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        path = args.out / f"{args.part}.jsonl"

        def emit(**facts: object) -> None:
            with path.open("a") as file:
                file.write(json.dumps(facts) + "\n")

        PARTS[args.part](args, emit)
        return
    from tables import gpu_tables

    began = time.perf_counter()
    path = args.out / "gpu.json"
    result = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    for name in args.parts:
        rest = args.budget_s - (time.perf_counter() - began)
        if rest < 20:
            print(f"{name} and what follows are left out: --budget_s is over", flush=True)
            break
        run_part(name, args, rest)
        result["parts"][name] = {**machine(args.device), "findings": list(lines(args.out / f"{name}.jsonl"))}
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(gpu_tables(result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the findings")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument("--budget_s", type=float, default=1500, help="seconds; what does not fit is left out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--large_shape", choices=SHAPES, default="llama-65b")
    parser.add_argument("--micro_batch_tokens", type=int, nargs="+", default=[4096, 8192, 16384], help="of lit_sft")
    parser.add_argument("--epoch_quantize", choices=["fp8", "nf4"], help="of the part epoch (default: bf16)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on cuda)")
    parser.add_argument("--whole_epochs", action="store_true", help="run the large shape's epochs to their end")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu --shape tiny tries the program out")
    return args


if __name__ == "__main__":
    main()
