"""A run goes on as if nothing had happened, or says why not: what is saved when, what may change, what stops it."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from safetensors.torch import load_file, save_file
from test_loop import data, full_args, lora_args, read_metrics  # noqa: F401 (data is a fixture)

import lit_sft.estimate  # noqa: F401 (else it would keep a function that a test has replaced in loop)
from finetune import full, lora
from lit_sft import load_model, loop, optim, run
from lit_sft.atomic import Manifest
from lit_sft.batches import TrainSteps
from lit_sft.errors import InputError, RunFailed
from lit_sft.lora import ExampleDropout, apply_lora
from lit_sft.metrics import Metrics, is_spike
from lit_sft.run import Saver
from lit_sft.runtime import launch, on_first
from lit_sft.shards import Shards
from lit_sft.states import load_state

SETTINGS = {"micro_batch_tokens": 700, "max_steps": 6, "save_interval": 2, "eval_interval": 3, "lr_warmup_steps": 0}
OF_THE_MACHINE = ("seconds", "tokens_per_s", "peak_mem_bytes")


def states(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def records(out_dir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in read_metrics(out_dir)]


# --- what is saved, and when ---


VAL_LOSSES = {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.7}


@pytest.fixture
def run_that_gets_worse(data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:  # noqa: F811
    """Twelve steps with VAL_LOSSES; the state of the lowest is none that would be saved otherwise."""

    def go(out: Path, **changes: object) -> None:
        lines = out / "metrics.jsonl"
        monkeypatch.setattr(loop, "validate", lambda *_: VAL_LOSSES[len(lines.read_text().splitlines()) + 1])
        settings = {"max_steps": 12, "eval_interval": 3, "save_interval": 4, "keep_last": 1}
        lora.main(lora_args(data[1], out, **(settings | changes)))

    return go


def test_the_best_state_is_kept_beside_the_last(run_that_gets_worse: Callable, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    run_that_gets_worse(out)
    assert states(out) == ["step-00000006", "step-00000012"]
    saved = json.loads((out / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert (saved["best_step"], saved["best_val_loss"]) == (6, 1.0)
    assert f"the lowest val loss, 1.0000, was after step 6: {out}/checkpoints/step-00000006" in capsys.readouterr().out
    run_that_gets_worse(tmp_path / "not", keep_best=False)
    assert states(tmp_path / "not") == ["step-00000012"]


def test_the_best_is_remembered_over_interruptions(run_that_gets_worse: Callable, tmp_path: Path) -> None:
    for _ in range(9):
        run_that_gets_worse(tmp_path / "out", max_time=1e-9)
    run_that_gets_worse(tmp_path / "out")
    assert states(tmp_path / "out") == ["step-00000006", "step-00000012"]


def test_states_are_saved_by_minutes(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    settings = {"max_steps": 4, "save_interval": 100, "eval_interval": 100, "keep_last": 9}
    lora.main(lora_args(data[1], tmp_path / "often", **settings, save_minutes=1e-9))
    lora.main(lora_args(data[1], tmp_path / "rarely", **settings, save_minutes=60.0))
    assert states(tmp_path / "often") == [f"step-{k:08d}" for k in (1, 2, 3, 4)]
    assert states(tmp_path / "rarely") == ["step-00000004"]


def test_the_scale_of_fp16_is_saved(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """Three overflows lower a scaler's scale: the run that goes on has the lowered one, its count of good steps too."""

    def fabric_and_saver(out: Path) -> tuple[Fabric, Saver]:
        scaler = torch.amp.GradScaler("cpu", growth_interval=50)
        fabric = Fabric(plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler), accelerator="cpu")
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter])
        return fabric, Saver(fabric, lora_args(data[1], out), "model.safetensors", {"w": parameter}, optimizer, {})

    (tmp_path / "out").mkdir()
    fabric, save = fabric_and_saver(tmp_path / "out")
    parameter, precision = save.trained["w"], fabric.strategy.precision
    for factor in (math.inf, math.inf, math.inf, 1.0, 1.0):
        fabric.backward((parameter * factor).sum())
        precision.unscale_gradients(save.optimizer)
        precision.optimizer_step(save.optimizer)
        save.optimizer.zero_grad()
    state = save(5)
    other, restored = fabric_and_saver(tmp_path / "out")
    assert restored.restore(state) == 5
    before, after = (f.strategy.precision.scaler.state_dict() for f in (fabric, other))
    assert before == after and after["scale"] == 2.0**16 / 8 and after["_growth_tracker"] == 2


