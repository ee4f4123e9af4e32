"""The stages of benchmarks/gpu.py but its single kernels; run by it, one a process.

python benchmarks/gpu_stages.py STAGE … imports what the stage needs, waits for a line on its standard input, and then
appends each finding as a line of JSON to --lines.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree
from zipfile import ZIP_DEFLATED, ZipFile

import torch
from lengths import N_ALPACA, Example, alpaca_like, lima_like, uniform
from measure import since_start, synchronize
from shapes import SHAPES, Shape, mean_context

ROOT = Path(__file__).parent.parent
Emit = Callable[..., None]
Result = TypeVar("Result")
CACHE_BYTES = 15 * 2**20  # most of cache.zip
EPOCH_STEPS = {"cuda": 40, "cpu": 3}
CEILING_S = {"cuda": 2.0, "cpu": 0.1}
LONGEST = {"cuda": None, "cpu": 256}  # tokens of an example


# --- what is trained ---


class Data(NamedTuple):
    """Examples that make a case's steps."""

    batch: int
    warm_up: int
    timed: int


DATA = {"alpaca": Data(64, 2, 3), "even": Data(32, 1, 2), "lima": Data(16, 1, 1)}
"""Lengths as Alpaca's; rows that are full to the last token; lengths as LIMA's."""
CPU_BATCH = 8  # where the program is only tried out


def data_of(name: str, device: str) -> Data:
    """The steps over ``DATA``'s ``name``."""
    return DATA[name] if device == "cuda" else DATA[name]._replace(batch=CPU_BATCH)


class Case(NamedTuple):
    """One way of training a model."""

    data: str
    share_prefix: bool
    micro_batch_tokens: int
    activation_checkpointing: str = "none"


class Cases(NamedTuple):
    """Cases of one stage, all on one model."""

    shape: str
    quantize: str | None
    cases: list[Case]
    profiled: bool = True
    """True where a step of each is taken apart."""
    final: bool = False
    """With the ceilings, and in bf16 some of an epoch."""


