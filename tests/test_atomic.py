import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_sft import atomic
from lit_sft.atomic import Manifest, publish_directory, sweep, write_atomically
from lit_sft.errors import InputError
from lit_sft.locks import lock

DEAD = 2**22 - 2  # beyond the process numbers this system gives out


def publish(final: Path, text: str = "new", kind: str = "data") -> None:
    with publish_directory(final, kind) as folder:
        (folder / "a.txt").write_text(text)
        Manifest(kind, {}).write(folder, ["a.txt"])


def test_a_directory_is_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publish_directory(tmp_path / "x", "data") as folder:
        (folder / "a.txt").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    publish(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), publish_directory(tmp_path / "x", "data"):
        raise RuntimeError
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    publish(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("what", ["file", "foreign", "other kind"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, what: str) -> None:
    if what == "file":
        (tmp_path / "x").write_text("precious")
    elif what == "foreign":
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis").write_text("precious")
    else:
        publish(tmp_path / "x", kind="checkpoint")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="is not a data directory"):
        publish(tmp_path / "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_leftovers_of_killed_writers_are_swept_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    for pid in (DEAD, os.getppid()):
        (tmp_path / f".tmp-x-{pid}").mkdir()
    publish(tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"x", f".tmp-x-{os.getppid()}"}


@pytest.mark.parametrize("by", ["publishing", "sweeping"])
def test_what_a_killed_writer_had_moved_away_comes_back(tmp_path: Path, by: str) -> None:
    """Killed between the two renames that replace a directory: the old one is there, under another name."""
    publish(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / f".dead-x-{DEAD}")
    if by == "sweeping":
        sweep(tmp_path)
    else:
        with pytest.raises(RuntimeError), publish_directory(tmp_path / "x", "data"):
            raise RuntimeError
    assert (tmp_path / "x" / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_what_was_there_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "fsync", full)
    with pytest.raises(InputError, match=r"a cannot be written: No space left on device; make room"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from lit_sft.locks import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(Path(atomic.__file__).parent.parent)}
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid}"), lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format_version": 99}, "newer than"),
        (lambda m: m | {"kind": "state", "digest": None}, "is a state directory, not a data directory"),
        (lambda m: m | {"kind": "state"}, "differs from its own digest"),
        (lambda m: m | {"facts": {"n": 2}}, "differs from its own digest"),
        (lambda m: m | {"files": []}, "not a manifest"),
        (lambda m: {"x": 1}, "not a manifest"),
        (lambda m: [], "not a manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, change: object, message: str) -> None:
    publish(tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message):
        Manifest.read(tmp_path / "x", "data")


@pytest.mark.parametrize(
    ("content", "message"), [("neu", "sha256"), ("longer", "has 6 bytes, not 3"), (None, "missing")]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    publish(tmp_path / "x")
    (tmp_path / "x" / "a.txt").unlink()
    if content is not None:
        (tmp_path / "x" / "a.txt").write_text(content)
    with pytest.raises(InputError, match=f"a.txt.*{message}"):
        Manifest.read(tmp_path / "x").check_files(tmp_path / "x")
