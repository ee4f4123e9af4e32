"""Every name on disk, and the checks that a directory is what a command needs."""

import re
from pathlib import Path

from lit_sft.errors import InputError

CHECKPOINTS = Path("checkpoints")
MANIFEST = "manifest.json"

# checkpoint_dir
HF_CONFIG = "config.json"
MODEL_CONFIG = "model_config.json"
ACCEPTED = "accepted_config_keys"
"""The fact of a checkpoint_dir's manifest that says which fields of config.json a person knows to change nothing."""
MODEL_WEIGHTS = "lit_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
DOWNLOAD_RECORD = "download.json"
GENERATION_CONFIG = "generation_config.json"
HF_WEIGHTS = "model.safetensors"
HF_INDEX = "model.safetensors.index.json"
HF_PICKLE = "pytorch_model.bin"
HF_PICKLE_INDEX = "pytorch_model.bin.index.json"

# data_dir
SKIPPED = "skipped.jsonl"

# out_dir
REPORT = "report.html"  # also in a data_dir
RUN_ARGUMENTS = "run.yaml"
RUN_INPUTS = "inputs.json"
METRICS = "metrics.jsonl"
DONE = "DONE"
ADAPTER_DIR = "adapter"
ADAPTER_WEIGHTS = "adapter.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_DIR = "model"
TRAINED_WEIGHTS = "model.safetensors"
STATES_DIR = "checkpoints"


def state_name(step: int) -> str:
    """The name of the folder under ``checkpoints/`` that holds the run's state after optimizer step ``step``."""
    return f"step-{step:08d}"


def step_of(state: Path) -> int:
    """The step after which a saved state was written, by its name."""
    return int(state.name.removeprefix("step-"))


def saved_states(out_dir: Path) -> list[Path]:
    """The folders of a run's saved states, by step; what else lies beside them, a copy of one say, is the user's."""
    found = (out_dir / STATES_DIR).glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-[0-9]{8,}", p.name) and p.is_dir()), key=step_of)


def shard_name(split: str, index: int) -> str:
    """The name of shard ``index`` of ``split`` (train or val) in a data_dir."""
    return f"{split}-{index:05d}.pt"


def work_dir(data_dir: Path) -> Path:
    """Where what will be ``data_dir`` is made; a run that was killed leaves it, and the same command goes on there."""
    return data_dir.with_name(f".partial-{data_dir.name}")


def resolve_checkpoint_dir(path: str | Path) -> Path:
    """The directory meant by ``path``, with or without ``checkpoints/`` in front; InputError lists what exists."""
    for candidate in (Path(path), CHECKPOINTS / path):
        if candidate.is_dir():
            return candidate
    present = sorted({str(p.parent) for p in CHECKPOINTS.glob(f"*/*/{HF_CONFIG}")})
    raise InputError(
        f"no checkpoint directory {str(path)!r}, nor {str(CHECKPOINTS / path)!r} "
        f"(found: {', '.join(present) or 'none'}); download one with scripts/download.py --repo_id ORG/MODEL"
    )


def check_checkpoint_dir(path: str | Path) -> Path:
    """Resolve ``path`` and require that it holds a converted checkpoint."""
    directory = resolve_checkpoint_dir(path)
    missing = [name for name in (MODEL_CONFIG, MANIFEST) if not (directory / name).is_file()]
    if missing and (directory / MODEL_DIR / MANIFEST).is_file():
        raise InputError(f"{directory} is a run; its model is {directory / MODEL_DIR}")
    adapters = (directory / ADAPTER_CONFIG, directory / ADAPTER_DIR / ADAPTER_CONFIG)
    if missing and any(path.is_file() for path in adapters) and not (directory / HF_CONFIG).is_file():
        raise InputError(
            f"{directory} is a LoRA adapter, not a checkpoint; give it as --lora_path, or merge it: "
            f"python scripts/merge_lora.py --lora_path {directory} --out_dir DIR"
        )
    if missing:
        raise InputError(
            f"{directory} is not a converted checkpoint: {' and '.join(missing)} missing; "
            f"run: python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}"
        )
    return directory


def copied_files(directory: Path) -> list[str]:
    """The text files that go from a checkpoint_dir into what is made of it.

    InputError for a link out of it, which would carry whatever it points to along; the Hub's cache may link to its own
    ``blobs``, beside the ``snapshots`` that hold the directory.
    """
    names, here = [name for name in TOKENIZER_FILES if (directory / name).is_file()], directory.resolve()
    blobs = here.parent.with_name("blobs") if here.parent.name == "snapshots" else here
    for name in (*names, HF_CONFIG):
        target = (directory / name).resolve()
        if not target.is_relative_to(here) and target.parent != blobs:
            raise InputError(
                f"{directory / name} is a link to {target}, out of its directory; put the file itself there"
            )
    return names


def check_new(path: str | Path, flag: str) -> Path:
    """Require that nothing is at ``path`` yet, an empty folder aside; ``flag`` is the one that named it."""
    found = Path(path)
    if found.exists() and not (found.is_dir() and not any(found.iterdir())):
        raise InputError(f"--{flag} {found} exists and is not an empty folder; name another")
    return found


def only_checkpoint_dir() -> Path:
    """The one converted checkpoint below ``checkpoints/``; InputError, listing them, when none or several exist."""
    found = sorted(p.parent for p in CHECKPOINTS.glob(f"*/*/{MODEL_CONFIG}"))
    if len(found) == 1:
        return found[0]
    what = "several converted checkpoints exist: " + ", ".join(map(str, found)) if found else "no converted checkpoint"
    raise InputError(f"{what} below {CHECKPOINTS}/; name one with --checkpoint_dir")


def check_data_dir(path: str | Path) -> Path:
    """Require that ``path`` is a directory a prepare script finished writing."""
    directory = Path(path)
    if directory.is_file():
        raise InputError(f"{path} is a file; prepare it first: python scripts/prepare_dataset.py --data_file {path}")
    if not directory.is_dir():
        present = ", ".join(str(p.parent) for p in sorted(Path("data").glob(f"*/{MANIFEST}"))) or "none"
        raise InputError(f"no data directory {str(path)!r} (found: {present}); make it with a scripts/prepare_*.py")
    if not (directory / MANIFEST).is_file():
        raise InputError(f"{directory} is not prepared: {MANIFEST} missing; run a scripts/prepare_*.py on your data")
    return directory
