"""Kill a run again and again, fail its file operations one by one, run it for long: as if nothing had happened.

    python tests/reliability.py --fuzz 60                          # 200 kills, every file operation, 10,000 steps, fuzz
    python tests/reliability.py --kills 20 --faults 29 --steps 1000   # what the test suite does of it

A run is LoRA with dropout, on a base as it is or in NF4, or full fine-tuning of a tiny model: 60 steps of several
packed rows, a saved state every second step. It is killed with SIGKILL at random moments, more than 40 % of them while
it saves, and started again with the same arguments until it is done; losses, learning rates and the result's bytes must
be those of a run that nobody killed. Prints a line of JSON after each part, and one of all in the end; exit code 1 and
what differed when something does. What --fuzz finds lies in fuzzed/.
"""

import argparse
import csv
import gc
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import bitsandbytes  # noqa: F401 (warm: a child would need seconds for it)
import torch
from faults import FAULTS, KILL, FileOperations, fork, leftovers, start, wait
from lightning.fabric import Fabric  # noqa: F401 (the same)

from demo.make_checkpoint import train_tokenizer
from finetune import full, lora
from lit_sft import cli, run
from lit_sft.args import Args, ConvertArgs, FullTrainArgs, LoRATrainArgs, TrainArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.metrics import Metrics
from lit_sft.weights import Weight, write_safetensors

RUN = {
    "device": "cpu", "max_steps": 60, "epochs": None, "global_batch_size": 6, "micro_batch_tokens": 400,
    "learning_rate": 2e-3, "save_interval": 2, "eval_interval": 15, "lr_warmup_steps": 5,
}  # fmt: skip
RECIPES: dict[str, tuple[Callable, type[TrainArgs], dict, str]] = {
    "lora": (lora.main, LoRATrainArgs, {"lora_dropout": 0.1, "lora_r": 4}, "adapter/adapter.safetensors"),
    "full": (full.main, FullTrainArgs, {}, "model/lit_model.safetensors"),
    "nf4": (
        lora.main,
        LoRATrainArgs,
        {"lora_dropout": 0.1, "lora_r": 4, "quantize": "nf4"},
        "adapter/adapter.safetensors",
    ),
}
IN_SAVES = 0.8  # share of the kills aimed at saving; some come late
OF_THE_MACHINE = ("seconds", "tokens_per_s", "peak_mem_bytes")
HIDDEN, MLP, LAYERS, HEADS = 32, 48, 2, 2


def make_checkpoint(directory: Path) -> Path:
    """A Llama of 40,000 random weights as a Hub checkpoint, converted."""
    directory.mkdir(parents=True)
    tokenizer = train_tokenizer()
    (directory / "tokenizer.model").write_bytes(tokenizer)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "vocab_size": 800}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads, **ids}
    (directory / "config.json").write_text(json.dumps(config))
    square, norm = (HIDDEN, HIDDEN), (HIDDEN,)
    shapes = {"model.embed_tokens": (800, HIDDEN), "lm_head": (800, HIDDEN), "model.norm": norm}
    for i in range(LAYERS):
        block = {f"self_attn.{name}_proj": square for name in "qkvo"}
        block |= {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
        block |= {"input_layernorm": norm, "post_attention_layernorm": norm}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{n}.weight": torch.randn(s, generator=generator) / HIDDEN**0.5 + (s == norm) for n, s in shapes.items()
    }
    weights = [Weight(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
    write_safetensors(directory / "model.safetensors", weights)
    return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))


def make_world(directory: Path) -> None:
    """A checkpoint and 48 examples prepared for it."""
    base = make_checkpoint(directory / "base")
    write_rows(directory / "rows.csv", 52)
    command(
        "prepare_csv",
        f"--csv_path={directory}/rows.csv",
        f"--checkpoint_dir={base}",
        f"--destination_path={directory}/data",
    )


