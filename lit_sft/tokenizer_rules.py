"""How a tokenizer.json cuts texts in deployment: by its own rules, or by those that transformers has for its class.

transformers 5 takes the vocabulary and the merges of a tokenizer.json and, for the classes below, makes normalizer and
pre-tokenizer anew, whatever the file says of them (``__init__`` of those classes; AutoTokenizer picks the class). A
model is asked with the ids that come of it, so it has to be trained on them.
"""

import json
from collections.abc import Callable
from typing import Any

from lit_sft.errors import InputError
from lit_sft.families import find_family

Rules = dict[str, Any]
"""``normalizer`` and ``pre_tokenizer``, as a tokenizer.json has them."""

AS_IT_IS = "TokenizersBackend"
"""transformers' class that takes a tokenizer.json as it is."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prepend_scheme(settings: dict[str, Any]) -> str:
    """Where a sentencepiece model puts a space: in front of the ``first`` stretch between control tokens, or ``always``
    (``legacy``), or ``never``. Without a word in tokenizer_config.json, ``settings``, that is transformers 5's first.
    """
    if settings.get("add_prefix_space") is False:
        return "never"
    has_legacy = not _class_name(settings).startswith("CodeLlama")
    return "always" if has_legacy and settings.get("legacy") else "first"


def rules_of_class(document: dict[str, Any], settings: dict[str, Any], hf_config: dict[str, Any]) -> Rules | None:
    """The rules that transformers gives to a tokenizer.json, or None: its own.

    Args:
        document: the tokenizer.json.
        settings: its tokenizer_config.json.
        hf_config: the model's config.json, empty where there is none.
    """
    make = RULES.get(_tokenizer_class(settings, hf_config))
    is_bpe = document["model"].get("type", "BPE") == "BPE" and "merges" in document["model"]
    if make is None or not is_bpe:
        return None
    if make is _metaspace and _has_byte_level(document):  # of a class that was named by mistake, as AutoTokenizer knows
        return None
    return make(settings)


def names_of_class(settings: dict[str, Any], hf_config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that transformers' class has where no file names others."""
    return NAMES.get(_tokenizer_class(settings, hf_config), {})


def options_of_class(settings: dict[str, Any], hf_config: dict[str, Any]) -> dict[str, Any]:
    """The options of the BPE model that transformers sets, where it makes a tokenizer's rules anew."""
    make = RULES.get(_tokenizer_class(settings, hf_config))
    from_sentencepiece = make in (_metaspace, _spaces)
    return {"fuse_unk": from_sentencepiece, "byte_fallback": from_sentencepiece}


def _class_name(settings: dict[str, Any]) -> str:
    return str(settings.get("tokenizer_class") or "").removesuffix("Fast")


def _tokenizer_class(settings: dict[str, Any], hf_config: dict[str, Any]) -> str:
    """The class that AutoTokenizer picks."""
    named = _class_name(settings) or _class_name(hf_config)
    try:
        family = find_family(hf_config)
    except InputError:  # a tokenizer without its model
        return named
    registered = family.tokenizer_class
    if registered is None:
        return named
    if registered == AS_IT_IS or family.overrides_tokenizer_class or not named:
        return registered
    return named


def _has_byte_level(document: dict[str, Any]) -> bool:
    parts = [document.get("pre_tokenizer"), document.get("decoder"), document.get("post_processor")]
    return any('"ByteLevel"' in json.dumps(part) for part in parts)


def _metaspace(settings: dict[str, Any]) -> Rules:
    scheme = prepend_scheme(settings)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": metaspace}


def _byte_level(settings: dict[str, Any], use_regex: bool = True) -> Rules:
    prefix = bool(settings.get("add_prefix_space"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}
    return {"normalizer": None, "pre_tokenizer": byte_level}


def _composed_byte_level(settings: dict[str, Any]) -> Rules:
    return _byte_level(settings) | {"normalizer": {"type": "NFC"}}


def _composed_words(settings: dict[str, Any]) -> Rules:
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    byte_level = _byte_level(settings, use_regex=False)["pre_tokenizer"]
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}


def _spaces(settings: dict[str, Any]) -> Rules:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return {"normalizer": replace, "pre_tokenizer": split}


RULES: dict[str, Callable[[dict[str, Any]], Rules]] = {
    "LlamaTokenizer": _metaspace,
    "CodeLlamaTokenizer": _metaspace,
    "GPT2Tokenizer": _byte_level,
    "CodeGenTokenizer": _byte_level,
    "GPTNeoXTokenizer": _composed_byte_level,
    "Qwen2Tokenizer": _composed_words,
    "GemmaTokenizer": _spaces,
}
_OF_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_OF_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer"), _OF_LLAMA),
    **dict.fromkeys(("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer"), _OF_GPT2),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
}
