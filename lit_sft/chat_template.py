"""A checkpoint's own chat template: Jinja from the Hub, rendered in a sandbox, into what is whose in the text."""

import json
import re
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_sft.errors import InputError


class Part(NamedTuple):
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
_CONTENT, _BEGIN, _END, _FORGOTTEN = "\ue000\\d+t?\ue001", "\ue002", "\ue003", "\ue004"
_END_TOKEN = r"<\|[^<>|\s]+\|>|<end_of_turn>|<turn\|>|</s>"
_THOUGHT = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)(.*)", re.DOTALL)


def render_template(
    template: str, roles: tuple[str, ...], contents: list[str], special_tokens: dict[str, str]
) -> list[Part]:
    """Write a dialogue with a Jinja template, as transformers does: parts whose texts joined are what the model sees.

    A template may strip white space from contents, and leave out the thought that an assistant's content begins with
    (``<think>…</think>``), as those of thinking models do in all turns but the last.

    Raises InputError when the template is broken, refuses the dialogue, rewrites contents in other ways or writes a
    prompt for an answer otherwise than the dialogue with that answer.
    """
    whole = _jinja(template, roles, contents, special_tokens)
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    attempts = [(marks, dict(zip(marks, contents, strict=True)))]
    thoughts = {i: m for i, role in enumerate(roles) if role == "assistant" and (m := _THOUGHT.fullmatch(contents[i]))}
    if thoughts:  # each in two marks, between the tags as they are written
        apart = [
            f"{t[1]}\ue000{i}t\ue001{t[3]}{marks[i]}" if (t := thoughts.get(i)) else m for i, m in enumerate(marks)
        ]
        halves = {f"\ue000{i}t\ue001": thought[2] for i, thought in thoughts.items()}
        attempts.append((apart, attempts[0][1] | halves | {marks[i]: thought[4] for i, thought in thoughts.items()}))
    for forms, texts in attempts:
        try:
            layout = _layout(template, roles, tuple(forms), tuple(special_tokens.items()))
            return _fit(layout, texts, whole, special_tokens)
        except InputError as error:
            problem = error
    raise problem


def _fit(
    layout: tuple[tuple[str, bool], ...], texts: dict[str, str], whole: str, special_tokens: dict[str, str]
) -> list[Part]:
    """The parts of ``whole``: the layout with contents for its marks; InputError when they are not found in it."""
    parts, position = [], 0
    for i, (text, response) in enumerate(layout):
        if text == _FORGOTTEN:
            parts.append(end_part(special_tokens))
            continue
        content = texts.get(text)
        if content is not None:
            after = next((t for t, _ in layout[i + 1 :] if t != _FORGOTTEN), "")
            after = "" if after in texts else after
            text = next((way for way in _strippings(content) if whole.startswith(way + after, position)), None)
        if text is None or not whole.startswith(text, position):
            break
        parts.append(Part(text, content is None, response))
        position += len(text)
    else:
        if position == len(whole):
            return [part for part in parts if part.text]
    start = max(0, len(commonprefix([content or "", whole[position:]])) - 20)  # noqa: RUF071 (texts, not paths)
    said, written = (text[start : start + 40] for text in (content or "", whole[position:]))
    raise InputError(
        f"the chat template rewrites the contents of messages, {said!r} as {written!r}; name a --prompt_style instead"
    )


def _strippings(content: str) -> Iterator[str]:
    """``content``, then without the newlines, spaces or all white space around it, as templates strip it."""
    kinds = ("", "\n", " ", None)
    starts = sorted({len(content) - len(content.lstrip(kind)) for kind in kinds})
    ends = sorted({len(content.rstrip(kind)) for kind in kinds}, reverse=True)
    return (content[start:end] for start in starts for end in ends)


@lru_cache(maxsize=1024)
def _layout(
    template: str, roles: tuple[str, ...], forms: tuple[str, ...], special_items: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, bool], ...]:
    """The template's own text and a mark for each content, in order, each with whether the model is to say it.

    A response begins where the prompt that generation would use ends, and ends after its end token. ``forms``: what
    stands for the contents, each with its mark.
    """
    text = _jinja(template, roles, forms, dict(special_items))
    for i, role in enumerate(roles):
        if (times := text.count(f"\ue000{i}\ue001")) != 1:
            raise InputError(f"the chat template writes the {role}'s turn {i + 1} {times} times; name a --prompt_style")
    for i in reversed(range(len(roles))):
        if roles[i] == "assistant":
            text = _mark_response(text, template, roles[: i + 1], forms[: i + 1], dict(special_items))
    layout, response = [], False
    for piece in filter(None, re.split(f"({_CONTENT}|[{_BEGIN}{_END}{_FORGOTTEN}])", text)):
        if piece in (_BEGIN, _END):
            response = piece == _BEGIN
        else:
            layout.append((piece, response))
    return tuple(layout)


