"""A tokenizer as GGUF has it: tokens with kinds, scores or merges, and the name of how texts are cut beforehand.

Kinds of tokenizers there (source: llama.cpp's llama-vocab.cpp): ``llama`` is SentencePiece's BPE, which merges by
scores; ``gpt2`` is byte-level BPE, which merges by rank within the pieces that a regular expression cuts. GGUF holds no
expression but a name, ``tokenizer.ggml.pre``, for those that llama.cpp has compiled in. llama.cpp's converter finds the
name by the hash of an encoded text, so that a vocabulary that it has not seen has none; here it is found by what it
stands for, the pre-tokenizer in tokenizer.json.
"""

import re
from dataclasses import dataclass

from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.prompts import Message, render
from lit_sft.samples import check_ids
from lit_sft.styles import CHAT_TEMPLATE
from lit_sft.tokenizer import Tokenizer

KINDS = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}
ADDED_SCORE = -1000.0

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_WITH_SLASH = REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
# the regular expressions of published tokenizers → llama.cpp's name, where every merge is needed and where
# ignore_merges takes a whole word that is a token; None: there is no such name
EXPRESSIONS = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": ("dbrx", "llama-bpe"),
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": ("qwen2", None),
    rf"{CASED % ('', '')}|\p{{N}}|{REST_WITH_SLASH}": (None, "tekken"),
    rf"{CASED % ((CONTRACTIONS + '?',) * 2)}|\p{{N}}{{1,3}}|{REST_WITH_SLASH}": ("gpt-4o", None),
}
FALCON = ["Punctuation", "ByteLevel", "Digits", "Split [0-9][0-9][0-9]"]


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """``llama`` or ``gpt2``."""
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    """A text's first word is read as if a space came before it."""


def read_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary, as many tokens as the embedding has rows; InputError for a kind that llama.cpp lacks."""
    ends = (tokenizer.bos_id if tokenizer.adds_bos else None, tokenizer.eos_id)
    check_ids((i for i in ends if i is not None), size, tokenizer)
    if tokenizer.vocab_size > size:
        print(
            f"notice: the tokenizer has {tokenizer.vocab_size} ids, the model embeddings for {size}: the tokens beyond "
            "are left out of the file"
        )
    if pieces := tokenizer.pieces():
        if any(score != int(score) for _, score, kind in pieces if kind == "normal"):
            raise InputError(f"{tokenizer.checkpoint_dir}/tokenizer.model is a unigram model: GGUF export has BPE only")
        return _scored(tokenizer, dict(enumerate(pieces)), size)
    document = read_json(tokenizer.checkpoint_dir / "tokenizer.json")
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise InputError(f"{tokenizer.checkpoint_dir}/tokenizer.json is a {model.get('type')} model, GGUF has BPE only")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pieces = {i: (text, 0.0, "normal") for text, i in model["vocab"].items()}
    for token in document.get("added_tokens") or ():
        special = tokenizer.token_id(token["content"]) == token["id"]
        pieces[token["id"]] = token["content"], ADDED_SCORE, "control" if special else "user_defined"
    steps = _steps(tokenizer.pre_tokenizer)
    if not any(step["type"] == "ByteLevel" for step in steps):
        if not model.get("byte_fallback"):
            raise InputError(f"{tokenizer.checkpoint_dir}/tokenizer.json has neither byte level nor byte fallback")
        rank = {merge.replace(" ", "", 1): float(-i) for i, merge in reversed(list(enumerate(merges)))}
        for i, (text, _, kind) in pieces.items():
            if kind == "normal":
                kind = "byte" if re.fullmatch("<0x[0-9A-F]{2}>", text) else kind
                pieces[i] = text, rank.get(text, 0.0), "unknown" if text == model.get("unk_token") else kind
        return _scored(tokenizer, pieces, size)
    tokens, _, kinds = _columns(pieces, size)
    return Vocabulary("gpt2", _pre(steps, bool(model.get("ignore_merges"))), tokens, kinds, merges=merges)


def _columns(pieces: dict[int, tuple[str, float, str]], size: int) -> tuple[list[str], list[float], list[int]]:
    rows = [pieces.get(i, (f"[PAD{i}]", ADDED_SCORE, "unused")) for i in range(size)]
    tokens, scores, kinds = map(list, zip(*rows, strict=True))
    return tokens, scores, [KINDS[kind] for kind in kinds]


def _scored(tokenizer: Tokenizer, pieces: dict[int, tuple[str, float, str]], size: int) -> Vocabulary:
    tokens, scores, kinds = _columns(pieces, size)
    first = tokenizer.encode("a", bos=False)
    prefix = bool(first) and first[0] < size and tokens[first[0]].startswith("▁")
    if prefix and _prefix_is_for_the_first_alone(tokenizer, tokens) and _template_begins_with_control(tokenizer):
        prefix = False
        print(
            "notice: llama.cpp puts a space in front of every stretch between control tokens, or of none; this "
            "tokenizer does so where a text begins, and its chat template begins with a control token: none is put"
        )
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, space_prefix=prefix)


def _prefix_is_for_the_first_alone(tokenizer: Tokenizer, tokens: list[str]) -> bool:
    bos = tokenizer.special_tokens.get("bos_token")
    later = tokenizer.encode(f"{bos}a", bos=False, control=True)[1:] if bos else []
    return bool(later) and not tokens[later[0]].startswith("▁")


def _template_begins_with_control(tokenizer: Tokenizer) -> bool:
    if not tokenizer.chat_template:
        return False
    try:
        first = render((Message("user", "a"),), CHAT_TEMPLATE, tokenizer.special_tokens, tokenizer.chat_template)[0]
    except InputError:
        return False
    return tokenizer.begins_with_control(first.text)


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    """The steps of a pre-tokenizer, sequences opened."""
    if pre_tokenizer is None:
        return []
    inner = pre_tokenizer.get("pretokenizers")
    return [pre_tokenizer] if inner is None else [step for each in inner for step in _steps(each)]


def _pre(steps: list[dict], ignore_merges: bool) -> str:
    """llama.cpp's name for a pre-tokenizer; the default, with a notice, where it has none."""
    names = [f"Split {step['pattern'].get('Regex')}" if step["type"] == "Split" else step["type"] for step in steps]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    found = None
    if not any(level.get("add_prefix_space") for level in levels):
        own = levels[0].get("use_regex", True)  # ByteLevel cuts by GPT-2's own expression
        digits = [step for step in steps if step["type"] == "Digits" and step.get("individual_digits")]
        if names == ["ByteLevel"] and own:
            found = "gpt-2"
        elif names == ["Digits", "ByteLevel"] and own and digits:
            found = "smollm"
        elif names == FALCON and own and not digits:
            found = "falcon"
        elif len(names) == 2 and names[1] == "ByteLevel" and not own:
            found = EXPRESSIONS.get(names[0].removeprefix("Split "), (None, None))[ignore_merges]
    if found is None:
        print("notice: llama.cpp has no name for this tokenizer's pre-tokenizer; its default may cut texts differently")
    return found or "default"