def cases_of(name: str, args: argparse.Namespace) -> Cases | None:
    """Choose what a stage trains; None: nothing of lit_sft's."""
    full, half = (16_384, 8192) if args.device == "cuda" else (1024, 512)
    both = [Case("alpaca", False, full), Case("alpaca", True, full)]
    if name in ("bf16", "fp8", "final_bf16", "final_fp8"):
        final, _, kind = name.rpartition("_")
        return Cases(args.shape, None if kind == "bf16" else kind, both, final=bool(final))
    if name == "memory":
        return Cases(args.shape, None, [Case("even", False, half, r) for r in ("none", "all")], profiled=False)
    if name == "small":
        return Cases("llama-0.5b" if args.device == "cuda" else "tiny", None, both)
    if name == "large":
        roomy = args.device == "cpu" or args.memory_mib > 120_000  # FP8 weights are 61 GiB
        case = Case("lima", True, half // 2, "2") if roomy else Case("lima", True, half // 4, "all")
        return Cases(args.large_shape, "fp8", [case], profiled=False)
    return None


def examples_of(name: str, shape: Shape, device: str) -> list[Example]:
    """The examples of ``DATA``'s ``name``: one step more than are timed, for the profile."""
    data, longest = data_of(name, device), LONGEST[device]
    n = data.batch * (data.warm_up + data.timed + 1)
    if name == "alpaca":
        return alpaca_like(n, shape.vocab_size, longest=longest)
    if name == "even":
        return uniform(n, longest or 512, shape.vocab_size)
    return [Example(ids[:longest], n_prompt) for ids, n_prompt in lima_like(shape.vocab_size)[:n]]


def run_of(stage: Cases, case: Case, args: argparse.Namespace) -> tuple[object, list[Example], dict]:
    """The arguments of a run of lit_sft, its examples, and the facts that name it."""
    from engine import lora_args, write_data

    shape = SHAPES[stage.shape]
    examples = examples_of(case.data, shape, args.device)
    folder = args.work / args.stage / f"{case.data}-{shape.vocab_size}"
    if not folder.exists():
        write_data(folder, examples)
    settings = case._asdict()
    del settings["data"]
    run_args = lora_args(folder, precision="bf16-true", device=args.device, quantize=stage.quantize,
                         global_batch_size=data_of(case.data, args.device).batch, **settings)  # fmt: skip
    return run_args, examples, {"shape": stage.shape, "quantize": stage.quantize} | case._asdict()


def train(args: argparse.Namespace, emit: Emit) -> None:
    """A stage's cases on one model."""
    import engine

    stage = cases_of(args.stage, args)
    shape = SHAPES[stage.shape]
    load_cache(args, emit)
    model = engine.random_model(shape, args.device, torch.bfloat16, stage.quantize)
    synchronize(args.device)
    started = {"imported_s": args.imported_s, "drawn_s": to_now(args)}
    side = engine.Training(model, run_of(stage, stage.cases[0], args)[0], args.compile)
    waiting, fresh = list(stage.cases), True
    while waiting:
        case = waiting.pop(0)
        run_args, examples, facts = run_of(stage, case, args)
        data = data_of(case.data, args.device)
        found, why = within_memory(one_case, args, side, run_args, data, emit if fresh else None)
        if found is None:
            emit(**facts, failed=why)
            half = case.micro_batch_tokens // 2
            if half >= max(len(example.ids) for example in examples):
                waiting.insert(0, case._replace(micro_batch_tokens=half))
            continue
        found |= rates(found["steps"], examples, shape)
        if stage.profiled:
            found |= by_category(args, side, run_args, examples, data, shape)
        emit(**facts, **found, compiled=args.compile, **(started if fresh else {}))
        fresh = False
    save_cache(args, emit)
    if not stage.final:
        return
    from ceilings import mixed_ceiling

    free(args.device)
    kind = stage.quantize or "bf16"
    found = mixed_ceiling(shape.linears(), args.device, CEILING_S[args.device], kind)
    emit(ceiling=kind, layers="separate", **found)
    if stage.quantize is None:
        epoch(args, emit, side, shape, case.micro_batch_tokens)  # the longest, so last


def steps_of(run_args: object):
    """The steps over a run's data."""
    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    return TrainSteps(Shards(run_args.data_dir, "train"), run_args, share_prefix=run_args.share_prefix)


def one_case(args: argparse.Namespace, side, run_args: object, data: Data, begun: Emit | None) -> dict:
    """Steps to warm up and timed ones.

    ``begun`` is told when the first step of the process is done; the other cases go on from the adapter there is then.
    """
    free(args.device)
    steps = steps_of(run_args)
    records = side.run(steps, run_args, 1, 1)
    first = {"first_step_s": to_now(args)}
    if begun:
        begun(**first)  # and so nothing waits for the compiler any longer
    records += side.run(steps, run_args, 2, data.warm_up)
    compiled = compilations()
    timed = side.run(steps, run_args, data.warm_up + 1, data.warm_up + data.timed)
    first["first_losses"] = [record["loss"] for record in records + timed]
    return {
        **(first if begun else {}),
        "compilations": compiled,
        "recompilations": compilations() - compiled,
        **memory(args.device),
        "steps": timed,
    }


def by_category(
    args: argparse.Namespace, side, run_args: object, examples: list[Example], data: Data, shape: Shape
) -> dict:
    """One more step, in microseconds a useful token."""
    from profiling import profile

    steps, number = steps_of(run_args), data.warm_up + data.timed + 1
    try:
        found = profile(lambda: side.run(steps, run_args, number, number), args.device, shape)
    except Exception as error:  # the speed is not lost where it cannot be explained
        return {"profile_failed": f"{type(error).__name__}: {error}"[:300]}
    tokens = sum(len(example.ids) for example in examples[-data.batch :])
    return {
        "microseconds": {kind: s / tokens * 1e6 for kind, s in found.pop("categories").items()},
        "profile": found,
    }


def epoch(args: argparse.Namespace, emit: Emit, side, shape: Shape, row_tokens: int) -> None:
    """The first steps of an epoch of 51,759 examples with shared prefixes, and from them the whole."""
    from engine import lora_args, write_data

    n_steps, batch = EPOCH_STEPS[args.device], data_of("alpaca", args.device).batch
    examples = alpaca_like(n_steps * batch, shape.vocab_size, seed=1, longest=LONGEST[args.device])
    folder = write_data(args.work / args.stage / "epoch", examples)
    run_args = lora_args(folder, precision="bf16-true", device=args.device, global_batch_size=batch,
                         micro_batch_tokens=row_tokens, share_prefix=True)  # fmt: skip
    free(args.device)
    steps, compiled = steps_of(run_args), compilations()
    began = time.perf_counter()
    records = side.run(steps, run_args, 1, n_steps)
    synchronize(args.device)
    seconds = time.perf_counter() - began
    emit(shape=args.shape, quantize=None, data="epoch", share_prefix=True, micro_batch_tokens=row_tokens,
         activation_checkpointing="none", compiled=args.compile, seconds=seconds, examples=len(examples),
         epoch_s=seconds / len(examples) * N_ALPACA, recompilations=compilations() - compiled,
         **rates(records, examples, shape), **memory(args.device), steps=records)  # fmt: skip


def estimates(args: argparse.Namespace, emit: Emit) -> None:
    """Estimate each case as --estimate would of the stages ``--of``; needs no device."""
    from engine import model_config

    from lit_sft.fitting import Plan
    from lit_sft.shards import Shards

    os.nice(10)  # the stages are being measured
    for stage in filter(None, [cases_of(name, args) for name in args.of]):
        for case in stage.cases:
            run_args, _, facts = run_of(stage, case, args)
            train = Shards(run_args.data_dir, "train")
            config, _ = model_config(SHAPES[stage.shape])
            plan = Plan(run_args, config, train, case.share_prefix, device="cuda", room=args.memory_mib * 2**20)
            _, row, needed = plan.needed(run_args)
            emit(**facts, estimate_bytes=needed, heaviest_row=row.input_ids.numel())


# --- tests ---


def tests(args: argparse.Namespace, emit: Emit) -> None:
    """Test what a GPU computes: attention, layers and rows of the tests marked gpu."""
    if args.device != "cuda":
        emit(failed="needs a GPU")
        return
    report = args.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-k",
               "attention or layer or rows", "--junitxml", report, "tests/test_gpu.py"]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    emit(**test_results(report) if report.exists() else {"failed": f"pytest gave {done.returncode}"},
         tail=done.stdout[-1500:])  # fmt: skip