def write_rows(path: Path, n: int) -> None:
    """A CSV of ``n`` instructions."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("instruction", "output")])
        csv.writer(file).writerows((f"Count to {i}.", " ".join(map(str, range(i)))) for i in range(2, n + 2))


def command(name: str, *argv: str) -> None:
    """Run one of the toolkit's commands in this process; SystemExit when it fails."""
    _well(importlib.import_module(cli.commands()[name]).main, list(argv))


def _well(main: Callable, argv: list[str]) -> None:
    try:
        cli.run(main, argv, prog="command")
    except SystemExit as end:
        if end.code:
            raise


def as_command(work: Callable[[], None]) -> None:
    """Do ``work`` and end as a command does that ends so: SystemExit where it fails, after one line."""

    def main(_: Args) -> None:
        work()

    _well(main, [])


def train(world: Path, recipe: str, out_dir: Path, **changes: object) -> None:
    """What ``finetune/<recipe>.py`` does, with the way in which it ends."""
    main, kind, settings, _ = RECIPES[recipe]
    places = {"data_dir": str(world / "data"), "out_dir": str(out_dir)}
    args = kind(**(RUN | settings | places | changes))
    as_command(lambda: main(args))


def result(out_dir: Path, recipe: str) -> tuple[list[dict], bytes]:
    """The records of a finished run, without what the machine is to blame for, and its weights."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE} for line in lines]
    return records, (out_dir / RECIPES[recipe][3]).read_bytes()


def difference(out_dir: Path, recipe: str, expected: tuple[list[dict], bytes]) -> str | None:
    """How a finished run differs from one that nobody disturbed."""
    records, weights = result(out_dir, recipe)
    if records != expected[0]:
        pairs = zip(records, expected[0], strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), f"{len(records)} of {len(expected[0])} records")
        return f"{out_dir}: the records differ: {first}"
    if weights != expected[1]:
        return f"{out_dir}: the weights differ"
    if left := leftovers(out_dir):
        return f"{out_dir}: left over: {left}"
    return None


def announced(tell: int, work: Callable[[], None]) -> None:
    """Do ``work`` and write to ``tell`` when it begins (S) and ends (s) to save, and when it writes the result (R)."""
    save, finish_state = run.Saver.__call__, Metrics.close

    def save_announced(self: run.Saver, step: int) -> Path:
        os.write(tell, b"S")
        where = save(self, step)
        os.write(tell, b"s")
        return where

    def close_announced(self: Metrics) -> None:
        os.write(tell, b"R")
        finish_state(self)

    run.Saver.__call__, Metrics.close = save_announced, close_announced
    work()


class Killer:
    """Starts a run over and over and kills it; knows how long starting and saving take."""

    def __init__(self, world: Path, chance: random.Random) -> None:
        self.world, self.chance = world, chance
        self.start_seconds, self.save_seconds, self.kills = 1.0, 0.05, Counter()

    def attempt(self, recipe: str, out_dir: Path, log: Path, kill: bool) -> int:
        """Start the run once, and kill it at some moment if asked to; how it ended."""
        heard, tell = os.pipe()
        began = time.monotonic()
        pid = start(lambda: announced(tell, lambda: train(self.world, recipe, out_dir)), log)
        os.close(tell)
        story = ""
        in_save = self.chance.random() < IN_SAVES
        if kill and in_save:
            story = self._listen(heard, until=self.chance.randint(1, 3), began=began)
            time.sleep(self.chance.uniform(0, 0.6 * self.save_seconds))  # a sleep ends late
        elif kill:
            time.sleep(self.chance.uniform(0, self.start_seconds + 6 * self.save_seconds))
        if kill:
            os.kill(pid, signal.SIGKILL)
        while piece := os.read(heard, 4096):
            story += piece.decode()
        os.close(heard)
        code = wait(pid)
        if code == -signal.SIGKILL:
            phases = {"": "loading", "S": "saving", "s": "between saves", "R": "writing the result"}
            self.kills[phases[story[-1:]]] += 1
        return code

    def _listen(self, heard: int, until: int, began: float) -> str:
        """Read until the run has begun its save number ``until``, or ends."""
        story, times = "", []
        while story.count("S") < until and (piece := os.read(heard, 1)):
            story += piece.decode()
            times.append(time.monotonic())
            if story == "S":
                self.start_seconds = 0.8 * self.start_seconds + 0.2 * (times[0] - began)
            elif piece == b"s":
                self.save_seconds = 0.8 * self.save_seconds + 0.2 * (times[-1] - times[-2])
        return story

    def run(self, recipe: str, out_dir: Path, left: int, expected: tuple[list[dict], bytes]) -> tuple[int, str | None]:
        """Kill a run up to ``left`` times, until it is done all the same; gives the kills and what is wrong."""
        log, before = out_dir.with_suffix(".log"), self.kills.total()
        while not (out_dir / "DONE").exists():
            code = self.attempt(recipe, out_dir, log, kill=self.kills.total() - before < left)
            if code not in (0, -signal.SIGKILL):
                return 0, f"{out_dir}: exit code {code}: {log.read_text()[-2000:]}"
        return self.kills.total() - before, difference(out_dir, recipe, expected)


def kill_runs(world: Path, expected: dict, n_kills: int, seed: int) -> tuple[dict, list[str]]:
    """Kill runs of every recipe ``n_kills`` times in all; gives the figures and what went wrong."""
    killer, problems, n_runs = Killer(world, random.Random(seed)), [], 0
    while killer.kills.total() < n_kills and not problems:
        recipe = list(RECIPES)[n_runs % len(RECIPES)]
        out_dir, half = world / f"killed-{n_runs}", -(-n_kills // len(RECIPES))
        left = min(n_kills - killer.kills.total(), half)
        _, problem = killer.run(recipe, out_dir, left, expected[recipe])
        problems += [problem] if problem else []
        n_runs += 1
        tell({"killed so far": {"runs": n_runs, **killer.kills}})
        shutil.rmtree(out_dir, ignore_errors=True) if not problem else None
    return {"kills": killer.kills.total(), "runs": n_runs, **killer.kills}, problems


def fail_operations(world: Path, every: int) -> tuple[dict, list[str]]:
    """Fail each ``every``-th file operation of a short run, in each way; the same command must go on to the end."""
    short = {"max_steps": 3, "save_interval": 1, "eval_interval": 3}
    counts, problems = Counter(), []
    for recipe in ("lora", "full"):  # nf4 writes what lora writes
        out_dir, log = world / "faulted", world / "faulted.log"

        def work(nth: int | None, fault: int | str, recipe: str = recipe, out_dir: Path = out_dir) -> None:
            with FileOperations(out_dir, nth, fault).watched() as operations:
                try:
                    train(world, recipe, out_dir, **short)
                finally:
                    print(f"operations: {len(operations.seen)}")

        shutil.rmtree(out_dir, ignore_errors=True)
        fork(lambda work=work: work(None, KILL), log)
        n_operations = int(log.read_text().rpartition("operations: ")[2])
        expected = result(out_dir, recipe)
        for i, nth in enumerate(range(1, n_operations + 1, every)):
            for fault in FAULTS if every == 1 else [FAULTS[i % len(FAULTS)]]:
                shutil.rmtree(out_dir, ignore_errors=True)
                code = fork(lambda work=work, nth=nth, fault=fault: work(nth, fault), log)
                text = log.read_text()
                counts["killed" if code < 0 else "refused" if code else "unharmed"] += 1
                errors = [line for line in text.splitlines() if line.startswith("error: ")]
                if fault != KILL and code and (code != 2 or len(errors) != 1 or "Traceback" in text):
                    problems.append(f"{recipe}, operation {nth}, {fault}: exit code {code}: {text[-1500:]}")
                if not (out_dir / "DONE").exists():
                    code = fork(lambda recipe=recipe, o=out_dir: train(world, recipe, o, **short), log)
                    if code:
                        problems.append(f"{recipe}, after operation {nth}, {fault}: {code}: {log.read_text()[-1500:]}")
                        continue
                if problem := difference(out_dir, recipe, expected):
                    problems.append(f"{recipe}, operation {nth}, {fault}: {problem}")
            if i % 50 == 49:
                tell({"faults so far": {"recipe": recipe, "operation": f"{nth} of {n_operations}", **counts}})
        counts[f"operations of {recipe}"] = n_operations
    return dict(counts), problems


def fail_writers() -> tuple[dict, list[str]]:
    """Fail each file operation of all else that writes, in each way: tests/test_faults.py without its sampling."""
    code = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_faults.py")),
    ]
    environment = os.environ | {"LIT_SFT_EVERY_FAULT": "1"}
    done = subprocess.run(code, env=environment, capture_output=True, text=True)
    *_, last = done.stdout.splitlines() or [""]
    return {"tests": last}, [done.stdout[-3000:]] if done.returncode else []


def measure(world: Path, n_steps: int) -> dict:
    """Train ``n_steps`` tiny steps; memory and open files after a tenth of them and at the end."""
    heard, tell = os.pipe()

    def work() -> None:
        log = Metrics.log

        def log_and_tell(self: Metrics, record: dict) -> None:
            log(self, record)
            if record["step"] in (n_steps // 10, n_steps):
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
                os.write(tell, json.dumps([pages * os.sysconf("SC_PAGE_SIZE"), files]).encode() + b"\n")

        Metrics.log = log_and_tell
        rare = {"save_interval": n_steps // 20, "eval_interval": n_steps // 20, "global_batch_size": 2}
        train(world, "lora", world / "long", max_steps=n_steps, **rare)

    code = fork(work, world / "long.log")
    os.close(tell)
    if code:
        raise SystemExit(f"the long run ended with {code}: {(world / 'long.log').read_text()[-2000:]}")
    with os.fdopen(heard) as lines:
        early, late = (json.loads(line) for line in lines)
    return {"steps": n_steps, "grown_mib": (late[0] - early[0]) / 2**20, "grown_files": late[1] - early[1]}


def tell(figures: dict) -> None:
    """Print the last part's figures at once: all of them take hours."""
    print(json.dumps(dict([list(figures.items())[-1]])), file=sys.stderr, flush=True)


