"""What is measured of a sample's text, to find duplicates, leakage and poor responses."""

import hashlib
import re
from typing import NamedTuple

import numpy as np

from lit_sft.prompts import Message

PERMUTATIONS = 128
"""Entries of a MinHash signature; its estimate of a similarity has a standard deviation of at most 0.044."""
SCHEME = "affine32"
"""How datasketch permutes: fast, with 32-bit entries."""
SHINGLE = 3
"""Words, and for repetition tokens, that are looked at together."""


class Measures(NamedTuple):
    """Of one sample; every hash has 8 bytes."""

    text: int
    """Hash of all turns, and of which responses are not learned."""
    prompt: int
    """Hash of the turns before the first response that is learned."""
    question: int
    """The same without case, punctuation and spacing."""
    alphanumeric: float
    """Share of letters and digits, of any script, among the learned responses' characters that are no white space."""
    repetition: float
    """Share of three-token stretches of the labelled tokens that occurred before: 0 where all are new."""


def measure(messages: tuple[Message, ...], learned: list[int] | None) -> Measures:
    """The measures of a sample whose labelled tokens are ``learned``; None: shares are not needed, and given as 0."""
    first = next(i for i, m in enumerate(messages) if m.role == "assistant" and m.learned is not False)
    first = first or len(messages)  # a text without a prompt
    prompt = "\0".join(f"{m.role}\0{m.content}\0{m.input}" for m in messages[:first])
    rest = "\0".join(_marked(m) for m in messages[first:])
    words = [word for m in messages[:first] for word in re.findall(r"\w+", f"{m.content} {m.input}".casefold())]
    hashes = _hash(f"{prompt}\1{rest}"), _hash(prompt), _hash(" ".join(words) or prompt)
    if learned is None:
        return Measures(*hashes, 0.0, 0.0)
    responses = [m.content for m in messages if m.role == "assistant" and m.learned is not False]
    visible = "".join("".join(responses).split())
    stretches = list(zip(*(learned[i:] for i in range(SHINGLE)), strict=False))
    alphanumeric = sum(map(str.isalnum, visible)) / max(1, len(visible))
    return Measures(*hashes, alphanumeric, 1 - len(set(stretches)) / len(stretches) if stretches else 0.0)


def _marked(message: Message) -> str:
    """A turn's content, told apart where it is a response that is not learned."""
    return message.content + "\2" * (message.role == "assistant" and message.learned is False)


def signatures(texts: list[tuple[Message, ...]]) -> np.ndarray:
    """The MinHash signatures, (N, PERMUTATIONS) uint32, of the word shingles of each sample (Broder 1997)."""
    from datasketch import MinHash

    documents = []
    for messages in texts:
        words = re.findall(r"\w+|[^\w\s]", " ".join(f"{m.content} {m.input}" for m in messages).casefold())
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        documents.append([shingle.encode() for shingle in shingles])
    hashes = MinHash.bulk(documents, num_perm=PERMUTATIONS, scheme=SCHEME)
    return np.array([one.hashvalues for one in hashes], np.uint32).reshape(len(texts), PERMUTATIONS)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
