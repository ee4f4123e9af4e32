"""The flags of every command, as dataclasses: a field is a flag, its text is the help. Scripts inherit what they share.

Validation happens here, once, with every problem reported together; nothing has touched the disk by then.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from lit_sft.errors import InputError
from lit_sft.styles import AS_WRITTEN, CHAT_TEMPLATE, PROMPT_STYLES

STYLES = (
    f"{', '.join(PROMPT_STYLES)}, {CHAT_TEMPLATE}, {AS_WRITTEN}, a Jinja or text file, or text with {{instruction}}"
)
ACCEPT_HELP = (
    "field of config.json that you know to change nothing: it is taken as absent; FIELD.KEY names a key in one, and "
    "several have commas between, or the flag is repeated"
)
CHECKPOINT_DIR_HELP = "converted checkpoint, with or without checkpoints/ in front"


MOST_INT, MOST_FLOAT = 2**31 - 1, 1e15
"""The largest number of a flag, below zero too: as much as tensors, clocks and fp32 bear, and more than is meant."""
LIMITS = ("epochs", "max_steps", "max_iters")
"""Flags of which each may end a run; one that is typed holds alone against those of a --config."""
MOST = {"seed": 2**32 - 1, "devices": 1024, "num_workers": 1024, "timeout_minutes": 1e9}
MOST |= {"lora_r": 1 << 16, "lora_alpha": 1e6}
"""Where it is another."""


def arg(default: Any, text: str, *aliases: str, bare: bool = False, several: bool = False) -> Any:
    """A dataclass field that is a flag, with its help and its other spellings.

    ``bare``: the name may be left out. ``several``: text with commas in it, which repeated flags make as well.
    """
    return field(default=default, metadata={"help": text, "aliases": aliases, "bare": bare, "several": several})


@dataclass
class Args:
    """What every command accepts."""

    debug: bool = arg(False, "print a traceback when the command fails")

    def __post_init__(self) -> None:
        optional = {f.name: type(None) in get_args(f.type) for f in fields(self)}
        if nulls := [f"--{f} must not be null" for f, may in optional.items() if not may and getattr(self, f) is None]:
            raise InputError("; ".join(nulls))
        if problems := [text for f in fields(self) if (text := self._beyond(f.name, getattr(self, f.name)))]:
            raise InputError("; ".join(problems))
        if problems := [text for text, wrong in self.checks().items() if wrong]:
            raise InputError("; ".join(problems))

    def _beyond(self, name: str, value: Any) -> str | None:
        """What is wrong with a number that nothing can be done with, or a text that no system takes."""
        most = MOST.get(name, MOST_FLOAT if isinstance(value, float) else MOST_INT)
        if isinstance(value, int | float) and not -most <= value <= most:
            return f"--{name} {value!s:.40} must be a number of at most {most:,.0f}"
        if isinstance(value, str) and "\0" in value:
            return f"--{name} has a NUL character"
        if isinstance(value, str) and value != value.encode(errors="replace").decode():
            return f"--{name} is no UTF-8 text; rename what it names, or write it anew"  # no manifest could hold it
        return None

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
    accept_config_key: str | None = arg(None, ACCEPT_HELP, several=True)
    model_name: str | None = arg(None, "accepted as in Lit-GPT, without effect: config.json says what the model is")
    verify: bool = arg(False, "compare the logits with those of transformers; needs 4 bytes of memory per parameter")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {"--checkpoint_dir is missing": self.checkpoint_dir is None}


@dataclass
class DoctorArgs(Args):
    """Flags of scripts/doctor.py."""

    checkpoint_dir: str | None = arg(
        None,
        "checkpoint, converted or not, with or without checkpoints/ in front; may stand without its name",
        bare=True,
    )
    accept_config_key: str | None = arg(None, ACCEPT_HELP, several=True)

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {"--checkpoint_dir is missing": self.checkpoint_dir is None}


@dataclass
class TrainArgs(Args):
    """Flags that every training command has."""

    data_dir: str = arg("data/alpaca", "folder a prepare script wrote")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the one the shards were made for)")
    out_dir: str = arg("out/run", "folder of this run: arguments, checkpoints, metrics, result")
    resume: str = arg(
        "auto", "auto: go on when out_dir holds an unfinished run; never: refuse; a path: from that state"
    )
    extend: bool = arg(
        False,
        "give the run in out_dir more steps, finished or not; from there on the learning rate follows the schedule of "
        "the longer run, as if it had been that long from the start",
    )
    seed: int = arg(1337, "seed of the order of examples, of the adapter's start and of dropout")
    device: Literal["auto", "cpu", "cuda", "mps"] = arg("auto", "where to run")
    devices: int = arg(1, "number of devices; one process each")
    timeout_minutes: float = arg(30.0, "with several: end the run when a process has not answered for so long")
    precision: Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"] | None = arg(
        None,
        "Fabric's name (default: bf16-true on CUDA, 16-mixed before Ampere, 32-true elsewhere); "
        "what is trained is kept in fp32 or better",
    )
    epochs: int | None = arg(3, "full passes over the data; the first limit reached ends the run")
    max_steps: int | None = arg(None, "most optimizer steps")
    max_iters: int | None = arg(None, "Lit-GPT's limit: this many times micro_batch_size examples, up to whole steps")
    max_time: float | None = arg(None, "stop, after saving, when this many seconds have passed; the schedule stays")
    global_batch_size: int | None = arg(
        None, "examples per optimizer step, over all devices (default: 64, at most n/4)"
    )
    micro_batch_size: int = arg(1, "most examples in a packed row, if above 1; otherwise only the unit of max_iters")
    micro_batch_tokens: int | Literal["auto"] | None = arg(
        None, "longest packed row, in tokens (default: 8192 or the longest example); auto: the longest that fits"
    )
    share_prefix: bool = arg(True, "compute what examples of a row begin with alike once (not with LoRA dropout)")
    activation_checkpointing: str = arg(
        "none",
        "blocks computed again backward, to save memory: none, all, a number K for every K-th, or auto: as few as fit",
    )
    compile: bool | None = arg(None, "compile the blocks, but for experts in a loop (default: on CUDA)")
    max_seq_length: int | None = arg(None, "cut examples again, below the shards' length", "override_max_seq_length")
    learning_rate: float = arg(2e-4, "highest learning rate")
    lr_schedule: Literal["cosine", "linear", "constant"] = arg("cosine", "shape of the learning rate after warmup")
    min_lr: float = arg(0.0, "learning rate at the end of the schedule")
    lr_warmup_steps: int = arg(100, "optimizer steps of linear warmup, at most a tenth of the run")
    weight_decay: float = arg(0.01, "AdamW's weight decay")
    max_norm: float | None = arg(1.0, "gradients are clipped to this norm; null: never")
    eval_interval: int = arg(50, "optimizer steps between validations; the last step always validates")
    save_interval: int = arg(50, "optimizer steps between saved states")
    save_minutes: float | None = arg(None, "also save when this many minutes have passed since the last time")
    keep_last: int = arg(2, "saved states kept")
    keep_best: bool = arg(True, "also save at each new lowest val loss, and keep that state")
    on_nonfinite: Literal["stop", "skip"] = arg(
        "stop", "what a loss or gradient that is not finite does: end the run, or leave the step without an update"
    )
    sample_prompt: str | None = arg(None, "instruction answered at each validation (default: the first val example's)")
    estimate: bool = arg(False, "say how much memory the run would take and which settings fit, and end there")
    rehearse: bool | None = arg(
        None, "before the first step compute the longest row, to see whether it fits, and undo it (default: on a GPU)"
    )

    @property
    def checkpoint_every(self) -> int:
        """Of how many blocks one is computed again backward; 0: none is, -1: the flag says something else."""
        named = {"none": 0, "all": 1, "auto": 0}  # which a run replaces by what it chooses
        digits = self.activation_checkpointing.isdecimal() and len(self.activation_checkpointing) < 10
        number = int(self.activation_checkpointing) if digits else -1
        return named.get(self.activation_checkpointing, number if number > 0 else -1)

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
        positive += ("micro_batch_size", "learning_rate", "max_norm", "eval_interval", "save_interval", "save_minutes")
        positive += ("timeout_minutes",)
        positive += ("keep_last",)
        given = {name: value for name in positive if (value := getattr(self, name)) not in (None, "auto")}
        wrong = {name: value for name, value in given.items() if not value > 0}
        blocks, limits = self.activation_checkpointing, (self.epochs, self.max_steps, self.max_iters)
        return super().checks() | {
            **{f"--{name} {value} must be above 0": True for name, value in wrong.items()},
            f"--max_seq_length {self.max_seq_length} must be at least 2": (self.max_seq_length or 2) < 2,
            f"--activation_checkpointing {blocks:.40} must be none, auto, all or a number above 0": (
                self.checkpoint_every < 0
            ),
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
    quantize: Literal["nf4", "nf4-dq", "fp8", "bnb.nf4", "bnb.nf4-dq"] | None = arg(
        None, "store the frozen linear layers in 4 bits (dq: their scales in 8) or in 8; null: as they are"
    )
    init_from: str | None = arg(
        None, "adapter, or folder of a run, whose matrices the new run starts from, with an optimizer of its own"
    )
    offload: bool = arg(
        False, "keep the blocks' frozen weights in the host's memory, for a small GPU: slower where rows are short"
    )

    def checks(self) -> dict[str, bool]:  # noqa: D102
        blocks = self.activation_checkpointing
        return super().checks() | {
            f"--offload does not go with --devices {self.devices}: each would keep weights of its own": (
                self.offload and self.devices > 1
            ),
            f"--offload computes every block again, so --activation_checkpointing {blocks:.40} does not go with it": (
                self.offload and blocks not in ("none", "all")
            ),
            f"--quantize {self.quantize} does not go with --precision 64-true": (
                self.quantize is not None and self.precision == "64-true"
            ),
        }


@dataclass
class FullTrainArgs(TrainArgs):
    """Flags of finetune/full.py."""

    out_dir: str = arg("out/full", "folder of this run: arguments, checkpoints, metrics, model")
    learning_rate: float = arg(2e-5, "highest learning rate")


@dataclass
class EstimateArgs(LoRATrainArgs):
    """Flags of scripts/estimate.py: those of finetune/lora.py, and what the run is planned for."""

    data_dir: str | None = arg(None, "folder a prepare script wrote; without it one example of micro_batch_tokens")
    device_memory_gb: float | None = arg(
        None, "memory of the GPU in 1e9 bytes (default: what is free on --device here)"
    )
    full: bool = arg(False, "plan finetune/full.py instead")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        memory, least = self.device_memory_gb, 0.6  # of which the driver takes as much
        return super().checks() | {
            "--data_dir or --checkpoint_dir is needed": self.data_dir is None and self.checkpoint_dir is None,
            f"--device_memory_gb {memory} must be above {least}": memory is not None and not memory > least,
            "--full does not go with --quantize": self.full and self.quantize is not None,
            "--full does not go with --offload": self.full and self.offload,
        }


@dataclass
class GenerateArgs(Args):
    """Flags of scripts/generate.py."""

    prompt: str = arg("What food do llamas eat?", "instruction to answer; - reads it from standard input")
    input: str = arg("", "the instruction's optional input")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the adapter's, or the only one there is)")
    adapter_dir: str | None = arg(None, "adapter of a LoRA run: its adapter/ folder or the run's folder", "lora_path")
    prompt_style: str | None = arg(None, f"{STYLES}; default: the adapter's; a base model continues the text")
    system_prompt: str | None = arg(None, "system message (default: what the model was trained with)")
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
            f"--top_p {self.top_p} must be between 1e-6 and 1": not 1e-6 <= self.top_p <= 1,
        }


EXPORT_CHECKPOINT_DIR_HELP = "base, merged or fully fine-tuned checkpoint (default: the adapter's own base)"
EXPORT_LORA_PATH_HELP = "adapter to merge on the way: a LoRA run's folder or its adapter/"


@dataclass
class ExportHFArgs(Args):
    """Flags of scripts/export_hf.py."""

    checkpoint_dir: str | None = arg(None, EXPORT_CHECKPOINT_DIR_HELP)
    lora_path: str | None = arg(None, EXPORT_LORA_PATH_HELP, "adapter_dir")
    out_dir: str | None = arg(None, "folder to write, new or empty")
    dtype: Literal["float32", "bfloat16", "float16"] | None = arg(None, "precision to write (default: as stored)")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {
            "--checkpoint_dir or --lora_path is needed": self.checkpoint_dir is None and self.lora_path is None,
            "--out_dir is missing": self.out_dir is None,
        }


@dataclass
class ConvertLitArgs(Args):
    """Flags of scripts/convert_lit_checkpoint.py."""

    checkpoint_path: str | None = arg(None, "converted checkpoint: its folder, or the weights in it")
    output_path: str | None = arg(None, "a .bin or .safetensors file to write, or a folder for transformers")
    config_path: str | None = arg(None, "accepted as in Lit-GPT, without effect: the checkpoint says what it is")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        names = ("checkpoint_path", "output_path")
        return super().checks() | {f"--{n} is missing": getattr(self, n) is None for n in names}


@dataclass
class ExportPeftArgs(Args):
    """Flags of scripts/export_peft.py."""

    lora_path: str | None = arg(None, "adapter of a LoRA run: its adapter/ folder or the run's folder", "adapter_dir")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the adapter's own base)")
    out_dir: str | None = arg(None, "folder to write, new or empty")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {f"--{n} is missing": getattr(self, n) is None for n in ("lora_path", "out_dir")}


@dataclass
class ImportPeftArgs(Args):
    """Flags of scripts/import_peft.py."""

    peft_dir: str | None = arg(None, "folder of a PEFT adapter: adapter_config.json and adapter_model.safetensors")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + ": the adapter's base")
    out_dir: str | None = arg(None, "folder to write, new or empty")
    prompt_style: str | None = arg(None, f"{STYLES}; default: as exported, else as preparing would choose")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        names = ("peft_dir", "checkpoint_dir", "out_dir")
        return super().checks() | {f"--{n} is missing": getattr(self, n) is None for n in names}


@dataclass
class ExportGGUFArgs(Args):
    """Flags of scripts/export_gguf.py."""

    checkpoint_dir: str | None = arg(None, EXPORT_CHECKPOINT_DIR_HELP)
    lora_path: str | None = arg(None, EXPORT_LORA_PATH_HELP, "adapter_dir")
    out_file: str | None = arg(None, "file to write, new")
    quantize: Literal["f32", "f16", "bf16", "q8_0"] = arg("f16", "type of the matrices; vectors stay f32")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {
            "--checkpoint_dir or --lora_path is needed": self.checkpoint_dir is None and self.lora_path is None,
            "--out_file is missing": self.out_file is None,
        }


@dataclass
class MergeArgs(Args):
    """Flags of scripts/merge_lora.py."""

    lora_path: str | None = arg(None, "adapter of a LoRA run: its adapter/ folder or the run's folder", "adapter_dir")
    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the adapter's own base)")
    out_dir: str | None = arg(None, "folder to write the merged checkpoint to")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {f"--{n} is missing": getattr(self, n) is None for n in ("lora_path", "out_dir")}


@dataclass
class VerifyArgs(Args):
    """Flags of scripts/verify.py."""

    path: str | None = arg(None, "directory to check; may be given without the flag's name")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        return super().checks() | {"--path is missing": not self.path}