def main() -> None:
    """Do what was asked for and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="times that runs are killed, all recipes together")
    parser.add_argument("--faults", type=int, default=1, help="fail every Nth file operation of a run; 0: none")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the long run; 0: none")
    parser.add_argument("--fuzz", type=float, default=0, help="minutes of feeding spoiled files to the commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, and of what is spoiled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures, problems = {}, []
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        if fork(lambda: make_world(world), world.parent / f"{world.name}.log"):
            sys.exit((world.parent / f"{world.name}.log").read_text())
        (world.parent / f"{world.name}.log").unlink()
        if args.kills:
            expected = {}
            for recipe in RECIPES:
                whole = world / f"whole-{recipe}"
                if fork(lambda recipe=recipe, whole=whole: train(world, recipe, whole), world / "log"):
                    sys.exit((world / "log").read_text())
                expected[recipe] = result(whole, recipe)
            figures["kills"], found = kill_runs(world, expected, args.kills, args.seed)
            problems += found
            tell(figures)
        if args.steps:
            figures["long"] = measure(world, args.steps)
            tell(figures)
        if args.faults:
            figures["faults"], found = fail_operations(world, args.faults)
            problems += found
            tell(figures)
        if args.faults == 1:
            figures["writers"], found = fail_writers()
            problems += found
            tell(figures)
        if args.fuzz:
            from bad_inputs import fuzz  # which takes its world from here
            from bad_inputs import make_world as make_inputs

            if fork(lambda: make_inputs(world / "inputs"), world / "log"):
                sys.exit((world / "log").read_text())
            figures["fuzz"], found = fuzz(world / "inputs", 60 * args.fuzz, args.seed, Path("fuzzed"))
            problems += found
    print(json.dumps(figures))
    if problems:
        sys.exit("\n\n".join([f"{len(problems)} problems", *problems[:5]]))


if __name__ == "__main__":
    main()
