"""Every file operation of what writes fails in turn: the process killed, the disk full, an I/O error."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from faults import FAULTS, KILL, FileOperations, fork, here, leftovers
from hub_server import HubServer, Repo
from huggingface_hub import constants
from reliability import as_command, command, make_checkpoint, write_rows

from lit_sft.args import LoRAArgs
from lit_sft.atomic import Manifest, sweep
from lit_sft.checkpoint import adapter_facts, load_model, save_adapter, save_model
from lit_sft.lora import apply_lora, lora_state_dict
from lit_sft.states import load_state, newest_state, save_state

# otherwise a sample of the operations, each in one way of three; tests/reliability.py fails them all
EVERY_FAULT = "LIT_SFT_EVERY_FAULT" in os.environ


@dataclass
class Writer:
    """Something that writes a directory: what it does, in a folder of its own, and where."""

    work: Callable[[], None]
    result: str
    in_place: bool = False
    """It may leave a directory without a manifest, which counts as not written."""
    once: bool = False
    """What is there whole is not written again."""


def _adapter(seed: int = 8) -> None:
    model = load_model("base")
    apply_lora(model, LoRAArgs(lora_r=2), seed=seed)
    save_adapter(
        Path("adapter"),
        model,
        LoRAArgs(lora_r=2),
        adapter_facts(Path("base"), {"prompt_style": "alpaca", "stop_ids": [2]}),
    )


def _full_model() -> None:
    model = load_model("base", dtype=torch.bfloat16)
    save_model(Path("model"), model, Path("base"), {"prompt_style": "alpaca", "stop_ids": [2]})


WRITERS = {
    "prepare": Writer(
        lambda: command("prepare_csv", "--csv_path=rows.csv", "--checkpoint_dir=base", "--destination_path=data"),
        "data",
    ),
    "convert": Writer(
        lambda: command("convert_hf_checkpoint", "--checkpoint_dir=base", "--dtype=bfloat16"), "base", in_place=True
    ),
    "merge": Writer(lambda: command("merge_lora", "--lora_path=adapter", "--out_dir=merged"), "merged", once=True),
    "export to the Hub's layout": Writer(
        lambda: command("export_hf", "--lora_path=adapter", "--out_dir=hf"), "hf", once=True
    ),
    "export to peft": Writer(
        lambda: command("export_peft", "--lora_path=adapter", "--out_dir=to_peft"), "to_peft", once=True
    ),
    "export to GGUF": Writer(
        lambda: command("export_gguf", "--checkpoint_dir=base", "--out_file=x.gguf"), "x.gguf", once=True
    ),
    "Lit-GPT's way back": Writer(
        lambda: command("convert_lit_checkpoint", "--checkpoint_path=base", "--output_path=x.bin"), "x.bin", once=True
    ),
    "import from peft": Writer(
        lambda: command("import_peft", "--peft_dir=peft", "--checkpoint_dir=base", "--out_dir=imported"),
        "imported",
        once=True,
    ),
    "save an adapter": Writer(lambda: as_command(_adapter), "adapter"),
    "save a model": Writer(lambda: as_command(_full_model), "model"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an adapter, and data prepared of fewer rows than there are now."""
    world = tmp_path_factory.mktemp("faults")

    def make() -> None:
        os.chdir(world)
        make_checkpoint(Path("base"))
        write_rows(world / "rows.csv", 4)
        command("prepare_csv", "--csv_path=rows.csv", "--checkpoint_dir=base", "--destination_path=data")
        write_rows(world / "rows.csv", 6)
        _adapter(seed=7)
        command("export_peft", "--lora_path=adapter", "--out_dir=peft")

    assert fork(make, world.with_suffix(".log")) == 0, world.with_suffix(".log").read_text()
    return world


