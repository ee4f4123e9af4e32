"""The loop against transformers and peft, and against itself computed in other ways."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_hf_llama
from lightning.fabric import Fabric
from spans import spans_on_a_cpu  # noqa: F401 (a fixture)
from test_lora import filled_adapter, to_peft
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import full, lora
from lit_sft import load_model
from lit_sft.args import ConvertArgs, FullTrainArgs, LoRAArgs, LoRATrainArgs
from lit_sft.atomic import Manifest
from lit_sft.batches import Ahead, Row, TrainSteps, ValRows
from lit_sft.checkpoint import load_adapter
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError, RunFailed
from lit_sft.joined import join_products
from lit_sft.loop import accumulate_gradients, train_step, validate
from lit_sft.lora import apply_lora, lora_state_dict
from lit_sft.optim import build_optimizer, lr_schedule, master_parameters
from lit_sft.prepare import prepare
from lit_sft.prepare_args import PrepareArgs
from lit_sft.rows import Columns
from lit_sft.runtime import launch
from lit_sft.shards import Shards


@pytest.fixture
def data(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and the demo's instructions prepared for it: (checkpoint_dir, data_dir)."""
    base = checkpoint()
    args = PrepareArgs(checkpoint_dir=str(base), destination_path=str(tmp_path / "data"), val_split_fraction=0.1)
    return base, prepare(args, ROOT / "demo" / "instructions.csv", "csv", Columns())


def lora_args(data_dir: Path, out_dir: Path, **args: object) -> LoRATrainArgs:
    settings = {"global_batch_size": 24, "learning_rate": 2e-3, "epochs": 2, "device": "cpu"} | args
    return LoRATrainArgs(data_dir=str(data_dir), out_dir=str(out_dir), **settings)


def read_metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def test_ten_steps_have_the_losses_of_transformers_and_peft(data: tuple[Path, Path], tmp_path: Path) -> None:
    """peft around transformers, one example at a time, its own cross-entropy and AdamW: losses within 1e-4."""
    base, data_dir = data
    args = lora_args(data_dir, tmp_path / "out", max_steps=10, micro_batch_tokens=700)
    fabric, shards = launch(args), Shards(data_dir, "train")
    steps, lr_at = TrainSteps(shards, args), lr_schedule(args, 10)

    model = load_model(base)
    apply_lora(model, args, args.seed)
    theirs = to_peft(model, make_hf_llama(tmp_path / "reference"), args)
    optimizer = build_optimizer(model, master_parameters(model), args)
    ours = [train_step(fabric, model, optimizer, lr_at(k), steps[k], args, None) for k in range(1, 11)]
    assert len(steps[1].rows) > 1, "the rows should be several, or nothing is accumulated"

    parameters = [p for p in theirs.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    for record in ours:
        examples = [shards[i] for i in steps.examples(record["step"])]
        n_labels = sum(int(mask.sum()) for _, mask in examples)
        total = 0.0
        for ids, mask in examples:
            logits = theirs(ids[None]).logits[0, :-1]
            labels = ids[1:].where(mask[1:], torch.tensor(-100))
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / n_labels
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_norm).item()
        plain.param_groups[0]["lr"] = record["lr"]
        plain.step()
        plain.zero_grad()
        assert record["n_labels"] == n_labels
        assert abs(record["loss"] - total) < 1e-4
        assert abs(record["grad_norm"] - norm) < 1e-3 * norm
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_loss_does_not_depend_on_how_a_step_is_packed(data: tuple[Path, Path], tmp_path: Path, dropout: float) -> None:
    """One example a row up to all in one row, in fp64, with dropout too: losses, gradients and the next steps."""
    base, data_dir = data

    def run(**packing: int) -> tuple[list[float], list[torch.Tensor], int]:
        args = lora_args(data_dir, tmp_path, precision="64-true", lora_dropout=dropout, lora_head=True, **packing)
        fabric, steps = launch(args), TrainSteps(Shards(data_dir, "train"), args)
        model = load_model(base, dtype=torch.float64)
        masks = apply_lora(model, args, args.seed)
        optimizer = build_optimizer(model, master_parameters(model), args)
        losses = [train_step(fabric, model, optimizer, 1e-3, steps[k], args, masks)["loss"] for k in (1, 2, 3)]
        accumulate_gradients(fabric, model, steps[4], masks)
        return losses, [p.grad for p in lora_state_dict(model).values()], len(steps[1].rows)

    losses, grads, n_rows = run(micro_batch_tokens=10_000)
    assert n_rows == 1
    longest = int(Shards(data_dir, "train").lengths.max())
    for packing in ({"micro_batch_tokens": longest}, {"micro_batch_tokens": 500}, {"micro_batch_size": 2}):
        others, other_grads, n_other = run(**packing)
        assert n_other > 2
        assert others == pytest.approx(losses, rel=1e-10, abs=0)
        for grad, other in zip(grads, other_grads, strict=True):
            assert torch.allclose(grad, other, rtol=1e-8, atol=1e-13)


