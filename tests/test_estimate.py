"""Memory before the run: bytes against exact counts, predictions against what runs held, the rehearsal against none."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_loop import data, lora_args, read_metrics  # noqa: F401

from finetune import full, lora
from lit_sft import fitting, rehearsal
from lit_sft.args import FullTrainArgs, LoRATrainArgs
from lit_sft.attention import Layout
from lit_sft.batches import LOOKED_AT, Row, TrainSteps
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.estimate import _measure, measure
from lit_sft.live_bytes import LiveBytes
from lit_sft.run_inputs import recorded
from lit_sft.shards import Shards

CONFIG = ModelConfig(
    block_size=512, vocab_size=300, n_layer=6, n_embd=64, n_head=4, n_query_groups=2, head_size=16, intermediate_size=96
)
BLOCK = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96  # of a block's linear layers
N_WEIGHTS = 2 * 300 * 64 + 64 + 6 * (BLOCK + 2 * 64)
N_ADAPTER = 6 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))


def row_of(lengths: list[int]) -> Row:
    n = sum(lengths)
    ids = torch.arange(n) % 300
    return Row(ids, Layout(lengths), torch.arange(n - 1), ids[1:], None, list(range(len(lengths))))


def settings(**args: object) -> LoRATrainArgs:
    return LoRATrainArgs(**{"device": "cpu", "precision": "32-true"} | args)


def test_bytes_are_counted_while_they_live() -> None:
    with LiveBytes(1) as live:
        a = torch.empty(1000, 100)
        assert live.now == 400_000
        view, b = a[:10].t(), a.to(torch.bfloat16)
        del a
        assert live.now == 600_000, "a view keeps its storage"
        del view
        assert (live.now, live.peak) == (200_000, 600_000)
        x = torch.empty(50, 50, requires_grad=True)
        y = (x.exp() * 2).sum()  # exp keeps its result
        assert live.now == 200_000 + 2 * 10_000 + 4
        y.backward()
        assert y.item() == 0.0
        del b, y
        assert live.now == 2 * 10_000, "x and its gradient"


def test_what_is_not_activations_is_exact() -> None:
    row = row_of([100, 60])
    memory = measure(settings(), CONFIG, row)
    small = 42 * 8  # a number that each of the adapters keeps beside its matrices
    assert memory.weights == 4 * N_WEIGHTS and 4 * N_ADAPTER <= memory.trained <= 4 * N_ADAPTER + small
    slots = 2 * 4 * N_ADAPTER
    assert slots <= memory.optimizer < slots + 4 * 2 * 7 * 6 + 1, "the two slots, and one counter a tensor"
    memory = measure(settings(precision="bf16-true"), CONFIG, row)
    assert memory.weights == 2 * N_WEIGHTS and 4 * N_ADAPTER <= memory.trained <= 4 * N_ADAPTER + small
    everything = FullTrainArgs(device="cpu", precision="bf16-true")
    memory = measure(everything, CONFIG, row)
    assert (memory.weights, memory.trained) == (2 * N_WEIGHTS, 4 * N_WEIGHTS), "fp32 masters"
    assert memory.optimizer // 8 == pytest.approx(N_WEIGHTS, rel=1e-2)
    assert measure(replace(everything, precision="32-true"), CONFIG, row).trained == 0
    fp8 = measure(settings(quantize="fp8"), CONFIG, row).weights
    assert fp8 == 4 * (N_WEIGHTS - 6 * BLOCK) + 6 * (BLOCK + 4 * (64 * 2 + 2 * 32 + 2 * 96 + 64))
    pytest.importorskip("bitsandbytes")
    nf4 = measure(settings(quantize="nf4"), CONFIG, row).weights - 4 * (N_WEIGHTS - 6 * BLOCK)
    assert 6 * BLOCK // 2 < nf4 < 6 * BLOCK * (0.5 + 4 / 64) * 1.05 + 42 * 16 * 4, "4 bits, and a scale for 64 of them"


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ({}, {}),
        ({"activation_checkpointing": "2", "lora_dropout": 0.1}, {"n_layer": 9}),
        ({"quantize": "fp8"}, {"sliding_window": 32, "sliding_layers": (True, True, False) * 4, "n_layer": 12}),
        ({"lora_head": True}, {"n_expert": 4, "n_expert_per_token": 2, "n_layer": 5}),
    ],
)
def test_a_few_blocks_multiplied_are_all_blocks(args: dict, config: dict) -> None:
    args, config = settings(**args), replace(CONFIG, **config)
    row = row_of([200, 90, 110])
    quick, whole = measure(args, config, row), _measure(args, config, row)
    for name, value in vars(whole).items():
        assert getattr(quick, name) == pytest.approx(value, rel=1e-3), name


def test_checkpointing_and_shorter_rows_take_less() -> None:
    whole = measure(settings(), CONFIG, row_of([200, 200])).activations
    assert measure(settings(activation_checkpointing="all"), CONFIG, row_of([200, 200])).activations < whole / 2
    assert measure(settings(), CONFIG, row_of([200])).activations == pytest.approx(whole / 2, rel=0.15)


@pytest.mark.parametrize("share", [False, True])
def test_the_heaviest_row_is_the_longest_of_the_run(data: tuple[Path, Path], share: bool, monkeypatch) -> None:  # noqa: F811
    args = lora_args(data[1], Path("out"), micro_batch_tokens=700)
    steps = TrainSteps(Shards(data[1], "train"), args, share_prefix=share)
    longest = max(row.input_ids.numel() for k in range(1, steps.max_steps + 1) for row in steps[k].rows)
    assert steps.heaviest_row().input_ids.numel() == longest
    assert steps.max_steps <= LOOKED_AT
    monkeypatch.setattr("lit_sft.batches.LOOKED_AT", 1)
    bound = steps.heaviest_row()
    assert bound.input_ids.numel() == sum(bound.layout.lengths) == 700 >= longest
    assert bound.positions.max() < 700 and len(bound.labels) == len(bound.positions) > 0
    assert bound.examples[0] == int(steps.shards.lengths.argmax())


# --- the flags ---


def test_estimate_prints_and_writes_nothing(data: tuple[Path, Path], tmp_path: Path, capsys) -> None:  # noqa: F811
    out = tmp_path / "out"
    assert lora.main(lora_args(data[1], out, estimate=True, micro_batch_tokens=700)) is None
    printed = capsys.readouterr().out
    assert "heaviest row" in printed and "activations" in printed and "as asked" in printed
    assert "--activation_checkpointing all" in printed and not out.exists()
    command = [sys.executable, ROOT / "scripts" / "estimate.py", "--data_dir", data[1], "--micro_batch_tokens", "700"]
    small = subprocess.run([*command, "--device_memory_gb", "0.601"], capture_output=True, text=True)
    assert small.returncode == 0 and "too large" in small.stdout and "bf16-true on cuda" in small.stdout, small.stderr
    command = [sys.executable, ROOT / "scripts" / "estimate.py", "--checkpoint_dir", data[0], "--full", "true"]
    large = subprocess.run([*command, "--device_memory_gb", "24"], capture_output=True, text=True)
    assert large.returncode == 0 and "assumed: one example" in large.stdout and "fits" in large.stdout, large.stderr


def test_auto_takes_the_longest_row_that_fits_and_keeps_it(
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = fitting.make_plan(
        lora_args(data[1], tmp_path, micro_batch_tokens="auto"), data[0], Shards(data[1], "train"), "cpu", "32-true"
    )
    needed = {n: plan.needed(replace(plan.args, micro_batch_tokens=n))[2] for n in (8192, 4096, 2048, 1024)}
    assert fitting.choose_settings(plan.args, plan).micro_batch_tokens == 8192
    tight = replace(plan, room=(needed[2048] + needed[1024]) // 2)
    assert fitting.choose_settings(plan.args, tight).micro_batch_tokens == 1024
    with pytest.raises(InputError, match=r"longest example, .* is not predicted to fit"):
        fitting.choose_settings(plan.args, replace(plan, room=1))
    out = tmp_path / "out"
    monkeypatch.setattr(fitting, "free_memory", lambda device: tight.room)
    lora.main(lora_args(data[1], out, micro_batch_tokens="auto", max_steps=1))
    assert recorded(out)["micro_batch_tokens"] == 1024
    (out / "DONE").unlink()
    monkeypatch.setattr(fitting, "free_memory", lambda device: 1 << 40)
    assert fitting.choose_settings(lora_args(data[1], out, micro_batch_tokens="auto"), plan).micro_batch_tokens == 1024


# --- the rehearsal ---


@pytest.mark.parametrize("kind", ["lora", "full", "full bf16"])
def test_a_run_with_a_rehearsal_is_the_run_without(
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    step = rehearsal.train_step
    monkeypatch.setattr(rehearsal, "train_step", lambda *a: made.append(step(*a)["grad_norm"]))
    losses, weights = [], []
    for name, rehearse in (("without", False), ("with", True)):
        args = lora_args(data[1], tmp_path / name, max_steps=3, rehearse=rehearse, lora_dropout=0.1, lr_warmup_steps=0)
        if kind != "lora":
            precision = "bf16-true" if "bf16" in kind else "32-true"
            shared = {"data_dir": args.data_dir, "out_dir": args.out_dir, "device": "cpu", "max_steps": 3}
            args = FullTrainArgs(**shared, rehearse=rehearse, learning_rate=1e-3, precision=precision)
        (lora if kind == "lora" else full).main(args)
        losses.append([r["loss"] for r in read_metrics(tmp_path / name)])
        result = "adapter/adapter.safetensors" if kind == "lora" else "model/lit_model.safetensors"
        state = next((tmp_path / name / "checkpoints").glob("step-*3"))
        weights.append([(tmp_path / name / result).read_bytes(), (state / "optimizer.safetensors").read_bytes()])
    assert len(made) == 2 and min(made) > 0
    assert losses[0] == losses[1] and weights[0] == weights[1]


def test_a_rehearsal_out_of_memory_says_what_fits(data: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    def too_large(*_: object) -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(rehearsal, "train_step", too_large)
    args = lora_args(data[1], tmp_path / "out", micro_batch_tokens=700, rehearse=True)
    with pytest.raises(InputError) as failed:
        lora.main(args)
    row = TrainSteps(Shards(data[1], "train"), args, share_prefix=True).heaviest_row()
    message, half = str(failed.value), row.input_ids.numel() // 2
    assert f"longest row, {row.input_ids.numel()} tokens" in message and str(row.examples)[1:-1] in message
    assert f"try --micro_batch_tokens {half}" in message and "\n" not in message and not metrics_of(tmp_path / "out")


def metrics_of(out: Path) -> bool:
    return (out / "metrics.jsonl").exists()


@pytest.mark.slow
def test_predictions_are_within_a_tenth_of_what_runs_hold(tmp_path: Path) -> None:
    """Each a process of its own; above what the process had before, within a quarter. The program has six settings."""
    command = [sys.executable, ROOT / "benchmarks" / "estimate.py", "--shape", "small", "--steps", "2"]
    command += ["--settings", "LoRA fp32, half rows", "LoRA bf16", "full fp32"]
    subprocess.run([*command, "--out", tmp_path / "e.json"], check=True, capture_output=True)
    runs = json.loads((tmp_path / "e.json").read_text())["runs"]
    assert len(runs) == 3
    for run in runs:
        assert abs(run["error"]) < 0.1, run
        assert abs(run["error_above"]) < 0.25, run
