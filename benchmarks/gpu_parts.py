"""The parts of benchmarks/gpu.py: each takes the command line and a function that writes a finding."""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lengths import N_ALPACA, Example, alpaca_like, lima_like
from measure import since_start, synchronize
from shapes import SHAPES, Shape, mean_context

BATCH = 64
WARM_UP, TIMED = 2, 4  # steps
Emit = Callable[..., None]


def ceilings(args: argparse.Namespace, emit: Emit) -> None:
    """Matrix products in bf16 and FP8 at the shapes' sizes, and copies."""
    from ceilings import ceiling, copy_rate, product_rates

    emit(copy_bytes_per_s=copy_rate(args.device, 4096 if args.device == "cuda" else 64))
    for name in dict.fromkeys((args.shape, args.large_shape)):
        for kind in ("bf16", "fp8"):
            tokens = 8192 if args.device == "cuda" else 256
            rates = product_rates(SHAPES[name], tokens, torch.bfloat16, args.device, fp8=kind == "fp8")
            emit(shape=name, kind=kind, flop_per_s=ceiling(SHAPES[name], rates), products=rates)


def bf16(args: argparse.Namespace, emit: Emit) -> None:
    """Bf16: the sweep without and with shared prefixes, recomputing, LIMA's lengths."""
    sizes = args.micro_batch_tokens
    cases = [("alpaca", share, size, "none") for share in (False, True) for size in sizes]
    cases += [("alpaca", False, sizes[-1], "all"), *(("lima", True, size, "none") for size in sizes)]
    train(args, emit, None, cases)


def fp8(args: argparse.Namespace, emit: Emit) -> None:
    """FP8: without and with shared prefixes."""
    _quantized(args, emit, "fp8")


def nf4(args: argparse.Namespace, emit: Emit) -> None:
    """NF4: without and with shared prefixes."""
    _quantized(args, emit, "nf4")


def _quantized(args: argparse.Namespace, emit: Emit, kind: str) -> None:
    cases = [("alpaca", share, size, "none") for share in (False, True) for size in args.micro_batch_tokens]
    train(args, emit, kind, [*cases, ("lima", True, args.micro_batch_tokens[-1], "none")])


def train(args: argparse.Namespace, emit: Emit, quantize: str | None, cases: list[tuple]) -> None:
    """lit_sft on one model in each of ``cases``: data, share_prefix, micro_batch_tokens, activation_checkpointing."""
    from engine import Training, lora_args, random_model

    shape = SHAPES[args.shape]
    folders = {name: data_of(args, name) for name in dict.fromkeys(case[0] for case in cases)}
    imported = since_start()
    model = random_model(shape, args.device, torch.bfloat16, quantize)
    synchronize(args.device)
    drawn = since_start()
    training = Training(model, lora_args(folders["alpaca"][0], precision="bf16-true", device=args.device), args.compile)
    for number, (data, share, size, recompute) in enumerate(cases):
        settings = {"micro_batch_tokens": size, "activation_checkpointing": recompute, "share_prefix": share}
        facts = {"shape": args.shape, "quantize": quantize, "data": data, **settings}
        run_args = lora_args(
            folders[data][0], precision="bf16-true", device=args.device, global_batch_size=BATCH, **settings
        )
        try:
            found = one_case(training, run_args, folders[data][1], shape, share)
        except (MemoryError, torch.OutOfMemoryError) as error:
            emit(**facts, failed=f"out of memory: {error}"[:300])
            free(args.device)
            continue
        if number == 0:
            found |= {"imported_s": imported, "drawn_s": drawn}
        else:  # only the first case starts from an adapter of zeros in a fresh process
            del found["first_step_s"], found["first_losses"]
        emit(**facts, **found)


def one_case(training, args, examples: list[Example], shape: Shape, share: bool) -> dict:
    """Warm-up steps, then timed ones."""
    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    device = str(training.fabric.device)
    free(device)
    steps = TrainSteps(Shards(args.data_dir, "train"), args, share_prefix=share)
    records = training.run(steps, args, 1, 1)
    first = since_start()
    records += training.run(steps, args, 2, WARM_UP)
    compiled = compilations()
    timed = training.run(steps, args, WARM_UP + 1, WARM_UP + TIMED)
    return {
        **rates(timed, examples, shape),
        "first_step_s": first,
        "first_losses": [record["loss"] for record in records + timed],
        "compilations": compiled,
        "recompilations": compilations() - compiled,
        **memory(device),
        "steps": timed,
    }


