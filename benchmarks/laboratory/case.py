"""One case in a process of its own, which run.py starts: prints what was found as a line of JSON.

It uses the project through what stays: GPT, quantized layers, apply_lora, compile_blocks, train_step.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from pretend import pretend  # before torch

N_EXAMPLES, ROW_TOKENS, N_STEPS = 40, 4096, 2  # examples a step: about four rows
BLOCK = 1
"""The one that is looked at: the first one's input may be special."""


def look_at(name: str, codes: Path) -> dict:
    """All that the table says of a case; generated code is written into ``codes``."""
    from cases import CASES

    case = CASES[name]
    if case.quantize == "nf4":
        from lit_sft.quantize import has_nf4

        if not has_nf4():
            return {"failed": "bitsandbytes is not installed"}
    found = {}
    for part, look in (("eager", eager_step), ("compiled", compiled_steps)):
        try:
            found |= look(case, codes)
        except Exception as error:
            traceback.print_exc()
            found[f"{part}_failed"] = in_one_line(error)
    return found


def eager_step(case, codes: Path) -> dict:
    """Find where the host waits in one train step, and its copies to the GPU."""
    from fake import FakeGPU

    mode = FakeGPU()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(case, Path(folder), mode, compiled=False)
        mode.waits.clear()
        mode.n_uploads = 0
        n_rows = run.step(1)
    waits = Counter({f"{what} {line}": n for (what, line), n in mode.waits.items()})
    return {
        "waits": mode.waits.total(),
        "waits_at": dict(sorted(waits.items())),
        "uploads_a_row": round(mode.n_uploads / n_rows, 1),
        "rows": n_rows,
    }


def compiled_steps(case, codes: Path) -> dict:
    """Graphs of a run of several rows, and what one block's are made of."""
    from fake import FakeGPU
    from graphs import Recorder, Work, n_graphs
    from reading import added_up, counted

    mode = FakeGPU()
    recorder = Recorder(mode)
    with tempfile.TemporaryDirectory() as folder, recorder.recording():
        run = Run(case, Path(folder), mode, compiled=True)
        if not run.model.compiled:
            return {"compiled_failed": "not compiled"}
        recorder.watch(run.model)
        for number in range(1, N_STEPS + 1):
            run.step(number)
        found = {
            "graphs": n_graphs(),
            "graphs_after_two_rows": n_graphs() - recorder.rows[2].graphs_before,
        }
        # those that are not were too many kinds of rows for Dynamo, which then gives up
        compiled = [row for row in recorder.rows if row.forward[BLOCK].graphs]
        found["uncompiled_rows"] = len(recorder.rows) - len(compiled)
        row = compiled[-1]
        works = {"forward": row.forward[BLOCK], "backward": row.backward.get(BLOCK, Work())}
        if not case.checkpoint_every:
            found["kept_kb"] = kept_a_token(run, recorder) / 1024
    for direction, work in works.items():
        texts = [text for key in work.graphs for text in recorder.codes[key]]
        for number, text in enumerate(texts):
            (codes / f"{direction}_{number}.py").write_text(text)
        counts = added_up([counted(text) for text in texts])
        eager = {"eager": dict(sorted(work.eager.items())), "eager_copies": work.eager_copies}
        found[direction] = {"graphs": len(work.graphs)} | counts | eager
    return found


class Run:
    """A model on the fake GPU with its adapter, optimizer and data."""

    def __init__(self, case, folder: Path, mode, compiled: bool) -> None:
        import torch
        from engine import lora_args, write_data

        from lit_sft import optim, runtime
        from lit_sft.batches import TrainSteps
        from lit_sft.lora import apply_lora
        from lit_sft.shards import Shards

        config, self.mode = case.config(), mode
        data = write_data(folder / "data", mixed_examples(config.vocab_size))
        self.args = lora_args(
            data,
            precision="bf16-true",
            device="cpu",
            micro_batch_tokens=ROW_TOKENS,
            global_batch_size=N_EXAMPLES,
        )
        self.steps = TrainSteps(Shards(data, "train"), self.args, share_prefix=case.share_prefix)
        self.fabric = runtime.launch(self.args)  # whose precision and backward are used, but on:
        self.fabric.strategy._root_device = torch.device("cuda:0")
        with mode.single_threaded():
            self.model = fake_model(config, case.quantize)
            self.model.checkpoint_every = case.checkpoint_every
            self.dropout = apply_lora(self.model, self.args, seed=0)
            make_fast(self.model)
            if compiled:
                self.model.compile_blocks()
            masters = optim.master_parameters(self.model)
            self.optimizer = optim.build_optimizer(self.model, masters, self.args)

    def step(self, number: int) -> int:
        """Train one step; gives its rows."""
        from lit_sft.loop import train_step

        step = self.steps[number]
        with self.mode.single_threaded():
            train_step(self.fabric, self.model, self.optimizer, 1e-4, step, self.args, self.dropout)
        return len(step.rows)


