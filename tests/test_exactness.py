"""What a run's exactness hangs on, piece by piece: each test fails when one of its mechanisms is taken away."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from faults import fork, leftovers
from reliability import RECIPES, RUN, difference, make_world, result, train
from safetensors.torch import load_file, save_file
from test_run_report import record

from lit_sft import atomic, loop, run
from lit_sft.atomic import Manifest, discard, publish_directory, sweep
from lit_sft.errors import InputError, RunFailed
from lit_sft.metrics import Metrics
from lit_sft.run_inputs import compare, recorded
from lit_sft.runtime import launch

SHORT = {"max_steps": 4, "save_interval": 1, "keep_last": 9}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, base/, and 52 examples prepared for it, data/."""
    world = tmp_path_factory.mktemp("exactness")
    make_world(world)
    return world


def go(world: Path, recipe: str, out_dir: Path, **changes: object) -> None:
    """Start the run in ``out_dir``, or go on with it."""
    main, kind, settings, _ = RECIPES[recipe]
    main(kind(out_dir=str(out_dir), **({"data_dir": str(world / "data")} | RUN | SHORT | settings | changes)))


@pytest.fixture
def interrupted(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """``interrupted(recipe, **changes)``: a run that was stopped after its first step and after its second."""

    def make(recipe: str = "lora", **changes: object) -> Path:
        for _ in range(2):
            go(world, recipe, tmp_path / "out", **changes, max_time=1e-9)
        assert states(tmp_path / "out") == [1, 2]
        return tmp_path / "out"

    return make


def states(out_dir: Path) -> list[int]:
    """After which steps there is a saved state."""
    return sorted(int(path.name.removeprefix("step-")) for path in (out_dir / "checkpoints").glob("step-*"))


def state(out_dir: Path, step: int) -> Path:
    return out_dir / "checkpoints" / f"step-{step:08d}"


def lines(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def contents(directory: Path) -> dict[Path, bytes]:
    """Every file below ``directory`` but for locks."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def losses_are(loss_of: Callable[[int], float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each step the loss that ``loss_of`` its number says; None: its own."""
    accumulate = loop.accumulate_gradients

    def accumulate_and_change(fabric: object, model: object, step: object, *rest: object) -> float:
        loss, wanted = accumulate(fabric, model, step, *rest), loss_of(step.number)
        return loss if wanted is None else torch.tensor(wanted)

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate_and_change)


# --- the same bits ---


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("lora", {"rehearse": True}),
        ("full", {"rehearse": True, "precision": "bf16-true"}),
        ("full", {"precision": "bf16-true"}),
        ("full", {"precision": "64-true"}),
        ("lora", {"precision": "64-true"}),
    ],
)
def test_a_run_in_pieces_is_the_run_in_one(
    recipe: str, settings: dict, world: Path, interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """Every record and the result's bytes: with a rehearsal before each piece, with masters, in fp64."""
    out = interrupted(recipe, **settings)
    go(world, recipe, out, **settings)
    go(world, recipe, tmp_path / "whole", **(settings | {"rehearse": False}))
    assert difference(out, recipe, result(tmp_path / "whole", recipe)) is None


# --- what may change, and what may not ---

MOVES_LAST_BITS = {
    "device": "another arithmetic of the same sums",
    "devices": "which process sums what",
    "micro_batch_size": "which examples are summed in one row",
    "micro_batch_tokens": "the same",
    "share_prefix": "whether a common beginning is computed once",
    "activation_checkpointing": "what is computed again",
    "compile": "other kernels",
    "offload": "every block is computed again, without gradients first",
    "hardware": "other kernels",
    "threads": "who sums what",
    "torch": "other kernels",
    "lit_sft": "what a later one computes otherwise it must say",
}
MOVES_NOTHING = {
    "debug": "how an error is shown",
    "out_dir": "the folder may have been moved; what it says about itself is compared",
    "data_dir": "the same, data_fingerprint is compared",
    "checkpoint_dir": "the same, base_fingerprint is compared",
    "base_files": "the base may have been moved or touched; its hashes are then read",
    "resume": "from which state",
    "extend": "whether max_steps, which is compared, may grow",
    "epochs": "max_steps, which follows from it, is compared",
    "max_iters": "the same",
    "max_time": "when the run pauses; the schedule stays",
    "timeout_minutes": "how long another process is waited for",
    "eval_interval": "validating changes nothing of what is trained",
    "save_interval": "nor does saving",
    "save_minutes": "nor does saving",
    "keep_last": "what is kept",
    "keep_best": "what is kept",
    "on_nonfinite": "what a step does at which the run would end otherwise",
    "sample_prompt": "what is shown",
    "estimate": "no run is made",
    "rehearse": "it is undone to the bit",
}


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_each_argument_may_change_or_is_refused_by_its_name(
    recipe: str, interrupted: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    """All that a run records and every flag of its command; what moves the last bits is said in one line."""
    out = interrupted(recipe)
    before = recorded(out)
    flags = {field.name for field in fields(RECIPES[recipe][1])}
    free = (MOVES_LAST_BITS.keys() | MOVES_NOTHING.keys()) - ({"offload"} if recipe == "full" else set())
    assert flags - {"debug"} <= before.keys() and free <= before.keys() | flags
    for name in sorted(before.keys() | flags):
        now = before | {name: "another" if name != "max_steps" else before["max_steps"] - 1}
        now["out_dir"] = "out"
        capsys.readouterr()
        if name in MOVES_LAST_BITS:
            compare(before, now, "--epochs 3", extend=False)
            said = f"going on with {name} another instead of {before[name]}: the same computation, equal to rounding\n"
            assert capsys.readouterr().out == said
        elif name in MOVES_NOTHING:
            compare(before, now, "--epochs 3", extend=False)
            assert capsys.readouterr().out == ""
        else:
            with pytest.raises(InputError, match=rf"\({name}: .* then, .* now( by --epochs 3)?\)"):
                compare(before, now, "--epochs 3", extend=False)


REFUSED = {
    "learning_rate": 1e-3, "lr_schedule": "linear", "min_lr": 1e-5, "lr_warmup_steps": 0, "weight_decay": 0.1,
    "max_norm": None, "global_batch_size": 12, "max_steps": 5, "max_seq_length": 512, "seed": 2, "quantize": "nf4",
    "precision": "64-true", "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.2, "lora_head": True, "lora_mlp": False,
}  # fmt: skip


@pytest.mark.parametrize("resume", ["auto", "a state"])
def test_a_refused_change_leaves_the_run_as_it_is(resume: str, world: Path, interrupted: Callable[..., Path]) -> None:
    """Also when the state to go on from is named."""
    out = interrupted()
    before = contents(out)
    where = "auto" if resume == "auto" else str(state(out, 1))
    for name, value in REFUSED.items():
        with pytest.raises(InputError, match=rf"computes something else \({name}: "):
            go(world, "lora", out, resume=where, **{name: value})
        assert contents(out) == before, name
    go(world, "lora", out, resume=where)
    assert (out / "DONE").is_file()


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_may_move_but_no_split_may_change(
    split: str, world: Path, interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    out, moved, changed = interrupted(), tmp_path / "moved", tmp_path / "changed"
    for copy in (moved, changed):
        shutil.copytree(world / "data", copy)
    shard = next(changed.glob(f"{split}-*"))
    tensors = torch.load(shard, weights_only=True)
    tensors["input_ids"][7] ^= 1
    torch.save(tensors, shard)
    manifest = Manifest.read(changed, "data")
    manifest.write(changed, manifest.files)
    with pytest.raises(InputError, match=r"computes something else \(data_fingerprint: "):
        go(world, "lora", out, data_dir=str(changed))
    go(world, "lora", out, data_dir=str(moved))
    assert (out / "DONE").is_file()


def test_a_late_refusal_forgets_no_run_that_has_made_steps(world: Path, interrupted: Callable[..., Path]) -> None:
    """The prompt is too long, which is seen when the run has been opened and its state restored."""
    out = interrupted()
    with pytest.raises(InputError, match="--sample_prompt has"):
        go(world, "lora", out, sample_prompt="llama " * 600)
    assert (out / "run.yaml").is_file() and (out / "inputs.json").is_file() and states(out) == [1, 2]
    go(world, "lora", out)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


# --- when a state is saved ---

STEP_SECONDS = 25.0


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's clock stands still but for STEP_SECONDS in each step."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    def pass_time(_: int) -> None:
        clock.now += STEP_SECONDS

    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    losses_are(pass_time, monkeypatch)


@pytest.mark.usefixtures("slow_steps")
def test_max_time_counts_from_the_start(world: Path, tmp_path: Path) -> None:
    """Not from the last save, of which there is one each step; each start of the command has its own."""
    for done in (3, 6):
        go(world, "lora", tmp_path / "out", max_steps=8, max_time=60.0)
        assert len(lines(tmp_path / "out")) == done


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize(("save_interval", "saved"), [(100, [3, 6, 9, 10]), (5, [3, 5, 8, 10])])
def test_save_minutes_are_minutes_since_the_last_save(
    save_interval: int, saved: list[int], world: Path, tmp_path: Path
) -> None:
    """Whatever that one was made for."""
    go(world, "lora", tmp_path / "out", max_steps=10, save_interval=save_interval, save_minutes=1.0)
    assert states(tmp_path / "out") == saved


# --- in which order the disk is told ---


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, int]]:
    """What the disk is told, in order: fsync or rename, of which path, with how many bytes in it."""
    told: list[tuple[str, Path, int]] = []
    fsync, rename = os.fsync, os.rename

    def fsync_noted(descriptor: int) -> None:
        told.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def rename_noted(source: str | Path, target: str | Path) -> None:
        told.append(("rename", Path(target), Path(source).stat().st_size))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync_noted)
    monkeypatch.setattr(os, "rename", rename_noted)
    return told


