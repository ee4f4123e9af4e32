"""Rows of raw data, and which of their columns are read as what."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_sft.errors import InputError
from lit_sft.row_fields import is_missing

ALIASES = {
    "instruction": ("instruction", "prompt", "question", "inputs"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion", "targets"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text",),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
}
BESIDE = frozenset({"system", "history"})
"""Parts that say something of a dialogue which others hold."""
PAIR_PARTS = ("instruction", "input", "output", "system", "history")
MAIN_PARTS = ("instruction", "input", "output", "messages")
NAMES = frozenset(name for names in ALIASES.values() for name in names)
FLAGS = "/".join(f"--{part}_column" for part in ALIASES) + " of prepare_csv and prepare_dataset"
KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Columns:
    """The column that holds each part of a sample; None: recognised by its name."""

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    text: str | None = None
    """Text without a prompt, all of which is learned."""
    system: str | None = None
    """The system message, of instructions or beside messages; an empty cell: none is given."""
    history: str | None = None
    """Turns before an instruction: a list of [user, assistant], or of messages."""

    def __str__(self) -> str:
        return ", ".join(f"{part} from {column!r}" for part, column in self.given().items())

    def given(self) -> dict[str, str]:
        """Part → column, of the parts that have one."""
        return {part: column for part, column in vars(self).items() if column is not None}


class Malformed(Exception):  # noqa: N818 (the fault of a row; its reader decides what becomes of it)
    """A row gives no sample; the message says why."""


class Row(NamedTuple):
    """A row as read: its number from 1, its line where the file has lines, and its cells, or why it has none."""

    number: int
    line: int | None
    cells: Any


def listed(names: Iterable[str]) -> str:
    """Names in quotes for a message, the first twenty of them."""
    shown = [repr(name) for name in names]
    return (", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")) or "none"


def recognise(seen: list[str], wanted: Columns) -> Columns:
    """The columns to read among those ``seen``: the ``wanted`` ones, the others by name.

    Raises InputError when a wanted column is not there, or when the names leave a choice or a gap.
    """
    given = wanted.given()
    columns = f"columns: {listed(seen)}"
    for part, column in given.items():
        if column not in seen:
            raise InputError(f"--{part}_column {column!r} is not there; {columns}")
    main = given.keys() - BESIDE
    crowded = ("text" in given and len(given) > 1) or ("messages" in given and given.keys() - {"messages", "system"})
    if len(set(given.values())) < len(given) or crowded:
        raise InputError(
            f"{wanted}: give each part a column of its own, or --messages_column or --text_column alone "
            f"(--system_column may stand beside messages); {columns}"
        )
    free = [column for column in seen if column not in given.values()]
    found = {part: [c for c in free if c.strip().lower() in names] for part, names in ALIASES.items()}
    found |= {part: [column] for part, column in given.items()}
    if not found["instruction"] and [c.strip().lower() for c in found["input"]] == ["input"] and "input" not in given:
        found["instruction"], found["input"] = found["input"], []  # LongForm: its input is the whole prompt
    pair = bool(found["instruction"] and found["output"])
    dialogue = "messages" in given or (not main and "history" not in given and bool(found["messages"]))
    # data with a prompt often repeat it all in a column "text", which is then left alone
    text = "text" in given or (not given and not pair and not dialogue and bool(found["text"]))
    parts = ["text"] if text else ["messages", "system"] if dialogue else list(PAIR_PARTS)
    several = [c for part in parts if len(found[part]) > 1 for c in found[part]]
    if pair and dialogue and not main:
        several = [c for part, choice in found.items() for c in choice if part in MAIN_PARTS]
    if several or not (pair or dialogue or text):
        wrong = f"which of {listed(several)} to read is ambiguous" if several else "the columns are of no known format"
        raise InputError(f"{wrong}; {columns}; name yours with {FLAGS}")
    return Columns(**{part: found[part][0] for part in parts if found[part]})


def format_of(columns: Columns, cells: Any) -> str:
    """What the format is called that these columns make, with a row of it, for the user to see what was recognised."""
    if columns.text is not None:
        return "plain text, learned whole"
    if columns.messages is None:
        names = {part: column for part, column in columns.given().items() if part not in BESIDE}
        if all(column.strip().lower() == part for part, column in names.items()):
            return "Alpaca's columns"
        return "/".join(column for part, column in names.items() if part != "input")
    value = cells.get(columns.messages) if isinstance(cells, dict) else None
    turn = value[0] if isinstance(value, list) and value else None
    if isinstance(turn, dict):
        return "ShareGPT conversations" if "from" in turn else "OpenAI messages"
    return "lists of turns" if isinstance(turn, str) else "dialogues"


def kind_of(value: Any) -> str:
    """What ``value`` is, for a message."""
    shown = f" ({value!s:.40})" if isinstance(value, bool | int | float) else ""
    return "missing" if is_missing(value) else KINDS.get(type(value), type(value).__name__) + shown