def test_fp16_with_loss_scaling_follows_fp32(data: tuple[Path, Path], tmp_path: Path) -> None:
    """A GPU's 16-mixed, with a gradient scaler for the CPU: unscaled once before clipping, and four steps alike."""
    from lightning.fabric.plugins import MixedPrecision

    base, data_dir = data
    scaled = Fabric(plugins=MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")), accelerator="cpu")
    runs = {}
    for fabric, precision in ((None, "32-true"), (scaled, "16-mixed")):
        args = lora_args(data_dir, tmp_path, precision=precision)
        model = load_model(base)
        apply_lora(model, args, args.seed)
        optimizer = build_optimizer(model, master_parameters(model), args)
        steps = TrainSteps(Shards(data_dir, "train"), args)
        records = [
            train_step(fabric or launch(args), model, optimizer, 2e-3, steps[k], args, None) for k in range(1, 5)
        ]
        runs[precision] = [(r["loss"], r["grad_norm"]) for r in records], lora_state_dict(model)
    for (loss, norm), (expected, expected_norm) in zip(runs["16-mixed"][0], runs["32-true"][0], strict=True):
        assert loss == pytest.approx(expected, abs=2e-3) and norm == pytest.approx(expected_norm, rel=2e-2)
    for name, tensor in runs["16-mixed"][1].items():
        expected = runs["32-true"][1][name]
        assert (tensor - expected).norm() < 0.1 * (expected.norm() if name.endswith("B") else 1), name


def test_dropout_changes_the_loss(data: tuple[Path, Path], tmp_path: Path) -> None:
    base, data_dir = data
    losses = []
    for dropout in (0.0, 0.2):
        args = lora_args(data_dir, tmp_path, lora_dropout=dropout)
        model = load_model(base)
        filled = apply_lora(model, args, 0)
        with torch.no_grad():
            for p in lora_state_dict(model).values():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        model.train()
        steps = TrainSteps(Shards(data_dir, "train"), args)
        losses.append(accumulate_gradients(launch(args), model, steps[1], filled))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_validation_is_the_mean_over_every_label_of_the_split(data: tuple[Path, Path], tmp_path: Path) -> None:
    base, data_dir = data
    reference = make_hf_llama(tmp_path / "reference")
    total = n_labels = 0
    shards = Shards(data_dir, "val")
    for ids, mask in (shards[i] for i in range(len(shards))):
        labels = ids.where(mask, torch.tensor(-100))
        n = int(mask.sum())
        with torch.no_grad():
            total, n_labels = total + reference(ids[None], labels=labels[None]).loss.item() * n, n_labels + n
    args = lora_args(data_dir, tmp_path / "out")
    for row_tokens in (200, 8192):
        ours = validate(launch(args), load_model(base), ValRows(shards, row_tokens))
        assert ours == pytest.approx(total / n_labels, abs=1e-5)
    assert validate(launch(args), load_model(base), []) is None


def test_epochs_visit_every_example_once_and_the_order_follows_from_the_seed(data: tuple[Path, Path]) -> None:
    shards = Shards(data[1], "train")
    steps = TrainSteps(shards, lora_args(data[1], Path("out"), epochs=3))
    n = len(shards)
    assert (steps.per_epoch, steps.max_steps) == (math.ceil(n / 24), 3 * math.ceil(n / 24))
    epochs = [
        [i for k in range(1, steps.per_epoch + 1) for i in steps.examples(e * steps.per_epoch + k)] for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert steps[steps.per_epoch].epoch == 1 and steps[steps.per_epoch + 1].epoch == 2
    again = TrainSteps(shards, lora_args(data[1], Path("out")))
    assert again.examples(9) == steps.examples(9) and again.examples(2) == steps.examples(2)
    assert TrainSteps(shards, lora_args(data[1], Path("out"), seed=1)).examples(1) != steps.examples(1)
    step = steps[steps.per_epoch]
    assert step.n_labels == sum(row.n_labels for row in step.rows)
    assert step.n_tokens == sum(row.input_ids.numel() for row in step.rows) == int(shards.lengths[step.examples].sum())


@pytest.mark.parametrize("batch_size", [1, 7, 24, 140, 141, 500])
def test_an_epoch_is_spread_evenly(data: tuple[Path, Path], batch_size: int) -> None:
    """141 = 20 · 7 + 1: no step of a single example at the end."""
    steps = TrainSteps(Shards(data[1], "train"), lora_args(data[1], Path("out"), global_batch_size=batch_size))
    sizes = [len(steps.examples(k)) for k in range(1, steps.per_epoch + 1)]
    assert sum(sizes) == 141 and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("order", ["as_given", "length", "source"])
def test_an_order_of_the_data_is_that_of_every_epoch(
    checkpoint: Callable[..., Path], tmp_path: Path, order: str
) -> None:
    args = PrepareArgs(checkpoint_dir=str(checkpoint()), destination_path=str(tmp_path / "d"), order=order)
    prepare(args, ROOT / "demo" / "instructions.csv", "csv", Columns())
    shards = Shards(tmp_path / "d", "train")
    steps = TrainSteps(shards, lora_args(tmp_path / "d", tmp_path / "out", seed=5))
    for epoch in range(2):
        visited = [i for k in range(1, steps.per_epoch + 1) for i in steps.examples(epoch * steps.per_epoch + k)]
        assert visited == list(range(141))
    rows = [int(shards.fact("row", i)) for i in range(141)]
    assert (rows == sorted(rows)) == (order == "as_given")
    assert (shards.lengths.diff() >= 0).all() == (order == "length")


def test_memory_of_the_order_is_8_bytes_an_example(data: tuple[Path, Path]) -> None:
    steps = TrainSteps(Shards(data[1], "train"), lora_args(data[1], Path("out")))
    steps.examples(1)
    held = [steps.order[1], steps.shards.lengths]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 8 * 141
    tensors = [v for v in {**vars(steps), **vars(steps.shards)}.values() if isinstance(v, torch.Tensor)]
    assert all(tensor is steps.shards.lengths for tensor in tensors)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_a_step_without_loss_or_overlap(data: tuple[Path, Path], world_size: int) -> None:
    shards, args = Shards(data[1], "train"), lora_args(data[1], Path("out"), micro_batch_tokens=400)
    alone = TrainSteps(shards, args)[2]
    shares = [TrainSteps(shards, args, world_size, rank)[2] for rank in range(world_size)]
    assert sorted(i for s in shares for row in s.rows for i in row.examples) == sorted(alone.examples)
    assert {s.n_labels for s in shares} == {alone.n_labels}


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"epochs": 3}, 18),
        ({"epochs": None, "max_steps": 5}, 5),
        ({"epochs": 1, "max_steps": 50}, 6),
        ({"max_iters": 30}, 2),  # 30 examples: one step of 24 and a second
        ({"max_iters": 141}, 6),  # one epoch
        ({"max_iters": 150}, 7),
        ({"max_iters": 12, "micro_batch_size": 4}, 2),
        ({"epochs": 1, "max_iters": 1000}, 6),
    ],
)
def test_the_first_limit_ends_the_run(data: tuple[Path, Path], limits: dict, steps: int) -> None:
    shards = Shards(data[1], "train")
    assert len(shards) == 141
    assert TrainSteps(shards, lora_args(data[1], Path("out"), **limits)).max_steps == steps


