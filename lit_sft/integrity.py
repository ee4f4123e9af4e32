"""Whether a directory still is what the toolkit wrote: every size, hash, count and fingerprint, read again."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_sft.atomic import Manifest, sha256_of
from lit_sft.checkpoint import ADAPTER, load_model, read_adapter_config, resolve_base
from lit_sft.convert import source_weights
from lit_sft.documents import read_bytes, read_json, read_yaml
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
    saved_states,
    state_name,
    step_of,
)
from lit_sft.metrics import METRICS_BYTES, read_record
from lit_sft.shards import KIND, Shards
from lit_sft.states import STATE, read_state_facts
from lit_sft.weight_files import choose_weights
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
    yield _tried(directory, lambda: _sources(directory))


def _sources(directory: Path) -> str:
    note = choose_weights(directory).note(directory)
    count = f"{len(source_weights(directory))} weights in the Hub's files"
    return f"{count}; {note}" if note else count


def _run(directory: Path) -> Iterator[Finding]:
    yield _tried(directory / RUN_ARGUMENTS, lambda: _arguments(directory / RUN_ARGUMENTS) and None)
    yield _tried(directory / RUN_INPUTS, lambda: read_json(directory / RUN_INPUTS) and None)
    states, results = saved_states(directory), (directory / ADAPTER_DIR, directory / MODEL_DIR)
    for folder in (*states, *results):
        if folder.is_dir():
            yield from _manifested(folder)
            yield _tried(folder, lambda f=folder: _of_this_run(directory, f))
    if states:
        yield _tried(directory / STATES_DIR, lambda: _best(states))
    if (directory / DONE).is_file():
        yield _tried(directory / DONE, lambda: _result(results))
    if (directory / METRICS).exists() or states:
        yield _tried(directory / METRICS, lambda: _metrics(directory, states))
    for prefix, why in {"bad": "it was found damaged", "later": "the run went back to an earlier one"}.items():
        for path in sorted((directory / STATES_DIR).glob(f".{prefix}-*")):
            yield Finding(f"{path}: set aside when {why}; it can be deleted")


def _best(states: list[Path]) -> str | None:
    """The newest state says which one had the lowest val loss, and that one is kept."""
    step = read_state_facts(states[-1])["best_step"]
    if step is not None and state_name(step) not in [state.name for state in states]:
        raise InputError(f"the state of the lowest val loss, {state_name(step)}, is missing")
    return None if step is None else f"the lowest val loss was after step {step}"


def _result(results: tuple[Path, ...]) -> None:
    if not any(result.is_dir() for result in results):
        raise InputError(f"the run is finished, but {' and '.join(map(str, results))} are missing")


def _arguments(path: Path) -> dict:
    try:
        arguments = read_yaml(path)
    except ValueError as error:
        raise InputError(f"it is no YAML ({error})") from None
    if not isinstance(arguments, dict) or "out_dir" not in arguments:
        raise InputError("it holds no run's arguments")
    return arguments


def _of_this_run(directory: Path, folder: Path) -> str:
    """An adapter names its base by its fingerprint and says what LoRA it is, and so does the run."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return "of this run"
    config, arguments = read_json(folder / ADAPTER_CONFIG), _arguments(directory / RUN_ARGUMENTS)
    if config.get("base_fingerprint") != read_json(directory / RUN_INPUTS).get("base_fingerprint"):
        raise InputError("its base is not the one that the run was started on")
    if odd := [name for name in arguments if name.startswith("lora_") and config.get(name) != arguments[name]]:
        raise InputError(f"it has {odd[0]} {config.get(odd[0])!r}, the run was started with {arguments[odd[0]]!r}")
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
    newest = max(map(step_of, states), default=0)
    if newest > last:
        raise InputError(f"it ends with step {last}; there is a state after step {newest}")
    said = read_bytes(directory / DONE).decode(errors="replace") if (directory / DONE).is_file() else str(last)
    if said.split()[:1] != [str(last)]:
        raise InputError(f"it ends with step {last}; {DONE} says {said.strip()[:40]!r}")
    return f"steps 1 to {last}"