def test_a_directory_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, disk: list[tuple[str, Path, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, its folders and itself; then the name; and what it replaces goes when the name is on the disk."""
    final = tmp_path.resolve() / "x"
    genuine = shutil.rmtree

    def remove(path: Path, *args: object, **kwargs: object) -> None:
        if Path(path).exists():
            disk.append(("remove", Path(path), 0))
        genuine(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", remove)
    for text in ("old", "newer"):
        disk.clear()
        with publish_directory(final, "data") as folder:
            (folder / "sub").mkdir()
            Manifest("data", {}).write(folder, [])
            for name in ("a.txt", "sub/b.txt"):
                (folder / name).write_text(text)
            disk.clear()
        order = [(what, path) for what, path, _ in disk]
        named = order.index(("rename", final))
        first = next(i for i, (what, _) in enumerate(order) if what == "rename")  # the old one makes room
        assert {folder, folder / "manifest.json", folder / "a.txt", folder / "sub", folder / "sub/b.txt"} <= {
            path for what, path in order[:first] if what == "fsync"
        }
        assert all(size == len(text) for what, path, size in disk[:first] if path.suffix == ".txt")
        assert ("fsync", final.parent) in order[named:]
        removed = [i for i, (what, _) in enumerate(order) if what == "remove"]
        assert all(i > order.index(("fsync", final.parent), named) for i in removed)
        assert bool(removed) == (text == "newer")


def _flushed(out: Path, disk: list[tuple[str, Path, int]]) -> None:
    """Every state's name comes after its records are on the disk, all of them."""
    records = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    saved = [(i, path) for i, (what, path, _) in enumerate(disk) if what == "rename" and path.name.startswith("step-")]
    assert saved
    for i, path in saved:
        expected = sum(map(len, records[: int(path.name.removeprefix("step-"))]))
        flushed = [size for what, other, size in disk[:i] if what == "fsync" and other == out / "metrics.jsonl"]
        assert max(flushed, default=0) == expected, path


@pytest.mark.parametrize(
    ("settings", "bad_from", "saved"),
    [
        ({"save_interval": 2}, 99, [2, 4]),
        ({"save_interval": 100}, 3, [2]),
        ({"save_interval": 100, "max_steps": 14, "on_nonfinite": "skip"}, 3, [12]),
    ],
    ids=["after steps", "a step that fails", "too many skipped"],
)
def test_records_are_on_the_disk_before_a_state_that_follows_them(
    settings: dict,
    bad_from: int,
    saved: list[int],
    world: Path,
    tmp_path: Path,
    disk: list[tuple[str, Path, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path.resolve() / "out"
    losses_are(lambda step: math.nan if step >= bad_from else None, monkeypatch)
    if bad_from < 99:
        with pytest.raises(RunFailed):
            go(world, "lora", out, **settings)
    else:
        go(world, "lora", out, **settings)
    assert states(out) == saved
    _flushed(out, disk)


def test_records_are_cut_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on after step 2 of 3 recorded: the old file is replaced as a whole, or stays as it was."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(k, 1.0)) + "\n" for k in (1, 2, 3)))
    old = path.read_bytes()
    (tmp_path / "linked").hardlink_to(path)

    def refuse(_: Path) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fsync", refuse)
        with pytest.raises(InputError, match="cannot be written"):
            Metrics(tmp_path, 2, 4)
    assert path.read_bytes() == old and not leftovers(tmp_path)
    Metrics(tmp_path, 2, 4).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2] and (tmp_path / "linked").read_bytes() == old


def test_a_name_is_given_up_before_what_it_names_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while deleting: nothing half deleted has the name of a state, and what is left is swept."""
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_text("{}")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(tmp_path / "step-00000001")
    assert leftovers(tmp_path) == [f".tmp-step-00000001-{os.getpid()}"] and len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what a state holds ---


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_a_states_manifest_guards_all_of_it(recipe: str, interrupted: Callable[..., Path]) -> None:
    directory = state(interrupted(recipe), 2)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    assert Manifest.read(directory).files.keys() == found - {"manifest.json"}
    assert {"state.json", "optimizer.safetensors"} < found


@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq", "step"])
def test_a_slot_of_another_shape_is_refused(slot: str, world: Path, interrupted: Callable[..., Path]) -> None:
    """As many numbers as there should be, with every sha256 right."""
    out = interrupted()
    path = state(out, 2) / "optimizer.safetensors"
    slots = load_file(path)
    name = next(name for name in slots if name.endswith(f"lora_A.{slot}"))
    slots[name] = slots[name].reshape(-1)
    save_file(slots, path)
    manifest = Manifest.read(path.parent)
    manifest.write(path.parent, manifest.files)
    with pytest.raises(InputError, match=rf"{name} has shape \(\d+,\)"):
        go(world, "lora", out)


def test_the_best_is_a_number_and_lower_than_all_before(world: Path, tmp_path: Path) -> None:
    args = RECIPES["lora"][1](data_dir=str(world / "data"), out_dir=str(tmp_path), device="cpu")
    save = run.Saver(launch(args), args, "adapter.safetensors", {}, torch.optim.AdamW([torch.nn.Parameter()]), {})
    losses = [math.nan, None, 2.0, 2.0, math.nan, 3.0, None, 1.9, math.inf]
    assert [k for k, loss in enumerate(losses) if save.is_best(k, loss)] == [2, 7]
    assert (save.best_step, save.best_val_loss) == (7, 1.9)


# --- steps without an update ---


def test_only_skipped_steps_in_a_row_end_a_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step is skipped, more in all than may be in a row."""
    n = 2 * (loop.MOST_SKIPPED + 2)
    losses_are(lambda step: math.nan if step % 2 else None, monkeypatch)
    go(world, "lora", tmp_path / "out", max_steps=n, save_interval=100, on_nonfinite="skip")
    skipped = [line["step"] for line in lines(tmp_path / "out") if line.get("skipped")]
    assert skipped == list(range(1, n, 2)) and len(skipped) > loop.MOST_SKIPPED


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_an_infinite_gradient_of_a_finite_loss_updates_nothing(
    recipe: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state after the step is that before it, to the byte; the next step trains again."""
    accumulate, out = loop.accumulate_gradients, tmp_path / "out"

    def poison(fabric: object, model: torch.nn.Module, step: object, *rest: object) -> float:
        loss = accumulate(fabric, model, step, *rest)
        if step.number == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", poison)
    go(world, recipe, out, on_nonfinite="skip")
    assert [line.get("skipped", False) for line in lines(out)] == [False, True, False, False]
    assert math.isfinite(lines(out)[1]["loss"]) and lines(out)[1]["grad_norm"] is None
    before, after, later = (
        {path.name: path.read_bytes() for path in state(out, step).glob("*.safetensors")} for step in (1, 2, 3)
    )
    assert before == after and len(before) == 2 and all(later[name] != after[name] for name in after)
    for path in state(out, 4).glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_spikes_are_found_after_skipped_steps(tmp_path: Path) -> None:
    """A step without a loss counts for none: one before the run goes on, and one after."""

    def log(metrics: Metrics, *numbers: int) -> None:
        for step in numbers:
            loss = {10: math.nan, 27: math.nan, 28: 9.0}.get(step, 1 + 0.05 * math.sin(5 * step))
            metrics.log(record(step, loss))
        metrics.close()

    log(Metrics(tmp_path, 0, 30), *range(1, 26))
    log(Metrics(tmp_path, 25, 30), *range(26, 31))
    assert [line["step"] for line in lines(tmp_path) if line["loss"] is None] == [10, 27]
    assert [line["step"] for line in lines(tmp_path) if line.get("spike")] == [28]


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_last_step_finishes_the_run(number: int, world: Path, tmp_path: Path) -> None:
    """All the work is done: the result is written, and the exit code says so."""
    out, log = tmp_path / "out", tmp_path / "log"

    def work() -> None:
        losses_are(lambda step: os.kill(os.getpid(), number) if step == 4 else None, pytest.MonkeyPatch())
        train(world, "lora", out, **SHORT)

    assert fork(work, log) == 0, log.read_text()
    assert "stopped by a signal" not in log.read_text() and not leftovers(out)
    assert (out / "DONE").is_file() and (out / RECIPES["lora"][3]).is_file() and len(lines(out)) == 4
