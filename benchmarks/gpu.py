"""Everything to be measured on one large GPU, in two calls of five minutes.

python benchmarks/gpu.py --out FOLDER --call A
python benchmarks/gpu.py --out FOLDER --call B --cache FOLDER_OF_A/cache.zip
python benchmarks/gpu.py --out FOLDER --call A --device cpu --shape tiny    (tries the program out)

Each stage is a process with a limit of its own; where compiling takes too long or a stage fails, training is tried
once more as it is written. Weights are random and drawn on the device, the same on every side; ids are random, lengths
real (alpaca_lengths.json), LIMA's assumed (lengths.py). What is in OUT:

    gpu_A.jsonl   each finding as soon as it is there
    gpu_A.json    all of them by stage, beside the machine, its clocks and power, and the predictions; after each stage
    logs_A.zip    what the stages printed, and nvidia-smi's log of clocks and power
    cache.zip     what torch.compile made, for a later call

The tables: python benchmarks/tables.py OUT/gpu_A.json
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

from clocks import Clocks, query
from tables import gpu_tables


class Stage(NamedTuple):
    """One process of a call."""

    call: str
    limit_s: float
    """From when it may use the device; a second try without compiling has what is left of it, or RETRY_S."""
    compile_s: float | None = None
    """By when its first step must have been made; None: it compiles nothing."""
    imports: str = "torch"
    """What it imports while the stage before it runs."""


ENGINE = "engine torch._inductor.compile_fx"
PEERS = "peers peft transformers.trainer transformers.models.llama.modeling_llama"
STAGES = {
    "micro": Stage("A", 50, imports="gpu_micro"),
    "tests": Stage("A", 60),
    "bf16": Stage("A", 95, 68, ENGINE),
    "fp8": Stage("A", 72, 52, ENGINE),
    "final_bf16": Stage("B", 92, 60, ENGINE),
    "final_fp8": Stage("B", 48, 38, ENGINE),
    "memory": Stage("B", 35, 25, ENGINE),
    "trainer": Stage("B", 42, imports=PEERS),
    "litgpt": Stage("B", 30, imports="peers"),
    "small": Stage("B", 28, 22, ENGINE),
    "large": Stage("B", 55, 40, ENGINE),
}
"""In the order in which they run. Call A's limits add up to 277 s, call B's to 330."""
BUDGET_S = {"A": 280, "B": 310}  # of a whole call: what is not reached by then is left out
ON_CPU = 20  # times as long may everything take where the program is only tried out
RETRY_S = 30
LEAST_S = 15  # with less than this left no stage is begun
ESTIMATES = "estimates"  # a process beside the others, which needs no device
STARTED = "BENCHMARK_STARTED"  # as measure.py has it, whose import takes seconds
HERE = Path(__file__).parent


def machine(args: argparse.Namespace) -> dict:
    """Describe what the figures are taken on and with."""
    names = ("torch", "triton", "transformers", "peft", "accelerate", "lightning", "litgpt", "liger_kernel")
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    card = query("name,driver_version,memory.total,power.limit,clocks.max.sm") if args.device == "cuda" else None
    name, driver, memory, power, clock = card or ("cpu", None, 0, None, None)
    return {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "device": name,
        "driver": driver,
        "memory_mib": int(memory),
        "power_limit_w": power,
        "most_mhz": clock,
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "versions": versions,
        "commit": args.commit or commit(),
    }


def commit() -> str | None:
    """The checkout's commit; None where this is none."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", HERE, "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