def _mark_response(
    text: str, template: str, roles: tuple[str, ...], forms: tuple[str, ...], special_tokens: dict[str, str]
) -> str:
    """Put marks into ``text`` around the response that is the last of these turns and may have others after it."""
    prompt = _jinja(template, roles[:-1], forms[:-1], special_tokens)
    closed = _jinja(template, roles, forms, special_tokens)  # behind the response, what ends it and nothing else
    before, mark, after = text.partition(f"\ue000{len(roles) - 1}\ue001")
    if not before.startswith(prompt):
        asked, told = (re.sub(_CONTENT, "…", text)[-40:] for text in (prompt, before))
        raise InputError(
            f"turn {len(roles)}: the chat template's prompt for an answer ({asked!r}) is not how the dialogue "
            f"with the answer begins ({told!r}); name a --prompt_style"
        )
    token = f"{_END_TOKEN}|{re.escape(special_tokens.get('eos_token', '</s>'))}"
    found = re.match(f".*?(?:{token})", closed.partition(mark)[2], re.DOTALL)
    if not found or not after.startswith(found[0]):  # some leave it out behind the last answer alone
        found = re.match(rf"\s*(?:{token})", after)
    end = found[0] if found else ""
    forgotten = "" if end else _FORGOTTEN
    return prompt + _BEGIN + before[len(prompt) :] + mark + end + forgotten + _END + after[len(end) :]


def _jinja(template: str, roles: tuple[str, ...], contents: Sequence[str], special_tokens: dict[str, str]) -> str:
    """Render as transformers does; a dialogue that ends with the user's turn is a prompt for an answer."""
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    variables = {**special_tokens, "messages": turns, "add_generation_prompt": roles[-1:] == ("user",)}
    try:
        with _limits():
            return _compile(template).render(variables, tools=None, documents=None)
    except Exception as error:  # whatever a template written elsewhere runs into
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template refuses the dialogue: {said}; name a --prompt_style") from None


TEMPLATE_SECONDS = 10.0
TEMPLATE_BYTES = 2 << 30
_ADDRESSES = resource.getrlimit(resource.RLIMIT_AS)
_deadline = threading.local()


@contextmanager
def _limits() -> Iterator[None]:
    """A template is code from elsewhere, and may loop for ever or fill the memory (which only Linux can limit)."""
    _deadline.time = time.monotonic() + TEMPLATE_SECONDS
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + TEMPLATE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (min({most, *_ADDRESSES} - {resource.RLIM_INFINITY}), _ADDRESSES[1]))
    try:
        yield
    except MemoryError:
        raise MemoryError("it takes more than 2 GB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, _ADDRESSES)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, by which transformers knows what the model says: the text in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """The statements up to ``{% endgeneration %}``."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def watch(self, tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
        """Every round of a loop and every call of a macro looks at the clock first, in whatever thread."""
        for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock))):
            call = self.call_method("look_at_the_clock", lineno=node.lineno)
            node.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=node.lineno))
        return tree

    def look_at_the_clock(self) -> None:
        if time.monotonic() > _deadline.time:
            raise TimeoutError(f"it takes more than {TEMPLATE_SECONDS:g} s")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Products of huge numbers take hours, in which nothing else runs."""
        numbers, most = isinstance(left, int) and isinstance(right, int), 64 if operator == "**" else 1 << 64
        if numbers and max(abs(left), abs(right)) > most:
            raise OverflowError(f"{operator} of a number too large")
        return super().call_binop(context, operator, left, right)


# What templates write as today: the day that Llama 3's have where it is not known. With the real one, the same data
# would give other shards tomorrow, and a prompt would not be that of the training.
TODAY = datetime(2024, 7, 26)


def template_variables(text: str) -> set[str]:
    """The names that a Jinja text expects to be given. InputError: it is not Jinja."""
    environment = _environment()
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys()
    except jinja2.TemplateError as error:
        raise InputError(f"the Jinja of the prompt style cannot be read: {error} (line {error.lineno})") from None


def fill_template(text: str, fields: dict[str, str]) -> str:
    """The Python format string that a Jinja text amounts to, each variable written as a field, or absent if empty.

    ``bos_token`` and ``eos_token`` are known to it as well. InputError: it cannot be rendered.
    """
    names = fields | {"bos_token": "bos", "eos_token": "eos"}
    written = {name: f"\ue000{field}\ue001" if field else "" for name, field in names.items()}
    try:
        with _limits():
            form = _compile(text).render(written)
    except Exception as error:  # whatever a text written elsewhere runs into
        raise InputError(f"the Jinja of the prompt style fails: {' '.join(str(error).split())}") from None
    return re.sub("\ue000(.*?)\ue001", r"{\1}", form.replace("{", "{{").replace("}", "}}"))


@lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    environment = _environment()
    return environment.from_string(environment.extensions[_Generation.identifier].watch(environment.parse(template)))


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
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

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    for busy in (environment.globals, "lipsum"), (environment.filters, "round"), (environment.filters, "slice"):
        del busy[0][busy[1]]  # which can take hours of their own
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment
