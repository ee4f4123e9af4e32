"""The command line's contract: the flags and doors of every command, what refusals look like, what never leaks."""

import csv
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from conftest import ROOT, instruction_texts, make_hf_llama
from hub_server import HubServer, Repo

from lit_sft import cli
from lit_sft.args import Args, ConvertArgs, MergeArgs
from lit_sft.errors import InputError
from lit_sft.redact import LONGEST, command_line, without_secrets

COMMANDS = sorted(cli.commands())
TRAINING = ("full", "lora")
HELP_SECONDS = 0.5


def main_of(name: str) -> Callable:
    return import_module(cli.commands()[name]).main


def arguments_of(name: str) -> type[Args]:
    return next(iter(get_type_hints(main_of(name)).values()))


def script_of(name: str) -> Path:
    return next(path for folder in ("finetune", "scripts") if (path := ROOT / folder / f"{name}.py").is_file())


def doors(name: str) -> dict[str, list[str]]:
    """The two ways to start a command from a checkout; tests/test_install.py has the installed ``lit-sft``."""
    return {
        "script": [sys.executable, str(script_of(name))],
        "lit-sft": [sys.executable, "-m", "lit_sft.cli", name],
    }


def environment(**more: str) -> dict[str, str]:
    """A process that finds this checkout, wraps no help text, and never reaches for a network or a stored token."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"PYTHONPATH": str(ROOT), "COLUMNS": "1000", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return kept | ours | more


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def refusal(self, code: int = 2) -> str:
        """The one line that a refused command writes to stderr."""
        assert self.code == code, (self.code, self.stdout, self.stderr)
        assert self.stderr.startswith("error: ") and self.stderr.count("\n") == 1 and self.stderr.endswith("\n")
        assert "Traceback" not in self.stdout + self.stderr and "error: unexpected" not in self.stderr
        return self.stderr.removeprefix("error: ").rstrip("\n")

    def ok(self) -> str:
        assert self.code == 0, (self.code, self.stdout, self.stderr)
        return self.stdout


def process(command: list[str], cwd: Path, **more: str) -> Outcome:
    done = subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=60)
    return Outcome(done.returncode, done.stdout, done.stderr)


def parsed(name: str, *argv: str) -> Args:
    """What a command's main is called with; SystemExit when it is not called."""
    received: list[Args] = []

    def main(args: Args) -> None:
        received.append(args)

    main.__annotations__["args"] = arguments_of(name)
    with pytest.raises(SystemExit) as end:
        cli.run(main, list(argv), prog=name)
    if end.value.code:
        raise end.value
    return received[0]


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., Outcome]:
    """``command(name, *argv)`` runs a command in this process, which spares the seconds of importing torch anew."""

    def run(name: str, *argv: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(main_of(name), list(argv), prog=f"lit-sft {name}")
        return Outcome(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """A working directory with three converted checkpoints and a raw one, prepared data, and a finished LoRA run.

    ``cousin`` shares base's tokenizer, not its weights; ``stranger`` has a tokenizer of its own.
    """
    import sentencepiece

    world = tmp_path_factory.mktemp("world")
    test = world / "checkpoints" / "test"
    make_hf_llama(test / "base", tokenizer_model)
    make_hf_llama(test / "cousin", tokenizer_model, seed=1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(instruction_texts()),
        model_prefix=str(world / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        minloglevel=2,
    )
    make_hf_llama(test / "stranger", (world / "tokenizer.model").read_bytes(), vocab_size=380)
    shutil.copytree(test / "base", test / "raw")
    shutil.copy(ROOT / "demo" / "instructions.csv", world / "my.csv")
    (world / "data" / "bare").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for name in ("base", "cousin", "stranger"):
            _well("convert_hf_checkpoint", "--checkpoint_dir", f"test/{name}")
        _well("prepare_csv", "--csv_path", "my.csv", "--checkpoint_dir", "test/base")
        _well("lora", "--data_dir=data/csv", "--max_steps=1", "--global_batch_size=2", "--device=cpu")
    return world


def _well(name: str, *argv: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(main_of(name), list(argv), prog=name)
    assert end.value.code == 0, (name, argv)


@pytest.fixture
def world(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``made`` as the working directory, shared by the tests: they only look, or clean up."""
    monkeypatch.chdir(made)
    return made


def listing(directory: Path) -> dict[str, tuple[int, int] | None]:
    """All that is below a directory, with size and time of writing; a run's lock, rewritten by who looks, by name."""
    found = {}
    for path in directory.rglob("*"):
        fixed = path.is_file() and path.name != ".lock"
        found[str(path.relative_to(directory))] = (path.stat().st_size, path.stat().st_mtime_ns) if fixed else None
    return found


# --- help ---


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("door", ["script", "lit-sft"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete_and_fast(name: str, door: str, tmp_path: Path):
    seconds = []
    for _ in range(3):  # the best of three, in seconds of a core: the machine may be busy with something else
        started = _seconds_of_children()
        text = process([*doors(name)[door], "--help"], tmp_path).ok()
        seconds.append(_seconds_of_children() - started)
        if seconds[-1] < HELP_SECONDS:
            break
    assert min(seconds) < HELP_SECONDS
    for f in fields(arguments_of(name)):
        for flag in (f.name, *f.metadata["aliases"]):
            assert re.search(rf"--{flag}\b", text), flag
        assert f.metadata["help"] in text, f.name
    assert (" ".join((import_module(cli.commands()[name]).__doc__).split())) in " ".join(text.split())
    assert not any(tmp_path.iterdir())


def test_help_imports_nothing_heavy(tmp_path: Path):
    """One process asks every command for its help: none of them may have loaded what takes seconds."""
    code = """
import sys
from importlib import import_module
from lit_sft import cli
for name, module in cli.commands().items():
    try:
        cli.run(import_module(module).main, ["--help"], prog=name)
    except SystemExit as end:
        assert end.code == 0, name
heavy = {"torch", "lightning", "transformers", "datasets", "tokenizers", "sentencepiece", "huggingface_hub", "pyarrow"}
print("loaded:", sorted(heavy & sys.modules.keys()))
"""
    text = process([sys.executable, "-c", code], tmp_path).ok()
    assert text.endswith("loaded: []\n")
    assert text.count("usage: ") == len(COMMANDS)


# --- the flags of the contract: flag → the field that it fills, a value as typed, the value as received ---

TEXT = ("some text", "some text")
TRAIN_FLAGS: dict[str, tuple[str, str, Any]] = {
    "checkpoint_dir": ("checkpoint_dir", *TEXT),
    "data_dir": ("data_dir", *TEXT),
    "out_dir": ("out_dir", *TEXT),
    "resume": ("resume", *TEXT),
    "seed": ("seed", "7", 7),
    "device": ("device", "mps", "mps"),
    "devices": ("devices", "2", 2),
    "precision": ("precision", "bf16-mixed", "bf16-mixed"),
    "epochs": ("epochs", "null", None),
    "max_steps": ("max_steps", "5", 5),
    "max_iters": ("max_iters", "1000", 1000),
    "max_time": ("max_time", "1.5", 1.5),
    "global_batch_size": ("global_batch_size", "8", 8),
    "micro_batch_size": ("micro_batch_size", "4", 4),
    "micro_batch_tokens": ("micro_batch_tokens", "4096", 4096),
    "share_prefix": ("share_prefix", "false", False),
    "activation_checkpointing": ("activation_checkpointing", "2", "2"),
    "max_seq_length": ("max_seq_length", "512", 512),
    "override_max_seq_length": ("max_seq_length", "2048", 2048),
    "learning_rate": ("learning_rate", "3e-4", 3e-4),
    "lr_schedule": ("lr_schedule", "linear", "linear"),
    "min_lr": ("min_lr", "1e-6", 1e-6),
    "lr_warmup_steps": ("lr_warmup_steps", "0", 0),
    "weight_decay": ("weight_decay", "0", 0.0),
    "max_norm": ("max_norm", "null", None),
    "eval_interval": ("eval_interval", "10", 10),
    "save_interval": ("save_interval", "10", 10),
    "save_minutes": ("save_minutes", "2.5", 2.5),
    "keep_last": ("keep_last", "4", 4),
    "keep_best": ("keep_best", "false", False),
    "on_nonfinite": ("on_nonfinite", "skip", "skip"),
    "estimate": ("estimate", "true", True),
    "rehearse": ("rehearse", "false", False),
}
LORA_FLAGS = {
    "lora_r": ("lora_r", "8", 8),
    "lora_alpha": ("lora_alpha", "16", 16.0),
    "lora_dropout": ("lora_dropout", "0.05", 0.05),
    "lora_query": ("lora_query", "false", False),
    "lora_key": ("lora_key", "false", False),
    "lora_value": ("lora_value", "false", False),
    "lora_projection": ("lora_projection", "false", False),
    "lora_mlp": ("lora_mlp", "false", False),
    "lora_head": ("lora_head", "true", True),
}
PREPARE_FLAGS = {
    "checkpoint_dir": ("checkpoint_dir", *TEXT),
    "destination_path": ("destination_path", *TEXT),
    "data_file": ("data_file", *TEXT),
    "csv_path": ("data_file", *TEXT),
    "csv_dir": ("data_file", *TEXT),
    "max_seq_length": ("max_seq_length", "2048", 2048),
    "val_split_fraction": ("val_split_fraction", "0.2", 0.2),
    "test_split_fraction": ("val_split_fraction", "0", 0.0),
    "seed": ("seed", "7", 7),
    "mask_prompt": ("mask_prompt", "false", False),
    "mask_inputs": ("mask_prompt", "false", False),
    "prompt_style": ("prompt_style", *TEXT),
    "system_prompt": ("system_prompt", *TEXT),
    "val_file": ("val_file", *TEXT),
    "data_file_url": ("data_file_url", *TEXT),
    "data_file_name": ("data_file_name", *TEXT),
    "data_repo_id": ("data_repo_id", *TEXT),
    "repo_id": ("data_repo_id", *TEXT),
    "data_config": ("data_config", *TEXT),
    "data_split": ("data_split", *TEXT),
    "data_val_split": ("data_val_split", *TEXT),
    "on_overflow": ("on_overflow", "drop", "drop"),
    "on_error": ("on_error", "skip", "skip"),
    "show": ("show", "3", 3),
    "max_examples": ("max_examples", "1000", 1000),
    "order": ("order", "length", "length"),
    "deduplicate": ("deduplicate", "near", "near"),
    "near_duplicate_similarity": ("near_duplicate_similarity", "0.9", 0.9),
    "on_leakage": ("on_leakage", "move", "move"),
    "min_tokens": ("min_tokens", "10", 10),
    "max_tokens": ("max_tokens", "1000", 1000),
    "min_response_tokens": ("min_response_tokens", "3", 3),
    "min_alphanumeric_share": ("min_alphanumeric_share", "0.5", 0.5),
    "max_repetition_share": ("max_repetition_share", "0.3", 0.3),
    "num_workers": ("num_workers", "2", 2),
    "ignore_index": ("ignore_index", "-1", -1),
    "access_token": ("access_token", *TEXT),
}
GENERATE_FLAGS = {
    "checkpoint_dir": ("checkpoint_dir", *TEXT),
    "adapter_dir": ("adapter_dir", *TEXT),
    "lora_path": ("adapter_dir", *TEXT),
    "prompt": ("prompt", *TEXT),
    "input": ("input", *TEXT),
    "prompt_style": ("prompt_style", *TEXT),
    "system_prompt": ("system_prompt", *TEXT),
    "num_samples": ("num_samples", "2", 2),
    "max_new_tokens": ("max_new_tokens", "50", 50),
    "top_k": ("top_k", "null", None),
    "top_p": ("top_p", "0.9", 0.9),
    "temperature": ("temperature", "0", 0.0),
}
LEAVING_FLAGS = {
    "checkpoint_dir": ("checkpoint_dir", *TEXT),
    "lora_path": ("lora_path", *TEXT),
    "adapter_dir": ("lora_path", *TEXT),
}
CONTRACT = {
    "lora": TRAIN_FLAGS | LORA_FLAGS,
    "full": TRAIN_FLAGS,
    "prepare_csv": PREPARE_FLAGS
    | {f"{part}_column": (f"{part}_column", *TEXT) for part in ("instruction", "input", "output", "messages", "text")},
    "prepare_alpaca": PREPARE_FLAGS | {"variant": ("variant", "libre", "libre")},
    "prepare_dolly": PREPARE_FLAGS,
    "prepare_flan": PREPARE_FLAGS | {"subsets": ("subsets", *TEXT)},
    "prepare_lima": PREPARE_FLAGS
    | {"include_multiturn_conversations": ("include_multiturn_conversations", "true", True)},
    "prepare_longform": PREPARE_FLAGS,
    "prepare_oasst": PREPARE_FLAGS | {"languages": ("languages", *TEXT), "lang": ("languages", *TEXT)},
    "prepare_dataset": {
        "data_repo_id": ("data_repo_id", *TEXT),
        "repo_id": ("data_repo_id", *TEXT),
        "data_file_url": ("data_file_url", *TEXT),
    },
    "download": {
        "repo_id": ("repo_id", *TEXT),
        "revision": ("revision", *TEXT),
        "access_token": ("access_token", *TEXT),
        "from_safetensors": ("from_safetensors", "false", False),
    },
    "convert_hf_checkpoint": {
        "checkpoint_dir": ("checkpoint_dir", *TEXT),
        "dtype": ("dtype", "bfloat16", "bfloat16"),
        "model_name": ("model_name", *TEXT),
        "verify": ("verify", "true", True),
    },
    "doctor": {"checkpoint_dir": ("checkpoint_dir", *TEXT)},
    "estimate": TRAIN_FLAGS
    | LORA_FLAGS
    | {
        "device_memory_gb": ("device_memory_gb", "24", 24.0),
        "full": ("full", "true", True),
        "micro_batch_tokens": ("micro_batch_tokens", "auto", "auto"),
    },
    "generate": GENERATE_FLAGS,
    "merge_lora": {name: (name, *TEXT) for name in ("lora_path", "checkpoint_dir", "out_dir")},
    "verify": {"path": ("path", *TEXT)},
    "export_hf": LEAVING_FLAGS | {"out_dir": ("out_dir", *TEXT), "dtype": ("dtype", "bfloat16", "bfloat16")},
    "export_gguf": LEAVING_FLAGS | {"out_file": ("out_file", *TEXT), "quantize": ("quantize", "q8_0", "q8_0")},
    "export_peft": LEAVING_FLAGS | {"out_dir": ("out_dir", *TEXT)},
    "import_peft": {name: (name, *TEXT) for name in ("peft_dir", "checkpoint_dir", "out_dir", "prompt_style")},
    "convert_lit_checkpoint": {name: (name, *TEXT) for name in ("checkpoint_path", "output_path", "config_path")},
}
REQUIRED = {
    "estimate": {"data_dir": "data"},
    "doctor": {"checkpoint_dir": "base"},
    "convert_hf_checkpoint": {"checkpoint_dir": "base"},
    "merge_lora": {"lora_path": "adapter", "out_dir": "out"},
    "export_hf": {"checkpoint_dir": "base", "out_dir": "out"},
    "export_gguf": {"checkpoint_dir": "base", "out_file": "x.gguf"},
    "export_peft": {"lora_path": "adapter", "out_dir": "out"},
    "import_peft": {"peft_dir": "peft", "checkpoint_dir": "base", "out_dir": "out"},
    "convert_lit_checkpoint": {"checkpoint_path": "base", "output_path": "out"},
    "prepare_dataset": {},
    "verify": {"path": "out/run"},
}
DEFAULTS = {
    "lora": {
        "device": "auto", "devices": 1, "epochs": 3, "max_steps": None, "max_iters": None, "max_time": None,
        "micro_batch_size": 1, "learning_rate": 2e-4, "lr_schedule": "cosine", "lora_r": 16, "lora_alpha": 32,
        "lora_dropout": 0, "lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True,
        "lora_mlp": True, "lora_head": False,
    },
    "full": {"learning_rate": 2e-5, "epochs": 3},
    "prepare_csv": {"on_overflow": "truncate", "mask_prompt": True, "max_seq_length": None, "seed": 42},
    "prepare_alpaca": {"val_split_fraction": 0.03865, "variant": "cleaned"},
    "prepare_dolly": {"val_split_fraction": 0.1, "data_repo_id": "databricks/databricks-dolly-15k"},
    "prepare_longform": {"data_repo_id": "akoksal/LongForm", "data_val_split": "validation"},
    "prepare_flan": {"data_repo_id": "Muennighoff/flan", "data_val_split": "test", "subsets": None},
    "prepare_oasst": {"data_repo_id": "OpenAssistant/oasst1", "data_val_split": "validation", "languages": None},
    "prepare_lima": {"data_repo_id": "GAIR/lima", "val_split_fraction": 0.1},
    "convert_hf_checkpoint": {"dtype": None, "verify": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contracts_flags_are_there(name: str):
    required = REQUIRED.get(name, {})
    for flag, (field, typed, received) in CONTRACT[name].items():
        others = [f"--{key}={value}" for key, value in required.items() if key != field]
        extra = ["--max_steps=1"] if flag == "epochs" else []  # without epochs there must be another limit
        value = getattr(parsed(name, *others, *extra, f"--{flag}", typed), field)
        assert value == received and type(value) is type(received), flag
    defaults = parsed(name, *(f"--{key}={value}" for key, value in required.items())) if name in DEFAULTS else None
    for field, value in DEFAULTS.get(name, {}).items():
        assert getattr(defaults, field) == value, field


def test_every_command_has_its_contract():
    assert sorted(CONTRACT) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_satisfy_their_own_types(name: str):
    """A default that its flag would refuse could not be saved and read back."""
    for f in fields(arguments_of(name)):
        default = f.default_factory() if f.default is MISSING else f.default
        typed = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        if not (default is None and f.type == str | None):  # optional text is absent, never "null"
            others = {k: v for k, v in REQUIRED.get(name, {}).items() if k != f.name}
            others |= {"data_file": "a.csv"} if name == "prepare_dataset" else {}
            others |= {"max_steps": "1"} if f.name == "epochs" else {}
            args = parsed(name, f"--{f.name}={typed}", *(f"--{k}={v}" for k, v in others.items()))
            assert getattr(args, f.name) == default


# --- wrong input: (command, flags, what the line must say) ---

NO_SUCH_THING: list[tuple[str, str, list[str], str]] = [
    # the flags themselves
    ("unknown flag", "lora", ["--batch_size", "4"], "unrecognized arguments: --batch_size;"),
    ("stray word", "generate", ["hello"], "unrecognized arguments: a word that no flag takes"),
    ("abbreviated flag", "generate", ["--check", "checkpoints/test/base"], "unrecognized arguments: --check"),
    ("abbreviated to the last letter", "lora", ["--lora_alph=3"], "unrecognized arguments: --lora_alph;"),
    ("hyphens", "generate", ["--lora-path", "x"], "unrecognized arguments: --lora-path"),
    ("no value", "generate", ["--prompt"], "--prompt: expected one argument"),
    ("a value with a dash", "generate", ["--prompt", "--what"], "--FLAG=VALUE"),
    ("int", "generate", ["--max_new_tokens", "many"], "--max_new_tokens: expected int, got many"),
    ("int with a fraction", "lora", ["--lora_r", "1.5"], "--lora_r: expected int, got 1.5"),
    ("optional int", "lora", ["--max_steps", "true"], "--max_steps: expected int, got true"),
    ("optional int, empty", "lora", ["--max_steps", ""], "--max_steps: expected int"),
    ("float", "generate", ["--temperature", "hot"], "--temperature: expected float, got hot"),
    ("float that is none", "lora", ["--learning_rate", "nan"], "--learning_rate"),
    ("optional float", "lora", ["--max_time", "1h"], "--max_time: expected float, got 1h"),
    ("bool", "lora", ["--lora_head", "maybe"], "--lora_head: expected bool, got maybe"),
    ("bool without a value", "lora", ["--lora_head"], "--lora_head: expected one argument"),
    ("Literal", "lora", ["--device", "tpu"], "'auto', 'cpu', 'cuda', 'mps'], got tpu"),
    ("optional Literal", "lora", ["--precision", "fp8"], "'16-mixed'], got fp8"),
    ("Literal of preparation", "prepare_csv", ["--on_overflow", "ignore"], "'truncate', 'drop', 'error'], got ignore"),
    ("class path", "generate", ["--prompt.class_path", "subprocess.Popen"], "--prompt"),
    # their values
    ("zero steps", "lora", ["--max_steps", "0"], "--max_steps 0 must be above 0"),
    ("negative epochs", "full", ["--epochs", "-1"], "--epochs -1 must be above 0"),
    ("zero iterations", "lora", ["--max_iters", "0"], "--max_iters 0 must be above 0"),
    ("negative time", "lora", ["--max_time", "-1"], "--max_time -1.0 must be above 0"),
    ("zero batch", "lora", ["--global_batch_size", "0"], "--global_batch_size 0 must be above 0"),
    ("nf4 in fp64", "lora", ["--quantize=nf4", "--precision=64-true"], "nf4 does not go with --precision 64-true"),
    ("checkpointing", "lora", ["--activation_checkpointing", "some"], "must be none, auto, all or a number above 0"),
    ("zero row", "lora", ["--micro_batch_tokens", "0"], "--micro_batch_tokens 0 must be above 0"),
    ("zero micro-batch", "lora", ["--micro_batch_size", "0"], "--micro_batch_size 0 must be above 0"),
    ("no devices", "lora", ["--devices", "0"], "--devices 0 must be above 0"),
    ("never saved", "lora", ["--save_interval", "0"], "--save_interval 0 must be above 0"),
    ("zero learning rate", "full", ["--learning_rate", "0"], "--learning_rate 0.0 must be above 0"),
    ("infinite learning rate", "full", ["--learning_rate", "inf"], "--learning_rate"),
    ("negative warmup", "lora", ["--lr_warmup_steps", "-1"], "--lr_warmup_steps -1 must not be negative"),
    ("negative decay", "lora", ["--weight_decay", "-1"], "--weight_decay -1.0 must not be negative"),
    ("rising schedule", "lora", ["--min_lr", "1"], "--min_lr 1.0 must be between 0 and --learning_rate"),
    ("no limit", "lora", ["--epochs", "null"], "one of --epochs, --max_steps and --max_iters is needed"),
    ("rank of a file", "lora", ["--lora_r=1" + "0" * 31], "00 must be a number of at most 65,536"),
    ("rank of a disk", "estimate", ["--lora_r=4611686018427387904"], "--lora_r 4611686018427387904 must be a num"),
    ("far length", "lora", ["--max_seq_length=1" + "0" * 31], "00 must be a number of at most 2,147,483,647"),
    ("far alpha", "lora", ["--lora_alpha=1e308"], "--lora_alpha 1e+308 must be a number of at most 1,000,000"),
    ("far rate", "full", ["--learning_rate=1e308"], "--learning_rate 1e+308 must be a number of at most"),
    ("many devices", "lora", ["--devices=2000"], "--devices 2000 must be a number of at most 1,024"),
    ("long checkpointing", "lora", ["--activation_checkpointing=" + "9" * 5000], "999 must be none, auto, all or a nu"),
    ("no memory", "estimate", ["--data_dir=data", "--device_memory_gb=5e-324"], "_gb 5e-324 must be above 0.6"),
    ("endless memory", "estimate", ["--data_dir=data", "--device_memory_gb=1e308"], "1e+308 must be a number of at"),
    ("rank", "lora", ["--lora_r", "0"], "--lora_r 0 must be above 0"),
    ("huge rank", "lora", ["--lora_r=99999999999999999999"], "must be a number of at most 65,536"),
    ("huge alpha", "lora", ["--lora_alpha=1e308"], "--lora_alpha 1e+308 must be a number of at most 1,000,000"),
    ("dropout", "lora", ["--lora_dropout", "1"], "--lora_dropout 1.0 must be in [0, 1)"),
    ("huge seed", "lora", ["--seed", "99999999999999999999"], "999999 must be a number of at most 4,294,967"),
    ("negative seed", "prepare_csv", ["--csv_path=my.csv", "--seed=-1"], "--seed -1 must be in"),
    ("length", "prepare_csv", ["--csv_path", "my.csv", "--max_seq_length", "1"], "--max_seq_length 1 must be at least"),
    ("split", "prepare_csv", ["--csv_path", "my.csv", "--val_split_fraction", "1"], "must be in [0, 1)"),
    ("scores alone", "prepare_csv", ["--csv_path=my.csv", "--keep_scores=s"], "--keep_scores and --min_score go toge"),
    ("share", "prepare_csv", ["--csv_path=my.csv", "--max_repetition_share=2"], "repetition_share 2.0 must be in"),
    ("no workers", "prepare_csv", ["--csv_path=my.csv", "--num_workers=0"], "--num_workers 0 must be above 0"),
    ("no mix", "prepare_dataset", ["--mix=no.yaml", "--checkpoint_dir=test/base"], "--mix no.yaml does not exist"),
    ("no new tokens", "generate", ["--max_new_tokens", "0"], "--max_new_tokens 0 must be above 0"),
    ("no samples", "generate", ["--num_samples", "-1"], "--num_samples -1 must be above 0"),
    ("top_k", "generate", ["--top_k", "0"], "--top_k 0 must be above 0"),
    ("top_p", "generate", ["--top_p", "0"], "--top_p 0.0 must be between 1e-6 and 1"),
    ("top_p that is none", "generate", ["--top_p=5e-324"], "--top_p 5e-324 must be between 1e-6 and 1"),
    ("temperature", "generate", ["--temperature", "-1"], "--temperature -1.0 must not be negative"),
    ("empty out_dir", "lora", ["--out_dir", ""], "--out_dir is empty"),
    ("empty file", "prepare_alpaca", ["--data_file", ""], "--data_file is empty"),
    ("convert nothing", "convert_hf_checkpoint", [], "--checkpoint_dir is missing"),
    ("merge nothing", "merge_lora", [], "--lora_path is missing; --out_dir is missing"),
    ("export nothing", "export_hf", [], "--checkpoint_dir or --lora_path is needed; --out_dir is missing"),
    ("export nothing, gguf", "export_gguf", [], "--checkpoint_dir or --lora_path is needed; --out_file is missing"),
    ("export nothing, peft", "export_peft", [], "--lora_path is missing; --out_dir is missing"),
    ("import nothing", "import_peft", [], "--peft_dir is missing; --checkpoint_dir is missing; --out_dir is missing"),
    ("go back from nothing", "convert_lit_checkpoint", [], "--checkpoint_path is missing; --output_path is missing"),
    ("quantize", "export_gguf", ["--quantize", "q4_k"], "'bf16', 'q8_0'], got q4_k"),
    ("prepare nothing", "prepare_csv", ["--checkpoint_dir", "test/base"], "--csv_path is missing"),
    ("prepare two", "prepare_dataset", ["--data_file=my.csv", "--data_repo_id=a/b"], "--data_repo_id and --mix"),
    (
        "all problems at once",
        "lora",
        ["--lora_r=0", "--epochs=0", "--lr_warmup_steps=-2", "--lora_dropout=2"],
        "--lr_warmup_steps -2 must not be negative; --lora_r 0 must be above 0; --lora_dropout 2.0 must be",
    ),
    # checkpoints
    ("no checkpoint, convert", "convert_hf_checkpoint", ["--checkpoint_dir", "test/none"], "no checkpoint directory"),
    ("no checkpoint, generate", "generate", ["--checkpoint_dir", "test/none"], "scripts/download.py"),
    ("unconverted, generate", "generate", ["--checkpoint_dir", "test/raw"], "is not a converted checkpoint"),
    ("unconverted, prepare", "prepare_csv", ["--csv_path=my.csv", "--checkpoint_dir=test/raw"], "convert_hf_checkp"),
    ("unconverted, train", "lora", ["--data_dir=data/csv", "--checkpoint_dir=test/raw", "--out_dir=out/x"], "convert"),
    ("several", "generate", [], "checkpoints/test/base, checkpoints/test/cousin"),
    ("several, prepare", "prepare_csv", ["--csv_path", "my.csv"], "name one with --checkpoint_dir"),
    # data
    ("no data_dir", "lora", ["--data_dir", "data/none", "--out_dir=out/x"], "no data directory 'data/none'"),
    ("no data_dir, full", "full", ["--data_dir", "data/none", "--out_dir=out/x"], "no data directory 'data/none'"),
    ("unprepared", "lora", ["--data_dir", "data/bare", "--out_dir=out/x"], "is not prepared: manifest.json missing"),
    ("unprepared, full", "full", ["--data_dir", "data/bare", "--out_dir=out/x"], "run a scripts/prepare_*.py"),
    ("a checkpoint as data", "lora", ["--data_dir=checkpoints/test/base", "--out_dir=out/x"], "not a data directory"),
    (
        "another tokenizer",
        "lora",
        ["--data_dir=data/csv", "--checkpoint_dir=test/stranger", "--out_dir=out/x"],
        "prepare the data again with --checkpoint_dir checkpoints/test/stranger",
    ),
    (
        "another tokenizer, full",
        "full",
        ["--data_dir=data/csv", "--checkpoint_dir=test/stranger", "--out_dir=out/x"],
        "the shards were made with the tokenizer of checkpoints/test/base",
    ),
    ("no label left", "lora", ["--data_dir=data/csv", "--max_seq_length=9", "--out_dir=out/x"], "keep no label"),
    (
        "row too short",
        "lora",
        ["--data_dir=data/csv", "--micro_batch_tokens=9", "--out_dir=out/x"],
        "--micro_batch_tokens 9 is below the longest example",
    ),
    ("finished", "lora", ["--data_dir=data/csv"], "holds a finished run; --extend true"),
    ("16-mixed", "lora", ["--data_dir=data/csv", "--device=cpu", "--precision=16-mixed", "--out_dir=out/x"], "a GPU"),
    ("no file", "prepare_csv", ["--csv_path=none.csv", "--checkpoint_dir=test/base"], "none.csv does not exist"),
    ("a folder", "prepare_csv", ["--csv_dir=data", "--checkpoint_dir=test/base", "--overwrite=true"], "is a directory"),
    (
        "overflow",
        "prepare_csv",
        ["--csv_path=my.csv", "--checkpoint_dir=test/base", "--max_seq_length=9"],
        "examples keep no label when cut",
    ),
    ("no style", "prepare_csv", ["--csv_path=my.csv", "--checkpoint_dir=test/base", "--prompt_style=x"], "alpaca"),
    (
        "a checkpoint in the way",
        "prepare_csv",
        ["--csv_path=my.csv", "--checkpoint_dir=test/base", "--destination_path=checkpoints/test/base"],
        "exists and is not a data directory",
    ),
    # adapters and prompts
    ("no adapter", "generate", ["--adapter_dir", "out/none"], "no adapter at 'out/none'"),
    ("no adapter, merge", "merge_lora", ["--lora_path=out/none", "--out_dir=out/m"], "no adapter at 'out/none'"),
    ("another base", "generate", ["--adapter_dir=out/lora", "--checkpoint_dir=test/cousin"], "was trained on"),
    (
        "another base, merge",
        "merge_lora",
        ["--lora_path=out/lora", "--checkpoint_dir=test/cousin", "--out_dir=out/m"],
        "whose weights differ from those of checkpoints/test/cousin",
    ),
    (
        "merge into the base",
        "merge_lora",
        ["--lora_path=out/lora", "--out_dir=checkpoints/test/base"],
        "is not an empty folder",
    ),
    ("merge into a run", "merge_lora", ["--lora_path=out/lora", "--out_dir=out/lora"], "is not an empty folder"),
    ("export into the base", "export_hf", ["--lora_path=out/lora", "--out_dir=checkpoints/test/base"], "not an empty"),
    ("export a raw one", "export_hf", ["--checkpoint_dir=test/raw", "--out_dir=out/x"], "not a converted"),
    ("export a run", "export_hf", ["--checkpoint_dir=out/lora", "--out_dir=out/x"], "out/lora is a LoRA adapter"),
    ("export a run's adapter", "export_gguf", ["--checkpoint_dir=out/lora/adapter", "--out_file=out/x"],
     "is a LoRA adapter, not a checkpoint; give it as --lora_path"),
    ("export over a file", "export_gguf", ["--checkpoint_dir=test/base", "--out_file=my.csv"], "my.csv exists"),
    ("export an adapter that is none", "export_peft", ["--lora_path=data/csv", "--out_dir=out/x"], "no adapter at"),
    ("import what peft did not save", "import_peft",
     ["--peft_dir=data", "--checkpoint_dir=test/base", "--out_dir=out/x"], "data holds no adapter_config.json"),
    ("back over a file", "convert_lit_checkpoint", ["--checkpoint_path=test/base", "--output_path=my.csv"], "exists"),
    ("empty prompt", "generate", ["--checkpoint_dir=test/base", "--prompt="], "--prompt is empty"),
    ("long prompt", "generate", ["--checkpoint_dir=test/base", "--prompt=" + "llama " * 600], "model takes 1 to 511"),
    ("repository", "download", ["--repo_id", "llama"], "'llama' is not of the form ORG/MODEL"),
    # what is no text, or far too much of it
    ("a name that is no text", "prepare_csv", ["--csv_path=\udcff.csv", "--checkpoint_dir=test/base"], "is no UTF-8"),
    ("a folder that is no text", "prepare_csv", ["--csv_path=my.csv", "--destination_path=\udcff"], "is no UTF-8 text"),
    ("a prompt that is no text", "generate", ["--prompt=\udcff", "--checkpoint_dir=test/base"], "--prompt is no UTF-8"),
    ("a long name", "verify", ["x" * 9_000], "x … x"),
    ("a long style", "generate", ["--checkpoint_dir=test/base", "--prompt_style=" + "x" * 9_000], "x … x"),
    # --config
    ("no config", "lora", ["--config", "none.yaml"], "none.yaml"),
    ("config is a folder", "lora", ["--config", "data"], "data is no regular file"),
    ("config without end", "lora", ["--config", "/dev/zero"], "/dev/zero is no regular file"),
    ("mix without end", "prepare_dataset", ["--mix=/dev/zero", "--checkpoint_dir=test/base"], "is no regular file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argv", "says"), [pytest.param(*case[1:], id=f"{case[1]}: {case[0]}") for case in NO_SUCH_THING]
)
def test_wrong_input_is_refused_in_one_line(name: str, argv: list[str], says: str, world: Path, command: Callable):
    before = listing(world)
    line = command(name, *argv).refusal()
    assert says in line and len(line) <= LONGEST
    assert listing(world) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("promt: hello\n", "'promt' is not accepted"),
        ("prompt: [1\n", "did not find expected"),
        ("prompt: 'open\n", "quoted scalar"),
        ("\tprompt: x\n", "cannot start any token"),
        ("", "Unexpected config"),
        ("- prompt\n", "Unexpected config"),
        ("just words\n", "Unexpected config"),
        ("prompt: 123\n", "--prompt: expected str, got 123"),
        ("checkpoint_dir: 5\n", "--checkpoint_dir: expected str, got 5"),
        ("max_new_tokens: many\n", "--max_new_tokens: expected int, got many"),
        ("max_new_tokens: null\n", "--max_new_tokens must not be null"),
        ("device: null\n", "--device must not be null"),
        ("prompt: {class_path: subprocess.Popen, init_args: {args: [touch, pwned]}}\n", "--prompt: expected str"),
        ("class_path: subprocess.Popen\ninit_args: {args: [touch, pwned]}\n", "is not accepted"),
        ("prompt: !!python/object/apply:subprocess.call [[touch, pwned]]\n", "could not determine a constructor"),
        ("prompt: {a: b}\n", "--prompt: expected str"),
        ('prompt: "\\ud800"\n', "found invalid Unicode character escape code"),
        ("seed: [&a [x, x], &b [*a, *a], *b]\n", "--config flags.yaml: it has the alias *a; write out"),
        ('max_new_tokens: !!int ""\n', "--config flags.yaml: it holds a value that is none of its kind"),
        ('temperature: !!float ""\n', "--config flags.yaml: it holds a value that is none of its kind"),
        ("prompt: !!timestamp x\n", "--config flags.yaml: it holds a value that is none of its kind"),
        ("seed: " + "9" * 5000 + "\n", "--config flags.yaml: it has a number of 5,000 characters"),
        ("prompt: \udcff\n", "--config flags.yaml: 'utf-8' codec can't decode"),
        ("__path__: x\n", "'__path__' is not accepted"),
        ('checkpoint_dir: "a\\0b"\n', "--checkpoint_dir has a NUL character"),
    ],
)
def test_a_wrong_config_file_is_refused_and_runs_nothing(
    content: str, says: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flags.yaml").write_text(content, errors="surrogateescape")
    before = listing(tmp_path)
    assert says in command("generate", "--config", "flags.yaml").refusal()
    assert listing(tmp_path) == before  # in particular, nobody touched "pwned"


@pytest.mark.parametrize("name", ["generate", *TRAINING])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_absent_device_is_refused(name: str, device: str, world: Path, command: Callable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    where = ["--checkpoint_dir=test/base"] if name == "generate" else ["--data_dir=data/csv", "--out_dir=out/x"]
    before = listing(world)
    says = command(name, f"--device={device}", *where).refusal()
    assert f"--device {device}: this machine has none" in says and "--device auto" in says
    assert listing(world) == before


@pytest.mark.parametrize(
    ("door", "name", "argv"),
    [
        ("script", "lora", ["--batch_size", "4"]),
        ("lit-sft", "prepare_csv", ["--csv_path=my.csv", "--check=test/base"]),
        ("lit-sft", "generate", ["--checkpoint_dir", "test/none"]),
        ("script", "lora", ["--data_dir=data/csv", "--checkpoint_dir=test/stranger", "--out_dir=out/x"]),
    ],
)
def test_real_processes_refuse_as_well(door: str, name: str, argv: list[str], world: Path, command: Callable):
    """A sample of the table as a user meets it: what other libraries write to the real stderr would show here."""
    before = listing(world)
    says = process([*doors(name)[door], *argv], world).refusal()
    assert says.replace(f"; {name}.py --help", f"; lit-sft {name} --help") == command(name, *argv).refusal()
    assert listing(world) == before


def test_nothing_to_resume(world: Path, command: Callable):
    says = command("lora", "--data_dir=data/csv", "--resume=out/y/z", "--out_dir=out/y", "--device=cpu").refusal()
    assert "out/y holds no run to go on with" in says
    assert not (world / "out" / "y" / "run.yaml").exists()


@pytest.mark.parametrize("rank", ["1", "abc"])
def test_a_rank_of_another_programs_processes_silences_nothing(rank: str, world: Path, command: Callable, monkeypatch):
    """What a launcher left in the environment; of processes that train together the first one speaks alone."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    command("generate", "--checkpoint_dir", "test/none").refusal()
    monkeypatch.setenv("LOCAL_RANK", rank)
    command("lora", "--data_dir=data/none").refusal()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("lora", "--data_dir=data/none") == Outcome(2, "", "")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("printf 'a\\377' |", "is no UTF-8 text"),
        ("</dev/null", "is empty"),
        ("<&-", "closed"),
        ("</dev/zero", "too long"),
    ],
)
def test_standard_input_that_is_no_prompt(given: str, says: str, world: Path):
    run = shlex.join([*doors("generate")["lit-sft"], "--prompt", "-", "--checkpoint_dir=test/base"])
    command = f"{given} {run}" if given.endswith("|") else f"{run} {given}"
    for locale in ({"PYTHONIOENCODING": "utf-8:strict"}, {"LC_ALL": "C"}):
        assert says in process(["bash", "-c", command], world, **locale).refusal()


def test_debug_shows_where(world: Path, command: Callable):
    for flags in (["--debug", "true"], ["--debug=true"], ["--debug", "yes"], ["--debug=True"]):
        outcome = command("generate", "--checkpoint_dir", "test/none", *flags)
        assert outcome.code == 2
        assert outcome.stderr.startswith("Traceback") and "\nerror: no checkpoint directory" in outcome.stderr
    command("generate", "--checkpoint_dir", "test/none", "--debug", "false").refusal()


def test_the_unexpected_is_one_line_and_another_code(command: Callable, capsys: pytest.CaptureFixture):
    def main(args: ConvertArgs) -> None:
        raise ZeroDivisionError("division\nby zero")

    with pytest.raises(SystemExit) as end:
        cli.run(main, ["--checkpoint_dir=x"], prog="x")
    assert end.value.code == 1
    assert (
        capsys.readouterr().err == "error: unexpected ZeroDivisionError: division by zero; --debug true shows where\n"
    )


# --- what is typed arrives ---

ODD_TEXTS = [
    "null", "~", "123", "1e3", "0x1f", "1_000", "true", "no", "off", "2024-01-01", "- a", "-", "---", "...", "|", "> x",
    "key: value", "[1, 2]", "[", "{a}", "{a: b}", '{"class_path": "os.system"}', "# x", "a # b", "&a", "*a", "!x", "%d",
    "@file", "`x`", "'", '"quoted"', "", " ", "  two  ", "two\nlines", "\n", "a\tb", "--flag", "-x", "--prompt=x", "=",
    "$HOME", "ünï 🦙 漢字", "\u2028", "a\\nb", "!!python/object/apply:os.system [ls]",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_TEXTS, ids=repr)
def test_text_arrives_as_typed(odd: str):
    assert parsed("generate", f"--input={odd}").input == odd  # text
    assert parsed("lora", f"--sample_prompt={odd}").sample_prompt == odd  # optional text
    if odd:
        assert parsed("generate", f"--prompt={odd}").prompt == odd
    if not odd.startswith("-") or odd in ("-", "- a"):
        assert parsed("generate", "--input", odd).input == odd
        assert parsed("lora", "--sample_prompt", odd).sample_prompt == odd


@pytest.mark.parametrize("odd", ODD_TEXTS, ids=repr)
def test_text_survives_a_config_file(odd: str, tmp_path: Path):
    file = tmp_path / "flags.yaml"
    flags = {"sample_prompt": odd, "data_dir": odd or "x"}
    file.write_text(yaml.safe_dump(flags, allow_unicode=True, default_style='"'))  # every text in quotes
    args = parsed("lora", "--config", str(file))
    assert (args.sample_prompt, args.data_dir) == (odd, odd or "x")


def test_flags_win_over_the_config_file_in_any_order(tmp_path: Path):
    file = tmp_path / "flags.yaml"
    file.write_text("max_new_tokens: 9\ntemperature: 1e-1\ntop_k: null\nlora_path: run\n")
    for argv in (["--config", str(file), "--max_new_tokens", "4"], [f"--config={file}", "--max_new_tokens=4"]):
        args = parsed("generate", *argv)
        assert (args.max_new_tokens, args.temperature, args.top_k, args.adapter_dir) == (4, 0.1, None, "run")


def test_a_saved_set_of_arguments_is_a_config_file(tmp_path: Path):
    typed = [
        "--max_norm=null",
        "--learning_rate=1e-5",
        "--sample_prompt=# x",
        "--precision=bf16-true",
        "--lora_head=true",
    ]
    args = parsed("lora", *typed, "--max_time=90", "--weight_decay=0", "--out_dir=2024-01-01", "--data_dir=123")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(asdict(args), sort_keys=False))
    assert parsed("lora", "--config", str(file)) == args


@pytest.mark.parametrize("name", COMMANDS)
def test_print_config_gives_a_config_file(name: str, command: Callable, tmp_path: Path):
    required = [f"--{key}={value}" for key, value in REQUIRED.get(name, {}).items()]
    required += ["--data_file=a.csv"] if name == "prepare_dataset" else []
    file = tmp_path / "flags.yaml"
    file.write_text(command(name, *required, "--print_config").ok())
    assert list(yaml.safe_load(file.read_text())) == [f.name for f in fields(arguments_of(name))]
    assert parsed(name, "--config", str(file)) == parsed(name, *required)


# --- lit-sft itself ---


@pytest.fixture
def lit_sft(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``lit_sft(*argv)`` runs the installed entry's function in this process."""

    def run(*argv: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lit-sft", *argv])
        capsys.readouterr()
        try:
            code = cli.main() or 0
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_lit_sft_lists_its_commands(argv: list[str], lit_sft: Callable):
    text = lit_sft(*argv).ok()
    assert text.startswith("usage: lit-sft COMMAND")
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", text)


def test_lit_sft_refuses_an_unknown_command(lit_sft: Callable):
    for word in ("trian", "--epochs", "lora.py", "../lora", ""):
        outcome = lit_sft(word, "--epochs", "3")
        assert repr(word) in outcome.refusal()
        assert all(name in outcome.stdout for name in COMMANDS)


def test_lit_sft_tells_its_version(lit_sft: Callable):
    from lit_sft import __version__

    assert lit_sft("--version").ok() == f"lit_sft {__version__}\n"


def test_lit_sft_takes_hyphens(lit_sft: Callable):
    assert lit_sft("merge-lora", "--help").ok().startswith("usage: lit-sft merge_lora")
    assert "--lora_path is missing" in lit_sft("merge-lora").refusal()


# --- secrets ---

SECRET = "hf_CanaryThatMustNeverBeSeen"
OTHER_SECRET = "CanaryThatMustNeverBeSeen"  # a token of another Hub need not begin with hf_


@pytest.mark.parametrize("secret", [SECRET, OTHER_SECRET])
@pytest.mark.parametrize(
    "typed",
    [
        ["--acess_token", "{}"],
        ["--acess_token={}"],
        ["--access-token", "{}"],
        ["--token={}"],
        ["--hf_token", "{}"],
        ["--access_token", "{}", "--sed", "3"],
        ["--access_token={}", "--seed", "x"],
        ["--access_token", "{}", "--seed", "-1"],
        ["--access_token", "{}", "--data_file", "none.csv"],
        ["--access_token", "{}", "--print_config"],
        ["--access_token", "{}\n more", "--print_config"],
        ["--access_token", "{}", "--help"],
    ],
    ids=" ".join,
)
def test_a_token_is_never_shown(typed: list[str], secret: str, command: Callable):
    for debug in ([], ["--debug", "true"]):
        outcome = command("prepare_lima", *(word.format(secret) for word in typed), *debug)
        assert OTHER_SECRET not in outcome.stdout + outcome.stderr
        assert outcome.code == (0 if typed[-1] in ("--print_config", "--help") else 2)


@pytest.mark.parametrize(
    "typed",
    [
        *("--access_tokens={}", "--access_tokn={}", "--hf_token:{}", "--access_token[0]={}", "--access_token.x={}"),
        *("--access_token{}", "{}", "--token:{} {}"),
        *("access_token: [{}]", "access_token: {{a: {}}}", "access_token: !!python/name:{} x", "access_token: !{} x"),
        *("access_token: !<{}> x", "access_token: !!int {}", "access_token {}", "- {}", "access_token: 1{}: 2"),
    ],
)
def test_what_the_parser_does_not_take_for_a_token_is_not_shown_either(typed: str, command: Callable, tmp_path: Path):
    """Under a misspelt flag, in an index, in a config file: however short it is."""
    for secret in ("SECX", OTHER_SECRET):
        text = typed.format(*[secret] * 2)
        (tmp_path / "flags.yaml").write_text(text)
        argv = ["--config", str(tmp_path / "flags.yaml")] if " " in typed and "--" not in typed[:2] else text.split()
        outcome = command("download", *argv)
        assert outcome.refusal() and secret not in outcome.stdout + outcome.stderr


def test_a_token_of_several_lines_is_never_shown(world: Path, command: Callable):
    """The client prints the header that it refuses, so it is refused before."""
    flags = ["--repo_id=d/s", "--checkpoint_dir=test/base", "--destination_path=new"]
    says = command("prepare_alpaca", *flags, f"--access_token={OTHER_SECRET}\n\nb").refusal()
    assert "contains a character that no token has" in says and OTHER_SECRET not in says
    assert not (world / "new").exists()


def test_every_line_is_without_known_tokens(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Whoever wrote them, in whatever form; and without what logs in to an address, or signs it."""
    said = f"{SECRET}. http://{OTHER_SECRET}@h/ http://a:{OTHER_SECRET}@h:1/x?a={OTHER_SECRET}#{OTHER_SECRET}; more"
    forms = ["a word/of mine", "'a word/of\\nmine", "a%20word%2Fof%0Amine", "an environment's", "s3://u:a/b@c/d"]

    def main(args: ConvertArgs) -> None:
        raise InputError(" and ".join([said, *forms]), ["details: an environment's", said])

    monkeypatch.setenv("HF_TOKEN", "an environment's")
    with pytest.raises(SystemExit):
        cli.run(main, ["--checkpoint_dir=x", "--debug=true"], prog="x")
    assert "a word/of mine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        remembered = cli.remember_arguments
        monkeypatch.setattr(
            cli, "remember_arguments", lambda argv: remembered([*argv, "--access_token=a word/of\nmine"])
        )
        cli.run(main, ["--checkpoint_dir=x", "--debug=true"], prog="x")
    text = capsys.readouterr().err.splitlines()[-1]
    shown = "error: ***. http://***@h/ http://***@h:1/x?***; more and *** and '*** and *** and *** and s3://***@c/d"
    assert text == shown


def test_a_misplaced_token_is_never_shown(command: Callable, lit_sft: Callable, tmp_path: Path):
    (tmp_path / "flags.yaml").write_text(f"max_new_tokens: {SECRET}\n")
    for outcome in (
        command("generate", SECRET),
        command("generate", "--max_new_tokens", SECRET),
        command("generate", "--config", str(tmp_path / "flags.yaml")),
        command("generate", "--device", SECRET, "--debug", "true"),
        lit_sft(SECRET),
        lit_sft(f"--access_token={OTHER_SECRET}"),
        lit_sft(f"--access_tokn={OTHER_SECRET}"),
    ):
        assert outcome.code == 2
        assert OTHER_SECRET not in outcome.stdout + outcome.stderr


def test_what_looks_like_no_secret_stays():
    text = (
        "give --access_token or set HF_TOKEN; hf_model.py "
        "lit-sft lora --max_new_tokens 5 --max_token 3 --micro_batch_tokens=8 convert_hf_checkpoint --prompt a token b"
    )
    assert without_secrets(text) == text


@pytest.mark.parametrize("typed", [["--access_token", OTHER_SECRET], [f"--access_token={OTHER_SECRET}"]])
def test_the_recorded_command_has_no_token(typed: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["download.py", "--repo_id", "a/b", *typed, "--revision", "main"])
    assert OTHER_SECRET not in command_line()
    assert command_line().startswith("download.py --repo_id a/b --access_token")
    assert command_line().endswith("*** --revision main")


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        (["--access_token=a b;c d", "--seed=1"], "--access_token=*** --seed=1"),
        (["--access_token", "a b;c", "--seed=1"], "--access_token *** --seed=1"),
        (["--csv_path=https://me:a b@h/f.csv?token=x y&s=z#w"], "--csv_path=https://***@h/f.csv?***"),
        (["--csv_path", f"http://h:80/{SECRET}/f.csv"], "--csv_path http://h:80/***/f.csv"),
    ],
)
def test_secrets_are_found_word_by_word(typed: list[str], recorded: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["prepare_csv.py", *typed])
    assert command_line() == f"prepare_csv.py {recorded}"


def test_an_address_is_saved_without_what_signs_it(made: Path, command: Callable, tmp_path: Path, monkeypatch):
    content = (ROOT / "demo" / "instructions.csv").read_bytes()
    monkeypatch.chdir(tmp_path)
    with HubServer({"org/data": Repo({"d.csv": content})}) as hub:
        url = f"{hub.url}/org/data/resolve/main/d.csv?token={OTHER_SECRET}&X-Amz-Signature={OTHER_SECRET}"
        flags = [f"--csv_path={url}", f"--checkpoint_dir={made}/checkpoints/test/base", "--destination_path=new"]
        monkeypatch.setattr(sys, "argv", ["prepare_csv.py", *flags])
        outcome = command("prepare_csv", *flags)
    assert OTHER_SECRET not in outcome.ok() + outcome.stderr
    assert json.loads((tmp_path / "new/manifest.json").read_text())["facts"]["arguments"]["data_file"].endswith(
        "/d.csv?***"
    )
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and OTHER_SECRET.encode() in p.read_bytes()]


def test_both_doors_do_the_same_and_keep_the_token_to_themselves(world: Path, tmp_path: Path):
    """One real command through each: a script by its path, and lit-sft, which finds it by its name."""
    written = {}
    typed = {"script": ["--access_token", OTHER_SECRET], "lit-sft": [f"--access_token={SECRET}"]}
    for door, start in doors("prepare_csv").items():
        flags = ["--csv_path=my.csv", "--checkpoint_dir=test/base", f"--destination_path={tmp_path / door}"]
        text = process([*start, *flags, *typed[door]], world).ok()
        files = {path.name: path.read_bytes() for path in (tmp_path / door).iterdir()}
        assert not [name for name, content in files.items() if OTHER_SECRET.encode() in content]
        command = json.loads(files.pop("manifest.json"))["command"]
        assert command.endswith("***") and "--csv_path=my.csv" in command and OTHER_SECRET not in text
        written[door] = files
    assert written["script"] == written["lit-sft"] and "train-00000.pt" in written["script"]


# --- Ctrl-C ---


def interrupt(command: list[str], cwd: Path, sign: str) -> Outcome:
    """Start a command, press Ctrl-C when ``sign`` shows in its output, and see how it ends."""
    # The output goes to files: what a process writes after it was interrupted is read whole, and no pipe can fill up.
    with (cwd / "stdout").open("w+") as out, (cwd / "stderr").open("w+") as err:
        running = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=out,
            stderr=err,
            # tests that run in the background of a shell are deaf to Ctrl-C, and their children with them
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 40
            while sign not in (cwd / "stdout").read_text(errors="replace"):
                assert running.poll() is None, (cwd / "stderr").read_text()
                assert time.monotonic() < deadline, f"no {sign!r} after 40 s"
                time.sleep(0.02)
            running.send_signal(signal.SIGINT)
            code = running.wait(20)
        finally:
            running.kill()
            running.wait()
    texts = [(cwd / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    for name in ("stdout", "stderr"):
        (cwd / name).unlink()
    return Outcome(code, *texts)


@pytest.fixture
def big_csv(made: Path, tmp_path: Path) -> Path:
    """A working directory with a CSV that takes a while to prepare."""
    (tmp_path / "checkpoints").symlink_to(made / "checkpoints")
    rows = [(f"Question {i}?", "", "A long answer about llamas. " * 20) for i in range(20_000)]
    with (tmp_path / "big.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("instruction", "input", "output"), *rows])
    return tmp_path


def test_ctrl_c_while_preparing_leaves_nothing_but_what_goes_on(big_csv: Path):
    """What the same command can use again stays, if that is worth it; whether it is depends on the moment."""
    before = listing(big_csv)
    flags = ["--csv_path=big.csv", "--checkpoint_dir=test/base", "--destination_path=data/big"]
    outcome = interrupt([*doors("prepare_csv")["script"], *flags], big_csv, "reading")
    said, left = outcome.refusal(130), {name for name in listing(big_csv) if name not in before}
    if said == "interrupted; nothing is left half written":
        assert not left
    else:
        assert f"kept in {big_csv}/data/.partial-big: the same command goes on from there" in said
        assert left and all((name + "/").startswith(("data/.partial-big/", "data/")[name == "data"]) for name in left)


def test_ctrl_c_while_answering(made: Path):
    before = listing(made)
    flags = ["--checkpoint_dir=test/base", "--prompt=x", "--num_samples=100000", "--temperature=1"]
    outcome = interrupt([*doors("generate")["lit-sft"], *flags], made, "\n")
    assert outcome.refusal(130).startswith("interrupted")
    assert listing(made) == before


def test_ctrl_c_inside_a_write_leaves_nothing(world: Path, command: Callable, monkeypatch: pytest.MonkeyPatch):
    """The worst moment, hit exactly: the shards are there under a temporary name, the manifest is not."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_sft.atomic.Manifest.write", interrupted)
    before = listing(world)
    flags = ["--csv_path=my.csv", "--checkpoint_dir=test/base"]
    command("prepare_csv", *flags, "--destination_path=new").refusal(130)
    command("prepare_csv", *flags, "--destination_path=data/csv").refusal(130)  # what is there already stays
    command("merge_lora", "--lora_path=out/lora", "--out_dir=merged").refusal(130)
    assert listing(world) == before


def test_arguments_can_be_made_without_the_command_line():
    """The Python door to the same checks."""
    assert MergeArgs(lora_path="a", out_dir="b").debug is False
    with pytest.raises(Exception, match="--lora_path is missing"):
        MergeArgs(out_dir="b")