def rates(timed: list[dict], examples: list[Example], shape: Shape) -> dict:
    """Useful tokens and FLOP a second of timed steps."""
    lengths = [len(example.ids) for example in examples]
    labelled = 1 - sum(example.n_prompt for example in examples) / sum(lengths)
    tokens_per_s = sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed)
    flop = shape.flop_per_token(labelled, mean_context(lengths))
    return {"tokens_per_s": tokens_per_s, "flop_per_token": flop, "flop_per_s": tokens_per_s * flop}


def trainer(args: argparse.Namespace, emit: Emit) -> None:
    """The Trainer of transformers with peft: in the data's order to compare losses, then length-grouped, swept."""
    from peers import Transformers

    _, examples = data_of(args, "alpaca")
    side = Transformers(args.shape, args.device)
    for grouped, size in [(False, 1), *((True, 2**power) for power in range(7))]:
        facts = {"shape": args.shape, "tool": "transformers + peft", "micro_batch": size, "grouped": grouped}
        try:
            timed, losses = side.run(examples[: BATCH * (3 if args.device == "cuda" else 2)], size, grouped)
        except (MemoryError, torch.OutOfMemoryError) as error:
            emit(**facts, failed=f"out of memory: {error}"[:300])
            break
        found = rates(timed, examples, SHAPES[args.shape]) | memory(args.device) | {"steps": timed}
        emit(**facts, **found, **({} if grouped else {"first_losses": losses}))
        free(args.device)


def others(args: argparse.Namespace, emit: Emit) -> None:
    """Peers that need packages of their own: litgpt, and transformers with Liger's kernels; absence is recorded."""
    from importlib.util import find_spec

    from peers import Transformers, litgpt_on_device

    examples = data_of(args, "alpaca")[1][: BATCH * 3]
    if find_spec("litgpt"):
        sweep("litgpt", lambda size: litgpt_on_device(args.shape, args.device, examples, size), examples, args, emit)
    if find_spec("liger_kernel"):
        side = Transformers(args.shape, args.device, liger=True)
        sweep("transformers + peft + Liger", lambda size: side.run(examples, size, True)[0], examples, args, emit)
    for name in ("litgpt", "liger_kernel", "trl", "unsloth"):
        if find_spec(name) is None:
            emit(tool=name, failed="cannot be imported here")
    for name in ("trl", "unsloth"):
        if find_spec(name):
            emit(tool=name, failed="is here, but this program has no run of it on a GPU")


def sweep(
    tool: str, run: Callable[[int], list[dict]], examples: list[Example], args: argparse.Namespace, emit: Emit
) -> None:
    """``run`` at micro-batches of 1, 2, 4, … 64 examples, until memory ends."""
    for size in (2**power for power in range(7)):
        try:
            timed = run(size)
        except (MemoryError, torch.OutOfMemoryError) as error:
            emit(tool=tool, micro_batch=size, failed=f"out of memory: {error}"[:300])
            return
        found = rates(timed, examples, SHAPES[args.shape]) | memory(args.device)
        emit(tool=tool, shape=args.shape, micro_batch=size, **found, steps=timed)
        free(args.device)


def large_bf16(args: argparse.Namespace, emit: Emit) -> None:
    """The large shape in bf16, every block recomputed."""
    _large(args, emit, None, "all")


def large_fp8(args: argparse.Namespace, emit: Emit) -> None:
    """The large shape in FP8, nothing recomputed."""
    _large(args, emit, "fp8", "none")


def _large(args: argparse.Namespace, emit: Emit, quantize: str | None, recompute: str) -> None:
    from engine import Training, lora_args, random_model

    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    shape = SHAPES[args.large_shape]
    folder, examples = data_of(args, "lima", args.large_shape)
    size = args.micro_batch_tokens[-1] if args.device == "cpu" else 8192
    settings = {"precision": "bf16-true", "device": args.device, "micro_batch_tokens": size}
    run_args = lora_args(folder, activation_checkpointing=recompute, global_batch_size=BATCH, **settings)
    facts = {"shape": args.large_shape, "quantize": quantize, "activation_checkpointing": recompute, **settings}
    try:
        training = Training(random_model(shape, args.device, torch.bfloat16, quantize), run_args, args.compile)
        steps = TrainSteps(Shards(folder, "train"), run_args, share_prefix=False)
        last = steps.per_epoch if args.whole_epochs else 3
        records = training.run(steps, run_args, 1, last)
    except (MemoryError, torch.OutOfMemoryError) as error:
        emit(**facts, failed=f"out of memory: {error}"[:300])
        return
    found = rates(records[1:], examples, shape)
    n_tokens = sum(len(example.ids) for example in examples)
    emit(**facts, **found, **memory(args.device), steps=records, epoch_tokens=n_tokens, measured_steps=last,
         epoch_steps=steps.per_epoch, epoch_s=n_tokens / found["tokens_per_s"])  # fmt: skip


