"""What a family is: one architecture as data, and its names for weights, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families.bookkeeping import IMAGES_AND_SOUNDS, QUANTIZATION
from lit_sft.families.fields import Fields
from lit_sft.families.rotary import respell_rope
from lit_sft.families.wrappers import ANY, Wrapper

if TYPE_CHECKING:  # the list of repositories is read without torch
    from torch import Tensor


@dataclass(frozen=True)
class Fused:
    """One Hub tensor whose rows are those of several of ours, one behind the other."""

    names: tuple[str, ...]
    by_group: bool = False
    """The rows of a key/value head are together: its queries, its key, its value, then those of the next."""

    def split(self, fused: Tensor, n_rows: list[int], config: ModelConfig) -> list[Tensor]:
        """Ours, of ``n_rows`` rows each."""
        groups = config.n_query_groups if self.by_group else 1
        parts = fused.unflatten(0, (groups, -1)).split([n // groups for n in n_rows], dim=1)
        return [part.flatten(0, 1) for part in parts]

    def join(self, parts: list[Tensor], config: ModelConfig) -> Tensor:
        """The way back."""
        import torch

        groups = config.n_query_groups if self.by_group else 1
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Stacked:
    """Several Hub tensors, numbered by the last number in their names, each a row of one of ours."""

    name: str


Target = str | Fused | Stacked


@dataclass(frozen=True)
class Family:
    """One architecture, as data."""

    name: str
    architectures: tuple[str, ...]
    """Names in config.json's ``architectures`` that mean this family."""
    model_types: tuple[str, ...]
    """Names in config.json's ``model_type``, which decides when ``architectures`` is absent."""
    read: Callable[[Fields], ModelConfig]
    """From the fields of a config.json; what it does not read must be neutral."""
    weight_map: Callable[[ModelConfig], dict[str, Target]]
    """Hub name → ours; ``{}`` stands for a number, the same on both sides. Of several Hub names for one of ours the
    first is the one that is written."""
    prefix: str = "model."
    """What the base model's weights are named by in a file of the whole; a file of the base model alone lacks it."""
    respell: Callable[[dict], dict] = dict
    """A config.json as today's transformers reads it, where an older spelling means something else to it."""
    gguf: str | None = None
    """The architecture's name in GGUF files; None: they have none that computes the same."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of Hub names that hold nothing that is trained (buffers), beside ``BUFFERS``."""
    tokenizer_class: str | None = None
    """The class that transformers has for the family's tokenizers (TOKENIZER_MAPPING_NAMES); None: it goes by the one
    that tokenizer_config.json names. ``TokenizersBackend`` takes a tokenizer.json as it is, whatever that says."""
    overrides_tokenizer_class: bool = False
    """Whether ``tokenizer_class`` holds against one that tokenizer_config.json names
    (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)."""
    modules: dict[str, str] = field(default_factory=dict)
    """Modules that transformers 5 calls otherwise than the files: their name there by the one here."""
    defaults: dict[str, int] = field(default_factory=dict)
    """What a wrapper's ``text_config`` means that leaves a field out: the values of transformers' own class."""
    wrapper: Wrapper | None = None
    """The multimodal architecture that a config.json is of; None: it is the text model's own."""

    def read_config(self, hf_config: dict, accepted: Collection[str] = ()) -> ModelConfig:
        """ModelConfig of a config.json; InputError names a field that is missing, wrong, unknown or not supported.

        ``accepted``: fields that a person knows to change nothing.
        """
        return self.read_fields(hf_config, accepted)[0]

    def read_fields(self, hf_config: dict, accepted: Collection[str] = ()) -> tuple[ModelConfig, Fields]:
        """As ``read_config``, with the fields, which know what was read of them."""
        fields = Fields(self.text_fields(hf_config), accepted)
        try:
            config = _within_a_chunk(self.read(fields), fields)
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise InputError(f"config.json: a field has the wrong type or value ({error})") from None
        fields.check_unread(self.name, config, IMAGES_AND_SOUNDS if self.wrapper else ())
        return config, fields

    def text_fields(self, hf_config: dict) -> dict:
        """The fields that say what the text model computes."""
        if self.wrapper is None:
            return text_config(hf_config)
        silent = {} if self.wrapper.same_as else self.defaults
        text = silent | self.wrapper.text_of(hf_config)
        return text_config(self.wrapper.outer_of(hf_config) | {"text_config": text})

    def exported_config(self, hf_config: dict) -> dict:
        """The config.json of the weights under the names that are written: a multimodal model's text model alone."""
        dropped = ("transformers_weights", *QUANTIZATION)  # a file's name; what converted is not quantized
        hf_config = {key: value for key, value in hf_config.items() if key not in dropped}
        if self.wrapper is None:
            return respell_rope(self.respell(hf_config))
        outer = {key: value for key, value in self.wrapper.outer_of(hf_config).items() if key in OF_THE_WHOLE}
        text = text_config(outer | {"text_config": self.wrapper.text_of(hf_config)})
        text = {key: value for key, value in text.items() if key not in dropped}
        return respell_rope(text) | {"architectures": [self.architectures[0]], "model_type": self.model_types[0]}

    def names(self, config: ModelConfig) -> WeightNames:
        """The names of all weights of one model."""
        return WeightNames(self, config)


