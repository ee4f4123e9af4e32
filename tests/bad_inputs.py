"""Broken inputs of every kind for every command, by a table and by chance; and what must hold of a command given one.

A world is a folder with one of each thing that commands read. An input spoils something in it; then the command ends
with exit code 2 and one line, having changed nothing. ``fuzz`` spoils at random: there the command may end well too.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from faults import leftovers, start, wait
from reliability import RUN, command, make_checkpoint, train, write_rows
from safetensors.torch import load_file, save_file

from lit_sft.atomic import Manifest
from lit_sft.errors import stops

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
COMMANDS: dict[str, list[str]] = {
    "convert_hf_checkpoint": ["--checkpoint_dir=raw"],
    "doctor": ["raw"],
    "verify": ["base"],
    "prepare_csv": ["--csv_path=rows.csv", "--checkpoint_dir=base", "--destination_path=new", "--num_workers=1"],
    "prepare_dataset": ["--data_file=rows.jsonl", "--checkpoint_dir=base", "--destination_path=new"],
    "lora": ["--data_dir=data", "--out_dir=new", "--device=cpu", "--max_steps=1", "--global_batch_size=2"],
    "full": ["--data_dir=data", "--out_dir=new", "--device=cpu", "--max_steps=1", "--global_batch_size=2"],
    "estimate": ["--data_dir=data", "--device=cpu", "--device_memory_gb=8", "--global_batch_size=2"],
    "generate": ["--checkpoint_dir=base", "--prompt=Hi", "--max_new_tokens=1", "--device=cpu"],
    "merge_lora": ["--lora_path=run", "--out_dir=new"],
    "export_hf": ["--checkpoint_dir=base", "--out_dir=new"],
    "export_peft": ["--lora_path=run", "--out_dir=new"],
    "export_gguf": ["--checkpoint_dir=base", "--out_file=new.gguf"],
    "import_peft": ["--peft_dir=peft", "--checkpoint_dir=base", "--out_dir=new", "--prompt_style=alpaca"],
    "convert_lit_checkpoint": ["--checkpoint_path=base", "--output_path=new"],
}
RESUMED = {"max_steps": 4, "save_interval": 1, "eval_interval": 4}
RESUME = [f"--{name}={'null' if value is None else value}" for name, value in (RUN | RESUMED).items()]
RESUME += ["--lora_dropout=0.1", "--lora_r=4", "--data_dir=data", "--out_dir=cut"]


def make_world(world: Path) -> None:
    """base (converted), raw, data, run (finished), cut (unfinished), peft, rows.csv, rows.jsonl; run it in a child."""
    world.mkdir(exist_ok=True)
    os.chdir(world)
    make_checkpoint(Path("base"))
    Path("raw").mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        shutil.copy(f"base/{name}", f"raw/{name}")
    write_rows(Path("rows.csv"), 12)
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"A {i}"}]} for i in "ab"]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("style.jinja").write_text(TEMPLATE)
    command("prepare_csv", *COMMANDS["prepare_csv"][:2], "--destination_path=data")
    train(Path(), "lora", Path("run"), max_steps=1, eval_interval=1)
    for _ in range(2):
        stops.append(143)  # as if a signal had come: one step is made, and saved
        with suppress(SystemExit):
            train(Path(), "lora", Path("cut"), **RESUMED)
        stops.clear()
    command("export_peft", "--lora_path=run", "--out_dir=peft")


# --- ways to spoil ---


def write(path: str, content: str | bytes) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content) and None


def remove(path: str) -> Callable[[], None]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def cut(path: str, kept: float = 0.5) -> Callable[[], None]:
    return lambda: _change(path, lambda content: content[: int(len(content) * kept)])


def flip(path: str, where: float = 0.5) -> Callable[[], None]:
    def change(content: bytes) -> bytes:
        at = int(len(content) * where)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return lambda: _change(path, change)


def _change(path: str, change: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


def edit(path: str, **changes: object) -> Callable[[], None]:
    """Set fields of a JSON file, and record its new hash where a manifest has one."""

    def spoil() -> None:
        content = json.loads(Path(path).read_text())
        if Path(path).name == "manifest.json":
            changes["digest"] = None
        Path(path).write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))
        if Path(path).name != "manifest.json":
            rehash(Path(path).parent)

    return spoil


def rehash(directory: Path) -> None:
    """Make a manifest say what is there now: what is wrong then must be found by what it means."""
    path = directory / "manifest.json"
    if path.is_file():
        manifest = Manifest.read(directory)
        names = [name for name in manifest.files if (directory / name).is_file()]
        manifest.files.clear()
        manifest.write(directory, names)


def forget_digest(path: Path) -> None:
    """What is wrong with a manifest must then be found by what it means."""
    with suppress(ValueError, TypeError):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"digest": None}))


def tensors(path: str, change: Callable[[dict], dict]) -> Callable[[], None]:
    def spoil() -> None:
        content = {name: tensor.clone() for name, tensor in load_file(path).items()}  # no mapping of what is rewritten
        save_file(change(content), path)
        rehash(Path(path).parent)

    return spoil


def shard(change: Callable[[dict], object], name: str = "data/train-00000.pt") -> Callable[[], None]:
    def spoil() -> None:
        torch.save(change(torch.load(name, weights_only=True)), name)
        rehash(Path(name).parent)

    return spoil


# --- what must hold ---


@dataclass
class End:
    """How a command ended on an input, and what is wrong with that; None when nothing is."""

    code: int
    text: str
    problem: str | None


def listing(folder: Path) -> dict[str, tuple | None]:
    """All below ``folder`` with size and time of writing; locks, which who looks rewrites, by name."""
    found = {}
    for path in folder.rglob("*"):
        fixed = path.is_file() and path.name != ".lock"
        found[str(path.relative_to(folder))] = (path.stat().st_size, path.stat().st_mtime_ns) if fixed else None
    return found


def judge(code: int, text: str, before: dict, after: dict, left: list[str]) -> str | None:
    """What a command that was given something broken did wrong."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code not in (0, 2):
        return f"exit code {code}"
    if len(errors) != (code == 2):
        return f"{len(errors)} error lines"
    if "Traceback" in text or "error: unexpected" in text:
        return "a traceback"
    if left:
        return f"left over: {left}"
    if code == 2 and before != after:
        changed = {name for name, _ in before.items() ^ after.items()}
        return f"changed: {sorted(changed)}"
    return None


