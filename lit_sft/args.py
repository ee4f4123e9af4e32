"""The flags of every command, as dataclasses: a field is a flag, its text is the help. Scripts inherit what they share.

Validation happens here, once, with every problem reported together; nothing has touched the disk by then.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from lit_sft.errors import InputError

STYLES = "alpaca, alpaca-no-newline, llama2-chat, vicuna, hermes, platypus, beluga, plain or chat-template"
CHECKPOINT_DIR_HELP = "converted checkpoint, with or without checkpoints/ in front"


def arg(default: Any, text: str, *aliases: str) -> Any:
    """A dataclass field that is a flag, with its help and its other spellings."""
    return field(default=default, metadata={"help": text, "aliases": aliases})


@dataclass
class Args:
    """What every command accepts."""

    debug: bool = arg(False, "print a traceback when the command fails")

    def __post_init__(self) -> None:
        optional = {f.name: type(None) in get_args(f.type) for f in fields(self)}
        if nulls := [f"--{f} must not be null" for f, may in optional.items() if not may and getattr(self, f) is None]:
            raise InputError("; ".join(nulls))
        if problems := [text for text, wrong in self.checks().items() if wrong]:
            raise InputError("; ".join(problems))

    def checks(self) -> dict[str, bool]:
        """Problem → whether it is there. Subclasses add their own to ``super().checks()``."""
        paths = [f.name for f in fields(self) if f.name.endswith(("_dir", "_path", "_file"))]
        seed = getattr(self, "seed", 0)
        return {f"--{name} is empty": getattr(self, name) == "" for name in paths} | {
            f"--seed {seed} must be in [0, 2**32)": not 0 <= seed < 2**32
        }


@dataclass
class DownloadArgs(Args):
    """Flags of scripts/download.py."""

    repo_id: str | None = arg(None, "repository on the Hub, ORG/MODEL; without it the known models are listed")
    revision: str | None = arg(None, "branch, tag or commit")
    access_token: str | None = arg(None, "Hub token for gated models; the environment's HF_TOKEN is used by default")
    from_safetensors: bool = arg(True, "take safetensors where the repository has them; false: take its .bin files")
    checkpoint_dir: str | None = arg(None, "folder to fill (default: checkpoints/<repo_id>)")


@dataclass
class ConvertArgs(Args):
    """Flags of scripts/convert_hf_checkpoint.py."""

    checkpoint_dir: str | None = arg(None, "downloaded checkpoint, with or without checkpoints/ in front")
    dtype: Literal["float32", "bfloat16", "float16"] | None = arg(None, "precision to store (default: the source's)")
    model_name: str | None = arg(None, "accepted as in Lit-GPT, without effect: config.json says what the model is")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {"--checkpoint_dir is missing": self.checkpoint_dir is None}


@dataclass
class PrepareArgs(Args):
    """Flags that every scripts/prepare_*.py has."""

    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the only one there is)")
    destination_path: str | None = arg(None, "folder to write the shards to (default: data/<name>)")
    data_file: str | None = arg(
        None, "local file to read: .json, .jsonl, .csv, .tsv or .parquet", "csv_path", "csv_dir"
    )
    max_seq_length: int | None = arg(None, "longest example kept, in tokens (default: the model's context)")
    val_split_fraction: float = arg(0.1, "share of the samples held out for validation", "test_split_fraction")
    seed: int = arg(42, "seed of the train/val split")
    mask_prompt: bool = arg(True, "learn the responses only, not the prompts", "mask_inputs")
    prompt_style: str | None = arg(None, f"{STYLES}; default: the checkpoint's chat-template, else alpaca")
    on_overflow: Literal["truncate", "drop", "error"] = arg("truncate", "what happens to a too long example's response")
    on_error: Literal["fail", "skip"] = arg("fail", "what a malformed sample does: end the command, or be left out")
    ignore_index: int | None = arg(None, "accepted as in Lit-GPT, without effect: labels are masked by position")
    access_token: str | None = arg(None, "Hub token for gated datasets; the environment's HF_TOKEN is used by default")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {
            f"--max_seq_length {self.max_seq_length} must be at least 2": (self.max_seq_length or 2) < 2,
            f"--val_split_fraction {self.val_split_fraction} must be in [0, 1)": not 0 <= self.val_split_fraction < 1,
        }


@dataclass
class PrepareAlpacaArgs(PrepareArgs):
    """Flags of scripts/prepare_alpaca.py."""

    data_repo_id: str = arg("yahma/alpaca-cleaned", "dataset on the Hub, read when no --data_file is given")
    data_file_url: str | None = arg(None, "address of a JSON file to fetch instead of the Hub dataset")
    data_file_name: str | None = arg(None, "name under which the fetched file is kept beside the shards' folder")
    val_split_fraction: float = arg(0.03865, "share of the samples held out for validation", "test_split_fraction")


@dataclass
class PrepareLimaArgs(PrepareArgs):
    """Flags of scripts/prepare_lima.py."""

    data_repo_id: str = arg("GAIR/lima", "dataset on the Hub, read when no --data_file is given")
    include_multiturn_conversations: bool = arg(False, "whole dialogues with their history, not first turns only")


@dataclass
class PrepareCSVArgs(PrepareArgs):
    """Flags of scripts/prepare_csv.py."""

    instruction_column: str | None = arg(None, "column of the instruction (default: recognised by its name)")
    input_column: str | None = arg(None, "column of the optional input")
    output_column: str | None = arg(None, "column of the response")
    messages_column: str | None = arg(None, "column of whole dialogues: lists of {role, content} or {from, value}")


@dataclass
class PrepareDatasetArgs(PrepareCSVArgs):
    """Flags of scripts/prepare_dataset.py."""

    data_repo_id: str | None = arg(None, "dataset on the Hub, read when no --data_file is given", "repo_id")
    data_config: str | None = arg(None, "configuration (subset) of the Hub dataset")
    data_split: str = arg("train", "split of the Hub dataset")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        sources = (self.data_file is None) + (self.data_repo_id is None)
        return super().checks() | {"give one of --data_file and --data_repo_id": sources != 1}


@dataclass
class TrainArgs(Args):
    """Flags that every training command has."""

    data_dir: str = arg("data/alpaca", "folder a prepare script wrote")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the one the shards were made for)")
    out_dir: str = arg("out/run", "folder of this run: arguments, checkpoints, metrics, result")
    resume: str = arg(
        "auto", "auto: go on when out_dir holds an unfinished run; never: refuse; a path: from that state"
    )
    seed: int = arg(1337, "seed of the order of examples, of the adapter's start and of dropout")
    device: Literal["auto", "cpu", "cuda", "mps"] = arg("auto", "where to run")
    devices: int = arg(1, "number of devices; one process each")
    precision: Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"] | None = arg(
        None, "Fabric's name (default: bf16-true on CUDA, 32-true elsewhere); what is trained is kept in fp32 or better"
    )
    epochs: int | None = arg(3, "full passes over the data; the first limit reached ends the run")
    max_steps: int | None = arg(None, "most optimizer steps")
    max_iters: int | None = arg(None, "Lit-GPT's limit: this many times micro_batch_size examples, up to whole steps")
    max_time: float | None = arg(None, "stop, after saving, when this many seconds have passed; the schedule stays")
    global_batch_size: int | None = arg(
        None, "examples per optimizer step, over all devices (default: 64, at most n/4)"
    )
    micro_batch_size: int = arg(1, "most examples in a packed row, if above 1; otherwise only the unit of max_iters")
    micro_batch_tokens: int | None = arg(None, "longest packed row, in tokens (default: 8192 or the longest example)")
    max_seq_length: int | None = arg(None, "cut examples again, below the shards' length", "override_max_seq_length")
    learning_rate: float = arg(2e-4, "highest learning rate")
    lr_schedule: Literal["cosine", "linear", "constant"] = arg("cosine", "shape of the learning rate after warmup")
    min_lr: float = arg(0.0, "learning rate at the end of the schedule")
    lr_warmup_steps: int = arg(100, "optimizer steps of linear warmup, at most a tenth of the run")
    weight_decay: float = arg(0.01, "AdamW's weight decay")
    max_norm: float | None = arg(1.0, "gradients are clipped to this norm; null: never")
    eval_interval: int = arg(50, "optimizer steps between validations; the last step always validates")
    save_interval: int = arg(50, "optimizer steps between saved states")
    keep_last: int = arg(2, "saved states kept")
    sample_prompt: str | None = arg(None, "instruction answered at each validation (default: the first val example's)")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        positive = (
            "epochs",
            "max_steps",
            "max_iters",
            "max_time",
            "global_batch_size",
            "micro_batch_tokens",
            "devices",
        )
        positive += ("micro_batch_size", "learning_rate", "max_norm", "eval_interval", "save_interval", "keep_last")
        wrong = {name: value for name in positive if (value := getattr(self, name)) is not None and not value > 0}
        limits = (self.epochs, self.max_steps, self.max_iters)
        return super().checks() | {
            **{f"--{name} {value} must be above 0": True for name, value in wrong.items()},
            f"--max_seq_length {self.max_seq_length} must be at least 2": (self.max_seq_length or 2) < 2,
            f"--lr_warmup_steps {self.lr_warmup_steps} must not be negative": self.lr_warmup_steps < 0,
            f"--weight_decay {self.weight_decay} must not be negative": not self.weight_decay >= 0,
            f"--min_lr {self.min_lr} must be between 0 and --learning_rate": not 0 <= self.min_lr <= self.learning_rate,
            "one of --epochs, --max_steps and --max_iters is needed": all(limit is None for limit in limits),
        }


@dataclass
class LoRAArgs(Args):
    """What the adapter is; saved with it, and all that merging and generating read."""

    lora_r: int = arg(16, "rank")
    lora_alpha: float = arg(32, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs dropped in training, drawn per example")
    lora_query: bool = arg(True, "adapt the query projections")
    lora_key: bool = arg(True, "adapt the key projections")
    lora_value: bool = arg(True, "adapt the value projections")
    lora_projection: bool = arg(True, "adapt the attention's output projections")
    lora_mlp: bool = arg(True, "adapt the MLPs")
    lora_head: bool = arg(False, "adapt the LM head")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {
            f"--lora_r {self.lora_r} must be above 0": not self.lora_r > 0,
            f"--lora_alpha {self.lora_alpha} must be above 0": not self.lora_alpha > 0,
            f"--lora_dropout {self.lora_dropout} must be in [0, 1)": not 0 <= self.lora_dropout < 1,
            "nothing to adapt: every --lora_<part> is false": not any(self.parts().values()),
        }

    def parts(self) -> dict[str, bool]:
        """Which parts of the model get an adapter."""
        names = ("query", "key", "value", "projection", "mlp", "head")
        return {name: getattr(self, f"lora_{name}") for name in names}


@dataclass
class LoRATrainArgs(LoRAArgs, TrainArgs):
    """Flags of finetune/lora.py."""

    out_dir: str = arg("out/lora", "folder of this run: arguments, checkpoints, metrics, adapter")


@dataclass
class FullTrainArgs(TrainArgs):
    """Flags of finetune/full.py."""

    out_dir: str = arg("out/full", "folder of this run: arguments, checkpoints, metrics, model")
    learning_rate: float = arg(2e-5, "highest learning rate")


@dataclass
class GenerateArgs(Args):
    """Flags of scripts/generate.py."""

    prompt: str = arg("What food do llamas eat?", "instruction to answer; - reads it from standard input")
    input: str = arg("", "the instruction's optional input")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the adapter's, or the only one there is)")
    adapter_dir: str | None = arg(None, "adapter of a LoRA run: its adapter/ folder or the run's folder", "lora_path")
    prompt_style: str | None = arg(None, f"{STYLES}; default: the adapter's; a base model continues the text")
    num_samples: int = arg(1, "answers to generate")
    max_new_tokens: int = arg(256, "most tokens of an answer")
    temperature: float = arg(0.8, "0: always the likeliest token")
    top_k: int | None = arg(200, "choose among the k likeliest tokens; null: among all")
    top_p: float = arg(1.0, "choose among the likeliest tokens that together have this probability")
    seed: int = arg(1234, "seed of the sampling")
    device: Literal["auto", "cpu", "cuda", "mps"] = arg("auto", "where to run")
    precision: Literal["32-true", "bf16-true", "16-true"] | None = arg(
        None, "default: as stored on CUDA, 32-true elsewhere"
    )

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {
            "--prompt is empty": not self.prompt,
            f"--max_new_tokens {self.max_new_tokens} must be above 0": self.max_new_tokens < 1,
            f"--num_samples {self.num_samples} must be above 0": self.num_samples < 1,
            f"--temperature {self.temperature} must not be negative": not self.temperature >= 0,
            f"--top_k {self.top_k} must be above 0": self.top_k is not None and self.top_k < 1,
            f"--top_p {self.top_p} must be in (0, 1]": not 0 < self.top_p <= 1,
        }


@dataclass
class MergeArgs(Args):
    """Flags of scripts/merge_lora.py."""

    lora_path: str | None = arg(None, "adapter of a LoRA run: its adapter/ folder or the run's folder", "adapter_dir")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the adapter's own base)")
    out_dir: str | None = arg(None, "folder to write the merged checkpoint to")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {f"--{n} is missing": getattr(self, n) is None for n in ("lora_path", "out_dir")}
