"""Whether a directory still is what the toolkit wrote: every size, hash, count and fingerprint, read again."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_sft.atomic import Manifest, sha256_of
from lit_sft.checkpoint import ADAPTER, STATE, load_model, read_adapter_config, read_state_facts, resolve_base
from lit_sft.convert import source_weights
from lit_sft.errors import InputError
from lit_sft.layout import (
    ADAPTER_CONFIG,
    ADAPTER_DIR,
    DONE,
    DOWNLOAD_RECORD,
    MANIFEST,
    METRICS,
    MODEL_DIR,
    RUN_ARGUMENTS,
    RUN_INPUTS,
    STATES_DIR,
    read_bytes,
    read_json,
    read_yaml,
)
from lit_sft.metrics import METRICS_BYTES, read_record
from lit_sft.shards import KIND, Shards
from lit_sft.weights import CHECKPOINT


@dataclass(frozen=True)
class Finding:
    """What was looked at and, if it is not as it was written, why not."""

    subject: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"ok       {self.subject}" if self.problem is None else f"DAMAGED  {self.subject}: {self.problem}"


def check_directory(directory: Path) -> Iterator[Finding]:
    """Look at everything in a run, a checkpoint, prepared data, an adapter or a saved state; a finding for each.

    InputError when the directory is none of them.
    """
    if not directory.is_dir():
        raise InputError(f"no directory {str(directory)!r}; give one that a command of lit_sft wrote")
    known = {RUN_ARGUMENTS: _run, DOWNLOAD_RECORD: _download, MANIFEST: _manifested}
    if not (checks := [check for name, check in known.items() if (directory / name).is_file()]):
        raise InputError(
            f"{directory} holds no {', no '.join(known)}: nothing that lit_sft finished writing; "
            "write it again, or give a directory above or below"
        )
    for check in checks:
        yield from check(directory)


def _tried(subject: object, check: Callable[[], object]) -> Finding:
    """A finding of something that raises InputError, or OSError, where it is not well; what it gives is a note."""
    try:
        note = check()
    except (InputError, OSError) as error:
        return Finding(str(subject), str(error).removeprefix(f"{subject} "))
    return Finding(f"{subject}: {note}" if isinstance(note, str) else str(subject))


def _manifested(directory: Path) -> Iterator[Finding]:
    try:
        manifest = Manifest.read(directory)
    except InputError as error:
        yield Finding(str(directory / MANIFEST), str(error).removeprefix(f"{directory / MANIFEST} "))
        return
    yield Finding(f"{directory / MANIFEST}: {manifest.kind}, format {manifest.format_version}")
    files = [_tried(directory / name, lambda n=name: manifest.check_file(directory, n)) for name in manifest.files]
    yield from files
    meaning = {CHECKPOINT: _model, KIND: _data, ADAPTER: _adapter, STATE: _state}.get(manifest.kind)
    if meaning and not any(finding.problem for finding in files):
        yield _tried(directory, lambda: meaning(directory, manifest))


def _model(directory: Path, _: Manifest) -> str:
    n_parameters = sum(p.numel() for p in load_model(directory, device="meta").parameters())
    return f"{n_parameters:,} parameters, those of its model_config.json"


def _data(directory: Path, manifest: Manifest) -> str:
    counts = {split: len(Shards(directory, split)) for split in ("train", "val")}
    for split, n in counts.items():
        if manifest.facts.get(f"n_{split}", n) != n:
            raise InputError(f"its shards hold {n} {split} examples, its manifest says {manifest.facts[f'n_{split}']}")
    return f"{counts['train']} train and {counts['val']} val examples"


def _adapter(directory: Path, _: Manifest) -> str:
    """An adapter's tensors are those of its config on its base, which must be the one that it was trained on."""
    try:
        base = resolve_base(None, read_adapter_config(directory))
    except InputError as error:
        return f"not compared with its base ({error})"
    load_model(base, directory, device="meta")
    return f"an adapter of {base}"