def test_results(report: Path) -> dict:
    """Counts, and the first line of each failure, of a junit file."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    wrong = {}
    for test in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for element in test.iter(kind):
                wrong[test.get("name")] = (element.get("message") or "").split("\n")[0][:200]
    return {**counts, "wrong": wrong}


# --- the other sides ---


def trainer(args: argparse.Namespace, emit: Emit) -> None:
    """The Trainer of transformers with peft: in the data's order for the first losses, then grouped by length."""
    from peers import Transformers

    examples = examples_of("alpaca", SHAPES[args.shape], args.device)
    batch = data_of("alpaca", args.device).batch
    side = Transformers(args.shape, args.device)
    emit(imported_s=args.imported_s, drawn_s=to_now(args))

    def run(size: int, grouped: bool, n_steps: int, tool: str = "transformers + peft") -> None:
        facts = {"tool": tool, "shape": args.shape, "micro_batch": size, "grouped": grouped}
        free(args.device)
        result, why = within_memory(side.run, examples[: batch * n_steps], size, grouped, batch)
        if result is None:
            emit(**facts, failed=why)
            return
        timed, losses = result
        found = rates(timed, examples, SHAPES[args.shape]) | memory(args.device) | {"steps": timed}
        emit(**facts, **found, **({} if grouped else {"first_losses": losses}))

    run(8, grouped=False, n_steps=2)
    for size in (16, 32):
        run(size, grouped=True, n_steps=3)
    if args.device != "cuda" or not find_spec("liger_kernel"):
        emit(tool="transformers + peft + Liger", failed="needs a GPU and liger_kernel")
        return
    side.liger = True  # which changes the model for good, so it comes last
    run(16, grouped=True, n_steps=3, tool="transformers + peft + Liger")


def litgpt(args: argparse.Namespace, emit: Emit) -> None:
    """The loop of litgpt at micro-batches of 8, 4 and 1, its default."""
    if not find_spec("litgpt"):
        emit(tool="litgpt", failed="cannot be imported here")
        return
    from peers import Litgpt

    examples = examples_of("alpaca", SHAPES[args.shape], args.device)
    batch = data_of("alpaca", args.device).batch
    steps = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    side = Litgpt(args.shape, args.device, longest=max(len(example.ids) for example in examples))
    emit(imported_s=args.imported_s, drawn_s=to_now(args))
    for size in (8, 4, 1):
        # the first step of all is a whole one, whose loss all sides must have
        first, others = (steps[0], steps[1:3]) if size == 8 else (steps[0][:size], steps[1:2])
        facts = {"tool": "litgpt", "shape": args.shape, "micro_batch": size}
        free(args.device)
        result, why = within_memory(side.run, [first, *others], size)
        if result is None:
            emit(**facts, failed=why)
            continue
        start, *timed = result
        found = rates(timed, examples, SHAPES[args.shape]) | memory(args.device) | {"steps": timed}
        emit(**facts, **found, **({"first_losses": [start["loss"]]} if size == 8 else {}))


