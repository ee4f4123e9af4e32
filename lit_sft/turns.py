"""From a row of raw data to the turns it holds, and what is wrong with it: all that changes what is learned is read."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lit_sft import row_fields
from lit_sft.prompts import Message
from lit_sft.row_fields import KNOWN, as_truth, fault_of, folded, is_given, is_missing, says_something
from lit_sft.rows import Columns, Malformed, kind_of, listed

ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "model": "assistant"}


@dataclass
class RowReader:
    """Rows → the checked turns that they hold.

    Attributes:
        columns: the columns to read.
        wanted: those of them that flags name, so that others of their kind may go unread.
        multiturn: False keeps only the first exchange of a dialogue.
        ignored: folded names of fields that go unread although they change what is learned.
        unread: keys of turns that were met and not read, in the order in which they came.
    """

    columns: Columns
    wanted: Columns
    multiturn: bool = True
    ignored: frozenset[str] = frozenset()
    unread: dict[str, None] = field(default_factory=dict)
    _harmless: set[str] = field(default_factory=set)
    """Columns that need no look."""

    def turns(self, row: Any) -> tuple[Message, ...]:
        """The turns of a row; Malformed says what is wrong with it."""
        if not isinstance(row, dict) or not row:
            raise Malformed(f"is {kind_of(row)}, not an object with columns" if row else "holds no columns")
        columns = self.columns
        self._check_columns(row)
        if columns.text is not None:
            return (Message("assistant", _text(row.get(columns.text), f"column {columns.text!r}")),)
        if columns.messages is not None:
            turns = self._dialogue(row.get(columns.messages), f"column {columns.messages!r}", self.multiturn)
        else:
            turns = self._history(row) + self._pair(row)
        if not self.multiturn:
            turns = turns[: 3 if turns[0].role == "system" else 2]
        if all(message.learned is False for message in turns if message.role == "assistant"):
            raise Malformed("nothing of it is learned: each assistant turn says so; take the row out")
        return self._with_system(row, turns)

    def _pair(self, row: dict[str, Any]) -> tuple[Message, ...]:
        """The exchange of instruction, input and output."""
        columns = self.columns
        instruction = _text(row.get(columns.instruction), f"column {columns.instruction!r}")
        output = _text(row.get(columns.output), f"column {columns.output!r}")
        context = row.get(columns.input)
        context = _text(context, f"column {columns.input!r}") if is_given(context) else ""
        return Message("user", instruction, context), Message("assistant", output)

    def _history(self, row: dict[str, Any]) -> tuple[Message, ...]:
        """The turns before the instruction, whose answers are learned too; empty when there are none."""
        what = f"column {self.columns.history!r}"
        value = row.get(self.columns.history)
        pairs = _parsed(value, what) if says_something(value) else None
        if not says_something(pairs):
            return ()
        if not isinstance(pairs, list):
            raise Malformed(f"{what} is {kind_of(pairs)}, not a list of [user, assistant]")
        if all(isinstance(turn, dict) for turn in pairs):
            if _turn(0, pairs[-1], what).role == "user":
                raise Malformed(f"{what} ends with a question; the instruction follows an answer")
            return self._dialogue(pairs, what, multiturn=True)
        turns = []
        for i, pair in enumerate(pairs, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                count = f" of {len(pair)}" if isinstance(pair, list) else ""
                raise Malformed(f"{what} item {i} is {kind_of(pair)}{count}, not [user, assistant]")
            turns.append(Message("user", _text(pair[0], f"{what} item {i} (user)")))
            turns.append(Message("assistant", _text(pair[1], f"{what} item {i} (assistant)")))
        return tuple(turns)

    def _with_system(self, row: dict[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns with the system message of its column in front, if the column gives one."""
        column = self.columns.system
        value = row.get(column)
        if not is_given(value):
            return turns
        text = _text(value, f"column {column!r}")
        if turns[0].role != "system":
            return Message("system", text), *turns
        if turns[0].content.strip() != text.strip():
            way = "give --system_column another, or none"
            if folded(column) in KNOWN:
                way = f"--ignore_fields {KNOWN[folded(column)]} takes the turn's"
            raise Malformed(
                f"column {column!r} ({text!r:.40}) and the system turn ({turns[0].content!r:.40}) differ; {way}"
            )
        return turns

    def _dialogue(self, value: Any, what: str, multiturn: bool) -> tuple[Message, ...]:
        """The turns of a messages cell: [system,] user, assistant, user, assistant, …."""
        value = _parsed(value, what)
        if not isinstance(value, list):
            raise Malformed(f"{what} is {kind_of(value)}" + ("" if is_missing(value) else ", not a list of turns"))
        turns = [_turn(i, turn, f"{what} turn {i + 1}") for i, turn in enumerate(value)]
        start = 1 if turns and turns[0].role == "system" else 0
        system, rest = turns[:start], turns[start : None if multiturn else start + 2]
        for i, turn in enumerate(rest):
            if turn.role != ("user", "assistant")[i % 2]:
                raise Malformed(
                    f"{turn.place} is the {turn.role}'s; a dialogue is [system,] user, assistant, user, assistant, …"
                )
        if len(rest) < 2:
            raise Malformed(f"{what} has no assistant turn")
        # a system turn of null is none; an empty one says that there is to be none, not even the template's own
        system = [turn for turn in system if not is_missing(turn.content)]
        # nothing can be learned from a last question without an answer
        return tuple(self._message(turn) for turn in system + rest[: len(rest) // 2 * 2])

    def _message(self, turn: "_Turn") -> Message:
        """The message of a turn, all of its fields looked at."""
        place = f"{turn.place} ({turn.role})"
        said = {}
        for key, value in turn.fields.items():
            name = KNOWN.get(folded(key))
            if folded(key) in self.ignored:
                name = None
            if name in row_fields.LEARNED:
                if is_given(value):
                    said[key] = _learned(name, value, f"{place}: {key!r}")
            elif name in row_fields.LOST or name in row_fields.ENDS:
                if fault := fault_of(key, value):
                    raise Malformed(f"{place}: {key!r} {fault}")
            else:
                self.unread.setdefault(key)
        if len(set(said.values())) > 1:
            raise Malformed(f"{place}: {listed(said)} contradict each other; keep one of them")
        learned = next(iter(said.values()), None)
        if turn.role == "assistant" and learned:
            learned = None  # as it is in any case
        empty = turn.role == "system" and turn.content == ""
        return Message(turn.role, "" if empty else _text(turn.content, place), learned=learned)

    def _check_columns(self, row: dict[str, Any]) -> None:
        """Require that no column is left unread which would change what is learned."""
        for key, value in row.items():
            if key in self._harmless:
                continue
            name = KNOWN.get(folded(key))
            if name is None or folded(key) in self.ignored:
                self._harmless.add(key)
            elif key not in self.columns.given().values():
                self._check_column(key, name, value)

    def _check_column(self, key: str, name: str, value: Any) -> None:
        what = f"column {key!r}"
        way = f"--ignore_fields {name} learns"
        if fault := fault_of(key, value):
            raise Malformed(f"{what} {fault}")
        if name in row_fields.LEARNED and is_given(value) and not _learned(name, value, what):
            raise Malformed(f"{what} says that the row is not learned; take it out, or {way} it")
        if name in row_fields.DIALOGUE and says_something(value):
            part = row_fields.DIALOGUE[name]
            if getattr(self.wanted, part) is None:
                flag = f"--{part}_column"
                raise Malformed(f"{what} would be lost: it is not read here as {flag} is; {way} without it")
        if name in row_fields.PREFERENCE and says_something(value) and not self._answers_chosen():
            raise Malformed(
                f"{what} holds one of several answers; name the column that is to be learned: --output_column, or "
                "--messages_column for dialogues"
            )
        if name in row_fields.JUDGEMENTS and value is False:
            raise Malformed(f"{what} is false: its answer is a bad one; take the row out, or {way} it")

    def _answers_chosen(self) -> bool:
        read = {folded(column) for column in self.columns.given().values()}
        if (self.wanted.output or self.wanted.messages or self.wanted.text) is not None:
            return True
        return any(folded(name) in read for name in row_fields.PREFERENCE)


class _Turn(NamedTuple):
    """A turn as read; ``fields``: what it holds beside role and content."""

    role: str
    content: Any
    place: str
    fields: dict[str, Any]


def _turn(index: int, turn: Any, place: str) -> _Turn:
    """A turn of OpenAI ({role, content}), ShareGPT ({from, value}) or LIMA (text)."""
    if isinstance(turn, str):
        return _Turn(("user", "assistant")[index % 2], turn, place, {})
    if not isinstance(turn, dict) or not ({"role", "from"} & turn.keys()):
        raise Malformed(f"{place} is {kind_of(turn)}, not text, {{role, content}} or {{from, value}}")
    keys = ("role", "content") if "role" in turn else ("from", "value")
    role, content = (turn.get(key) for key in keys)
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        raise Malformed(f"{place} has the unknown role {shown:.40}; known: {listed(ROLES)}")
    fields = {key: value for key, value in turn.items() if key not in keys}
    return _Turn(ROLES[role], content, place, fields)


def _learned(name: str, value: Any, what: str) -> bool:
    """Say whether a field of LEARNED has its turn or row learned; Malformed: it says neither."""
    truth = as_truth(value)
    if truth is None:
        shown = f"{kind_of(value)} ({value!r:.40})" if isinstance(value, str) else kind_of(value)
        raise Malformed(f"{what} is {shown}, neither 0 nor 1; --ignore_fields {name} learns as if it were not there")
    return truth is row_fields.LEARNED[name]


def _parsed(value: Any, what: str) -> Any:
    """A list or an object; from JSON where it is text, as a CSV cell has it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is text but not JSON ({error})") from None


def _text(value: Any, what: str) -> str:
    """``value`` as it is, if it is text that can be trained on."""
    if is_missing(value):
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