# --- by chance ---

TARGETS: dict[str, list[str]] = {
    "convert_hf_checkpoint": ["raw/config.json", "raw/model.safetensors", "raw/model.safetensors.index.json"],
    "doctor": ["raw/config.json", "raw/model.safetensors", "raw/tokenizer.model", "raw/tokenizer_config.json",
               "raw/tokenizer.json", "raw/generation_config.json", "raw/model.safetensors.index.json"],
    "verify": ["base/manifest.json", "base/model_config.json", "base/lit_model.safetensors"],
    "verify run": ["run/metrics.jsonl", "run/run.yaml", "run/inputs.json", "run/adapter/manifest.json",
                   "run/adapter/adapter_config.json", "run/checkpoints/step-00000001/state.json"],
    "verify data": ["data/manifest.json", "data/train-00000.pt"],
    "prepare_csv": ["rows.csv", "base/tokenizer.model", "base/manifest.json", "base/model_config.json"],
    "prepare_dataset": ["rows.jsonl", "base/tokenizer_config.json", "base/chat_template.jinja", "style.jinja"],
    "lora": ["data/train-00000.pt", "data/val-00000.pt", "data/manifest.json", "base/model_config.json"],
    "full": ["data/train-00000.pt", "data/manifest.json", "base/lit_model.safetensors"],
    "resume": ["cut/run.yaml", "cut/inputs.json", "cut/metrics.jsonl", "cut/checkpoints/step-00000002/state.json",
               "cut/checkpoints/step-00000002/manifest.json", "cut/checkpoints/step-00000002/adapter.safetensors",
               "cut/checkpoints/step-00000002/optimizer.safetensors"],
    "generate": ["base/manifest.json", "base/model_config.json", "base/lit_model.safetensors", "base/tokenizer.model"],
    "merge_lora": ["run/adapter/adapter_config.json", "run/adapter/adapter.safetensors", "run/adapter/manifest.json"],
    "export_hf": ["base/config.json", "base/model_config.json", "base/manifest.json"],
    "export_peft": ["run/adapter/adapter_config.json", "run/adapter/adapter.safetensors", "base/config.json"],
    "export_gguf": ["base/config.json", "base/tokenizer.model", "base/model_config.json"],
    "import_peft": ["peft/adapter_config.json", "peft/adapter_model.safetensors"],
}  # fmt: skip
VALUES = (
    None, True, -1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", "x", "../x", "/etc/passwd", "\0", "é", [], [[]], {}, [1, "a"], {"a": {}}, "llama", "gelu", "linear",
)  # fmt: skip
STARTS = {
    "raw/tokenizer_config.json": '{"add_bos_token": true, "eos_token": "</s>", "added_tokens_decoder": {}}',
    "base/tokenizer_config.json": '{"add_bos_token": true, "eos_token": "</s>", "chat_template": "{{ messages[0] }}"}',
    "raw/tokenizer.json": '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
    "raw/generation_config.json": '{"eos_token_id": 2, "bos_token_id": 1}',
    "raw/model.safetensors.index.json": '{"weight_map": {"lm_head.weight": "model.safetensors"}}',
    "base/chat_template.jinja": TEMPLATE,
}
FUZZ_SECONDS = 90.0  # an input may not keep a command longer; the machine may be busy
MOST_MEMORY = 6 * 2**30  # bytes of address space more than the warm parent has