# --- what they share ---


def within_memory(work: Callable[..., Result], *inputs: object) -> tuple[Result | None, str]:
    """Run ``work`` on ``inputs``; gives its result, or None, and what was said, where the memory ended."""
    try:
        return work(*inputs), ""
    except Exception as error:  # it ends within the compiler too, which has errors of its own
        if not isinstance(error, MemoryError) and "out of memory" not in str(error):
            raise
        said = f"out of memory: {error}"[:300]
    return None, said


def to_now(args: argparse.Namespace) -> float:
    """Seconds since the process was started, the wait for the stage before it left out."""
    return args.imported_s + time.perf_counter() - args.went


def rates(timed: list[dict], examples: list[Example], shape: Shape) -> dict:
    """Useful tokens a second, the median of timed steps, and FLOP a second."""
    lengths = [len(example.ids) for example in examples]
    labelled = 1 - sum(example.n_prompt for example in examples) / sum(lengths)
    tokens_per_s = statistics.median(record["tokens"] / record["seconds"] for record in timed)
    flop = shape.flop_per_token(labelled, mean_context(lengths))
    return {"tokens_per_s": tokens_per_s, "flop_per_token": flop, "flop_per_s": tokens_per_s * flop}


def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


def load_cache(args: argparse.Namespace, emit: Emit) -> None:
    """Give torch.compile what earlier calls have compiled; what they did in this call is on the disk already."""
    if not args.compile or not args.cache:
        return
    with ZipFile(args.cache) as archive:
        for name in archive.namelist():
            try:
                torch.compiler.load_cache_artifacts(archive.read(name))
            except Exception as error:  # of another version, say: it is compiled anew
                emit(note=f"{name} of the cache was not loaded: {type(error).__name__}: {error}"[:300])


def save_cache(args: argparse.Namespace, emit: Emit) -> None:
    """Add what this stage has compiled to cache.zip, unless that grows past what may be brought home."""
    try:
        made = torch.compiler.save_cache_artifacts() if args.compile else None
    except Exception as error:  # what was measured is worth more
        emit(note=f"the cache was not saved: {type(error).__name__}: {error}"[:300])
        return
    if made is None:
        return
    path, new = args.out / "cache.zip", args.work / "cache.zip"
    kept = {}
    if path.exists():
        with ZipFile(path) as archive:
            kept = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(new, "w", ZIP_DEFLATED) as archive:
        for name, contents in (kept | {args.stage: made[0]}).items():
            archive.writestr(name, contents)
    size = new.stat().st_size
    if size <= CACHE_BYTES:
        path.write_bytes(new.read_bytes())
    emit(note=f"cache.zip of {size / 2**20:.1f} MiB with {args.stage}" + (" left out" * (size > CACHE_BYTES)))


def memory(device: str) -> dict:
    """Most memory since ``free``, in bytes; on a CPU the process's."""
    if device != "cuda":
        import measure

        return {"peak_bytes": int(measure.peak() * 2**20)}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_bytes": allocated, "reserved_bytes": reserved}


def free(device: str) -> None:
    """Give back what is not used, and begin to measure the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def micro(args: argparse.Namespace, emit: Emit) -> None:
    """Single kernels."""
    import gpu_micro

    gpu_micro.micro(args, emit)


WITHOUT_TRAINING = {work.__name__: work for work in (micro, tests, trainer, litgpt, estimates)}


def main() -> None:
    """Import what the stage needs, wait for a line, make the stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--large_shape", choices=SHAPES)
    parser.add_argument("--memory_mib", type=int)
    parser.add_argument("--of", nargs="*")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--imports", nargs="*", default=[])
    args = parser.parse_args()
    for name in args.imports:
        importlib.import_module(name)
    args.imported_s = since_start()
    sys.stdin.readline()
    args.went = time.perf_counter()

    def emit(**facts: object) -> None:
        with args.lines.open("a") as file:
            file.write(json.dumps({"stage": args.stage, **facts}) + "\n")

    WITHOUT_TRAINING.get(args.stage, train)(args, emit)


if __name__ == "__main__":
    main()