def profile(args: argparse.Namespace, emit: Emit) -> None:
    """One step by category, in bf16 and in FP8."""
    for quantize in (None, "fp8"):
        _profile(args, emit, quantize)
        free(args.device)


def _profile(args: argparse.Namespace, emit: Emit, quantize: str | None) -> None:
    from engine import Training, lora_args, random_model
    from profiling import profile as by_category

    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    folder, _ = data_of(args, "alpaca")
    settings = {"device": args.device, "micro_batch_tokens": args.micro_batch_tokens[-1], "global_batch_size": BATCH}
    run_args = lora_args(folder, precision="bf16-true", **settings)
    training = Training(random_model(SHAPES[args.shape], args.device, torch.bfloat16, quantize), run_args, args.compile)
    steps = TrainSteps(Shards(folder, "train"), run_args, share_prefix=True)
    training.run(steps, run_args, 1, WARM_UP)
    number = WARM_UP + 1
    found = by_category(lambda: training.run(steps, run_args, number, number), args.device, SHAPES[args.shape])
    emit(shape=args.shape, quantize=quantize, **settings, **found)


def epoch(args: argparse.Namespace, emit: Emit) -> None:
    """Alpaca's 51,759 examples, once, in bf16 and shared prefixes: every step is run."""
    from engine import Training, lora_args, random_model

    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    n = N_ALPACA if args.device == "cuda" else 4 * BATCH
    folder, examples = data_of(args, "alpaca", n=n)
    size = args.micro_batch_tokens[-1]
    run_args = lora_args(folder, precision="bf16-true", device=args.device, micro_batch_tokens=size, epochs=1,
                         global_batch_size=BATCH, quantize=args.epoch_quantize)  # fmt: skip
    model = random_model(SHAPES[args.shape], args.device, torch.bfloat16, args.epoch_quantize)
    training = Training(model, run_args, args.compile)
    steps = TrainSteps(Shards(folder, "train"), run_args, share_prefix=True)
    began = time.perf_counter()
    records = training.run(steps, run_args, 1, steps.max_steps)
    seconds = time.perf_counter() - began
    emit(shape=args.shape, quantize=args.epoch_quantize, examples=n, seconds=seconds, steps_made=len(records),
         micro_batch_tokens=size, **rates(records, examples, SHAPES[args.shape]), **memory(args.device))  # fmt: skip


PARTS = {part.__name__: part for part in
         (ceilings, bf16, fp8, trainer, profile, nf4, others, large_fp8, large_bf16, epoch)}  # fmt: skip


# --- what they share ---


def data_of(args: argparse.Namespace, name: str, shape: str | None = None, n: int = 0) -> tuple[Path, list[Example]]:
    """The data_dir and examples of ``name``, alpaca or lima; the same for every part."""
    from engine import write_data

    vocab_size = SHAPES[shape or args.shape].vocab_size
    longest = None if args.device == "cuda" else 256
    n = n or BATCH * (WARM_UP + TIMED)
    examples = alpaca_like(n, vocab_size, longest=longest) if name == "alpaca" else lima_like(vocab_size)
    if args.device == "cpu" and name == "lima":
        examples = [Example(ids[:256], min(n_prompt, 64)) for ids, n_prompt in examples[:n]]
    return write_data(args.out / "data" / f"{name}-{len(examples)}-{vocab_size}", examples), examples


def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def memory(device: str) -> dict:
    """Most memory since ``free``, in bytes; on a CPU the process's."""
    if torch.device(device).type != "cuda":
        import measure

        return {"peak_bytes": int(measure.peak() * 2**20)}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_bytes": allocated, "reserved_bytes": reserved}


def free(device: str) -> None:
    """Give back what is not used, and begin to measure the peak anew."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