BUFFERS = (
    r"(.*\.)?(maybe_)?(rotary|rotary_emb|rotary_emb_local|rotary_pos_emb|rope)"
    r"\.(\w*inv_freq|(\w*_)?(cos|sin)(_cached?)?)"
)
"""Tables of angles that older versions of transformers and code of repositories saved; all make them from
config.json, and transformers passes over those in a file."""
OF_THE_WHOLE = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("tie_word_embeddings", "dtype", "torch_dtype", "transformers_version"),
)
"""Fields of a multimodal config.json that go on to its text model's where that has none."""


def text_config(hf_config: dict) -> dict:
    """A config.json with its text model's, where a multimodal one nests it, laid over the rest."""
    text = hf_config.get("text_config")
    if not isinstance(text, dict):
        return hf_config
    outer = {key: value for key, value in hf_config.items() if key != "text_config"}
    tied = {key: outer[key] for key in ("tie_word_embeddings",) if key in outer}  # the head is the outer model's
    return outer | text | tied


def _within_a_chunk(config: ModelConfig, fields: Fields) -> ModelConfig:
    """A context within which dual chunk attention is plain attention: that of its first chunk.

    Source: Qwen's implementation in vLLM. Up to ``chunk_size`` distances are their own; scores are scaled beyond
    ``original_max_position_embeddings``; keys that begin with sparse_attention choose an approximation.
    """
    chunks = fields.get("dual_chunk_attention_config", default={})
    if not chunks:
        return config
    name = "config.json: dual_chunk_attention_config"
    if not isinstance(chunks, dict):
        raise InputError(f"{name} is {chunks!r:.99}; it must be an object")
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    odd = (key for key in chunks if key not in known and not key.startswith("sparse_attention"))
    if key := next(odd, None):
        raise InputError(f"{name}.{key} = {chunks[key]!r:.60} is not known; the plain attention computed here lacks it")
    limits = [chunks.get("chunk_size"), chunks.get("original_max_position_embeddings", config.block_size)]
    if not all(type(limit) is int and limit > 0 for limit in limits):
        raise InputError(f"{name} = {chunks!r:.99} has no chunk_size, or one that is no positive integer")
    block_size = min(config.block_size, *limits)
    fields.notes.append(f"dual_chunk_attention_config: plain attention up to {block_size} tokens, which is the context")
    return replace(config, block_size=block_size)