def snapshot(directory: Path) -> dict[str, bytes] | None:
    """The files of a directory, or a file by itself, and what is in them."""
    if directory.is_file():
        return {"": directory.read_bytes()}
    if not directory.is_dir():
        return None
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.slow
def test_every_file_operation_fails_in_turn(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards: what was there before or the new whole, nothing beside it; and the same command goes through."""
    writer, room, log = WRITERS[name], tmp_path / "room", tmp_path / "log"

    def attempt(nth: int | None, fault: int | str | None = None) -> int:
        def work() -> None:
            with FileOperations(room, nth, fault).watched() as operations:
                writer.work()
            (tmp_path / "operations").write_text("\n".join(operations.seen))

        return fork(work, log) if fault == KILL else here(work, log)

    room.mkdir()
    monkeypatch.chdir(room)
    shutil.copytree(world, room, dirs_exist_ok=True)
    before = snapshot(room / writer.result)
    assert attempt(None) == 0, log.read_text()
    operations = (tmp_path / "operations").read_text().splitlines()
    after = snapshot(room / writer.result)
    assert before != after and len(operations) >= 10

    for nth, operation in list(enumerate(operations, 1))[:: 1 if EVERY_FAULT else 4]:
        for fault in FAULTS if EVERY_FAULT else [FAULTS[nth % 3]]:
            for path in room.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(world, room, dirs_exist_ok=True)
            code, told = attempt(nth, fault), log.read_text()
            what = f"{name}, operation {nth} ({operation}), {fault}: exit code {code}\n{told}"
            if fault == KILL:
                assert code < 0, what
            else:
                assert code in (0, 2), what
                errors = [line for line in told.splitlines() if line.startswith("error: ")]
                assert len(errors) == (code == 2) and "Traceback" not in told, what
                assert not leftovers(room) or operation.startswith(("unlink", "rmdir")), what
            there = snapshot(room / writer.result)
            there = there and {k: v for k, v in there.items() if not k.startswith((".tmp-", ".dead-"))}
            unwritten = writer.in_place and "manifest.json" not in there
            moved = fault == KILL and there is None and list(room.glob(f".dead-{writer.result}-*"))
            assert there in (before, after) or unwritten or moved, what
            if there != after or (leftovers(room) and not writer.once):
                assert attempt(None) == 0, f"{what}\nthen: {log.read_text()}"
            assert snapshot(room / writer.result) == after, what
            assert not leftovers(room) or (writer.once and there == after), what


def test_every_file_operation_of_a_saved_state_fails_in_turn(world: Path, tmp_path: Path) -> None:
    """A run goes on from the state before or from the new one, to the bit; both are of the same optimizer steps."""
    os.chdir(world)
    model = load_model("base")
    apply_lora(model, LoRAArgs(lora_r=2), seed=7)
    trained = lora_state_dict(model)
    optimizer = torch.optim.AdamW(trained.values())
    restored = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained.items()}
    restored_optimizer = torch.optim.AdamW(restored.values())
    bits: dict[int, dict[str, torch.Tensor]] = {}

    def advance(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    def everything(trained: dict, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        slots = {f"{n}.{slot}": t for n, p in trained.items() for slot, t in optimizer.state[p].items()}
        return {name: t.detach().clone() for name, t in ({**trained, **slots}).items()}

    out, first, log = tmp_path / "out", tmp_path / "first", tmp_path / "log"
    facts = {"scaler": {}, "best_step": None, "best_val_loss": None}
    advance(1)
    save_state(first, 1, "adapter.safetensors", trained, optimizer, facts, {})
    bits[1] = everything(trained, optimizer)
    advance(2)
    bits[2] = everything(trained, optimizer)

    def attempt(nth: int | None, fault: int | str | None = None) -> int:
        def work() -> None:
            with FileOperations(out, nth, fault).watched() as operations:
                save_state(out, 2, "adapter.safetensors", trained, optimizer, facts, {})
            (tmp_path / "operations").write_text("\n".join(operations.seen))

        return fork(work, log) if fault == KILL else here(work, log)

    shutil.copytree(first, out)
    assert attempt(None) == 0, log.read_text()
    operations = (tmp_path / "operations").read_text().splitlines()
    assert len(operations) > 30
    found = set()
    for nth in range(1, len(operations) + 1):
        for fault in FAULTS if EVERY_FAULT else [FAULTS[nth % 3]]:
            shutil.rmtree(out)
            shutil.copytree(first, out)
            attempt(nth, fault)
            sweep(out / "checkpoints")
            state = newest_state(out)
            step = load_state(state, "adapter.safetensors", restored, restored_optimizer)["step"]
            found.add(step)
            now = everything(restored, restored_optimizer)
            assert now.keys() == bits[step].keys()
            assert all(torch.equal(now[name], bits[step][name]) for name in now), (nth, fault)
            assert not leftovers(out), (nth, fault)
    assert found == {1, 2}


def test_what_counts_as_a_file_operation(tmp_path: Path) -> None:
    """The harness sees what it must, and fails the one that was asked for."""
    (tmp_path / "a").mkdir()

    def write() -> None:
        (tmp_path / "a" / "x").write_bytes(b"x")
        (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
        (tmp_path / "elsewhere").write_text("not watched")
        (tmp_path / "a" / "y").read_bytes()
        Manifest("x", {}).write(tmp_path / "a", ["y"])

    with FileOperations(tmp_path / "a").watched() as operations:
        write()
    kinds = [seen.split()[0] for seen in operations.seen]
    assert kinds == ["open", "write", "close", "rename", "open", "write", "close", "fsync", "rename", "fsync", "unlink"]
    with pytest.raises(OSError, match="No space left"), FileOperations(tmp_path / "a", 2, errno.ENOSPC).watched():
        write()
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["kind"] == "x"
    assert fork(lambda: FileOperations(tmp_path, 1).happen("x")) == -9


def test_every_file_operation_of_a_download_fails_in_turn(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file under its final name is whole, whatever happened, and the same command ends with all of them."""
    names = ("config.json", "tokenizer.model", "model.safetensors")
    files = {name: (world / "base" / name).read_bytes() for name in names}
    room, log, seen = tmp_path / "room", tmp_path / "log", tmp_path / "operations"
    monkeypatch.chdir(tmp_path)
    with HubServer({"org/model": Repo(files)}) as hub:
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)

        def attempt(nth: int | None, fault: int | str | None = None) -> int:
            def work() -> None:
                with FileOperations(room, nth, fault).watched() as operations:
                    command("download", "--repo_id=org/model", f"--checkpoint_dir={room}")
                seen.write_text("\n".join(operations.seen))

            return fork(work, log)

        assert attempt(None) == 0, log.read_text()
        operations = seen.read_text().splitlines()
        assert len(operations) > 20
        for nth in range(1, len(operations) + 1, 1 if EVERY_FAULT else 2):
            for fault in FAULTS if EVERY_FAULT else [FAULTS[nth % 3]]:
                shutil.rmtree(room)
                code, told = attempt(nth, fault), log.read_text()
                what = f"operation {nth} ({operations[nth - 1]}), {fault}: exit code {code}\n{told}"
                errors = [line for line in told.splitlines() if line.startswith("error: ")]
                assert code < 0 if fault == KILL else code in (0, 2) and len(errors) == (code == 2), what
                assert "Traceback" not in told, what
                there = snapshot(room) or {}
                assert all(there[name] == files[name] for name in names if name in there), what
                assert attempt(None) == 0, f"{what}\nthen: {log.read_text()}"
                assert {name: content for name, content in snapshot(room).items() if name in names} == files, what
                assert not [path for path in room.iterdir() if path.name.startswith(".") and path.name != ".lock"], what
