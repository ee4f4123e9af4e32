"""What a run is computed from, and whether it still is when the run goes on."""

from __future__ import annotations

import platform
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import torch

from lit_sft import __version__
from lit_sft.args import TrainArgs
from lit_sft.atomic import Manifest
from lit_sft.checkpoint import base_fingerprint
from lit_sft.documents import read_json, read_yaml
from lit_sft.errors import InputError
from lit_sft.layout import RUN_ARGUMENTS, RUN_INPUTS, saved_states
from lit_sft.output import tell
from lit_sft.prompts import PROMPT_FACTS
from lit_sft.shards import Shards

# what may change when a run goes on: it decides where, how fast and how often, never what is computed
FREE = {
    "debug", "out_dir", "resume", "device", "devices", "micro_batch_size", "micro_batch_tokens", "max_time",
    "eval_interval", "save_interval", "save_minutes", "keep_last", "keep_best", "on_nonfinite", "sample_prompt",
    "checkpoint_dir", "data_dir", "max_iters", "epochs", "share_prefix", "activation_checkpointing", "compile",
    "offload", "hardware", "threads", "torch", "lit_sft", "estimate", "rehearse", "timeout_minutes", "base_files",
    "extend",
}  # fmt: skip
# those of them that move the last bits
PLACES = (
    "device", "devices", "micro_batch_size", "micro_batch_tokens", "share_prefix", "activation_checkpointing",
    "compile", "offload", "hardware", "threads", "torch", "lit_sft",
)  # fmt: skip


def arguments_of(args: TrainArgs) -> dict:
    """Every argument but how this one command was to begin: as given in run.yaml, resolved in inputs.json."""
    return {k: v for k, v in asdict(args).items() if k != "debug"} | {"resume": "auto", "extend": False}


def inputs_of(args: TrainArgs, shards: Shards, device: torch.device) -> dict:
    """What inputs.json says: base, data, and what a result's last bits hang on beside the arguments."""
    base, facts = Path(args.checkpoint_dir), shards.manifest.facts
    files = {name: (base / name).stat() for name in Manifest.read(base).files if name.endswith(".safetensors")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "base_fingerprint": base_fingerprint(base),
        "base_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
        "data_fingerprint": "+".join(fact["sha256"] for _, fact in sorted(shards.manifest.files.items())),
        **{f"data_{name}": facts.get(name) for name in ("order", *PROMPT_FACTS)},
        "data_on_overflow": facts["arguments"].get("on_overflow"),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lit_sft": __version__,
    }


def going_on(args: TrainArgs) -> dict | None:
    """What the unfinished run in ``args.out_dir`` was started with; None where there is none with a saved state."""
    out_dir = Path(args.out_dir)
    return recorded(out_dir) if (out_dir / RUN_ARGUMENTS).is_file() and saved_states(out_dir) else None


def recorded(out_dir: Path) -> dict:
    """The resolved arguments and the inputs that a run was started with; InputError when its files do not say."""
    try:
        given, inputs = read_yaml(out_dir / RUN_ARGUMENTS), read_json(out_dir / RUN_INPUTS)
        return given | inputs.pop("arguments", {}) | inputs  # earlier versions had them, resolved, in run.yaml
    except (OSError, ValueError, TypeError, InputError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{out_dir} does not say what its run was started with ({why}); name another") from None


def compare(before: dict, now: dict, limit: str, extend: bool) -> None:
    """Say in a line what moves the last bits; InputError, with the difference, where something else is computed.

    ``limit``: the flag that ends the run, as given now. ``extend``: it may have more steps than before.
    """
    out_dir = Path(now["out_dir"])
    both = [k for k in PLACES if k in now and k in before]
    moved = [f"{k} {now[k]} instead of {before[k]}" for k in both if before[k] != now[k]]
    if moved:
        tell(f"going on with {', '.join(moved)}: the same computation, equal to rounding")
    changed = [k for k in (now | before) if k not in FREE and before.get(k) != now.get(k)]
    is_longer = "max_steps" in changed and now["max_steps"] > before["max_steps"]
    if is_longer and extend:
        tell(
            f"extended from {before['max_steps']} to {now['max_steps']} steps; the learning rate follows the schedule "
            f"of {now['max_steps']} steps from here on"
        )
        changed.remove("max_steps")
    if changed:
        reasons = {"max_steps": f" by {limit}"}
        differences = ", ".join(_difference(k, before.get(k), now.get(k)) + reasons.get(k, "") for k in changed)
        more = "--extend true gives it more steps; else " if is_longer and len(changed) == 1 else ""
        raise InputError(
            f"{out_dir} holds a run that computes something else ({differences}); {more}"
            "give it the same arguments, or name another --out_dir"
        )
    if before.get("base_files") != now["base_files"]:  # moved, or written over since the run began: its hashes tell
        Manifest.read(base := Path(now["checkpoint_dir"])).check_files(base)


def _difference(name: str, then: object, now: object) -> str:
    if name.endswith("_fingerprint"):  # the hashes of files, one behind the other: the first that differs
        pairs = zip_longest(str(then).split("+"), str(now).split("+"), fillvalue="none")
        then, now = next((a[:12], b[:12]) for a, b in pairs if a != b)
    return f"{name}: {then!r:.80} then, {now!r:.80} now"