class WeightNames:
    """The weights of one model by their names on both sides."""

    def __init__(self, family: Family, config: ModelConfig) -> None:
        self.family, self.config = family, config
        self.targets = family.weight_map(config)
        self.sources: dict[str, str] = {}
        for theirs, target in self.targets.items():
            for ours in target.names if isinstance(target, Fused) else (_name(target),):
                self.sources.setdefault(ours, theirs)

    def find(self, hf_name: str) -> tuple[Target, list[str]] | None:
        """What a Hub tensor is, with the numbers in its name; None: ignored. InputError names an unknown one."""
        wrapper, prefix = self.family.wrapper, self.family.prefix
        if self.of_another_part(hf_name) or re.fullmatch(BUFFERS, hf_name):
            return None
        text_name = wrapper.text_name(hf_name, prefix) if wrapper else hf_name
        for name in (text_name, prefix + text_name):
            template, numbers = split_numbers(name)
            if template in self.targets:
                return self.targets[template], numbers
            if any(re.fullmatch(pattern, name) for pattern in self.family.ignored):
                return None
        raise InputError(f"weight {hf_name!r} is unknown to the {self.family.name} family; nothing was converted")

    def of_another_part(self, hf_name: str) -> bool:
        """True for a weight or module of the rest of a multimodal model, which is not read."""
        wrapper = self.family.wrapper
        return wrapper is not None and re.fullmatch(wrapper.others, hf_name) is not None

    def in_any_wrapper(self) -> WeightNames:
        """These names, and those that the weights have in a multimodal model."""
        if self.family.wrapper or self.family.prefix != "model.":
            return self
        return WeightNames(replace(self.family, wrapper=ANY), self.config)

    def source(self, lit_name: str) -> tuple[str, Target, list[str]]:
        """Where one of our weights goes on the Hub: the name with ``{}`` for numbers, what it is, the numbers."""
        template, numbers = split_numbers(lit_name)
        theirs = self.sources[template]
        return theirs, self.targets[theirs], numbers

    def hf_name(self, lit_name: str) -> str:
        """The Hub's name of one of our weights; of a stacked one the name of its first row."""
        theirs, _, numbers = self.source(lit_name)
        name, wrapper = theirs.format(*numbers, 0), self.family.wrapper
        return wrapper.file_name(name, self.family.prefix, wrapper.prefixes[0]) if wrapper else name

    def module_name(self, hf_name: str) -> str:
        """The path of the module in transformers 5 whose weight a file of the text model alone calls ``hf_name``."""
        name = hf_name.removesuffix(".weight")
        name = self.family.modules.get(name, name)
        wrapper, prefix = self.family.wrapper, self.family.prefix
        if wrapper and name.startswith(prefix):
            return wrapper.module + name.removeprefix(prefix)
        return name

    def spelled_as(self, source: list[str], hf_name: str) -> str:
        """The name of a text model's weight in the files of the whole, which name their weights as in ``source``."""
        wrapper, prefix = self.family.wrapper, self.family.prefix
        if wrapper is None:
            return hf_name
        starts = (start for start in wrapper.prefixes if any(name.startswith(start) for name in source))
        return wrapper.file_name(hf_name, prefix, next(starts, wrapper.prefixes[0]))


def _name(target: Target) -> str:
    return target.name if isinstance(target, Stacked) else target


def split_numbers(name: str) -> tuple[str, list[str]]:
    """``a.3.b.12.c`` → ``a.{}.b.{}.c`` and its numbers."""
    parts = name.split(".")
    return ".".join("{}" if part.isdecimal() else part for part in parts), [p for p in parts if p.isdecimal()]


def linear(theirs: str, ours: str) -> dict[str, Target]:
    """The entries of a linear layer or norm: its weight and, where there is one, its bias."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def fused(theirs: str, *ours: str, by_group: bool = False) -> dict[str, Target]:
    """The entries of linear layers that the Hub's file holds as one."""
    return {f"{theirs}.{kind}": Fused(tuple(f"{o}.{kind}" for o in ours), by_group) for kind in ("weight", "bias")}
