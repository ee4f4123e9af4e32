"""Templates that are already applied in data: seen before they are encoded a second time, or as plain characters."""

import re
from functools import lru_cache

import numpy as np

from lit_sft.errors import InputError
from lit_sft.prompts import Message, render, style_label
from lit_sft.samples import is_text
from lit_sft.styles import AS_WRITTEN
from lit_sft.tokenizer import Tokenizer

NONE, IN_DIALOGUE, IN_TEXT = range(3)
"""What ``find_template`` says of a sample."""
TEXTS = 0.01
"""The share of templated plain texts from which on they are refused; below it they are texts about control tokens."""
DIALOGUES = 0.5
"""That of dialogues, in whose messages people write control tokens rather often."""
SHORTEST_OPENING = 4
"""Characters of a style's own text in front of a question by which it is recognised in data."""


def find_template(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> int:
    """Say whether a template is written in a sample: NONE, IN_DIALOGUE or IN_TEXT.

    Plain text has one if a control token begins or ends it, or if it has two different ones; a dialogue if a control
    token is in any of its contents, or if a question begins with what ``style`` itself puts in front of one.
    """
    if style == AS_WRITTEN:
        return NONE
    if is_text(messages):
        text = messages[0].content
        controls = tokenizer.controls_in(text)
        at_an_end = tokenizer.begins_with_control(text) or not text[tokenizer.end_of_last_control(text) :].strip()
        return IN_TEXT if controls and (at_an_end or len(set(controls)) > 1) else NONE
    # a system prompt may be the user's own, given by a flag
    if any(tokenizer.controls_in(message.content) for message in messages if message.role != "system"):
        return IN_DIALOGUE
    openings = _openings(style, tokenizer)
    questions = (message.content.lstrip() for message in messages if message.role == "user")
    return IN_DIALOGUE if any(question.startswith(openings) for question in questions) else NONE


@lru_cache(maxsize=8)
def _openings(style: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a style puts in front of a question, whole, its last line, and without control tokens."""
    mark = "\ue000"
    try:
        parts = render((Message("user", mark),), style, tokenizer.special_tokens, tokenizer.chat_template, tokenizer.ends)
    except InputError:  # a template that refuses a single question; each sample is refused, too
        return ()
    before = "".join(part.text for part in parts).partition(mark)[0].strip()
    last = before.rpartition("\n")[2]
    controls = "|".join(map(re.escape, tokenizer.controls_in(before)))
    bare = re.sub(controls, "", last).strip() if controls else last
    return tuple({text for text in (before, last, bare) if len(text) >= SHORTEST_OPENING})


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
        for kind, share in ((IN_TEXT, TEXTS), (IN_DIALOGUE, DIALOGUES)):
            templated = of_source[of_source["template"] == kind]
            if len(templated) and len(templated) > share * len(of_source):
                heading = f", or the heading of prompt style {style_label(style)!r}," if kind == IN_DIALOGUE else ""
                raise InputError(
                    f"{name} row {templated['row'][0]}: a template is already applied in it (control tokens{heading} "
                    f"are written in {len(templated):,} of {len(of_source):,} records); --template_applied true takes "
                    "the texts as they are, their control tokens as such; --template_applied false takes all as plain "
                    "characters"
                )
