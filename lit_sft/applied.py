"""Templates that are already applied in data: seen before they are encoded a second time, or as plain characters."""

from functools import lru_cache

import numpy as np

from lit_sft.errors import InputError
from lit_sft.prompts import Message, render, style_label
from lit_sft.samples import is_text
from lit_sft.styles import AS_WRITTEN
from lit_sft.tokenizer import Tokenizer

NONE, IN_DIALOGUE, AT_ENDS, WITHIN = range(4)
"""What ``find_template`` says of a sample: a template is written in a dialogue; in a text at its ends, or within it."""
SHARE = {AT_ENDS: 0.01, WITHIN: 0.5, IN_DIALOGUE: 0.5}
"""The share of samples above which they are refused. Below it they are about control tokens, and that is said."""


def find_template(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> int:
    """Say whether a template is written in a sample: NONE, IN_DIALOGUE, AT_ENDS or WITHIN.

    A dialogue has one if a control token is in any of its contents, or if what ``style`` puts around a question is
    written there already.
    """
    if is_text(messages):
        text = messages[0].content
        if not tokenizer.controls_in(text):
            return NONE
        ends_so = not text[tokenizer.end_of_last_control(text) :].strip()
        return AT_ENDS if ends_so or tokenizer.begins_with_control(text) else WITHIN
    # a system prompt may be the user's own, given by a flag
    if any(tokenizer.controls_in(message.content) for message in messages if message.role != "system"):
        return IN_DIALOGUE
    heads, tails = _frame(style, tokenizer)
    for message in messages:
        text = message.content.strip()
        if message.role == "user" and (text.startswith(heads) or text.endswith(tails)):
            return IN_DIALOGUE
        if message.role == "assistant" and text.startswith(tails):
            return IN_DIALOGUE
    return NONE


@lru_cache(maxsize=8)
def _frame(style: str, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a style writes before and behind a question, without control tokens.

    Only what has other characters than letters, digits and spaces: a question may begin with the word "user".
    """
    if style == AS_WRITTEN:
        return (), ()
    marks = "\ue000q\ue001", "\ue000a\ue001", "\ue000b\ue001"
    turns = (Message("user", marks[0]), Message("assistant", marks[1]), Message("user", marks[2]))
    try:
        parts = render(turns, style, tokenizer.special_tokens, tokenizer.chat_template, tokenizer.ends)
    except InputError:  # a template that refuses such a dialogue; each sample is refused, too
        return (), ()
    text = "".join(part.text for part in parts)
    first, behind, between = (text.partition(marks[0])[0], *_between(text, marks))
    heads, tails = {_bare(first, tokenizer), _bare(between, tokenizer)}, {_bare(behind, tokenizer)}
    return tuple(filter(None, heads)), tuple(filter(None, tails))


def _between(text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    """The text between question and answer, and between answer and question."""
    _, _, rest = text.partition(marks[0])
    behind, _, rest = rest.partition(marks[1])
    return behind, rest.partition(marks[2])[0]


def _bare(text: str, tokenizer: Tokenizer) -> str:
    for control in tokenizer.controls_in(text):
        text = text.replace(control, " ")
    text = text.strip()
    return "" if all(c.isalnum() or c.isspace() for c in text) else text


def check_templates(rows: np.ndarray, names: list[str], style: str) -> None:
    """Refuse sources in which a template is already applied, by what ``find_template`` said of their rows.

    Args:
        rows: (N,) spool.ROW.
        names: of the sources.
        style: that the samples were written in.

    Raises InputError that names the source, a row and both ways on.
    """
    for number, name in enumerate(names):
        of_source = rows[rows["source"] == number]
        for kind, share in SHARE.items():
            counted = (AT_ENDS, WITHIN) if kind == WITHIN else (kind,)
            templated = of_source[np.isin(of_source["template"], counted)]
            if len(templated) and len(templated) > share * len(of_source):
                raise InputError(
                    f"{name} row {templated['row'][0]}: a template seems to be applied in it already "
                    f"({_signs(kind, style)} written in {len(templated):,} of {len(of_source):,} records); "
                    "--template_applied true takes the texts as they are, their control tokens as such; "
                    "--template_applied false takes all as plain characters, and applies the style; or delete them"
                )


def _signs(kind: int, style: str) -> str:
    return "control tokens are" if kind != IN_DIALOGUE else f"control tokens, or parts of {style_label(style)!r}, are"


def template_notices(rows: np.ndarray, names: list[str], style: str) -> list[str]:
    """A line for each source of which a smaller share than is refused has signs of a template."""
    notices = []
    for number, name in enumerate(names):
        of_source = rows[rows["source"] == number]
        for kind in (IN_DIALOGUE, AT_ENDS, WITHIN):
            templated = of_source[of_source["template"] == kind]
            if len(templated):
                notices.append(
                    f"{name}: {_signs(kind, style)} written in {len(templated):,} of {len(of_source):,} records, the "
                    f"first in row {templated['row'][0]}, and taken as plain characters; see --template_applied"
                )
    return notices


def check_as_written(rows: np.ndarray, names: list[str]) -> None:
    """Refuse a source among several in which no control token is written, while all are to be taken as written."""
    for number, name in enumerate(names):
        of_source = rows[rows["source"] == number]
        if len(names) > 1 and len(of_source) and not of_source["template"].any():
            raise InputError(
                f"--template_applied true: no control token is written in {name}, which no template would be applied "
                "to; prepare it apart, or write its template into it"
            )