def mutate(content: bytes, kind: str, chance: random.Random) -> bytes:
    """Another content: fields of JSON set to odd values, tokens of text doubled or moved, bytes changed, cut."""
    if kind in (".json", ".jsonl", ".yaml") and chance.random() < 0.7:
        try:
            lines = content.decode().splitlines() if kind == ".jsonl" else [content.decode()]
            at = chance.randrange(len(lines))
            lines[at] = json.dumps(_odd(json.loads(lines[at]), chance))
            return "\n".join(lines).encode()
        except ValueError:
            pass
    for _ in range(chance.choice((1, 1, 2, 5))):
        head = 400 if kind == ".safetensors" and chance.random() < 0.7 else len(content)  # its header
        at = chance.randrange(min(head, len(content)) + 1)
        size = chance.choice((1, 1, 2, 8, 64))
        new = chance.choice(
            (b"", chance.randbytes(size), content[at : at + size] * 3, b'"', b"\n", b"\xff", b"\0" * size)
        )
        content = content[:at] + new + content[at + (size if chance.random() < 0.7 else 0) :]
        if chance.random() < 0.1:
            content = content[: chance.randrange(len(content) + 1)]
    return content


def _odd(value: object, chance: random.Random) -> object:
    """``value`` with one part of it replaced, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(sorted(value))
        action = chance.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if action < 0.15:
            return value | {chance.choice(("x", "", "..", *value)): chance.choice(VALUES)}
        return value | {name: _odd(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], _odd(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def argv_of(target: str) -> list[str]:
    """The command line of a target of ``fuzz``."""
    name, _, what = target.partition(" ")
    if name == "resume":
        return ["lora", *RESUME]
    return [name, *([what] if what else COMMANDS[name])]


def attempt(room: Path, argv: list[str], log: Path, seconds: float = FUZZ_SECONDS) -> End:
    """Run a command in ``room`` in a child that has little memory and time; how it ended."""

    def work() -> None:
        os.chdir(room)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))
        command(*argv)

    before, limit, ended = listing(room), time.monotonic() + seconds, 0
    pid = start(work, log)
    while not ended and time.monotonic() < limit:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        time.sleep(0.005)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    code = wait(pid)
    text = log.read_text(errors="replace")
    problem = judge(code, text, before, listing(room), leftovers(room)) if ended else f"hangs for {seconds:.0f} s"
    return End(code, text, problem)


def fuzz(world: Path, seconds: float, seed: int, kept: Path) -> tuple[dict, list[str]]:
    """Spoil a file at random and run a command that reads it, until the time is over; what did not end as it must.

    Of each problem the spoiled file is written below ``kept``, with the command's name and the seed.
    """
    chance, problems, ends = random.Random(seed), [], {"accepted": 0, "refused": 0}
    room, log, end = world.with_name("room"), world.with_name("fuzz.log"), time.monotonic() + seconds
    by_target = dict.fromkeys(TARGETS, 0)
    while time.monotonic() < end:
        target = chance.choice(list(TARGETS))
        name = chance.choice(TARGETS[target])
        shutil.rmtree(room, ignore_errors=True)
        shutil.copytree(world, room)
        path = room / name
        content = path.read_bytes() if path.is_file() else STARTS.get(name, "").encode()
        path.write_bytes(spoiled := mutate(content, path.suffix, chance))
        if chance.random() < 0.7:
            forget_digest(path) if path.name == "manifest.json" else rehash(path.parent)
        argv = argv_of(target)
        argv += ["--prompt_style=style.jinja"] if name == "style.jinja" else []
        found = attempt(room, argv, log)
        by_target[target] += 1
        ends["refused" if found.code else "accepted"] += 1
        if found.problem and not _known(target, found):
            case = kept / f"{seed}-{sum(by_target.values())}-{name.replace('/', '-')}"
            kept.mkdir(exist_ok=True)
            case.write_bytes(spoiled)
            problems.append(f"{' '.join(argv)} with {name} as in {case}: {found.problem}: {found.text[-600:]}")
    return ends | {"inputs": sum(by_target.values()), "problems": len(problems), **by_target}, problems


def _known(target: str, found: End) -> bool:
    """Whether what ``judge`` complains of is what must happen.

    A damaged state is set aside, under a name of its own; nothing else may change. A file that is in order, and
    computes what is not finite, ends a run or a merge with exit code 1 and a word on what was saved.
    """
    if found.problem == "exit code 1":
        return bool(re.search(r"^error: .*(the update was not made, saved|nothing was written$)", found.text, re.M))
    return target == "resume" and bool(re.fullmatch(r"(left over|changed): \[.*\.bad-step.*\]", found.problem or ""))
