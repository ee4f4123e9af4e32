"""What a family is: one architecture as data, and its names for weights, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families.fields import Fields
from lit_sft.families.rotary import respell_rope

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
    """Regular expressions of Hub names that hold nothing that is trained (buffers)."""
    tokenizer_class: str | None = None
    """The class that transformers has for the family's tokenizers (TOKENIZER_MAPPING_NAMES); None: it goes by the one
    that tokenizer_config.json names. ``TokenizersBackend`` takes a tokenizer.json as it is, whatever that says."""
    overrides_tokenizer_class: bool = False
    """Whether ``tokenizer_class`` holds against one that tokenizer_config.json names
    (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)."""

    def read_config(self, hf_config: dict) -> ModelConfig:
        """ModelConfig of a config.json; InputError names a field that is missing, wrong or not supported."""
        return self.read_fields(hf_config)[0]

    def read_fields(self, hf_config: dict) -> tuple[ModelConfig, Fields]:
        """As ``read_config``, with the fields, which know what was read of them."""
        fields = Fields(text_config(hf_config))
        try:
            config = self.read(fields)
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise InputError(f"config.json: a field has the wrong type or value ({error})") from None
        fields.check_unread(self.name)
        return config, fields

    def exported_config(self, hf_config: dict) -> dict:
        """The config.json of the weights under the names that are written: a multimodal model's text model alone."""
        text = text_config(hf_config)
        if text is hf_config:
            return respell_rope(self.respell(hf_config))
        kept = {key: value for key, value in text.items() if key not in ("vision_config", "audio_config")}
        return respell_rope(kept) | {"architectures": [self.architectures[0]], "model_type": self.model_types[0]}

    def names(self, config: ModelConfig) -> WeightNames:
        """The names of all weights of one model."""
        return WeightNames(self, config)


def text_config(hf_config: dict) -> dict:
    """A config.json with its text model's, where a multimodal one nests it, laid over the rest."""
    text = hf_config.get("text_config")
    if not isinstance(text, dict):
        return hf_config
    outer = {key: value for key, value in hf_config.items() if key != "text_config"}
    tied = {key: outer[key] for key in ("tie_word_embeddings",) if key in outer}  # the head is the outer model's
    return outer | text | tied


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
        for name in (hf_name, self.family.prefix + hf_name):
            template, numbers = split_numbers(name)
            if template in self.targets:
                return self.targets[template], numbers
            if any(re.fullmatch(pattern, name) for pattern in self.family.ignored):
                return None
        raise InputError(f"weight {hf_name!r} is unknown to the {self.family.name} family; nothing was converted")

    def source(self, lit_name: str) -> tuple[str, Target, list[str]]:
        """Where one of our weights goes on the Hub: the name with ``{}`` for numbers, what it is, the numbers."""
        template, numbers = split_numbers(lit_name)
        theirs = self.sources[template]
        return theirs, self.targets[theirs], numbers

    def hf_name(self, lit_name: str) -> str:
        """The Hub's name of one of our weights; of a stacked one the name of its first row."""
        theirs, _, numbers = self.source(lit_name)
        return theirs.format(*numbers, 0)


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
