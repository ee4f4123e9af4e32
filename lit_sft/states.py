"""The saved states of a run: written between steps, read with distrust, the newest intact one first."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_sft.atomic import Manifest, discard, publish_directory, write_atomically
from lit_sft.checkpoint import copy_tensors, opened, write_tensors
from lit_sft.documents import read_json
from lit_sft.errors import InputError, NewerFormat
from lit_sft.layout import STATES_DIR, saved_states, state_name, step_of
from lit_sft.output import tell

STATE = "state"
OPTIMIZER_WEIGHTS = "optimizer.safetensors"
STATE_FACTS = "state.json"
SLOTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW, for each parameter


def save_state(
    out_dir: Path,
    step: int,
    weights_name: str,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: dict,
    extra: dict[str, str],
) -> Path:
    """Write all that a run needs to go on after ``step``: what is trained, the optimizer's slots, the position.

    Args:
        out_dir: the run; the state becomes ``checkpoints/step-…`` in it.
        step: optimizer steps done. With the run's arguments and data it gives the rest: order of examples, learning
            rate and dropout masks are functions of it, and nothing in a step draws from a global generator.
        weights_name: the file of what is trained, ``adapter.safetensors`` or ``model.safetensors``.
        trained: name → parameter the optimizer updates (fp32).
        optimizer: its state is stored per parameter and slot.
        facts: what else a run goes on from, beside the step, in state.json.
        extra: further files, name → text.
    """
    directory = out_dir / STATES_DIR / state_name(step)
    slots = {
        f"{name}.{slot}": value
        for name, parameter in trained.items()
        for slot, value in optimizer.state[parameter].items()
    }
    with publish_directory(directory, STATE) as folder:
        write_tensors(folder / weights_name, trained)
        write_tensors(folder / OPTIMIZER_WEIGHTS, slots)
        extra = extra | {STATE_FACTS: json.dumps({"step": step} | facts) + "\n"}
        for name, text in extra.items():
            write_atomically(folder / name, text)
        Manifest(STATE, {}).write(folder, [weights_name, OPTIMIZER_WEIGHTS, *extra])
    return directory


def newest_state(out_dir: Path) -> Path | None:
    """The latest intact state of a run. Damaged ones after it are set aside as ``.bad-…``, to be written again.

    None when nothing was saved yet; InputError, all left as it is, when no state is intact; NewerFormat when a later
    lit_sft wrote one.
    """
    damaged = {}
    for directory in reversed(saved_states(out_dir)):
        try:
            Manifest.read(directory, STATE).check_files(directory)
        except NewerFormat:
            raise
        except InputError as error:
            damaged[directory] = str(error)
            continue
        for bad, why in damaged.items():
            _set_aside(bad, "bad", why)
        return directory
    if damaged:
        raise InputError(
            f"{out_dir} has no intact state left, see the lines above; name another", list(damaged.values())
        )
    if aside := sorted((out_dir / STATES_DIR).glob(".bad-step-*")):
        raise InputError(f"{out_dir} has no state left but {aside[-1]}, found damaged before; name another --out_dir")
    return None


def named_state(out_dir: Path, directory: Path) -> Path:
    """The saved state of ``out_dir`` that the user names, checked; InputError tells which there are."""
    states = saved_states(out_dir)
    if directory.resolve() not in [state.resolve() for state in states]:
        known = ", ".join(str(state) for state in states[-5:]) or "none yet"
        raise InputError(f"--resume {directory}: no saved state of {out_dir}; the last of it: {known}")
    Manifest.read(directory, STATE).check_files(directory)
    read_state_facts(directory)
    return directory


def set_aside_after(out_dir: Path, step: int) -> None:
    """Give the states after ``step`` another name: they would be gone on from next, and are to be written anew."""
    for later in saved_states(out_dir):
        if step_of(later) > step:
            _set_aside(later, "later", f"{later} is later than step {step}")


def _set_aside(directory: Path, prefix: str, why: str) -> None:
    tell(f"set aside: {why}")
    directory.rename(directory.with_name(f".{prefix}-{directory.name}-{os.getpid()}"))


def load_state(
    directory: Path, weights_name: str, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict:
    """Restore what ``save_state`` wrote, in place; gives its facts, ``step`` among them. InputError where it is odd."""
    facts = read_state_facts(directory)
    copy_tensors(trained, directory / weights_name)
    numbers = {name: number for number, name in enumerate(trained)}
    state = optimizer.state_dict()
    with opened(directory / OPTIMIZER_WEIGHTS) as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name, _, slot = key.rpartition(".")
            if name not in numbers:
                raise InputError(f"{directory / OPTIMIZER_WEIGHTS} holds {key}, of which the run trains nothing")
            tensor = file.get_tensor(key)
            if slot not in SLOTS or not _fits(tensor, slot, trained[name]):
                raise InputError(
                    f"{directory / OPTIMIZER_WEIGHTS}: {key} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
                    f"which is no slot of AdamW for it; move {directory} away"
                )
            state["state"].setdefault(numbers[name], {})[slot] = tensor.clone()
    slots = [state["state"].get(number, {}).keys() for number in numbers.values()]
    expected = SLOTS if any(slots) else set()  # none before the first update
    if odd := [name for name, found in zip(numbers, slots, strict=True) if found != expected]:
        raise InputError(f"{directory / OPTIMIZER_WEIGHTS} holds other slots of {odd[0]}; move {directory} away")
    optimizer.load_state_dict(state)
    return facts


def _fits(tensor: Tensor, slot: str, parameter: nn.Parameter) -> bool:
    """Whether it can be the slot: the optimizer's kernels would write where another shape has no memory."""
    if not tensor.is_floating_point():
        return False
    return (tensor.dim() == 0 and 0 <= tensor < torch.inf) if slot == "step" else tensor.shape == parameter.shape


def read_state_facts(directory: Path) -> dict:
    """The facts of a saved state; InputError when one is missing or cannot be."""
    facts, none = read_json(directory / STATE_FACTS), type(None)
    kinds = {"step": (int,), "best_step": (int, none), "best_val_loss": (float, int, none), "scaler": (dict,)}
    if wrong := [name for name, kind in kinds.items() if name not in facts or type(facts[name]) not in kind]:
        raise InputError(
            f"{directory / STATE_FACTS}: {wrong[0]} is {facts.get(wrong[0], 'missing')!r}; move {directory} away"
        )
    if directory.name != state_name(facts["step"]):
        raise InputError(f"{directory} holds the state after step {facts['step']}, which is not what its name says")
    return facts


def prune_states(out_dir: Path, keep: int, best_step: int | None) -> None:
    """Delete all states but the ``keep`` newest and that of ``best_step``."""
    for directory in saved_states(out_dir)[:-keep]:
        if best_step is None or directory.name != state_name(best_step):
            discard(directory)
