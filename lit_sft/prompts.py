"""Dialogues, and from their turns to the text a model sees: in a named style, a chat template or the user's own."""

import re
import string
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lit_sft.chat_template import Part, end_part, fill_template, render_template
from lit_sft.documents import read_bytes
from lit_sft.errors import InputError
from lit_sft.sandbox import template_variables
from lit_sft.styles import AS_WRITTEN, CHAT_TEMPLATE, PROMPT_STYLES, PromptStyle

PROMPT_FACTS = ("prompt_style", "system_prompt", "stop_ids")
"""What a model's later commands must know of how its data were written; manifests and adapters carry it."""
OWN_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
FIELDS = ("instruction", "input", "system", "bos", "eos")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str
    input: str = ""
    """A user turn's optional context, as in Alpaca's data; the prompt style decides where it goes."""
    learned: bool | None = None
    """The data's own word: true: the turn is learned, false: it is context alone; None: its role decides."""


@dataclass(frozen=True)
class Sample:
    """One exchange or dialogue as text, before it is rendered and tokenized; a lone assistant turn is plain text."""

    messages: tuple[Message, ...]
    place: str = ""
    """Where it came from, for messages: ``data.csv row 417``."""
    row: int = 0
    """Its number in its source, from 1; malformed rows count too."""


def with_system(messages: tuple[Message, ...], system_prompt: str | None) -> tuple[Message, ...]:
    """The dialogue with ``system_prompt`` in front, unless that is None or the dialogue has its own, or is text."""
    if system_prompt is None or messages[0].role != "user":
        return messages
    return (Message("system", system_prompt), *messages)


