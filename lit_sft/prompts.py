"""Prompt styles and chat templates: from the turns of a dialogue to the text a model sees."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str
    input: str = ""
    """A user turn's optional context, as in Alpaca's data; the prompt style decides where it goes."""


@dataclass(frozen=True)
class Sample:
    """One exchange or dialogue as text, before it is rendered and tokenized."""

    messages: tuple[Message, ...]
    place: str = ""
    """Where it came from, for messages: ``data.csv row 417``."""