def _state(directory: Path, manifest: Manifest) -> str:
    step = read_state_facts(directory)["step"]
    note = _adapter(directory, manifest) if (directory / ADAPTER_CONFIG).is_file() else "weights"
    return f"the state after step {step}, {note}"


def _download(directory: Path) -> Iterator[Finding]:
    record = directory / DOWNLOAD_RECORD
    try:
        files = read_json(record)["files"]
        facts = {str(name): (fact["bytes"], str(fact["hash"])) for name, fact in files.items()}
    except (InputError, KeyError, TypeError, AttributeError) as error:
        yield Finding(str(record), f"it is no record of a download ({error!r}); download again")
        return

    def check(name: str) -> None:
        size, digest = facts[name]
        path = directory / Path(name).name
        if not path.is_file():
            raise InputError("it is missing; download again")
        if path.stat().st_size != size:
            raise InputError(f"{path.stat().st_size} bytes, not {size}; download again")
        if len(digest) == 64:
            found = sha256_of(path)
        else:
            found = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        if found != digest:
            raise InputError("its hash is not the one that the Hub stated; download again")

    for name in facts:
        yield _tried(directory / name, lambda n=name: check(n))
    yield _tried(directory, lambda: f"{len(source_weights(directory))} weights in the Hub's files")


def _run(directory: Path) -> Iterator[Finding]:
    yield _tried(directory / RUN_ARGUMENTS, lambda: _arguments(directory / RUN_ARGUMENTS))
    yield _tried(directory / RUN_INPUTS, lambda: read_json(directory / RUN_INPUTS) and None)
    states = sorted(path for path in (directory / STATES_DIR).glob("step-*"))
    for folder in (*states, directory / ADAPTER_DIR, directory / MODEL_DIR):
        if folder.is_dir():
            yield from _manifested(folder)
            yield _tried(folder, lambda f=folder: _of_this_run(directory, f))
    if (directory / METRICS).exists() or states:
        yield _tried(directory / METRICS, lambda: _metrics(directory, states))
    for path in sorted({*directory.glob(".bad-*"), *directory.glob(f"{STATES_DIR}/.bad-*")}):
        yield Finding(f"{path}: set aside when it was found damaged; it can be deleted")


def _arguments(path: Path) -> None:
    try:
        arguments = read_yaml(path)
    except ValueError as error:
        raise InputError(f"it is no YAML ({error})") from None
    if not isinstance(arguments, dict) or "out_dir" not in arguments:
        raise InputError("it holds no run's arguments")


def _of_this_run(directory: Path, folder: Path) -> str:
    """An adapter names its base by its fingerprint, and so does the run."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return "of this run"
    ours = read_json(directory / RUN_INPUTS).get("base_fingerprint")
    if read_json(folder / ADAPTER_CONFIG).get("base_fingerprint") != ours:
        raise InputError("its base is not the one that the run was started on")
    return "of the base that the run was started on"


def _metrics(directory: Path, states: list[Path]) -> str:
    """Steps are there once each, in order, up to the newest state, and in a finished run to the last."""
    path, last = directory / METRICS, 0
    for number, line in enumerate(read_bytes(path, METRICS_BYTES).splitlines(keepends=True), 1):
        try:
            step = read_record(line)["step"]
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                break  # a kill cut it; the run leaves it out when it goes on
            raise InputError(f"line {number}: {error}") from None
        if step != last + 1:
            raise InputError(f"line {number} is of step {step}; step {last + 1} was to come")
        last = step
    newest = max((int(s.name.removeprefix("step-")) for s in states if s.name[5:].isdigit()), default=0)
    if newest > last:
        raise InputError(f"it ends with step {last}; there is a state after step {newest}")
    said = read_bytes(directory / DONE).decode(errors="replace") if (directory / DONE).is_file() else str(last)
    if said.split()[:1] != [str(last)]:
        raise InputError(f"it ends with step {last}; {DONE} says {said.strip()[:40]!r}")
    return f"steps 1 to {last}"
