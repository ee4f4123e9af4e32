"""A checkpoint's own chat template: Jinja from the Hub, rendered in a sandbox, into what is whose in the text."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_sft.errors import InputError


@dataclass(frozen=True)
class Part:
    """A stretch of rendered text."""

    text: str
    control: bool = False
    """Whether control tokens written in it are meant: true for a template's own text, never for the user's."""
    response: bool = False
    """Whether the model is to say it: a response with its end token."""


def end_part(special_tokens: dict[str, str]) -> Part:
    """The EOS token behind a response; InputError when the tokenizer has none."""
    if "eos_token" not in special_tokens:
        raise InputError(
            "the tokenizer has no EOS token to end a response with; add eos_token to tokenizer_config.json"
        )
    return Part(special_tokens["eos_token"], control=True, response=True)


# Marks that stand for a content, for where a response begins and ends, and for an end token that the template forgets
_CONTENT, _BEGIN, _END, _FORGOTTEN = "\ue000\\d+\ue001", "\ue002", "\ue003", "\ue004"
_END_TOKEN = r"<\|[^<>|\s]+\|>|<end_of_turn>|<turn\|>|</s>"


def render_template(
    template: str, roles: tuple[str, ...], contents: list[str], special_tokens: dict[str, str]
) -> list[Part]:
    """Write a dialogue with a Jinja template, as transformers does: parts whose texts joined are what the model sees.

    Raises InputError when the template is broken, refuses the dialogue, rewrites contents (to strip white space from
    them is allowed) or writes a prompt for an answer otherwise than the dialogue with that answer.
    """
    layout = [*_layout(template, roles, tuple(special_tokens.items())), ("", False)]
    whole = _jinja(template, roles, contents, special_tokens)
    parts, position = [], 0
    for i, (text, response) in enumerate(layout):
        if text == _FORGOTTEN:
            parts.append(end_part(special_tokens))
            continue
        control = not re.fullmatch(_CONTENT, text)
        if not control:
            after = next(t for t, _ in layout[i + 1 :] if t != _FORGOTTEN)
            after = "" if re.fullmatch(_CONTENT, after) else after
            ways = _strippings(contents[int(text[1:-1])])
            text = next((way for way in ways if whole.startswith(way + after, position)), text)
        if not whole.startswith(text, position):
            break
        parts.append(Part(text, control, response))
        position += len(text)
    if position != len(whole):
        raise InputError("the chat template rewrites the contents of messages; name a --prompt_style instead")
    return [part for part in parts if part.text]


def _strippings(content: str) -> Iterator[str]:
    """``content``, then without the newlines, spaces or all white space around it, as templates strip it."""
    kinds = ("", "\n", " ", None)
    starts = sorted({len(content) - len(content.lstrip(kind)) for kind in kinds})
    ends = sorted({len(content.rstrip(kind)) for kind in kinds}, reverse=True)
    return (content[start:end] for start in starts for end in ends)


@lru_cache(maxsize=1024)
def _layout(
    template: str, roles: tuple[str, ...], special_items: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, bool], ...]:
    """The template's own text and a mark for each content, in order, each with whether the model is to say it.

    A response begins where the prompt that generation would use ends, and ends after its end token.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    text = _jinja(template, roles, marks, dict(special_items))
    for i, role in enumerate(roles):
        if (times := text.count(marks[i])) != 1:
            raise InputError(f"the chat template writes the {role}'s turn {i + 1} {times} times; name a --prompt_style")
    for i in reversed(range(len(roles))):
        if roles[i] == "assistant":
            text = _mark_response(text, template, roles[: i + 1], marks[: i + 1], dict(special_items))
    layout, response = [], False
    for piece in filter(None, re.split(f"({_CONTENT}|[{_BEGIN}{_END}{_FORGOTTEN}])", text)):
        if piece in (_BEGIN, _END):
            response = piece == _BEGIN
        else:
            layout.append((piece, response))
    return tuple(layout)


def _mark_response(
    text: str, template: str, roles: tuple[str, ...], marks: list[str], special_tokens: dict[str, str]
) -> str:
    """Put marks into ``text`` around the response that is the last of these turns and may have others after it."""
    prompt = _jinja(template, roles[:-1], marks[:-1], special_tokens)
    closed = _jinja(template, roles, marks, special_tokens)  # behind the response, what ends it and nothing else
    before, mark, after = text.partition(marks[-1])
    if not before.startswith(prompt):
        asked, told = (re.sub(_CONTENT, "…", text)[-40:] for text in (prompt, before))
        raise InputError(
            f"turn {len(roles)}: the chat template's prompt for an answer ({asked!r}) is not how the dialogue "
            f"with the answer begins ({told!r}); name a --prompt_style"
        )
    token = f"{_END_TOKEN}|{re.escape(special_tokens.get('eos_token', '</s>'))}"
    found = re.match(f".*?(?:{token})", closed.partition(mark)[2], re.DOTALL)
    end = found[0] if found and after.startswith(found[0]) else ""
    forgotten = "" if end else _FORGOTTEN
    return prompt + _BEGIN + before[len(prompt) :] + mark + end + forgotten + _END + after[len(end) :]


def _jinja(template: str, roles: tuple[str, ...], contents: list[str], special_tokens: dict[str, str]) -> str:
    """Render as transformers does; a dialogue that ends with the user's turn is a prompt for an answer."""
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    variables = {**special_tokens, "messages": turns, "add_generation_prompt": roles[-1:] == ("user",)}
    try:
        with _time_limit():
            return _compile(template).render(variables, tools=None, documents=None)
    except Exception as error:  # whatever a template written elsewhere runs into
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template refuses the dialogue: {said}; name a --prompt_style") from None


TEMPLATE_SECONDS = 10.0


@contextmanager
def _time_limit() -> Iterator[None]:
    """A template is code from elsewhere, and may loop for ever. Only the main thread can be interrupted."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {TEMPLATE_SECONDS:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, by which transformers knows what the model says: the text in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """The statements up to ``{% endgeneration %}``."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    now = datetime.now()  # of the whole process: a dialogue does not change at midnight
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(template)