# --- a state that lacks something is noticed ---


def _without_optimizer(patch: pytest.MonkeyPatch) -> None:
    def load(directory: Path, name: str, trained: dict, _: torch.optim.Optimizer) -> dict:
        return load_state(directory, name, trained, torch.optim.AdamW(trained.values()))

    patch.setattr(run, "load_state", load)


def _without_position(patch: pytest.MonkeyPatch) -> None:
    restore = Saver.restore
    patch.setattr(Saver, "restore", lambda self, state: restore(self, state) and 0)


def _without_schedule(patch: pytest.MonkeyPatch) -> None:
    """The learning rate begins anew where the run goes on, at step 3."""
    schedule = optim.lr_schedule
    patch.setattr(optim, "lr_schedule", lambda args, n: lambda step: schedule(args, n)(max(1, step - 2)))


def _without_order(patch: pytest.MonkeyPatch) -> None:
    examples = TrainSteps.examples

    def reseeded(self: TrainSteps, number: int) -> list[int]:
        self.seed = 99
        return examples(self, number)

    patch.setattr(TrainSteps, "examples", reseeded)


def _without_dropouts_seed(patch: pytest.MonkeyPatch) -> None:
    start = ExampleDropout.__init__
    patch.setattr(ExampleDropout, "__init__", lambda self, p, seed: start(self, p, seed + 1))


