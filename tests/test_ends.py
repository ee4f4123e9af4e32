"""However a run is made to end, the same command goes on to the same bits: signals, clocks, locks, disks, deaths."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_inputs import COMMANDS, RESUME, make_world
from conftest import ROOT
from faults import FileOperations, fork, leftovers
from reliability import RECIPES, command, difference, result, train
from reliability import make_world as make_runs

from lit_sft import checkpoint, loop, run
from lit_sft.atomic import Manifest

SHORT = {"max_steps": 4, "save_interval": 2, "eval_interval": 2}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, data, and the results of runs that nobody disturbed."""
    world = tmp_path_factory.mktemp("ends")
    assert fork(lambda: make_runs(world), world / "log") == 0, (world / "log").read_text()
    for recipe in ("lora", "full"):
        whole = world / f"whole-{recipe}"
        assert fork(lambda r=recipe, w=whole: train(world, r, w, **SHORT), world / "log") == 0
    return world


# --- signals ---

PHASES: dict[str, tuple[object, str, int]] = {
    # what is done when the signal comes: where its function is, and at which call of it
    "loading": (checkpoint, "load_model", 1),
    "a step": (loop, "train_step", 2),
    "validating": (loop, "validate", 1),
    "saving": (run, "save_state", 1),
    "deleting": (run, "prune_states", 1),
    "the last save": (run, "save_state", 2),
    "writing the result": (Manifest, "write", 3),
}


def signalled(place: object, name: str, nth: int, *numbers: int) -> None:
    """Send this process signals in the ``nth`` call of a function, before and after its work."""
    genuine, calls = getattr(place, name), []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(name)
        for number in numbers if len(calls) == nth else ():
            os.kill(os.getpid(), number)
        return genuine(*args, **kwargs)

    setattr(place, name, call)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("number", "recipe"), [(signal.SIGTERM, "lora"), (signal.SIGUSR1, "lora"), (signal.SIGINT, "full")]
)
def test_a_signal_at_any_phase(phase: str, number: int, recipe: str, world: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
        signalled(*PHASES[phase], number)
        train(world, recipe, out, **SHORT)

    code = fork(work, log)
    told = log.read_text()
    assert code == (0 if phase == "the last save" else CODES[number]), told
    assert "Traceback" not in told and "unexpected" not in told
    assert code == 0 or "stopped by" in told or "interrupted" in told
    if phase in ("a step", "validating", "saving", "deleting"):
        assert "not finished" in (out / "report.html").read_text()
    assert not leftovers(tmp_path)
    if code:
        assert not (out / "DONE").exists()
        assert fork(lambda: train(world, recipe, out, **SHORT), log) == 0, log.read_text()
    assert difference(out, recipe, result(world / f"whole-{recipe}", recipe)) is None


@pytest.mark.parametrize("phase", ["a step", "saving"])
@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGINT)])
def test_a_second_signal_ends_at_once(phase: str, first: int, second: int, world: Path, tmp_path: Path) -> None:
    """Nothing is saved any more; what was, stays, and the run goes on from there."""
    out, log = tmp_path / "out", tmp_path / "log"

    def work() -> None:
        signalled(*PHASES[phase], first, second)
        train(world, "lora", out, **SHORT)

    assert fork(work, log) == CODES[second], log.read_text()
    assert not list(out.glob("checkpoints/step-*"))
    assert fork(lambda: train(world, "lora", out, **SHORT), log) == 0, log.read_text()
    assert difference(out, "lora", result(world / "whole-lora", "lora")) is None


# --- clocks and locks ---


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_was_changed(years: int, world: Path, tmp_path: Path) -> None:
    """Which state is the newest is in its name; no time of writing is looked at."""
    out, log, seconds = tmp_path / "out", tmp_path / "log", years * 365 * 86400

    def stopped() -> None:
        signalled(loop, "train_step", 3, signal.SIGTERM)
        train(world, "lora", out, **(SHORT | {"save_interval": 1, "keep_last": 5}))

    assert fork(stopped, log) == 143
    states = sorted(out.glob("checkpoints/step-*"))
    assert len(states) == 3
    for i, path in enumerate([*out.rglob("*"), *reversed(states)]):
        os.utime(path, (1.5e9 + 1000 * i,) * 2)

    def go_on() -> None:
        genuine = time.time
        time.time = lambda: genuine() + seconds
        train(world, "lora", out, **(SHORT | {"save_interval": 1, "keep_last": 5}))

    assert fork(go_on, log) == 0, log.read_text()
    assert f"going on from {states[-1]}" in log.read_text()
    assert difference(out, "lora", result(world / "whole-lora", "lora")) is None