def resolve_style(given: str) -> str:
    """What --prompt_style says, as manifests keep it: a known name, or a style of the user's own in full.

    The user's own is a Python format string or a Jinja template, given itself or as a file's path. A line break at
    the end of a file is not part of it. InputError: it is none of these.
    """
    if is_named(given):
        return given
    if "{" in given or "\n" in given:
        _own_style(given, False)
        return given
    path = Path(given)
    if path.suffix not in OWN_SUFFIXES and not path.is_file():
        raise InputError(f"unknown prompt style {given!r}; {known_styles()}")
    try:
        text = read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError(f"--prompt_style {given} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"--prompt_style {given} cannot be read: {error.strerror}; give a file, or a name") from None
    try:
        _own_style(text, False)
    except InputError as error:
        raise InputError(f"--prompt_style {given}: {error}") from None
    return text


def check_prompt_facts(facts: dict, path: Path) -> None:
    """Require that PROMPT_FACTS read from ``path`` are what is written there, or absent; InputError names the one."""
    style, system, ends = (facts.get(name) for name in PROMPT_FACTS)
    right = {
        "prompt_style": style is None or isinstance(style, str),
        "system_prompt": system is None or isinstance(system, str),
        "stop_ids": ends is None or (isinstance(ends, list) and all(type(i) is int and 0 <= i < 2**31 for i in ends)),
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise InputError(f"{path}: {wrong[0]} is {facts[wrong[0]]!r:.99}, which cannot be; write the directory again")


def known_styles() -> str:
    """The sentence that lists the names."""
    names = ", ".join((*PROMPT_STYLES, CHAT_TEMPLATE, AS_WRITTEN))
    return f"known: {names}; or a file of your own (.jinja, .txt), or text with {{instruction}}"


def style_label(style: str) -> str:
    """A style for a message: its name, or the beginning of the user's own."""
    return style if is_named(style) else f"your own ({' '.join(style.split()):.40}…)"


def is_named(style: str) -> bool:
    """Whether a style is known by its name, and no text of the user's own."""
    return style in PROMPT_STYLES or style in (CHAT_TEMPLATE, AS_WRITTEN)


def is_chat_template(style: str) -> bool:
    """Whether a Jinja template over ``messages`` writes the dialogue: the checkpoint's, or the user's own."""
    return style == CHAT_TEMPLATE or (not is_named(style) and _own_style(style, False) is None)


def render(
    messages: tuple[Message, ...],
    style: str,
    special_tokens: dict[str, str],
    template: str | None,
    ends: re.Pattern | None = None,
) -> list[Part]:
    """Write a dialogue in a style, as parts whose texts joined are what the model sees.

    Args:
        messages: an optional system message, then user and assistant in turn. When the last is the user's, the parts
            end where the model's answer begins: a prompt to generate from.
        style: a key of PROMPT_STYLES, ``chat-template``, ``as-written``, or the text of a style of the user's own
            (``resolve_style``).
        special_tokens: the texts of ``bos_token`` and ``eos_token``.
        template: the checkpoint's own Jinja template, for ``chat-template``.
        ends: finds the tokens that may end an answer in a Jinja template; None: what commonly looks like one.

    Raises InputError when the style is unknown, or the template refuses the dialogue, rewrites its contents or writes
    them otherwise in a prompt than in a whole dialogue.
    """
    if style == AS_WRITTEN:
        return [Part(_content(m), control=True, response=m.role == "assistant") for m in messages if _content(m)]
    if style == CHAT_TEMPLATE and template is None:
        raise InputError(f"prompt style {CHAT_TEMPLATE!r}: the checkpoint has no chat template; {known_styles()}")
    found = PROMPT_STYLES.get(style)
    if found is None and style != CHAT_TEMPLATE:
        found, template = _own_style(style, messages[0].role == "system" and messages[0].content != ""), style
    if found is not None:
        return _render_style(messages, found, special_tokens)
    roles = tuple(m.role for m in messages)
    return render_template(template, roles, [_content(m) for m in messages], special_tokens, ends)


def _content(message: Message) -> str:
    return f"{message.content}\n\n{message.input}" if message.input else message.content


def _render_style(messages: tuple[Message, ...], style: PromptStyle, special_tokens: dict[str, str]) -> list[Part]:
    said = messages[0].content if messages[0].role == "system" else None
    system = Part(style.default_system, control=True) if said is None else Part(said)
    tokens = {name: [Part(special_tokens.get(f"{name}_token", ""), control=True)] for name in ("bos", "eos")}
    before = _fill(style.system, tokens | {"system": [system]}) if system.text else []
    parts: list[Part] = []
    for message in messages:
        if message.role == "assistant":
            parts.append(Part(style.response_prefix + message.content + style.response_suffix, response=True))
            own_end = style.end != "{eos}"
            parts.append(Part(style.end, control=True, response=True) if own_end else end_part(special_tokens))
        elif message.role == "user":
            form = style.later_prompt if parts and style.later_prompt else style.prompt
            form = style.prompt_with_input if message.input and not parts and style.prompt_with_input else form
            content = message.content
            if message.input and "{input}" not in form:
                content += "\n\n" + message.input
            if not parts and "{system}" not in form:
                parts += before
            values = {"instruction": [Part(content)], "input": [Part(message.input)], "system": before}
            parts += _fill(form, tokens | values)
            before = []
    return [part for part in parts if part.text]


def _fill(form: str, values: dict[str, list[Part]]) -> list[Part]:
    """The parts of a form: control tokens written in it are meant, in what fills its fields they are not."""
    parts = []
    for literal, field in _parts_of(form):
        parts.append(literal)
        if field:
            parts += values[field]
    return parts


@lru_cache(maxsize=256)
def _parts_of(form: str) -> tuple[tuple[Part, str | None], ...]:
    return tuple((Part(literal, control=True), field) for literal, field in _pieces(form))


@lru_cache(maxsize=256)
def _pieces(form: str) -> tuple[tuple[str, str | None], ...]:
    """The literal texts of a Python format string, each with the field behind it. ValueError when it is none."""
    pieces = []
    for literal, field, spec, conversion in string.Formatter().parse(form):
        if field is not None and (field not in FIELDS or spec or conversion):
            raise ValueError(f"{{{field}}} is not a field")
        pieces.append((literal, field))
    return tuple(pieces)


@lru_cache(maxsize=64)
def _own_style(text: str, with_system: bool) -> PromptStyle | None:
    """The style in a user's text, for dialogues with or without a system message; None: a template over ``messages``.

    InputError: it is neither a Python format string with {instruction} nor a Jinja template.
    """
    try:
        fields = {field for _, field in _pieces(text)}
    except ValueError as error:
        fields, wrong = set(), f"{error} (known: {', '.join(f'{{{field}}}' for field in FIELDS)}; {{{{ is a brace)"
    else:
        wrong = "it has no {instruction}"
    if "instruction" in fields:
        return PromptStyle(text, system="{system}" if "system" in fields else PromptStyle.system)
    if "{" not in text:
        raise InputError(f"unknown prompt style {text!r:.60}; {known_styles()}")
    if "{{" not in text and "{%" not in text:
        raise InputError(f"prompt style {text!r:.60}: {wrong}; {known_styles()}")
    try:
        variables = template_variables(text)
    except InputError as error:
        raise InputError(f"the Jinja of the prompt style cannot be read: {error}") from None
    if "messages" in variables:
        return None
    known = {"instruction", "input", "system", "bos_token", "eos_token"}
    if "instruction" not in variables or not variables <= known:
        seen = ", ".join(sorted(variables)) or "nothing"
        raise InputError(f"prompt style {text!r:.60}: it uses {seen}; use messages, or instruction, input and system")
    system = "system" if with_system else ""
    forms = [
        fill_template(text, {"instruction": "instruction", "input": i, "system": s})
        for i, s in (("", system), ("input", system), ("", ""))
    ]
    if wrong := next((form for form in forms if "{instruction}" not in form), None):
        raise InputError(f"prompt style {text!r:.60}: it does not write the instruction as it is, but {wrong!r:.60}")
    placed = "{system}" in forms[0]
    return PromptStyle(*forms, system="{system}" if placed else PromptStyle.system)
