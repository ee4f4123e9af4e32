"""A checkpoint's own chat template: Jinja from the Hub, rendered, and what in its text is whose."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import NamedTuple

from lit_sft.errors import InputError
from lit_sft.sandbox import render_jinja


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
_END_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|<end_of_turn>|<turn\|>|</s>")
"""What looks like the end of an answer, whether the tokenizer has such a token or not."""
_THOUGHT = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)(.*)", re.DOTALL)


def render_template(
    template: str,
    roles: tuple[str, ...],
    contents: list[str],
    special_tokens: dict[str, str],
    ends: re.Pattern | None = None,
) -> list[Part]:
    """Write a dialogue with a Jinja template, as transformers does: parts whose texts joined are what the model sees.

    A template may strip white space from contents, and leave out the thought that an assistant's content begins with
    (``<think>…</think>``), as those of thinking models do in all turns but the last. ``ends`` finds the tokens that may
    end an answer; None: what commonly looks like one.

    Raises InputError when the template is broken, refuses the dialogue, rewrites contents in other ways or writes a
    prompt for an answer otherwise than the dialogue with that answer.
    """
    ends = _END_TOKEN if ends is None else re.compile(f"{ends.pattern}|{_END_TOKEN.pattern}")
    special_items = tuple(special_tokens.items())
    if (roles[0], contents[0]) == ("system", "") and not _keeps_empty_system(template, special_items, ends):
        roles, contents = roles[1:], contents[1:]
    whole = _jinja(template, roles, contents, special_tokens)
    # a template may write nothing around what is empty, so that no mark stands for it
    marks = [f"\ue000{i}\ue001" if contents[i] or role == "assistant" else "" for i, role in enumerate(roles)]
    attempts = [(marks, dict(zip(marks, contents, strict=True)))]
    thoughts = {i: m for i, role in enumerate(roles) if role == "assistant" and (m := _thought(contents[i]))}
    if thoughts:  # each in two marks, between the tags as they are written
        apart = [
            f"{t[1]}\ue000{i}t\ue001{t[3]}{marks[i]}" if (t := thoughts.get(i)) else m for i, m in enumerate(marks)
        ]
        halves = {f"\ue000{i}t\ue001": thought[2] for i, thought in thoughts.items()}
        attempts.append((apart, attempts[0][1] | halves | {marks[i]: thought[4] for i, thought in thoughts.items()}))
    for forms, texts in attempts:
        try:
            layout = _layout(template, roles, tuple(forms), special_items, ends)
            return _fit(layout, texts, whole, special_tokens)
        except InputError as error:
            problem = error
    raise problem


@lru_cache(maxsize=64)
def _keeps_empty_system(template: str, special_items: tuple[tuple[str, str], ...], ends: re.Pattern) -> bool:
    """Say whether a system message that says nothing is rendered: not where a template takes none and writes none.

    Left out, it would make other templates write a system text of their own.
    """
    roles, forms = ("system", "user", "assistant"), ("", "\ue0001\ue001", "\ue0002\ue001")
    try:
        _layout(template, roles, forms, special_items, ends)
    except InputError:
        pass
    else:
        return True
    special_tokens = dict(special_items)
    without = _jinja(template, roles[1:], forms[1:], special_tokens)
    try:
        return _jinja(template, roles, forms, special_tokens) != without
    except InputError:
        return False


def _thought(content: str) -> re.Match | None:
    return _THOUGHT.fullmatch(content) if "</think>" in content else None  # else it would go on from each white space


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
    template: str,
    roles: tuple[str, ...],
    forms: tuple[str, ...],
    special_items: tuple[tuple[str, str], ...],
    ends: re.Pattern,
) -> tuple[tuple[str, bool], ...]:
    """The template's own text and a mark for each content, in order, each with whether the model is to say it.

    A response begins where the prompt that generation would use ends, and ends after its end token. ``forms``: what
    stands for the contents, each with its mark.
    """
    text = _jinja(template, roles, forms, dict(special_items))
    for i, role in enumerate(roles):
        if forms[i] and (times := text.count(f"\ue000{i}\ue001")) != 1:
            raise InputError(f"the chat template writes the {role}'s turn {i + 1} {times} times; name a --prompt_style")
    for i in reversed(range(len(roles))):
        if roles[i] == "assistant":
            text = _mark_response(text, template, roles[: i + 1], forms[: i + 1], dict(special_items), ends)
    layout, response = [], False
    for piece in filter(None, re.split(f"({_CONTENT}|[{_BEGIN}{_END}{_FORGOTTEN}])", text)):
        if piece in (_BEGIN, _END):
            response = piece == _BEGIN
        else:
            layout.append((piece, response))
    return tuple(layout)


def _mark_response(
    text: str,
    template: str,
    roles: tuple[str, ...],
    forms: tuple[str, ...],
    special_tokens: dict[str, str],
    ends: re.Pattern,
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
    eos = re.escape(special_tokens.get("eos_token", "</s>"))
    behind = closed.partition(mark)[2]
    found = re.search(f"{ends.pattern}|{eos}", behind)
    end = behind[: found.end()] if found else ""
    if not end or not after.startswith(end):  # some leave it out behind the last answer alone
        found = re.match(rf"\s*(?:{eos})", after)
        end = found[0] if found else ""
    forgotten = "" if end else _FORGOTTEN
    return prompt + _BEGIN + before[len(prompt) :] + mark + end + forgotten + _END + after[len(end) :]


def _jinja(template: str, roles: tuple[str, ...], contents: Sequence[str], special_tokens: dict[str, str]) -> str:
    """Render as transformers does; a dialogue that ends with the user's turn is a prompt for an answer."""
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    variables = {**special_tokens, "messages": turns, "add_generation_prompt": roles[-1:] == ("user",)}
    try:
        return render_jinja(template, {**variables, "tools": None, "documents": None})
    except InputError as error:
        raise InputError(f"the chat template refuses the dialogue: {error}; name a --prompt_style") from None


def fill_template(text: str, fields: dict[str, str]) -> str:
    """The Python format string that a Jinja text amounts to, each variable written as a field, or absent if empty.

    ``bos_token`` and ``eos_token`` are known to it as well. InputError: it cannot be rendered.
    """
    names = fields | {"bos_token": "bos", "eos_token": "eos"}
    written = {name: f"\ue000{field}\ue001" if field else "" for name, field in names.items()}
    try:
        form = render_jinja(text, written)
    except InputError as error:
        raise InputError(f"the Jinja of the prompt style fails: {error}") from None
    return re.sub("\ue000(.*?)\ue001", r"{\1}", form.replace("{", "{{").replace("}", "}}"))
