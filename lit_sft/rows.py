"""From a row of raw data to the turns it holds: which columns, in which format, and what is wrong with it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_sft.errors import InputError
from lit_sft.prompts import Message

ALIASES = {
    "instruction": ("instruction", "prompt", "question", "inputs"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion", "targets"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text",),
}
NAMES = frozenset(name for names in ALIASES.values() for name in names)
FLAGS = "/".join(f"--{part}_column" for part in ALIASES) + " of prepare_csv and prepare_dataset"
ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "model": "assistant"}
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
    if len(set(given.values())) < len(given) or ({"messages", "text"} & given.keys() and len(given) > 1):
        raise InputError(
            f"{wanted}: give each part a column of its own, or --messages_column or --text_column alone; {columns}"
        )
    free = [column for column in seen if column not in given.values()]
    found = {part: [c for c in free if c.strip().lower() in names] for part, names in ALIASES.items()}
    found |= {part: [column] for part, column in given.items()}
    if not found["instruction"] and [c.strip().lower() for c in found["input"]] == ["input"] and "input" not in given:
        found["instruction"], found["input"] = found["input"], []  # LongForm: its input is the whole prompt
    pair = bool(found["instruction"] and found["output"])
    dialogue = "messages" in given or (not given and bool(found["messages"]))
    # data with a prompt often repeat it all in a column "text", which is then left alone
    text = "text" in given or (not given and not pair and not dialogue and bool(found["text"]))
    parts = ["text"] if text else ["messages"] if dialogue else ["instruction", "input", "output"]
    several = [c for part in parts if len(found[part]) > 1 for c in found[part]]
    if pair and dialogue and not given:
        several = [c for part, choice in found.items() for c in choice if part != "text"]
    if several or not (pair or dialogue or text):
        wrong = f"which of {listed(several)} to read is ambiguous" if several else "the columns are of no known format"
        raise InputError(f"{wrong}; {columns}; name yours with {FLAGS}")
    return Columns(**{part: found[part][0] for part in parts if found[part]})


def format_of(columns: Columns, cells: Any) -> str:
    """What the format is called that these columns make, with a row of it, for the user to see what was recognised."""
    if columns.text is not None:
        return "plain text, learned whole"
    if columns.messages is None:
        names = {column.strip().lower() for column in columns.given().values()}
        alpaca = names in ({"instruction", "output"}, {"instruction", "input", "output"})
        return "Alpaca's columns" if alpaca else "/".join(c for c in columns.given().values() if c != columns.input)
    value = cells.get(columns.messages) if isinstance(cells, dict) else None
    turn = value[0] if isinstance(value, list) and value else None
    if isinstance(turn, dict):
        return "ShareGPT conversations" if "from" in turn else "OpenAI messages"
    return "lists of turns" if isinstance(turn, str) else "dialogues"


def turns_of(row: Any, columns: Columns, multiturn: bool) -> tuple[Message, ...]:
    """The checked turns of a row; ``multiturn`` False: a dialogue's first exchange. Malformed says what is wrong."""
    if not isinstance(row, dict) or not row:
        raise Malformed(f"is {kind_of(row)}, not an object with columns" if row else "holds no columns")
    if columns.text is not None:
        return (Message("assistant", _text(row.get(columns.text), f"column {columns.text!r}")),)
    if columns.messages is not None:
        return _dialogue(row.get(columns.messages), f"column {columns.messages!r}", multiturn)
    instruction = _text(row.get(columns.instruction), f"column {columns.instruction!r}")
    output = _text(row.get(columns.output), f"column {columns.output!r}")
    context = row.get(columns.input)
    if _is_missing(context) or (isinstance(context, str) and not context.strip()):
        context = ""
    else:
        context = _text(context, f"column {columns.input!r}")
    return Message("user", instruction, context), Message("assistant", output)


def _dialogue(value: Any, what: str, multiturn: bool) -> tuple[Message, ...]:
    """The turns of a messages cell: [system,] user, assistant, user, assistant, …."""
    if isinstance(value, str):  # as a CSV cell has it
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{what} is text but not JSON ({error})") from None
    if not isinstance(value, list):
        raise Malformed(f"{what} is {kind_of(value)}" + ("" if _is_missing(value) else ", not a list of turns"))
    turns = [_turn(i, turn, f"{what} turn {i + 1}") for i, turn in enumerate(value)]
    start = 1 if turns and turns[0][0] == "system" else 0
    system, rest = turns[:start], turns[start : None if multiturn else start + 2]
    for i, (role, _, place) in enumerate(rest):
        if role != ("user", "assistant")[i % 2]:
            raise Malformed(f"{place} is the {role}'s; a dialogue is [system,] user, assistant, user, assistant, …")
    if len(rest) < 2:
        raise Malformed(f"{what} has no assistant turn")
    # A system turn that says nothing is none, and nothing can be learned from a last question without an answer.
    system = [turn for turn in system if not (_is_missing(turn[1]) or turn[1] == "")]
    kept = system + rest[: len(rest) // 2 * 2]
    return tuple(Message(role, _text(content, f"{place} ({role})")) for role, content, place in kept)


def _turn(index: int, turn: Any, place: str) -> tuple[str, Any, str]:
    """Role, content and place of a turn of OpenAI ({role, content}), ShareGPT ({from, value}) or LIMA (text)."""
    if isinstance(turn, str):
        return ("user", "assistant")[index % 2], turn, place
    if not isinstance(turn, dict) or not ({"role", "from"} & turn.keys()):
        raise Malformed(f"{place} is {kind_of(turn)}, not text, {{role, content}} or {{from, value}}")
    role, content = (turn["role"], turn.get("content")) if "role" in turn else (turn["from"], turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        raise Malformed(f"{place} has the unknown role {shown:.40}; known: {listed(ROLES)}")
    return ROLES[role], content, place


def _text(value: Any, what: str) -> str:
    """``value`` as it is, if it is text that can be trained on."""
    if _is_missing(value):
        raise Malformed(f"{what} is missing")
    if not isinstance(value, str):
        advice = "; store it as text" if isinstance(value, bool | int | float) else ""
        raise Malformed(f"{what} is {kind_of(value)}, not text{advice}")
    if not value.strip():
        raise Malformed(f"{what} is empty")
    if "\0" in value:
        raise Malformed(f"{what} has a NUL byte at character {value.index(chr(0)) + 1}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a byte that did not decode, or half a surrogate pair in JSON
        raise Malformed(f"{what} is not UTF-8 at character {error.start + 1}") from None
    return value


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN is an empty cell of pandas


def kind_of(value: Any) -> str:
    """What ``value`` is, for a message."""
    shown = f" ({value!s:.40})" if isinstance(value, bool | int | float) else ""
    return "missing" if _is_missing(value) else KINDS.get(type(value), type(value).__name__) + shown