def test_default_batch_is_at_most_a_quarter_of_a_small_dataset(data: tuple[Path, Path]) -> None:
    args = lora_args(data[1], Path("out"), global_batch_size=None)
    assert TrainSteps(Shards(data[1], "train"), args).batch_size == 35
    assert TrainSteps(Shards(data[1], "val"), args).batch_size == 3


def test_a_run_learns_and_leaves_what_it_promises(data: tuple[Path, Path], tmp_path: Path) -> None:
    base, data_dir = data
    out = tmp_path / "out"
    lora.main(lora_args(data_dir, out, epochs=8, eval_interval=12, save_interval=20, learning_rate=5e-3))
    records = read_metrics(out)
    assert [r["step"] for r in records] == list(range(1, 49))
    fields = {"step", "epoch", "loss", "lr", "grad_norm", "n_labels", "n_tokens", "tokens_per_s"}
    fields |= {"padding_share", "peak_mem_bytes", "seconds"}
    assert all(r.keys() == fields | ({"val_loss"} if r["step"] % 12 == 0 else set()) for r in records)
    assert sum(r["loss"] for r in records[-6:]) / 6 < 0.8 * records[0]["loss"]
    assert {p.name for p in out.iterdir()} == {
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "report.html",
        "run.yaml",
        "inputs.json",
        "DONE",
        ".lock",
    }
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000040", "step-00000048"]
    for folder in (out / "adapter", out, out / "checkpoints" / "step-00000048"):  # each is an adapter_dir
        assert validate(
            launch(lora_args(data_dir, out)), load_model(base, folder), ValRows(Shards(data_dir, "val"), 8192)
        ) == pytest.approx(records[-1]["val_loss"], abs=1e-5)
    with pytest.raises(InputError, match="finished run"):
        lora.main(lora_args(data_dir, out, epochs=8))


