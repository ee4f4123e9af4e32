"""Twenty hostile pickles, wherever a file could hold one: none is run, and the command says what is wrong.

Hashes are recorded anew, as somebody who sends the files would do: what protects is how they are read.
"""

import io
import json
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import COMMANDS, RESUME, attempt, make_world, rehash
from conftest import ROOT
from faults import fork, here

from lit_sft.convert import open_pickle
from lit_sft.errors import InputError
from lit_sft.shards import _load

CANARY = Path("canary")  # in the working directory, where nothing that is run could miss it


class Touch:
    """Unpickling it makes the file."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (CANARY,))


class Evaluated:
    """The same by text."""

    def __reduce__(self) -> tuple:
        return (eval, ("__import__('pathlib').Path('canary').touch()",))


class Executed:
    """The same by a shell."""

    def __reduce__(self) -> tuple:
        return (__import__("os").system, ("touch canary",))


class Built:
    """By what is called with the state of an object that is allowed."""

    def __reduce__(self) -> tuple:
        return (dict, (), None, None, iter([("x", Touch())]))


class Method:
    """By a method of an object, which is looked up by its name."""

    def __reduce__(self) -> tuple:
        return (CANARY.touch, ())


def plain(what: object, protocol: int) -> bytes:
    return pickle.dumps(what, protocol)


def saved(what: object, zipped: bool = True) -> bytes:
    """As torch.save writes it, in its format of today or in that before 1.6."""
    sink = io.BytesIO()
    torch.save(what, sink, _use_new_zipfile_serialization=zipped)
    return sink.getvalue()


def by_hand(opcodes: bytes) -> bytes:
    """Opcodes in the archive that torch.load opens."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("x/data.pkl", opcodes)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    return sink.getvalue()


def old_tar() -> bytes:
    """The format of torch before 0.2: a tar of pickles."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = plain(Touch(), 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def array() -> bytes:
    """A numpy file of objects."""
    sink = io.BytesIO()
    np.save(sink, np.array([Touch()], dtype=object), allow_pickle=True)
    return sink.getvalue()


PAYLOADS: dict[str, Callable[[], bytes]] = {
    "protocol 0": lambda: plain(Touch(), 0),
    "protocol 2": lambda: plain(Executed(), 2),
    "protocol 5": lambda: plain(Evaluated(), 5),
    "torch.save": lambda: saved({"x": Touch()}),
    "torch.save of old": lambda: saved({"x": Executed()}, zipped=False),
    "beside a tensor": lambda: saved({"wte.weight": torch.ones(2), "x": [Evaluated()]}),
    "by an allowed object": lambda: saved({"x": Built()}),
    "by a method's name": lambda: saved({"x": Method()}),
    "STACK_GLOBAL by hand": lambda: by_hand(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R."),
    "INST by hand": lambda: by_hand(b"(S'touch canary'\nios\nsystem\n."),
    "a tar of pickles": old_tar,
    "an array of objects": array,
}
STATE = "cut/checkpoints/step-00000002"
# file → the command that reads it: (name, its arguments)
PLACES: dict[str, tuple[str, list[str]]] = {
    "raw/pytorch_model.bin": ("convert_hf_checkpoint", COMMANDS["convert_hf_checkpoint"]),
    "raw/pytorch_model-1.bin": ("doctor", ["raw"]),
    "raw/model.safetensors": ("convert_hf_checkpoint", COMMANDS["convert_hf_checkpoint"]),
    "raw/tokenizer.json": ("doctor", ["raw"]),
    "base/tokenizer.model": ("prepare_csv", COMMANDS["prepare_csv"]),
    "base/lit_model.safetensors": ("generate", COMMANDS["generate"]),
    "base/model_config.json": ("export_hf", COMMANDS["export_hf"]),
    "data/train-00000.pt": ("lora", COMMANDS["lora"]),
    "data/val-00000.pt": ("full", COMMANDS["full"]),
    "rows.parquet": ("prepare_dataset", ["--data_file=rows.parquet", *COMMANDS["prepare_dataset"][1:]]),
    "run/adapter/adapter.safetensors": ("merge_lora", COMMANDS["merge_lora"]),
    "run/adapter/adapter_config.json": ("export_peft", COMMANDS["export_peft"]),
    "peft/adapter_model.bin": ("import_peft", COMMANDS["import_peft"]),
    f"{STATE}/adapter.safetensors": ("lora", RESUME),
    f"{STATE}/optimizer.safetensors": ("lora", RESUME),
    f"{STATE}/state.json": ("lora", RESUME),
    "cut/run.yaml": ("lora", RESUME),
}
# one that the file's own reader would take for its own, or else the oldest kind
CASES = [(place, "beside a tensor" if place.endswith((".bin", ".pt")) else "protocol 0") for place in PLACES]
# the two functions in which anything is unpickled that comes from elsewhere
READERS: dict[str, Callable[[Path], object]] = {"weights": lambda path: list(open_pickle(path)), "shards": _load}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("pickles") / "world"
    assert fork(lambda: make_world(world), world.with_suffix(".log")) == 0, world.with_suffix(".log").read_text()
    return world


@pytest.mark.parametrize(("place", "payload"), CASES, ids=" ".join)
def test_a_hostile_pickle_is_refused_and_never_run(place: str, payload: str, world: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    shutil.copytree(world, room)
    if place.endswith(".bin"):
        for path in Path(room / place).parent.glob("*model.safetensors"):
            path.unlink()
    if place.endswith("-1.bin"):
        (room / "raw/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": Path(place).name}}))
    if place.endswith("tokenizer.json"):
        (room / "raw/tokenizer.model").unlink()
    (room / place).write_bytes(PAYLOADS[payload]())
    rehash((room / place).parent)
    name, argv = PLACES[place]
    end = attempt(room, [name, *argv], tmp_path / "log")
    assert not (room / CANARY).exists()
    assert end.code == 2 and end.problem is None, (end.problem, end.text)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("reader", READERS)
def test_no_kind_of_pickle_is_run(reader: str, payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.bin").write_bytes(PAYLOADS[payload]())
    with pytest.raises(InputError, match=r"file\.bin"):
        READERS[reader](Path("file.bin"))
    assert not CANARY.exists()


def test_nothing_else_unpickles() -> None:
    """Each torch.load is told to read tensors only; pickle itself reads what this process wrote for another."""
    found = []
    for path in sorted((ROOT / "lit_sft").rglob("*.py")):
        for line in path.read_text().splitlines():
            if re.search(r"torch\.load\(|np\.load\(.*allow_pickle|pickle\.loads?\(|Unpickler", line):
                found.append((path.stem, "weights_only=True" in line))
    assert found == [("convert", True), ("convert", True), ("figures", True), ("shards", True), ("spool", False)]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_pickles_are_hostile(payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as one should not read them, they do what they want."""
    monkeypatch.chdir(tmp_path)
    content = PAYLOADS[payload]()

    def read() -> None:
        if payload == "an array of objects":
            np.load(io.BytesIO(content), allow_pickle=True)
        elif payload.startswith("protocol"):
            pickle.loads(content)
        elif payload == "a tar of pickles":
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                pickle.loads(archive.extractfile("pickle").read())
        else:
            torch.load(io.BytesIO(content), weights_only=False)

    here(read, tmp_path / "log")
    assert CANARY.exists()


def test_there_are_more_than_twenty() -> None:
    assert len(PAYLOADS) * len(READERS) >= 24 and len(PLACES) >= 17