def mixed_examples(vocab_size: int) -> list:
    """Three examples of Alpaca's lengths to one of LIMA's: rows then differ in how many they hold."""
    from lengths import alpaca_like, lima_like

    n_long = N_STEPS * N_EXAMPLES // 4
    short, long = alpaca_like(3 * n_long, vocab_size), lima_like(vocab_size, n=n_long)
    return [example for number in range(n_long) for example in (*short[3 * number : 3 * number + 3], long[number])]


def fake_model(config, quantize: str | None):
    """A model whose weights have no contents, in bf16 on the fake GPU."""
    import torch

    from lit_sft.model import GPT
    from lit_sft.quantize import is_quantized, place_quantized, quantized

    with torch.device("meta"):
        model = GPT(config)
    weights, narrow = {}, {}
    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda:0")
        if quantize and is_quantized(model, name):
            narrow[name] = quantized(weight, quantize)
            weight = weight.to("meta")
        weights[name] = weight
    model.load_state_dict(weights, assign=True)
    for name, layer in narrow.items():
        place_quantized(model, name, layer)
    return model


def make_fast(model) -> None:
    """Do what training on a GPU does after ``apply_lora``, in projects that have it."""
    for room, name in (("joined", "join_products"), ("experts", "group_experts")):
        with suppress(ModuleNotFoundError):
            getattr(import_module(f"lit_sft.{room}"), name)(model)


def kept_a_token(run: Run, recorder) -> float:
    """Bytes that the block keeps for its backward pass, for each token.

    What a row of twice the segments keeps more: weights and the like cancel out.
    """
    from lit_sft.loop import summed_loss

    kept = []

    def note(number: int, args: tuple, result) -> None:
        if number == BLOCK:
            kept.append(kept_bytes(run.model, args, result))

    recorder.on_block = note
    row = run.steps[1].rows[-1]
    for times in (1, 2):
        longer = repeated(row, times)
        with run.mode.single_threaded():
            summed_loss(run.fabric, run.model, longer.to(run.fabric.device))
    recorder.on_block = None
    return (kept[1] - kept[0]) / row.input_ids.numel()


def repeated(row, times: int):
    """A row with the same segments several times over."""
    import torch

    from lit_sft.attention import Layout

    n_tokens, n_segments = row.input_ids.numel(), len(row.layout.lengths)
    parents = None
    if row.layout.parents:
        parents = [
            None if parent is None else parent + number * n_segments
            for number in range(times)
            for parent in row.layout.parents
        ]
    return replace(
        row,
        input_ids=row.input_ids.repeat(times),
        layout=Layout(row.layout.lengths * times, parents),
        positions=torch.cat([row.positions + number * n_tokens for number in range(times)]),
        labels=row.labels.repeat(times),
        counts=None if row.counts is None else row.counts.repeat(times),
    )


def kept_bytes(model, args: tuple, result) -> int:
    """Bytes that autograd keeps between a block's result and its first argument.

    Without the model's own tensors and the block's other arguments, which all blocks share.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    own = [*model.parameters(), *model.buffers(), *tree_leaves(args[1:])]
    left_out = {storage_of(tensor) for tensor in own if isinstance(tensor, torch.Tensor)}
    storages = {}
    for tensor in saved_between(result.grad_fn, args[0].grad_fn):
        if storage_of(tensor) not in left_out:
            storages[storage_of(tensor)] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def storage_of(tensor) -> int:
    """Identify a piece of memory."""
    return tensor.untyped_storage()._cdata


def saved_between(last, first) -> Iterator:
    """The tensors that nodes of autograd's graph keep, from ``last`` on, up to ``first`` and without it."""
    seen, waiting = {first}, [last]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from saved_by(node)
        waiting += [following for following, _ in node.next_functions]


def saved_by(node) -> Iterator:
    """The tensors that one node keeps: of a function in Python, a compiled graph, or torch's own."""
    import torch

    names = [name for name in dir(node) if name.startswith("_saved_")]
    names += ["saved_tensors", "_tensors_no_vc_check"]
    for value in (getattr(node, name, None) for name in names):
        values = value if isinstance(value, tuple | list) else [value]
        yield from (kept for kept in values if isinstance(kept, torch.Tensor))


def in_one_line(error: Exception) -> str:
    """The kind of error, the line of the project it passed last, and how its message begins."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "lit_sft" in Path(f.filename).parts]
    message = " ".join(str(error).split())[:160]
    return " ".join(filter(None, [type(error).__name__, *lines[-1:], message]))


@contextmanager
def printing_apart() -> Iterator:
    """Within, what is printed goes to the errors; the real output is for the one line of JSON."""
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        yield output
    finally:
        sys.stdout = output


def main() -> None:
    """Look at one case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--project", type=Path, required=True, help="checkout whose lit_sft is looked at")
    parser.add_argument("--case", required=True)
    parser.add_argument("--codes", type=Path, required=True, help="folder for the generated code")
    args = parser.parse_args()
    sys.path[1:1] = [str(args.project), str(args.project / "benchmarks")]
    began = time.perf_counter()
    with printing_apart() as output:
        pretend()
        found = look_at(args.case, args.codes)
        found["seconds"] = round(time.perf_counter() - began)
        print(json.dumps(found), file=output)


if __name__ == "__main__":
    main()
