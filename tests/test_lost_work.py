"""Sequences of ordinary commands and faults after which work was once lost, or something else computed in silence."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import fork
from reliability import command, difference, result, train
from reliability import make_world as make_runs
from test_ends import SHORT, signalled

from lit_sft import locks, loop, metrics
from lit_sft.errors import InputError
from lit_sft.locks import lock

STOPPED = SHORT | {"save_interval": 1, "keep_last": 9}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, data, a run that nobody disturbed, and one that a signal ended in its third step of four."""
    world = tmp_path_factory.mktemp("lost")
    assert fork(lambda: make_runs(world), world / "log") == 0, (world / "log").read_text()
    assert fork(lambda: train(world, "lora", world / "whole-lora", **SHORT), world / "log") == 0
    assert go(world, world / "cut", stop=3) == 143
    return world


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a signal ended."""
    shutil.copytree(made / "cut", tmp_path / "out")
    return tmp_path / "out"


def go(world: Path, out: Path, recipe: str = "lora", stop: int = 0, before: Callable = lambda: None, **args) -> int:
    """Run the same command in a child, with a signal in step ``stop``; its exit code. What it says is in out.log."""

    def work() -> None:
        before()
        if stop:
            signalled(loop, "train_step", stop, signal.SIGTERM)
        train(world, recipe, out, **(STOPPED | args))

    return fork(work, out.with_suffix(".log"))


def said(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def states(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def is_whole(made: Path, out: Path) -> bool:
    return difference(out, "lora", result(made / "whole-lora", "lora")) is None


def test_nobody_reads_what_a_run_prints(made: Path, tmp_path: Path) -> None:
    """Its terminal or ``tee`` goes with the same Ctrl-C: the step is saved, and the exit code is the signal's."""
    out = tmp_path / "out"

    def without_readers() -> None:
        metrics.PLAIN_INTERVAL = 0.0
        for number in (1, 2):
            reading, writing = os.pipe()
            os.dup2(writing, number)
            os.close(reading)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signalled(loop, "train_step", 2, signal.SIGINT)

    assert go(made, out, before=without_readers, save_interval=100) == 130
    assert states(out) == ["step-00000002"]
    assert go(made, out, before=lambda: setattr(sys, "stdout", None), save_interval=100) == 0, said(out)
    assert is_whole(made, out)


@pytest.mark.parametrize(("ignored", "code"), [(False, 129), (True, 0)])
def test_a_terminal_that_closes(made: Path, tmp_path: Path, ignored: bool, code: int) -> None:
    """SIGHUP, which may come twice, ends a run as SIGTERM does; ``nohup`` has it go on."""
    out = tmp_path / "out"

    def closing() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signalled(loop, "train_step", 2, signal.SIGHUP, signal.SIGHUP)

    assert go(made, out, before=closing, save_interval=100) == code, said(out)
    assert "step-00000002" in states(out) or ignored
    assert go(made, out) == (2 if ignored else 0)
    assert is_whole(made, out)


def test_when_every_state_is_damaged_the_second_command_is_refused_too(made: Path, out: Path) -> None:
    for path in out.glob("checkpoints/step-*/adapter.safetensors"):
        path.write_bytes(b"")
    before, records = states(out), (out / "metrics.jsonl").read_bytes()
    for _ in range(3):
        assert go(made, out) == 2 and "has no intact state left" in said(out)
        assert said(out).count("has 0 bytes") == 3
        assert states(out) == before and (out / "metrics.jsonl").read_bytes() == records
    for path in out.glob("checkpoints/step-*"):
        path.rename(path.with_name(f".bad-{path.name}-1"))
    assert go(made, out) == 2 and "found damaged before" in said(out)


@pytest.mark.parametrize("name", [".later-step-00000003-7", "step-00000003-good", "step-00000009", "../adapter"])
def test_no_state_is_set_aside_for_one_that_is_none(made: Path, out: Path, name: str) -> None:
    states_dir = out / "checkpoints"
    if "3" in name:
        shutil.copytree(states_dir / "step-00000003", states_dir / name)
    before = states(out)
    assert go(made, out, resume=str(states_dir / name)) == 2
    assert "the last of it: " in said(out) and "step-00000003" in said(out)
    assert states(out) == before
    assert go(made, out) == 0, said(out)
    assert is_whole(made, out)


def test_another_recipe_in_its_folder_changes_nothing(made: Path, out: Path) -> None:
    assert go(made, out, "full") == 2 and "lora_r: 4 then, None now" in said(out)
    assert go(made, out) == 0, said(out)
    assert is_whole(made, out)