def full_args(data_dir: Path, out_dir: Path, **args: object) -> FullTrainArgs:
    settings = {"global_batch_size": 24, "learning_rate": 1e-3, "epochs": 3, "device": "cpu"} | args
    return FullTrainArgs(data_dir=str(data_dir), out_dir=str(out_dir), **settings)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_full_fine_tuning_gives_a_checkpoint_of_its_own(
    data: tuple[Path, Path], tmp_path: Path, precision: str
) -> None:
    base, data_dir = data
    full.main(full_args(data_dir, tmp_path / "out", precision=precision))
    records = read_metrics(tmp_path / "out")
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    model = load_model(tmp_path / "out" / "model")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    fabric = launch(full_args(data_dir, tmp_path, precision=precision))
    val = validate(fabric, model, ValRows(Shards(data_dir, "val"), 8192, share_prefix=True))
    assert val == pytest.approx(records[-1]["val_loss"], abs=1e-5)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p.float(), load_model(base).get_parameter(n))}
    assert changed == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_bits(data: tuple[Path, Path], tmp_path: Path, recipe: str) -> None:
    """Stopped by max_time after its first step and again later; dropout and several rows a step."""
    _, data_dir = data
    main, args = (lora.main, lora_args) if recipe == "lora" else (full.main, full_args)
    settings = {"micro_batch_tokens": 700, "max_steps": 8, "save_interval": 3, "eval_interval": 4}
    settings |= {"lora_dropout": 0.1} if recipe == "lora" else {}
    main(args(data_dir, tmp_path / "whole", **settings))
    main(args(data_dir, tmp_path / "cut", **settings, max_time=1e-9))
    assert len(read_metrics(tmp_path / "cut")) == 1 and not (tmp_path / "cut" / "DONE").exists()
    main(args(data_dir, tmp_path / "cut", **settings, max_time=1e-9))
    assert len(read_metrics(tmp_path / "cut")) == 2
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # what a kill leaves behind the last saved state
    main(args(data_dir, tmp_path / "cut", **settings))
    same = ("step", "epoch", "loss", "lr", "grad_norm", "n_labels", "n_tokens", "val_loss")
    whole, cut = ([{k: r.get(k) for k in same} for r in read_metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == cut
    result = "adapter/adapter.safetensors" if recipe == "lora" else "model/lit_model.safetensors"
    assert (tmp_path / "whole" / result).read_bytes() == (tmp_path / "cut" / result).read_bytes()


def test_a_run_killed_after_its_last_save_goes_on_to_its_result(data: tuple[Path, Path], tmp_path: Path) -> None:
    """The last state is there, DONE and the adapter are not."""
    out, settings = tmp_path / "out", {"max_steps": 2}
    lora.main(lora_args(data[1], out, **settings))
    adapter, metrics = (out / "adapter" / "adapter.safetensors").read_bytes(), read_metrics(out)
    shutil.rmtree(out / "adapter")
    (out / "DONE").unlink()
    lora.main(lora_args(data[1], out, **settings))
    assert (out / "DONE").is_file() and read_metrics(out) == metrics
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == adapter


def test_a_damaged_state_is_set_aside_for_the_one_before(data: tuple[Path, Path], tmp_path: Path) -> None:
    _, data_dir = data
    settings = {"max_steps": 6, "save_interval": 2, "keep_last": 3}
    lora.main(lora_args(data_dir, tmp_path / "whole", **settings))
    out = tmp_path / "out"
    lora.main(lora_args(data_dir, out, **settings))
    (out / "DONE").unlink()
    newest = out / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    lora.main(lora_args(data_dir, out, **settings))
    assert [r["loss"] for r in read_metrics(out)] == [r["loss"] for r in read_metrics(tmp_path / "whole")]
    assert any(p.name.startswith(".bad-step-00000006") for p in (out / "checkpoints").iterdir())


def test_going_back_to_an_older_state(data: tuple[Path, Path], tmp_path: Path) -> None:
    """It goes on from there and stays there: the later states are neither kept for it nor gone on from."""
    out, settings = tmp_path / "out", {"max_steps": 6, "save_interval": 2, "keep_last": 3}
    states = out / "checkpoints"
    lora.main(lora_args(data[1], out, **settings))
    whole = read_metrics(out)
    (out / "DONE").unlink()
    lora.main(lora_args(data[1], out, **settings, resume=str(states / "step-00000002"), max_time=1e-9))
    assert [p.name for p in sorted(states.glob("step-*"))] == ["step-00000002", "step-00000003"]
    lora.main(lora_args(data[1], out, **settings))
    assert [r["loss"] for r in read_metrics(out)] == [r["loss"] for r in whole]


def test_a_named_state_is_of_this_run_and_intact(data: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"max_steps": 4, "max_time": 1e-9}
    for name in ("one", "two"):
        lora.main(lora_args(data[1], tmp_path / name, **settings))
    one = tmp_path / "one" / "checkpoints" / "step-00000001"
    with pytest.raises(InputError, match="no saved state"):
        lora.main(lora_args(data[1], tmp_path / "two", **settings, resume=str(one)))
    weights = bytearray((one / "adapter.safetensors").read_bytes())
    weights[-5] ^= 1
    (one / "adapter.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="differs from its recorded sha256"):
        lora.main(lora_args(data[1], tmp_path / "one", **settings, resume=str(one)))


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step-00000006/x", "adapter/x"])
def test_a_folder_with_something_of_a_run_but_no_run_is_refused(
    data: tuple[Path, Path], tmp_path: Path, left: str
) -> None:
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(InputError, match=r"but no run.yaml: .* name another --out_dir"):
        lora.main(lora_args(data[1], tmp_path / "out"))
    assert path.read_text() == "precious" and not (tmp_path / "out" / "run.yaml").exists()


def test_a_run_that_saved_nothing_starts_anew_with_other_arguments(data: tuple[Path, Path], tmp_path: Path) -> None:
    lora.main(lora_args(data[1], tmp_path / "out", max_steps=2))
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "DONE").unlink()
    lora.main(lora_args(data[1], tmp_path / "out", max_steps=3, lora_r=4))
    assert [r["step"] for r in read_metrics(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.002 then, 0.001 now"),
        ({"lora_r": 8}, "lora_r"),
        ({"max_steps": 9}, "max_steps"),
        ({"seed": 2}, "seed"),
        ({"resume": "never"}, "--resume auto goes on"),
        ({"resume": "out/nothing"}, "no saved state"),
    ],
)
def test_an_unfinished_run_refuses_other_arguments(
    data: tuple[Path, Path], tmp_path: Path, change: dict, message: str
) -> None:
    _, data_dir = data
    out = tmp_path / "out"
    lora.main(lora_args(data_dir, out, max_steps=4, max_time=1e-9))
    before = (out / "run.yaml").read_bytes(), read_metrics(out)
    with pytest.raises(InputError, match=message):
        lora.main(lora_args(data_dir, out, **({"max_steps": 4} | change)))
    assert before == ((out / "run.yaml").read_bytes(), read_metrics(out))


def test_another_rope_in_the_bases_config_is_another_base(data: tuple[Path, Path], tmp_path: Path) -> None:
    base, data_dir = data
    lora.main(lora_args(data_dir, tmp_path / "out", max_steps=4, max_time=1e-9))
    config = base / "model_config.json"
    config.write_text(config.read_text().replace("10000.0", "90000.0"))
    with pytest.raises(InputError, match=r"model_config.json differs"):
        load_model(base)
    Manifest("checkpoint", {}).write(base, ["lit_model.safetensors", "model_config.json"])
    with pytest.raises(InputError, match="base_fingerprint"):
        lora.main(lora_args(data_dir, tmp_path / "out", max_steps=4))


def test_when_every_state_is_damaged_nothing_starts_anew(data: tuple[Path, Path], tmp_path: Path) -> None:
    _, data_dir = data
    out = tmp_path / "out"
    lora.main(lora_args(data_dir, out, max_steps=4, max_time=1e-9))
    (out / "checkpoints" / "step-00000001" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no intact state left"):
        lora.main(lora_args(data_dir, out, max_steps=4))
    assert len(read_metrics(out)) == 1


def test_a_signal_that_came_before_the_loop_ends_it(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_sft import errors
    from lit_sft.errors import Interrupted

    monkeypatch.setattr(errors, "stops", [143])
    monkeypatch.setattr("lit_sft.runtime.stops", [143])
    with pytest.raises(Interrupted, match="after step 1 of 4") as stopped:
        lora.main(lora_args(data[1], tmp_path / "out", max_steps=4))
    assert stopped.value.exit_code == 143


@pytest.mark.parametrize(("rule", "kept"), [("truncate", 141), ("drop", None), ("error", None)])
def test_a_shorter_limit_applies_the_datas_overflow_rule_again(
    checkpoint: Callable[..., Path], tmp_path: Path, rule: str, kept: int | None
) -> None:
    args = PrepareArgs(checkpoint_dir=str(checkpoint()), destination_path=str(tmp_path / "d"), on_overflow=rule)
    prepare(args, ROOT / "demo" / "instructions.csv", "csv", Columns())
    lengths = Shards(tmp_path / "d", "train").lengths
    limit = int(lengths.max()) - 1
    fitting = int((lengths <= limit).sum())
    if rule == "error":
        with pytest.raises(InputError, match=f"longer than {limit} tokens"):
            Shards(tmp_path / "d", "train", limit)
    else:
        shards = Shards(tmp_path / "d", "train", limit)
        assert len(shards) == (kept or fitting) and shards.n_cut == 141 - fitting > 0
        assert sum(len(shards[i][0]) for i in range(len(shards))) == int(shards.lengths.sum())


def test_changed_data_is_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    base, data_dir = data
    lora.main(lora_args(data_dir, tmp_path / "out", max_steps=4, max_time=1e-9))
    args = PrepareArgs(checkpoint_dir=str(base), destination_path=str(data_dir), seed=43)
    prepare(args, ROOT / "demo" / "instructions.csv", "csv", Columns())
    with pytest.raises(InputError, match="data_fingerprint"):
        lora.main(lora_args(data_dir, tmp_path / "out", max_steps=4))


def test_a_non_finite_loss_stops_before_the_update(data: tuple[Path, Path], tmp_path: Path) -> None:
    """The base is poisoned: the first step names itself, saves the state before it, and leaves the adapter clean."""
    base, data_dir = data
    from safetensors.torch import load_file, save_file

    from lit_sft.atomic import Manifest

    weights = load_file(base / "lit_model.safetensors")
    weights["blocks.0.mlp.up.weight"][3, 3] = torch.nan
    save_file(weights, base / "lit_model.safetensors")
    Manifest("checkpoint", {}).write(base, ["lit_model.safetensors", "model_config.json"])
    out = tmp_path / "out"
    with pytest.raises(RunFailed, match=r"step 1: loss nan.*saved .*step-00000000"):
        lora.main(lora_args(data_dir, out))
    assert read_metrics(out) == [] and not (out / "adapter").exists()
    model = load_model(base)
    load_adapter(model, out / "checkpoints" / "step-00000000", base)
    assert not any(p.any() for name, p in lora_state_dict(model).items() if name.endswith("lora_B"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
@pytest.mark.slow
def test_signals_save_and_the_run_goes_on(data: tuple[Path, Path], tmp_path: Path, number: int, code: int) -> None:
    _, data_dir = data
    out = tmp_path / "out"
    command = [sys.executable, "finetune/lora.py", f"--data_dir={data_dir}", f"--out_dir={out}", "--device=cpu"]
    command += ["--global_batch_size=24", "--max_steps=2000", "--epochs=null", "--save_interval=100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_bytes()) < 500:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    steps = [r["step"] for r in read_metrics(out)]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] < 2000
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]
    assert f"stopped by a signal after step {steps[-1]}" in stderr.decode().splitlines()[-1]
    assert not (out / "DONE").exists()


@pytest.mark.slow
def test_two_processes_are_one(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Two gloo processes: the same losses and adapter as one, to rounding, in fp64."""
    _, data_dir = data
    for devices in (1, 2):
        command = [sys.executable, "finetune/lora.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path / str(devices)}"]
        command += [
            "--device=cpu",
            f"--devices={devices}",
            "--precision=64-true",
            "--max_steps=4",
            "--lora_dropout=0.1",
        ]
        command += ["--global_batch_size=24", "--micro_batch_tokens=400", "--eval_interval=2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    for key in ("loss", "grad_norm", "n_labels", "n_tokens", "val_loss"):
        assert [r.get(key, 0) for r in two] == pytest.approx([r.get(key, 0) for r in one], rel=1e-9), key


def test_two_runs_in_one_out_dir(data: tuple[Path, Path], tmp_path: Path) -> None:
    from lit_sft.locks import lock

    with lock(tmp_path / "out"), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        lora.main(lora_args(data[1], tmp_path / "out"))


def test_shards_of_another_tokenizer_or_context_are_refused(
    data: tuple[Path, Path], checkpoint: Callable[..., Path], tmp_path: Path, tokenizer_model: bytes
) -> None:
    other = checkpoint("other", max_position_embeddings=40)
    with pytest.raises(InputError, match="--max_seq_length 40"):
        lora.main(lora_args(data[1], tmp_path / "out", checkpoint_dir=str(other)))
    (other / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(other)))
    with pytest.raises(InputError, match=f"prepare the data again with --checkpoint_dir {other}"):
        lora.main(lora_args(data[1], tmp_path / "out", checkpoint_dir=str(other)))
    assert not (tmp_path / "out").exists()


def test_ids_without_an_embedding_are_refused(
    data: tuple[Path, Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"token id 3\d\d, .* ids below 300"):
        lora.main(lora_args(data[1], tmp_path / "out", checkpoint_dir=str(checkpoint("small", vocab_size=300))))


def test_a_sample_prompt_that_fills_the_context_is_refused_before_the_first_step(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--sample_prompt has .* tokens; the model takes 1 to 511"):
        lora.main(lora_args(data[1], tmp_path / "out", sample_prompt="llama " * 600))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_adapter_of_another_base_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from lit_sft.checkpoint import adapter_facts, save_adapter

    base, other = checkpoint("base"), checkpoint("other", seed=1)
    model = filled_adapter(base, LoRAArgs())
    save_adapter(
        tmp_path / "adapter", model, LoRAArgs(), adapter_facts(base, {"prompt_style": "alpaca", "stop_ids": [2]})
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(base, tmp_path / "adapter")(ids), model(ids))
    with pytest.raises(InputError, match="was trained on"):
        load_model(other, tmp_path / "adapter")


@pytest.mark.parametrize("share", [False, True])
def test_every_process_has_rows_of_a_step(data: tuple[Path, Path], share: bool) -> None:
    """One row would do for a whole step: of two processes one would then wait for the other at each of them."""
    args = lora_args(data[1], Path("out"), global_batch_size=24, micro_batch_tokens=8192)
    shards = Shards(data[1], "train")
    for number in (1, 2):
        parts = [TrainSteps(shards, args, 2, rank, share)[number] for rank in (0, 1)]
        n_tokens = [sum(row.input_ids.numel() for row in part.rows) for part in parts]
        assert min(n_tokens) > 0.6 * max(n_tokens)
        assert sorted(i for part in parts for row in part.rows for i in row.examples) == sorted(parts[0].examples)


# --- what the host waits for ---


class Waits(TorchDispatchMode):
    """Notes each operation for which the host would wait for a GPU: those whose result it, or a shape, depends on."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave", "equal")

    def __init__(self, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.events = events
        tolist = torch.Tensor.tolist

        def noted(tensor: torch.Tensor) -> object:
            events.append("tolist")
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", noted)  # which on a CPU is no operation
        monkeypatch.setattr(torch.Tensor, "numpy", lambda *_, **__: pytest.fail("a copy to the host"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(x.dtype in (torch.bool, torch.uint8) for x in masks)
        if by_mask or name in self.NAMES or "unique" in name:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


def test_what_would_wait_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, events = torch.arange(5.0), []
    with Waits(events, monkeypatch):
        float(x[0]), bool(x[1]), x.tolist(), x[x > 2], x.nonzero(), x.unique(), x.int().bincount(), x.sum().item()
        x.repeat_interleave(x.long())
        x[torch.tensor([0, 2])] + x.sum()
    expected = ["_local_scalar_dense"] * 2 + ["tolist", "index", "nonzero"]
    assert events[:5] == expected and "unique" in events[5]
    assert events[6:] == ["bincount", "_local_scalar_dense", "repeat_interleave"]


@pytest.mark.usefixtures("spans_on_a_cpu")
@pytest.mark.parametrize("clipped", [None, 1.0])
@pytest.mark.parametrize("share", [False, True])
def test_the_host_waits_once_a_step_and_prepares_the_next_before(
    data: tuple[Path, Path], share: bool, clipped: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows that are where they are computed, as ``Ahead`` leaves them on a GPU."""
    base, data_dir = data
    args = lora_args(data_dir, Path("unused"), precision="bf16-true", micro_batch_tokens=700, max_norm=clipped)
    fabric, steps = launch(args), TrainSteps(Shards(data_dir, "train"), args, share_prefix=share)
    model = load_model(base, dtype=torch.bfloat16)
    apply_lora(model, args, args.seed)
    join_products(model)
    optimizer = build_optimizer(model, master_parameters(model), args)
    made, events = [steps[1], steps[2]], []
    assert any(row.layout.parents for row in made[0].rows) == share and len(made[0].rows) > 1
    for step in made:
        for row in step.rows:
            row.to(fabric.device)
    # a kernel that takes part in the gradients and reads nothing on the host
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda q, k, v, *_, **__: q * 2 + (k.sum() + v.sum()).tanh()
    )
    monkeypatch.setattr(Row, "to", lambda self, device: self)
    monkeypatch.setattr("lit_sft.loop.peak_memory", lambda device: 0)
    train_step(fabric, model, optimizer, 1e-3, made[0], args, None)  # the optimizer's slots are made
    with Waits(events, monkeypatch):
        train_step(fabric, model, optimizer, 1e-3, made[1], args, None, lambda: events.append("meanwhile"))
    assert events == ["meanwhile", "tolist"]


def test_steps_made_ahead_are_the_runs(data: tuple[Path, Path]) -> None:
    """The next one is there when it is taken, another is made anew, and none behind the last."""
    args = lora_args(data[1], Path("unused"), max_steps=3)
    steps, asked = TrainSteps(Shards(data[1], "train"), args), []

    class Noted:
        max_steps = steps.max_steps

        def __getitem__(self, number: int) -> object:
            asked.append(number)
            return steps[number]

    ahead = Ahead(Noted(), torch.device("cpu"))
    assert ahead.take(1).number == 1
    ahead.prepare(2)
    assert asked == [1, 2] and ahead.take(2).examples == steps[2].examples and asked == [1, 2]
    assert ahead.take(1).number == 1 and asked == [1, 2, 1]
    ahead.prepare(4)
    assert asked == [1, 2, 1] and ahead.take(3).number == 3


def test_memory_that_ends_while_compiling_ends_the_step(
    data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MemoryError, which names the step; no gradient is left and no update made."""
    base, data_dir = data
    args = lora_args(data_dir, Path("unused"))
    fabric, steps, model = launch(args), TrainSteps(Shards(data_dir, "train"), args), load_model(base)
    apply_lora(model, args, args.seed)
    optimizer = build_optimizer(model, master_parameters(model), args)
    before = [p.clone() for p in lora_state_dict(model).values()]
    torch._dynamo.reset()

    def backend(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory while benchmarking")

    model.blocks[1].compile(backend=backend)
    with pytest.raises(MemoryError, match="step 2 does not fit into the memory of this device"):
        train_step(fabric, model, optimizer, 1e-3, steps[2], args, None)
    assert all(p.grad is None for p in lora_state_dict(model).values())
    assert all(torch.equal(p, q) for p, q in zip(lora_state_dict(model).values(), before, strict=True))
