"""A model's shape and switches: all that ``model.py`` branches on. No model names here."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from lit_sft.errors import InputError
from lit_sft.layout import MODEL_CONFIG

LARGEST = {"n_layer": 10_000}  # a file that asks for more would build modules until memory ends


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder-only GPT, as read from a Hub config.json by its family."""

    block_size: int
    """The context: tokens of the longest sequence the model was made for."""
    vocab_size: int
    """Rows of the embedding and of the head, as in config.json."""
    n_layer: int
    n_embd: int
    n_head: int
    n_query_groups: int
    """Key/value heads: ``n_head`` is multi-head, 1 multi-query, anything between grouped-query attention."""
    head_size: int
    intermediate_size: int
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_factor: float = 1.0
    """linear, llama3: how many times longer the context becomes."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_block_size: int = 8192
    """llama3: the context before scaling."""

    def __post_init__(self) -> None:
        for name, kind, value in [(f.name, f.type, getattr(self, f.name)) for f in fields(self)]:
            if kind is int and (type(value) is not int or not 1 <= value <= LARGEST.get(name, 2**31)):
                raise InputError(
                    f"model config: {name} is {value!r}; it must be a positive integer, at most "
                    f"{LARGEST.get(name, 2**31):,}"
                )
            if kind is float and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise InputError(f"model config: {name} is {value!r}; it must be a positive number")
            if kind is bool and type(value) is not bool:
                raise InputError(f"model config: {name} is {value!r}; it must be true or false")
        if self.n_head % self.n_query_groups:
            raise InputError(f"model config: n_head {self.n_head} is not a multiple of {self.n_query_groups} groups")
        if self.head_size % 2:
            raise InputError(f"model config: head_size {self.head_size} is odd; rotary embedding needs an even one")

    def to_json(self) -> str:
        """The text of model_config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_dir(cls, directory: Path) -> "ModelConfig":
        """Read ``model_config.json``; InputError when it is not what this version writes."""
        path = directory / MODEL_CONFIG
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}); convert the checkpoint again") from None