@pytest.mark.parametrize(
    ("facts", "says"),
    [({"order": "as_given"}, "data_order: 'shuffle' then, 'as_given' now"), ({"stop_ids": [7]}, "data_stop_ids")],
)
def test_data_whose_facts_changed_are_other_data(made: Path, out: Path, facts: dict, says: str) -> None:
    """Their shards may be the same to the byte, and yet another order or other cuts are trained on."""
    other = out.parent / "data"
    shutil.copytree(made / "data", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["facts"] |= facts
    (other / "manifest.json").write_text(json.dumps(manifest | {"digest": None}))
    assert go(made, out, data_dir=str(other)) == 2 and says in said(out)
    manifest["facts"]["arguments"]["on_overflow"] = "drop"
    (other / "manifest.json").write_text(json.dumps(manifest | {"digest": None}))
    assert go(made, out, data_dir=str(other)) == 2 and "data_on_overflow: 'truncate' then, 'drop' now" in said(out)


def test_a_run_is_not_written_into_data_or_a_base(made: Path, tmp_path: Path) -> None:
    for name in ("data", "base"):
        shutil.copytree(made / name, folder := tmp_path / name)
        before = sorted(folder.iterdir())
        assert go(made, folder, data_dir=str(made / "data")) == 2 and "whose files a run would replace" in said(folder)
        assert sorted(folder.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    assert go(made, tmp_path / "file") == 2 and "is no folder" in said(tmp_path / "file")


def test_what_lies_beside_the_states_is_the_users(made: Path, out: Path) -> None:
    folder = out / "checkpoints"
    for name in ("step-00000001-backup", "step-00000003-copy"):
        shutil.copytree(folder / "step-00000003", folder / name)
    (folder / "step-notes.txt").write_text("mine")
    (folder / "step-00000004.tar.gz").write_text("mine")
    moved = out.parent / "elsewhere"
    (folder / "step-00000001").rename(moved)
    (folder / "step-00000001").symlink_to(moved)
    assert go(made, out, keep_last=1, keep_best=False) == 0, said(out)
    assert is_whole(made, out)
    mine = ["step-00000001-backup", "step-00000003-copy", "step-00000004.tar.gz", "step-notes.txt"]
    assert states(out)[-4:] == sorted([*mine, "step-00000004"])[-4:] and set(mine) < set(states(out))
    assert (moved / "manifest.json").is_file() and not (folder / "step-00000001").is_symlink()


def test_going_back_is_asked_for_once(made: Path, out: Path) -> None:
    """The folder does not remember it, and once its state is pruned the command says which there are."""
    named = str(out / "checkpoints" / "step-00000001")
    assert go(made, out, resume=named, stop=2, keep_last=1) == 143
    assert "the command without --resume goes on from there" in said(out)
    assert "resume: auto" in (out / "run.yaml").read_text()
    assert any(name.startswith(".later-step-00000002") for name in states(out))
    assert go(made, out, resume=named) == 2 and "the last of it: " in said(out)
    assert go(made, out) == 0, said(out)
    assert is_whole(made, out)


def test_a_refusal_sets_nothing_aside(made: Path, out: Path) -> None:
    before = states(out)
    named = str(out / "checkpoints" / "step-00000001")
    assert go(made, out, resume=named, sample_prompt="very " * 600) == 2, said(out)
    assert states(out) == before


def test_steps_skipped_in_a_row_are_counted_over_interruptions(made: Path, tmp_path: Path) -> None:
    """A scheduler that starts a run again and again does not train on what has no finite loss."""
    out = tmp_path / "out"

    def poisoned() -> None:
        loop.accumulate_gradients = lambda *_: torch.tensor(float("nan"))

    settings = {"on_nonfinite": "skip", "max_steps": 14, "eval_interval": 14}
    assert go(made, out, stop=6, before=poisoned, **settings) == 143, said(out)
    assert go(made, out, before=poisoned, **settings) == 1 and "11 steps in a row" in said(out)
    for _ in range(2):
        assert go(made, out, before=poisoned, **settings) == 1 and "11 steps in a row" in said(out)
    assert not (out / "DONE").exists() and not (out / "adapter").exists()


def test_a_base_that_was_written_over_is_noticed(made: Path, tmp_path: Path) -> None:
    """Its manifest is what it was, and so is its size."""
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(made / "base", base)
    for checkpoint_dir in (made / "base", base):  # elsewhere, it is the same
        assert go(made, out, checkpoint_dir=str(checkpoint_dir), stop=1) == 143, said(out)
    weights = base / "lit_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-400:] = bytes(400)
    weights.write_bytes(content)
    assert go(made, out, checkpoint_dir=str(base)) == 2
    assert "lit_model.safetensors differs from its recorded sha256" in said(out)


def test_what_a_user_put_into_the_folder_stays(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    refused = {"sample_prompt": "very " * 600}
    assert go(made, out, **refused) == 2 and not list(out.iterdir())
    (out / "run.yaml").write_text("mine")
    assert go(made, out, **refused) == 2 and "no inputs.json of a run" in said(out)
    assert (out / "run.yaml").read_text() == "mine" and len(list(out.iterdir())) == 1
    assert go(made, tmp_path / "new", **refused) == 2 and not (tmp_path / "new").exists()


def test_a_result_that_is_outdated_is_gone(made: Path, tmp_path: Path) -> None:
    """--max_time leaves an adapter; once the run goes on, it is no longer what ``generate`` would take."""
    out = tmp_path / "out"
    assert go(made, out, max_time=1e-9) == 0 and (out / "adapter").is_dir()
    assert go(made, out, stop=2) == 143 and not (out / "adapter").exists()
    with pytest.raises(SystemExit):
        command("generate", f"--adapter_dir={out}", "--prompt=Hi", "--max_new_tokens=1", "--device=cpu")
    assert go(made, out) == 0 and is_whole(made, out)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_from_elsewhere_is_not_written_to(kind: str, tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "x" / ".lock"
    precious.write_text("mine")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(precious), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(InputError, match=r"\.lock is no plain file; remove it"), lock(path.parent):
        pass
    assert precious.read_text() == "mine"


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had opened it before would otherwise hold a file that nobody else sees."""
    genuine, calls = locks.fcntl.flock, []

    def flock(file: object, how: int) -> None:
        genuine(file, how)
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with lock(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("name", ["lit_model_backup", "model_config.json"])
def test_a_folder_in_the_way_of_a_conversion_costs_nothing(made: Path, tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    (base / name).unlink(missing_ok=True)
    (base / name).mkdir()
    before = (base / "manifest.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        command("convert_hf_checkpoint", f"--checkpoint_dir={base}")
    assert end.value.code == 2 and (base / "manifest.json").read_bytes() == before
