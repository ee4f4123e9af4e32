"""Examples made visible: every token spelled on its own, what the eye does not see named."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

from lit_sft.tokenizer import Tokenizer

LONGEST_CHARACTER = 8  # tokens that may have to be read together before a character is whole
PART = "◌"  # stands for a token whose bytes are shown with those of the tokens behind it
NAMES = {"\n": "↵\n", "\t": "⇥", "\r": "␍"}
HEAD, TAIL = 600, 100  # tokens of a longer example that are shown


@dataclass(frozen=True)
class Token:
    """One token of an example, as it is shown."""

    id: int
    text: str
    labelled: bool
    control: bool


@dataclass(frozen=True)
class Shown:
    """An example to look at."""

    place: str
    n_tokens: int
    n_labels: int
    head: list[Token]
    n_hidden: int
    """Tokens left out between head and tail."""
    tail: list[Token]

    @property
    def begins(self) -> str:
        """The first words to be learned."""
        return "".join(t.text for t in self.head if t.labelled)[:60]


def show(place: str, ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> Shown:
    """Spell an example, without its middle when it is longer than HEAD + TAIL tokens."""

    def spelled(at: slice) -> list[Token]:
        texts = spell(ids[at], tokenizer)
        control = (tokenizer.control_text(i) is not None for i in ids[at])
        return [Token(*token) for token in zip(ids[at], texts, mask[at], control, strict=True)]

    head = len(ids) if len(ids) <= HEAD + TAIL else HEAD
    tail = len(ids) - head and TAIL
    parts = spelled(slice(0, head)), spelled(slice(len(ids) - tail, len(ids)))
    return Shown(place, len(ids), sum(mask), parts[0], len(ids) - head - tail, parts[1])


def spell(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """What each id adds to the text, made visible; where several make a character, the last has it, the others PART."""
    before = tokenizer.encode("a", bos=False)  # decoders treat what a text begins with in a way of their own
    skipped = len(tokenizer.decode(before))
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        text = tokenizer.control_text(ids[start])
        for end in range(start + 1, min(start + LONGEST_CHARACTER, len(ids)) + 1) if text is None else ():
            whole = tokenizer.decode([*before, *ids[start:end]])[skipped:]
            if "\ufffd" not in whole:
                texts += [PART] * (end - start - 1) + [visible(whole) or f"⟨id {ids[end - 1]}⟩"]
                break
        else:
            texts.append(visible(tokenizer.decode([*before, ids[start]])[skipped:] if text is None else text))
    return texts


def visible(text: str) -> str:
    """``text`` with a sign or the number of each character that a reader, or a terminal, would not show as one."""
    return "".join(c if c.isprintable() else NAMES.get(c) or f"⟨U+{ord(c):04X}⟩" for c in text)


def print_examples(examples: Iterable[Shown], file: TextIO) -> None:
    """Print examples with their labels and control tokens marked: in colour on a terminal, else by brackets."""
    colour = file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for example in examples:
        text = f"\n{example.place}: {example.n_tokens:,} tokens, {example.n_labels:,} of them labels (marked); "
        text += "control tokens in reverse\n" if colour else "control tokens in ⟨ ⟩, labels in ⟦ ⟧\n"
        text += _marked(example.head, colour)
        if example.n_hidden:
            text += f"\n… {example.n_hidden:,} tokens more …\n" + _marked(example.tail, colour)
        encoding = file.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _marked(tokens: list[Token], colour: bool) -> str:
    """Labelled tokens in green or between ⟦ and ⟧, control tokens in reverse or between ⟨ and ⟩."""
    if colour:  # green: to be predicted; in reverse: a control token
        codes = (";".join(["32"] * t.labelled + ["7"] * t.control) for t in tokens)
        return "".join(
            f"\x1b[{code}m{t.text}\x1b[0m" if code else t.text for code, t in zip(codes, tokens, strict=True)
        )
    text, before = "", False
    for t in tokens:
        if t.labelled != before:
            text += "⟦" if t.labelled else "⟧"
        text += f"⟨{t.text}⟩" if t.control else t.text
        before = t.labelled
    return text + "⟧" * before