def test_a_lock_of_a_dead_process_holds_nothing(world: Path, tmp_path: Path) -> None:
    """The file stays when its process dies, and so does the number in it, which may be another's by now."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text(str(os.getppid()))
    assert fork(lambda: train(world, "lora", out, **SHORT), tmp_path / "log") == 0, (tmp_path / "log").read_text()


# --- disks that take nothing ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = tmp_path_factory.mktemp("inputs") / "world"
    assert fork(lambda: make_world(inputs), inputs.with_suffix(".log")) == 0, inputs.with_suffix(".log").read_text()
    return inputs


WRITING = {
    name: [name, *argv] for name, argv in COMMANDS.items() if name not in ("doctor", "verify", "generate", "estimate")
}
WRITING["resume"] = ["lora", *RESUME]


DISKS = [(what, errno.EROFS) for what in WRITING] + [(what, errno.EDQUOT) for what in ("prepare_csv", "lora", "resume")]


@pytest.mark.parametrize(("what", "fault"), DISKS, ids=[f"{what} {errno.errorcode[fault]}" for what, fault in DISKS])
def test_a_disk_that_takes_nothing(what: str, fault: int, inputs: Path, tmp_path: Path) -> None:
    """From the first operation that changes something: one line with the system's words, and all is as it was."""
    room, log = tmp_path / "room", tmp_path / "log"
    shutil.copytree(inputs, room)

    def files() -> dict[str, bytes]:
        return {str(p.relative_to(room)): p.read_bytes() for p in room.rglob("*") if p.is_file() and p.name != ".lock"}

    def work() -> None:
        os.chdir(room)
        operations = FileOperations(room, 1, fault)
        operations.lasting = True
        with operations.watched():
            command(*WRITING[what])

    before = files()
    code, told = fork(work, log), log.read_text()
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and os.strerror(fault) in errors[0], told
    assert "Traceback" not in told and files() == before


# --- a process of two dies ---


TIMEOUT = 25  # seconds, in which two processes must also have met


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "number"), [(w, s) for s in (signal.SIGKILL, signal.SIGSTOP) for w in ("the first", "the second")]
)
def test_a_dead_or_hung_process_ends_the_others(which: str, number: int, world: Path, tmp_path: Path) -> None:
    """Dead: within the five seconds between Fabric's looks, or at the next exchange; hung: after the time allowed."""
    out = tmp_path / "out"
    argv = [sys.executable, "finetune/lora.py", f"--data_dir={world / 'data'}", f"--out_dir={out}", "--device=cpu"]
    argv += ["--devices=2", "--global_batch_size=8", "--max_steps=100000", "--epochs=null", "--save_interval=3"]
    argv += [f"--timeout_minutes={TIMEOUT / 60}"] if number == signal.SIGSTOP else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=log)
    second = "0"
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/step-*")):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        [second] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(first.pid if which == "the first" else int(second), number)
        deadline = time.monotonic() + 10 + (TIMEOUT if number == signal.SIGSTOP else 0)
        while (which == "the second" and first.poll() is None) or _runs(second):
            assert time.monotonic() < deadline, f"a process outlived the other\n{(tmp_path / 'log').read_text()}"
            time.sleep(0.05)
        if (which, number) == ("the first", signal.SIGSTOP):
            first.kill()  # what has stopped it need not let it go on
        assert first.wait() != 0 and not (out / "DONE").exists()
    finally:
        first.kill()
        if _runs(second):
            os.kill(int(second), signal.SIGKILL)
    assert Manifest.read(max(out.glob("checkpoints/step-*"))).kind == "state"
    told = (tmp_path / "log").read_text()
    assert number == signal.SIGKILL or "has died or does not answer" in told, told


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_undisturbed_runs_are_whole(world: Path) -> None:
    for recipe in ("lora", "full"):
        records, weights = result(world / f"whole-{recipe}", recipe)
        assert [r["step"] for r in records] == [1, 2, 3, 4] and weights and RECIPES[recipe]
        assert json.loads((world / f"whole-{recipe}/checkpoints/step-00000004/state.json").read_text())["step"] == 4


def test_a_page_that_cannot_be_written_changes_nothing_of_how_a_run_ends(world: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def work() -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        run.write_run_report = full
        signalled(loop, "train_step", 2, signal.SIGTERM)
        train(world, "lora", out, **SHORT)

    assert fork(work, log) == 143, log.read_text()
    assert "stopped by" in log.read_text() and list(out.glob("checkpoints/step-*"))
