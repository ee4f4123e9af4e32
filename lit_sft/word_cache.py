"""The ids of words met before, for sentencepiece models whose words certainly do not influence each other."""

import re
from array import array
from collections.abc import Callable
from typing import Any

MOST_WORDS, LONGEST_WORD = 1 << 16, 32  # characters; about 15 MB
MOST_LINES, LONGEST_LINE = 1 << 10, 200  # the first that are met, among them those of a template


class WordCache:
    """Encodes as the model does, word by word: several times as fast, and exact.

    Byte-pair encoding only ever joins what makes a piece together. If no piece has a space behind another character,
    nothing is joined across the place before a space, nor beside a line break where no piece has one; then the ids of
    a text are those of its words, one after the other.
    """

    def __init__(self, whole: Any, bare: Any) -> None:
        """``whole`` and ``bare``: the sentencepiece processor, and the one that puts no space in front of a text."""
        self.whole, self.bare = whole, bare
        self.words, self.breaks = _words_apart(bare)
        self.known = _Known(lambda word: bare.encode(word))
        self.spaced = _Known(lambda word: bare.encode(" " + word))
        self.lines: dict[str, bytes] = {}

    def encode(self, text: str, continuation: bool) -> list[int]:
        """The ids of ``text`` by ``bare`` where it is a continuation, else by ``whole``."""
        if self.words is None:
            return (self.bare if continuation else self.whole).encode(text)
        parts: list[bytes] = []
        if not continuation and (head := self.words.match(text)):
            parts.append(_as_bytes(self.whole.encode(head[0])))
            text = text[head.end() :]
        for i, line in enumerate(text.split("\n") if self.breaks else [text]):
            if i:
                parts.append(self.known["\n"])
            if line in self.lines:
                parts.append(self.lines[line])
            elif line:
                parts.append(self._line(line))
        return array("i", b"".join(parts)).tolist()

    def _line(self, line: str) -> bytes:
        if "  " in line or "▁" in line:
            ids = b"".join(map(self.known.__getitem__, self.words.findall(line)))
        else:  # splitting at each space is quicker
            first, *others = line.split(" ")
            ids = b"".join((self.known[first], *map(self.spaced.__getitem__, others)))
        if len(self.lines) < MOST_LINES and len(line) <= LONGEST_LINE:
            self.lines[line] = ids
        return ids


class _Known(dict):
    """Word → its ids as int32; one not met before is encoded, and kept if it is short and there is room."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        found = _as_bytes(self.encode(word))
        if len(word) <= LONGEST_WORD and len(self) < MOST_WORDS:
            self[word] = found
        return found


def _as_bytes(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def _words_apart(model: Any) -> tuple[re.Pattern | None, bool]:
    """What finds the words, if the class's condition holds, and whether line breaks are apart as well.

    The condition is one of the pieces, of byte-pair encoding, and of texts being left as they are.
    """
    size = model.vocab_size()
    numbers = [i for i in range(size) if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))]
    pieces, scores = [model.id_to_piece(i) for i in numbers], [model.get_score(i) for i in numbers]
    # byte-pair encoding numbers its merges, unigram models have logarithms of probabilities
    ranked = all(score == int(score) for score in scores) and len(set(scores)) > len(pieces) // 2
    apart = not any("▁" in piece.lstrip("▁") for piece in pieces)
    text = "  a  b   c \n d\n\n e ﬁ①Å\u00a0é "
    kept = model.normalize(text) == text.replace(" ", "▁")
    bytes_for_unknown = any(model.is_byte(i) for i in range(size))  # else neighbours that are unknown become one
    if not (ranked and apart and kept and bytes_for_unknown):
        return None, False
    if any("\n" in piece for piece in pieces):
        return re.compile("[ ▁]*[^ ▁]+|[ ▁]+"), False
    return re.compile("[ ▁]*[^ ▁\n]+|[ ▁]+|\n"), True
