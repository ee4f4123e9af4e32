"""What is printed or saved holds no secret: Hub tokens, what logs in to an address, and what a signed one ends on."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from urllib.parse import quote

LEAST = 8  # a shorter word is no token of any Hub, and replacing it everywhere would spoil messages
LONGEST = 1000  # characters of a line that says what was wrong
FLAG = re.compile(r"(--(?!max)[\w-]*token)(?:=(.*))?", re.DOTALL | re.IGNORECASE)
TOKEN = re.compile(
    r"\bhf_(?!token\b)(?:[A-Za-z0-9]{20,}|\w+\b(?!/|\.\w))"  # a short one before a slash or an ending is a file's name
    r"|((?i:--(?!max)[\w-]*token[= ])\s*)(?!or\b)[^\s;]+"  # our advice is "--access_token or HF_TOKEN"
)
# a name and a password end on the last @ before a slash; a password that holds one follows a colon and is no port
LOGIN = re.compile(r"(?<=://)(?:[^/?#\s:]*:(?!\d+[/?#])\S*|[^/?#\s]*)@")
QUERY = re.compile(r"(://[^\s?#]*[?#])\S*[^\s'\";,)]")
known: set[str] = set()
"""Tokens of this process, in the forms in which they may come up in a text."""


def remember(*tokens: str | None) -> None:
    """From now on ``without_secrets`` knows these; a token of several lines also line by line."""
    words = [word for token in tokens if token for word in (token, *token.split())]
    forms = {
        form
        for word in words
        for form in (word, repr(word)[1:-1], " ".join(word.split()), quote(word, "", errors="replace"))
    }
    known.update(form for form in forms if len(form) >= LEAST)


def remember_arguments(argv: Iterable[str]) -> None:
    """Remember the tokens of this command line and of the environment, and no others."""
    known.clear()
    remember(*(value for _, value in _with_values(argv)), *map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")))


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for Hub tokens, those remembered, and what follows a flag named like ``--access_token``.

    Of addresses login and query go too: a signature or a token may be anywhere in them.
    """
    for token in sorted(known, key=len, reverse=True):
        text = text.replace(token, "***")
    text = TOKEN.sub(r"\1***", text)
    return QUERY.sub(r"\1***", LOGIN.sub("***@", text)) if "://" in text else text


def without_address_secrets(argument: str) -> str:
    """``without_secrets`` of a whole argument; in an address what follows a space belongs to it too."""
    if re.match(r"[^\s:]*\w://", argument):
        argument = re.sub(r"[?#].*", "?***", re.sub(r"(?<=://)[^/?#]*@", "***@", argument), flags=re.DOTALL)
    return without_secrets(argument)


def command_line() -> str:
    """The command as typed, without the secrets in it: they never reach a file."""
    words = [
        word if value is None else word[: len(word) - len(value)] + "***" for word, value in _with_values(sys.argv)
    ]
    return " ".join(map(without_address_secrets, words))


def _with_values(argv: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each word of a command line, and what of it is a token: of ``--token=X`` the end, of the word after one all."""
    follows = False
    for word in argv:
        flag = None if follows else FLAG.fullmatch(word)
        yield word, word if follows else flag and flag[2]
        follows = flag is not None and flag[2] is None


def shortened(line: str) -> str:
    """A line that a terminal bears: of a longer one its beginning and its end, which says what to do."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} … {line[3 - LONGEST // 3 :]}"
