"""A model's shape and switches: all that ``model.py`` branches on. No model names here."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

from lit_sft.documents import read_bytes
from lit_sft.errors import InputError
from lit_sft.layout import MODEL_CONFIG

LARGEST = {"n_layer": 10_000}  # a file that asks for more would build modules until memory ends
MOST_EXPERTS = 50_000  # of all layers together, for the same reason; the largest models have half of that
LARGEST_NUMBER = 1e15  # of those with a fraction; torch takes no whole number beyond 64 bits
MAY_BE_ZERO = ("rotary_size", "n_expert", "n_expert_per_token")


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
    """Width of the MLP, or of each expert."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_unit_offset: bool = False
    """The norm's weight is stored as its difference from 1."""
    round_late: bool = False
    """16-bit weights of norms multiply, and 16-bit queries and keys are turned, in fp32; the products are rounded."""
    pre_norm: bool = True
    """Norms before attention and MLP, on the residual stream."""
    post_norm: bool = False
    """Norms after attention and MLP, before their results are added to the residual stream."""
    parallel_residual: bool = False
    """The MLP sees the block's input, not what attention has made of it."""
    shared_norm: bool = False
    """parallel_residual: one norm feeds both attention and MLP."""
    qk_norm: Literal["none", "head", "each_head", "full"] = "none"
    """Queries and keys are normed: per head with one weight for all or each its own, or over all heads at once."""
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    n_expert: int = 0
    """Experts of a mixture; 0: one MLP."""
    n_expert_per_token: int = 0
    normalize_experts: bool = True
    """The chosen experts' shares add up to 1."""
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """What query · key is multiplied by; None: 1 / √head_size."""
    attention_softcap: float | None = None
    """c: scores s become c · tanh(s / c)."""
    logits_softcap: float | None = None
    sliding_window: int | None = None
    """Tokens that a position attends to in the sliding layers, itself included."""
    sliding_layers: tuple[bool, ...] = ()
    """Which layers have the window; empty: none."""
    alibi: bool = False
    """Scores are lowered in proportion to distance."""
    rotary_size: int | None = None
    """Dimensions of a head, the first ones, that are turned; None: all, 0: none."""
    rope_layers: tuple[bool, ...] = ()
    """Which layers turn queries and keys; empty: all."""
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None
    """Theta of the sliding layers, which are then not scaled; None: as the others."""
    rope_type: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    rope_factor: float = 1.0
    """linear, llama3, yarn: how many times longer the context becomes."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    """yarn: pairs that turn more often than this within the original context keep their frequency."""
    rope_beta_slow: float = 1.0
    """yarn: pairs that turn less often are stretched by the whole factor."""
    rope_original_block_size: int = 8192
    """llama3, yarn, longrope: the context before scaling."""
    rope_short_factors: tuple[float, ...] = ()
    """longrope: what each pair's wavelength is multiplied by in examples up to the original context."""
    rope_long_factors: tuple[float, ...] = ()
    """longrope: the same in longer examples."""
    rope_attention_factor: float = 1.0
    """yarn, longrope: what cosines and sines are multiplied by."""

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, field.type, getattr(self, field.name))
        if self.n_head % self.n_query_groups:
            raise InputError(f"model config: n_head {self.n_head} is not a multiple of {self.n_query_groups} groups")
        if self.turned % 2 or self.turned > self.head_size:
            raise InputError(
                f"model config: {self.turned} of {self.head_size} dimensions of a head cannot be turned in pairs"
            )
        if self.n_expert_per_token > self.n_expert or (self.n_expert and not self.n_expert_per_token):
            raise InputError(f"model config: {self.n_expert_per_token} of {self.n_expert} experts cannot be chosen")
        if self.n_layer * self.n_expert > MOST_EXPERTS:
            raise InputError(f"model config: {self.n_expert} experts in each of {self.n_layer} layers are too many")
        for name in ("sliding_layers", "rope_layers"):
            if len(getattr(self, name)) not in (0, self.n_layer):
                raise InputError(
                    f"model config: {name} is given for {len(getattr(self, name))} of {self.n_layer} layers"
                )
        if any(self.sliding_layers) and not self.sliding_window:
            raise InputError("model config: sliding_layers without a sliding_window")
        if self.rope_type == "longrope":
            for name in ("rope_short_factors", "rope_long_factors"):
                if len(getattr(self, name)) != self.turned // 2:
                    raise InputError(
                        f"model config: {name} has {len(getattr(self, name))} values for {self.turned // 2} pairs"
                    )

    def _check(self, name: str, kind: object, value: object) -> None:
        """InputError unless ``value`` is of the field's type and in a range that makes sense."""
        optional = type(None) in get_args(kind)
        if optional and value is None:
            return
        base = next(k for k in get_args(kind) if k is not type(None)) if optional else kind
        least = 0 if name in MAY_BE_ZERO else 1
        most = LARGEST.get(name, 2**31)
        if base is int and (type(value) is not int or not least <= value <= most):
            what = "an integer from 0" if least == 0 else "a positive integer"
            raise InputError(f"model config: {name} is {value!r}; it must be {what}, at most {most:,}")
        if base is float and (type(value) not in (int, float) or not 0 < value <= LARGEST_NUMBER):
            raise InputError(f"model config: {name} is {value!r}; it must be a positive number, at most 1e15")
        if base is bool and type(value) is not bool:
            raise InputError(f"model config: {name} is {value!r}; it must be true or false")
        if get_origin(base) is Literal and value not in get_args(base):
            raise InputError(f"model config: {name} is {value!r}; known: {', '.join(get_args(base))}")
        if get_origin(base) is tuple:
            if not isinstance(value, tuple):
                raise InputError(f"model config: {name} is {value!r}; it must be a list")
            for i, item in enumerate(value):
                self._check(f"{name}[{i}]", get_args(base)[0], item)

    @property
    def turned(self) -> int:
        """Dimensions of a head that rotary embedding turns."""
        return self.head_size if self.rotary_size is None else self.rotary_size

    def window(self, layer: int) -> int | None:
        """Tokens that a position of this layer attends to; None: all before it."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    def has_rope(self, layer: int) -> bool:
        """Whether this layer turns queries and keys."""
        return self.turned > 0 and (not self.rope_layers or self.rope_layers[layer])

    def to_json(self) -> str:
        """The text of model_config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_dir(cls, directory: Path) -> "ModelConfig":
        """Read ``model_config.json``; InputError when it is not what this version writes."""
        path = directory / MODEL_CONFIG
        try:
            values = json.loads(read_bytes(path).decode())
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except InputError as error:
            raise InputError(f"{path}: {error}; convert the checkpoint again") from None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read ({why}); convert the checkpoint again") from None