class Call:
    """The stages of one call, one after the other; the next one's imports are made meanwhile."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        """``work``: a folder for what does not stay."""
        self.args, self.work = args, work
        self.lines = args.out / f"gpu_{args.call}.jsonl"
        self.path = args.out / f"gpu_{args.call}.json"
        self.result = json.loads(self.path.read_text()) if self.path.exists() else {"call": args.call, "stages": {}}
        self.result["machine"] = machine(args)
        self.end = time.monotonic() + args.budget_s
        self.clocks = Clocks(work / "clocks.csv", args.device == "cuda")
        self.waiting: dict[str, subprocess.Popen] = {}
        self.start_of_lines = self._size()

    def run(self, names: list[str]) -> None:
        """Run the stages called ``names``, and write after each."""
        self.clocks.start()
        estimates = self._prepare(ESTIMATES)
        self._go(estimates)
        try:
            for name, following in zip(names, [*names[1:], None], strict=True):
                if self.end - time.monotonic() < LEAST_S:
                    self.result["stages"][name] = {"findings": [{"failed": "left out: the call's time was up"}]}
                    continue
                if name not in self.waiting:
                    self.waiting[name] = self._prepare(name)
                if following:
                    self.waiting[following] = self._prepare(following)
                self.result["stages"][name] = self._stage(name)
                self._write()
            with suppress(subprocess.TimeoutExpired):
                estimates.wait(max(0, self.end - time.monotonic()))
        finally:
            for process in (estimates, *self.waiting.values()):
                end(process)
            self.clocks.stop()
            self._write()

    def _prepare(self, name: str, *flags: str) -> subprocess.Popen:
        """The process of a stage, which waits for a line before it touches the device."""
        environment = os.environ | {STARTED: str(time.time()), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment["TOKENIZERS_PARALLELISM"], environment["HF_HUB_OFFLINE"] = "false", "1"
        if name == ESTIMATES:
            environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"] = "", "2"
        a = self.args
        command = [sys.executable, HERE / "gpu_stages.py", name, "--out", a.out, "--work", self.work, "--lines",
                   self.lines, "--device", a.device, "--shape", a.shape, "--large_shape", a.large_shape,
                   "--memory_mib", self.result["machine"]["memory_mib"]]  # fmt: skip
        command += ["--cache", a.cache] if a.cache else []
        command += ["--compile"] if a.compile and "--no-compile" not in flags else []
        command += ["--imports", *STAGES[name].imports.split()] if name in STAGES else ["--of", *a.stages]
        with (self.work / f"{name}.log").open("a") as log:
            return subprocess.Popen([*map(str, command)], env=environment, cwd=self.work, stdin=subprocess.PIPE,
                                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def _go(self, process: subprocess.Popen) -> None:
        with suppress(BrokenPipeError):
            process.stdin.write(b"go\n")
            process.stdin.close()

    def _stage(self, name: str) -> dict:
        """Run one stage, once more without compiling where that may help."""
        stage = STAGES[name]
        began, first_sample = time.monotonic(), self.clocks.count()
        patience = 1 if self.args.device == "cuda" else ON_CPU
        until = min(began + patience * stage.limit_s, self.end)
        print(f"== {name}, {self.end - began:.0f} s left of the call", flush=True)
        offset = self._size()
        compiled = self.args.compile and stage.compile_s is not None
        ended = self._attempt(name, self.waiting.pop(name), until, patience * stage.compile_s if compiled else None)
        if ended and compiled and not any("tokens_per_s" in f for f in self._findings(name, offset)):
            self._emit(stage=name, failed=f"compiled: {ended}", log=self._tail(name))
            until = min(max(until, time.monotonic() + RETRY_S), self.end)
            ended, compiled = self._attempt(name, self._prepare(name, "--no-compile"), until, None), False
        if ended:
            self._emit(stage=name, ended=ended, log=self._tail(name))
            print(f"{name}: {ended}\n{self._tail(name)[-600:]}", flush=True)
        return {
            "seconds": time.monotonic() - began,
            "compiled": compiled,
            "clocks": self.clocks.summary(first_sample),
            "findings": self._findings(name, offset),
        }

    def _attempt(self, name: str, process: subprocess.Popen, until: float, compile_s: float | None) -> str | None:
        """Let a prepared process do its work; gives why it did not end well."""
        offset, began = self._size(), time.monotonic()
        self._go(process)
        compiling = compile_s is not None
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now > until:
                    return f"cut after {now - began:.0f} s"
                if compiling and now - began > compile_s:
                    compiling = not any("first_step_s" in f for f in self._findings(name, offset))
                    if compiling:
                        return f"no step was made within {compile_s:.0f} s"
                time.sleep(0.1)
        finally:
            end(process)
        return f"exit status {process.returncode}" if process.returncode else None

    def _emit(self, **facts: object) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def _size(self) -> int:
        return self.lines.stat().st_size if self.lines.exists() else 0

    def _findings(self, name: str, offset: int) -> list[dict]:
        """Read what a stage has found since the file of lines had ``offset`` bytes; a line cut short is none."""
        found = []
        if not self.lines.exists():
            return found
        for line in self.lines.read_bytes()[offset:].splitlines():
            with suppress(ValueError):
                facts = json.loads(line)
                if facts.pop("stage") == name:
                    found.append(facts)
        return found

    def _tail(self, name: str) -> str:
        return (self.work / f"{name}.log").read_text(errors="replace")[-1500:]

    def _write(self) -> None:
        """Write gpu_A.json and logs_A.zip as they are now."""
        estimates = self._findings(ESTIMATES, self.start_of_lines)
        complete(self.result, estimates)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.result, indent=1) + "\n")
        new.replace(self.path)
        with ZipFile(self.work / "logs.zip", "w", ZIP_DEFLATED) as archive:
            for path in sorted([*self.work.glob("*.log"), *self.work.glob("*.csv"), *self.work.glob("*.xml")]):
                archive.write(path, path.name)
        shutil.copyfile(self.work / "logs.zip", self.args.out / f"logs_{self.args.call}.zip")


def end(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


CASE = ("shape", "quantize", "data", "micro_batch_tokens", "activation_checkpointing", "share_prefix")


def complete(result: dict, estimates: list[dict]) -> None:
    """Give each finding of a training stage what other processes know: ceilings, the estimate, the machine."""
    facts = result["machine"]
    brief = {name: facts[name] for name in ("device", "driver", "versions", "commit")}
    found = [finding for stage in result["stages"].values() for finding in stage["findings"]]
    ceilings = {f["ceiling"]: f for f in found if "ceiling" in f and f["layers"] == "separate"}
    estimated = {tuple(f[name] for name in CASE): f for f in estimates if "estimate_bytes" in f}
    for stage in result["stages"].values():
        for finding in stage["findings"]:
            if "tokens_per_s" not in finding:
                continue
            finding |= brief | {"clocks": stage["clocks"]}
            top = ceilings.get(finding.get("quantize") or "bf16")
            if top:
                finding["share_of_burst"] = finding["flop_per_s"] / top["burst_flop_per_s"]
                finding["share_of_sustained"] = finding["flop_per_s"] / top["sustained_flop_per_s"]
            estimate = estimated.get(tuple(finding.get(name) for name in CASE))
            if estimate and facts["device"] != "cpu":  # what a CPU's process takes is no GPU's memory
                finding["estimate_bytes"] = estimate["estimate_bytes"]
                finding["estimate_error"] = estimate["estimate_bytes"] / finding["peak_bytes"] - 1


def main() -> None:
    """Run a call's stages; print the tables."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))  # so that what was started ends too
    with tempfile.TemporaryDirectory() as work:
        call = Call(args, Path(work))
        call.run(args.stages)
    print(gpu_tables(call.result))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=lambda path: Path(path).resolve(), required=True, help="folder of the findings")
    parser.add_argument("--call", choices=BUDGET_S, required=True, help="which of the two")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="some of any call's, in this order")
    parser.add_argument("--budget_s", type=float, help="seconds of the whole call; what does not fit is left out")
    parser.add_argument("--cache", type=lambda path: Path(path).resolve(), help="cache.zip of an earlier call")
    parser.add_argument("--commit", help="of the code, where this is no checkout")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", default="llama-7b", help="of shapes.py")
    parser.add_argument("--large_shape", help="of shapes.py (default: llama-65b, on a CPU tiny)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on cuda)")
    args = parser.parse_args()
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.budget_s = args.budget_s or BUDGET_S[args.call] * (1 if args.device == "cuda" else ON_CPU)
    args.stages = args.stages or [name for name, stage in STAGES.items() if stage.call == args.call]
    args.large_shape = args.large_shape or ("llama-65b" if args.device == "cuda" else "tiny")
    if args.device == "cuda" and query("name") is None:
        parser.error("--device cuda: nvidia-smi finds no GPU here; --device cpu --shape tiny tries the program out")
    return args


if __name__ == "__main__":
    main()
