"""What a family is: one architecture as data, and the refusal of config fields it does not support."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError


@dataclass(frozen=True)
class Family:
    """One architecture, as data. ``{}`` in a weight's name stands for the block's number, the same on both sides."""

    name: str
    architectures: tuple[str, ...]
    """Names in config.json's ``architectures`` that mean this family."""
    model_types: tuple[str, ...]
    """Names in config.json's ``model_type``, which decides when ``architectures`` is absent."""
    read_config: Callable[[dict], ModelConfig]
    weight_map: dict[str, str]
    """Hub name → our name, one to one, read in both directions."""
    ignored: tuple[str, ...]
    """Regular expressions of Hub names that hold nothing that is trained (buffers)."""

    def lit_name(self, hf_name: str) -> str | None:
        """Our name of a Hub weight, None for one that is ignored; InputError names a key the family does not know."""
        number = re.search(r"\.(\d+)\.", hf_name)
        template = hf_name.replace(number.group(0), ".{}.", 1) if number else hf_name
        if template in self.weight_map:
            return self.weight_map[template].format(number.group(1) if number else "")
        if any(re.fullmatch(pattern, hf_name) for pattern in self.ignored):
            return None
        raise InputError(f"weight {hf_name!r} is unknown to the {self.name} family; nothing was converted")

    def hf_name(self, lit_name: str) -> str:
        """The Hub name of one of our weights."""
        number = re.search(r"\.(\d+)\.", lit_name)
        template = lit_name.replace(number.group(0), ".{}.", 1) if number else lit_name
        backwards = {ours: theirs for theirs, ours in self.weight_map.items()}
        return backwards[template].format(number.group(1) if number else "")


def require(hf_config: dict, key: str, *allowed: object) -> None:
    """Refuse a field that would change the computation in a way not supported; absent or null is allowed."""
    value = hf_config.get(key)
    if value is not None and value not in allowed:
        hint = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
        raise InputError(f"config.json: {key} = {value!r} is not supported{hint}")