LEFT_OUT = {
    "nothing": lambda patch: None,
    "optimizer": _without_optimizer,
    "position": _without_position,
    "schedule": _without_schedule,
    "order of examples": _without_order,
    "random numbers of dropout": _without_dropouts_seed,
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_leaving_anything_out_of_a_state_would_be_noticed(
    what: str,
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = SETTINGS | {"lora_dropout": 0.1, "max_steps": 4}
    lora.main(lora_args(data[1], tmp_path / "whole", **settings))
    for _ in range(2):
        lora.main(lora_args(data[1], tmp_path / "cut", **settings, max_time=1e-9))
    with monkeypatch.context() as patch:
        LEFT_OUT[what](patch)
        lora.main(lora_args(data[1], tmp_path / "cut", **settings))
    whole, cut = ((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("whole", "cut"))
    same = records(tmp_path / "whole") == records(tmp_path / "cut") and whole == cut
    assert same == (what == "nothing")


def test_a_step_draws_from_no_global_generator(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """Which is why a state holds none: two runs from other global seeds are one."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        lora.main(lora_args(data[1], tmp_path / str(seed), max_steps=3, eval_interval=2, lora_dropout=0.2))
    assert records(tmp_path / "1") == records(tmp_path / "2")


# --- what may change, and what may not ---


def test_a_change_of_place_is_said_in_one_line(
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    lora.main(lora_args(data[1], out, max_steps=4, micro_batch_tokens=700, max_time=1e-9))
    inputs = json.loads((out / "inputs.json").read_text())
    (out / "inputs.json").write_text(json.dumps(inputs | {"threads": 99, "torch": "1.0"}))
    capsys.readouterr()
    lora.main(lora_args(data[1], out, max_steps=4, micro_batch_tokens=900, save_minutes=5.0, keep_last=3))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("going on with")]
    assert said == [
        f"going on with micro_batch_tokens 900 instead of 700, threads {torch.get_num_threads()} instead of 99, "
        f"torch {torch.__version__} instead of 1.0: the same computation, equal to rounding"
    ]
    whole = tmp_path / "whole"
    lora.main(lora_args(data[1], whole, max_steps=4, micro_batch_tokens=700))
    for ours, theirs in zip(read_metrics(out), read_metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_changed_inputs_are_shown_briefly(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    lora.main(lora_args(data[1], out, max_steps=4, max_time=1e-9))
    inputs = json.loads((out / "inputs.json").read_text())
    *others, last = inputs["data_fingerprint"].split("+")
    changed = "+".join([*others, "0" * 64])
    (out / "inputs.json").write_text(json.dumps(inputs | {"data_fingerprint": changed}))
    with pytest.raises(InputError, match=rf"data_fingerprint: '000000000000' then, '{last[:12]}' now"):
        lora.main(lora_args(data[1], out, max_steps=4))


def test_a_state_of_a_newer_format_is_neither_used_nor_set_aside(
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    lora.main(lora_args(data[1], out, max_steps=4, max_time=1e-9))
    path = out / "checkpoints" / "step-00000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2, "compressed": True}))
    for resume in ("auto", str(path.parent)):
        with pytest.raises(InputError, match="has format 2, newer than 1; update lit_sft"):
            lora.main(lora_args(data[1], out, max_steps=4, resume=resume))
    assert states(out) == ["step-00000001"]


@pytest.mark.parametrize("damage", ["cut", "zeros", "gap"])
def test_records_that_a_state_is_ahead_of(data: tuple[Path, Path], tmp_path: Path, damage: str) -> None:  # noqa: F811
    """Power lost: the disk kept the state, not the lines before it. The gap is never papered over."""
    out, settings = tmp_path / "out", {"max_steps": 4, "save_interval": 1}
    for _ in range(3):
        lora.main(lora_args(data[1], out, **settings, max_time=1e-9))
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {"cut": [lines[0], lines[1][:9]], "zeros": [lines[0], bytes(500)], "gap": [lines[0], lines[2]]}[damage]
    path.write_bytes(b"".join(damaged))
    with pytest.raises(InputError, match=r"after step 1 of the 3 made comes no other.*move it away"):
        lora.main(lora_args(data[1], out, **settings))
    path.unlink()
    lora.main(lora_args(data[1], out, **settings))
    assert [r["step"] for r in read_metrics(out)] == [4]


# --- losses and gradients that are not finite ---


@pytest.fixture
def poisoned(data: tuple[Path, Path]) -> tuple[Path, int]:  # noqa: F811
    """A base with NaN for one token's embedding, which a single training example has: data_dir and that example."""
    base, data_dir = data
    train, val = Shards(data_dir, "train"), Shards(data_dir, "val")
    elsewhere = {i for k in range(len(val)) for i in val[k][0].tolist()}
    holders: dict[int, set[int]] = {}
    for k in range(len(train)):
        for token in train[k][0].tolist():
            holders.setdefault(token, set()).add(k)
    token, (example, *_) = next((t, list(k)) for t, k in holders.items() if len(k) == 1 and t not in elsewhere)
    weights = load_file(base / "lit_model.safetensors")
    weights["wte.weight"][token] = torch.nan
    save_file(weights, base / "lit_model.safetensors")
    Manifest("checkpoint", {}).write(base, ["lit_model.safetensors", "model_config.json"])
    return data_dir, example


def step_of(data_dir: Path, example: int) -> int:
    steps = TrainSteps(Shards(data_dir, "train"), lora_args(data_dir, Path("out")))
    return next(k for k in range(1, 7) if example in steps.examples(k))


def test_the_example_whose_loss_is_not_finite_is_named(poisoned: tuple[Path, int], tmp_path: Path) -> None:
    data_dir, example = poisoned
    step, out = step_of(data_dir, example), tmp_path / "out"
    says = rf"step {step}: loss nan.* from the train split's examples {example}; .* saved .*step-0000000{step - 1}"
    with pytest.raises(RunFailed, match=says):
        lora.main(lora_args(data_dir, out, epochs=1, save_interval=100))
    assert [r["step"] for r in read_metrics(out)] == list(range(1, step))
    for path in sorted((out / "checkpoints" / f"step-{step - 1:08d}").glob("*.safetensors")):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_skipping_leaves_a_step_without_update_and_goes_on(poisoned: tuple[Path, int], tmp_path: Path) -> None:
    data_dir, example = poisoned
    step, out = step_of(data_dir, example), tmp_path / "out"
    with pytest.raises(RunFailed):
        lora.main(lora_args(data_dir, out, epochs=2, save_interval=100))
    lora.main(lora_args(data_dir, out, epochs=2, save_interval=100, on_nonfinite="skip"))  # the same run goes on
    lines = (out / "metrics.jsonl").read_text()
    assert "NaN" not in lines and [r["step"] for r in read_metrics(out)] == list(range(1, 13))
    skipped = [r["step"] for r in read_metrics(out) if r.get("skipped")]
    assert step in skipped and len(skipped) == 2  # once in each epoch
    assert all((r["loss"] is None) == (r["step"] in skipped) for r in read_metrics(out))
    assert all(tensor.isfinite().all() for tensor in load_file(out / "adapter" / "adapter.safetensors").values())


def test_skipping_every_step_ends(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(loop, "accumulate_gradients", lambda *_: torch.tensor(math.nan))
    with pytest.raises(RunFailed, match=r"11 steps in a row without a finite loss; saved .*step-00000010"):
        lora.main(lora_args(data[1], tmp_path / "out", epochs=9, on_nonfinite="skip"))
    assert len(read_metrics(tmp_path / "out")) == 10


def test_a_gradient_that_is_not_finite_stops_too(data: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    accumulate = loop.accumulate_gradients

    def poison(fabric: Fabric, model: torch.nn.Module, *rest: object) -> float:
        loss = accumulate(fabric, model, *rest)
        next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", poison)
    with pytest.raises(RunFailed, match=r"step 1: loss \d.*gradient norm inf: though each example"):
        lora.main(lora_args(data[1], tmp_path / "out"))


# --- spikes ---


def test_what_a_spike_is() -> None:
    noisy = [2.0 + 0.1 * math.sin(7 * i) for i in range(50)]
    assert not is_spike(2.2, noisy) and is_spike(3.0, noisy)
    assert is_spike(3.0, [*noisy[:-3], 9.0, 9.0, 9.0]), "earlier spikes do not hide this one"
    assert not is_spike(1e9, noisy[:19]), "too few steps to tell"
    assert not is_spike(1.05, [1.0] * 50) and is_spike(1.2, [1.0] * 50), "a run without noise: a tenth above"
    falling = [4.0 * 0.97**i for i in range(60)]
    assert not any(is_spike(loss, falling[max(0, i - 50) : i]) for i, loss in enumerate(falling))


def test_spikes_are_marked_across_an_interruption(tmp_path: Path) -> None:
    def record(step: int, loss: float) -> dict:
        counts = {"step": step, "epoch": 1, "n_labels": 1, "n_tokens": 1, "peak_mem_bytes": 1}
        return counts | {
            "loss": loss,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 1.0,
            "padding_share": 0.0,
            "seconds": 1.0,
        }

    losses = [1 + 0.05 * math.sin(5 * k) for k in range(1, 61)]
    losses[29] = losses[54] = 2.0
    for start, end in pairwise((0, 25, 40, 60)):
        metrics = Metrics(tmp_path, start, 60)
        for step in range(start + 1, end + 1):
            metrics.log(record(step, losses[step - 1]))
        metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path) if r.get("spike")] == [30, 55]


# --- too little memory ---


def out_of_memory_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device had too little memory for rows of more than 400 tokens, from this step on."""
    accumulate = loop.accumulate_gradients

    def limited(fabric: Fabric, model: torch.nn.Module, its: object, *rest: object) -> float:
        if its.number >= step and any(row.input_ids.numel() > 400 for row in its.rows):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return accumulate(fabric, model, its, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", limited)


def test_out_of_memory_names_the_row_and_what_to_lower(
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, settings = tmp_path / "out", {"max_steps": 4, "save_interval": 100}
    out_of_memory_from(3, monkeypatch)
    with pytest.raises(RunFailed) as failed:
        lora.main(lora_args(data[1], out, **settings, micro_batch_tokens=700))
    args = lora_args(data[1], out, **settings, micro_batch_tokens=700)
    steps = TrainSteps(Shards(data[1], "train"), args, share_prefix=True)
    row = max(steps[3].rows, key=lambda row: row.input_ids.numel())
    half = max(row.input_ids.numel() // 2, int(steps.shards.lengths.max()))
    assert f"its longest packed row has {row.input_ids.numel()} tokens" in str(failed.value)
    assert str(row.examples)[1:-1] in str(failed.value)
    assert f"the same command goes on with --micro_batch_tokens {half}" in str(failed.value)
    assert states(out) == ["step-00000002"] and len(read_metrics(out)) == 2
    lora.main(lora_args(data[1], out, **settings, micro_batch_tokens=half))
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 3, 4]


def test_out_of_memory_of_a_single_example(data: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    longest = int(Shards(data[1], "train").lengths.max())

    def never(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop, "accumulate_gradients", never)
    with pytest.raises(RunFailed, match=f"--max_seq_length {longest // 2}"):
        lora.main(lora_args(data[1], tmp_path / "out", micro_batch_tokens=longest, global_batch_size=141))


# --- processes that agree ---


def test_what_the_first_process_cannot_do_is_told_to_all() -> None:
    class Other:
        """A second process, that receives what the first has sent."""

        is_global_zero = False

        def broadcast(self, _: object) -> tuple:
            return None, ("the disk is full", ())

        def barrier(self) -> None:
            pass

    with pytest.raises(InputError, match="the disk is full"):
        on_first(Other(), lambda: 1)
    fabric = launch(lora_args(Path("x"), Path("y")))
    assert on_first(fabric, lambda: 7) == 7
    with pytest.raises(InputError, match="No such file or directory: nowhere"):
        on_first(fabric, lambda: Path("nowhere").read_text())


@pytest.mark.slow
def test_a_save_that_fails_ends_every_process(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """Two processes, on a disk that takes no file as large as a state: one line, exit code 2, and nobody waits."""
    command = f"ulimit -f 40; exec {sys.executable} finetune/lora.py --data_dir={data[1]} --out_dir={tmp_path / 'out'}"
    command += " --device=cpu --devices=2 --max_steps=4 --save_interval=2 --global_batch_size=24"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "cannot be written: File too large" in errors[0]
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


ENDS = """
import atexit, os, sys, time
from lit_sft.args import Args
from lit_sft.cli import run
store, rank = sys.argv.pop(), sys.argv.pop()
os.environ["LOCAL_RANK"] = rank

@atexit.register
def hold_the_interpreter():  # until the other process has gone, and Gloo's thread here wants to free its tensor
    sys.setswitchinterval(100)
    end = time.monotonic() + (3 if rank == "0" else 0)
    while time.monotonic() < end:
        pass

def main(args: Args) -> None:
    import torch
    from torch import distributed
    from lit_sft.errors import InputError
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    if rank == "0":
        distributed.all_reduce(torch.ones(1000), async_op=True)  # the other one never answers
    else:
        time.sleep(1)
        os._exit(2)
    raise InputError("refused")

print("before the end")
run(main)
"""


@pytest.mark.slow
def test_a_process_of_several_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    """While a thread of Gloo still works: taking down the interpreter under it aborts, rarely or, here, always."""
    command = [sys.executable, "-c", ENDS]
    others = subprocess.Popen([*command, "1", str(tmp_path / "store")], cwd=ROOT)
    first = subprocess.run([*command, "0", str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True)
    others.wait()
    assert (first.returncode, first.stdout, first.stderr) == (2, "before the end\n", "error: refused\n")


SLOW_TO_END = """
import sys, time
from lightning.fabric.strategies.launchers import subprocess_script
from lit_sft import cli
from lit_sft.args import LoRATrainArgs

subprocess_script._ChildProcessObserver.__init__.__defaults__ = (0.05,)  # instead of five seconds

def main(args: LoRATrainArgs) -> None:
    from lit_sft import runtime
    from lit_sft.errors import RunFailed
    fabric = runtime.launch(args)
    fabric.barrier()
    if fabric.is_global_zero:
        time.sleep(2.5)
    raise RunFailed(f"process {fabric.global_rank} has failed")

if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.slow
def test_the_others_let_the_first_process_say_what_failed(tmp_path: Path) -> None:
    """Fabric kills the first process as soon as it sees that another one has failed; that one waits for it."""
    (tmp_path / "ends.py").write_text(SLOW_TO_END)
    command = [sys.executable, str(tmp_path / "ends.py"), "--device=cpu", "--devices=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr
    assert sorted(errors) == [f"error: process {k} has failed" for k in range(2)]


def test_a_disk_without_room_for_a_state_is_refused_before_the_first_step(
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(InputError, match=r"0\.0 GB free, a saved state takes .* make room"):
        full.main(full_args(data[1], tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_every_parameter_of_a_run_is_in_its_state(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """A state's tensors against the model's own list: nothing trained is left out, nothing frozen is in it."""
    base, data_dir = data
    args = lora_args(data_dir, tmp_path / "out", max_steps=1)
    lora.main(args)
    model = load_model(base)
    apply_lora(model, args, 0)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    state: Callable[[str], set] = lambda name: set(load_file(tmp_path / "out/checkpoints/step-00000001" / name))  # noqa: E731
    assert state("adapter.safetensors") == wanted
    assert state("optimizer.safetensors") == {f"{n}.{s}" for n in wanted for s in ("step", "exp_avg", "exp_avg_sq")}
