"""Tiny tokenizers with the published rules of each family: normalizer, pre-tokenizer, post-processor, added tokens.

What is trained is small; what cuts, prefixes, falls back and names tokens is what the families' files on the Hub say.
"""

import io
import json
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun for 12 hours.",
    "def add(a, b):\n    return a + b  # the sum\n",
    "Ein Übermaß an Größe: Köln, Zürich, Façade, naïve café",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "1234567890 3.14159 2024-01-31 the end of the world as we know it, isn't it? We'll see.",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += x[i];\n}\n\n",
    "日本語のテキスト 한국어 Ωμέγα עברית العربية 😀👍🏽",
] * 20


class Kind(NamedTuple):
    """A tokenizer's files: ``tokenizer``: the bytes of its ``file``; ``beside``: the JSON files beside it, by stem;
    ``other``: those of a tokenizer.model that lies beside a tokenizer.json."""

    file: str
    tokenizer: bytes
    beside: dict[str, dict]
    other: bytes | None = None


# ---- sentencepiece


def sentencepiece_model(**options: object) -> bytes:
    proto = io.BytesIO()
    defaults = {
        "vocab_size": 500,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=proto, **(defaults | options))
    return proto.getvalue()


@cache
def llama_model() -> bytes:
    return sentencepiece_model()


GEMMA_SYMBOLS = [
    *("<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<start_of_turn>", "<end_of_turn>"),
    *("\n" * n for n in range(1, 5)),
    *("▁" * n for n in range(2, 7)),
    *("<table>", "</table>", "<h1>"),
]


@cache
def gemma_model() -> bytes:
    names = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"}
    return sentencepiece_model(add_dummy_prefix=False, user_defined_symbols=GEMMA_SYMBOLS, vocab_size=520, **names)


def special(text: str, **flags: bool) -> dict:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, **plain, "special": True} | flags


def decoder_of(model: bytes, *texts: str, **flags: bool) -> dict:
    """An added_tokens_decoder that names pieces of a sentencepiece model."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {str(sp.piece_to_id(text)): special(text, **flags) for text in texts}


LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
LLAMA_CONFIG = {**LLAMA_NAMES, "add_bos_token": True, "add_eos_token": False, "legacy": False}
PHI3_TOKENS = [
    *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>"),
    *("<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
]
STRIPPING = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|placeholder1|>")


def llama2() -> Kind:
    tokens = decoder_of(llama_model(), "<unk>", "<s>", "</s>")
    config = {**LLAMA_CONFIG, "added_tokens_decoder": tokens}
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Kind("tokenizer.model", llama_model(), {"tokenizer_config": config, "generation_config": generation})


def llama2_legacy() -> Kind:
    """Conversions of 2023: a space in front of every stretch between control tokens."""
    return llama2()._replace(beside={"tokenizer_config": {**LLAMA_CONFIG, "legacy": True}})


CHATML = ["<|im_start|>", "<|im_end|>"]


def chatml(special_tokens: bool = True) -> Kind:
    """ChatML on Llama 2, from its tokenizer.model alone."""
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model()).vocab_size()
    tokens = decoder_of(llama_model(), "<unk>", "<s>", "</s>")
    tokens |= {str(size + i): special(text, special=special_tokens) for i, text in enumerate(CHATML)}
    names = {**LLAMA_CONFIG, "eos_token": "<|im_end|>", "added_tokens_decoder": tokens}
    return Kind("tokenizer.model", llama_model(), {"tokenizer_config": names})


def codellama() -> Kind:
    fill = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    model = sentencepiece_model(user_defined_symbols=fill)
    names = {**LLAMA_NAMES, "tokenizer_class": "CodeLlamaTokenizer", "additional_special_tokens": fill}
    return Kind("tokenizer.model", model, {"tokenizer_config": names, "special_tokens_map": {"bos_token": "<s>"}})


MISTRAL_CONTROLS = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[control_8]"]


def mistral_v3() -> Kind:
    model = sentencepiece_model(control_symbols=MISTRAL_CONTROLS)
    tokens = decoder_of(model, "<unk>", "<s>", "</s>", *MISTRAL_CONTROLS)
    return Kind("tokenizer.model", model, {"tokenizer_config": {**LLAMA_CONFIG, "added_tokens_decoder": tokens}})


def open_llama() -> Kind:
    model = sentencepiece_model(remove_extra_whitespaces=True, allow_whitespace_only_pieces=False)
    return Kind("tokenizer.model", model, {"tokenizer_config": {**LLAMA_CONFIG, "bos_token": special("<s>")}})


def hermes() -> Kind:
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model()).vocab_size()
    beside = {
        "added_tokens": {"<pad>": size},
        "special_tokens_map": {"pad_token": "<pad>", "bos_token": special("<s>")},
    }
    return Kind("tokenizer.model", llama_model(), {"tokenizer_config": LLAMA_NAMES, **beside})


def phi3() -> Kind:
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model()).vocab_size()
    tokens = decoder_of(llama_model(), "<unk>", "<s>") | decoder_of(llama_model(), "</s>", rstrip=True, special=False)
    ids = {text: size + i for i, text in enumerate(PHI3_TOKENS)}
    tokens |= {str(i): special(text, rstrip=text in STRIPPING) for text, i in ids.items()}
    names = {**LLAMA_NAMES, "add_bos_token": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    ends = [ids["<|endoftext|>"], ids["<|assistant|>"], ids["<|end|>"]]
    beside = {"added_tokens": ids, "generation_config": {"bos_token_id": 1, "eos_token_id": ends}}
    return Kind(
        "tokenizer.model", llama_model(), {"tokenizer_config": {**names, "added_tokens_decoder": tokens}, **beside}
    )


def gemma() -> Kind:
    sp = sentencepiece.SentencePieceProcessor(model_proto=gemma_model())
    tokens = decoder_of(gemma_model(), "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokens |= decoder_of(gemma_model(), "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<table>", "<h1>", special=False)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {**names, "add_bos_token": True, "tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": tokens}
    config["additional_special_tokens"] = ["<start_of_turn>", "<end_of_turn>"]
    ends = {"bos_token_id": 2, "eos_token_id": [1, sp.piece_to_id("<end_of_turn>")]}
    return Kind("tokenizer.model", gemma_model(), {"tokenizer_config": config, "generation_config": ends})


def t5_like() -> Kind:
    model = sentencepiece_model(
        model_type="unigram", byte_fallback=False, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )
    return Kind("tokenizer.model", model, {})


def symbols() -> Kind:
    model = sentencepiece_model(user_defined_symbols=["<|turn|>", "▁▁"], control_symbols=["[INST]"])
    return Kind("tokenizer.model", model, {})


# ---- tokenizer.json from a sentencepiece model


def bpe_of(model: bytes, **options: object) -> tokenizers.Tokenizer:
    """The model as tokenizers' BPE, as transformers converts it: its merges follow from its pieces."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, i in pieces.items()
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    bpe = models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **options)
    return tokenizers.Tokenizer(bpe)


def bos_template(tok: tokenizers.Tokenizer, bos: str) -> processors.TemplateProcessing:
    ids = [(bos, tok.token_to_id(bos))]
    return processors.TemplateProcessing(f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids)


def to_kind(tok: tokenizers.Tokenizer, names: dict, /, **beside: dict) -> Kind:
    return Kind("tokenizer.json", tok.to_str().encode(), {"tokenizer_config": names, **beside})


def fallback_decoder(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)


def llama2_prepend() -> Kind:
    tok = bpe_of(llama_model())
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = fallback_decoder(strip=True)
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tok.post_processor = bos_template(tok, "<s>")
    return to_kind(tok, {**LLAMA_NAMES, "tokenizer_class": "LlamaTokenizerFast"})


def llama2_normalized() -> Kind:
    """Early conversions: the special tokens are searched for in the normalized text."""
    tok = bpe_of(llama_model())
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = fallback_decoder(strip=True)
    tok.add_special_tokens([AddedToken(text, normalized=True) for text in ("<unk>", "<s>", "</s>")])
    return to_kind(tok, LLAMA_NAMES)


def llama2_metaspace() -> Kind:
    tok = bpe_of(llama_model())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tok.decoder = fallback_decoder(strip=True)
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tok.post_processor = bos_template(tok, "<s>")
    return to_kind(tok, LLAMA_CONFIG)


def metaspace_always() -> Kind:
    tok = bpe_of(llama_model())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tok.decoder = fallback_decoder(strip=True)
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return to_kind(tok, LLAMA_NAMES)


def unigram_json() -> Kind:
    """A unigram model finds "</s>" in a text by itself, since it is one of its pieces."""
    letters = [(c, -5.0) for c in sorted(set("".join(CORPUS) + "</s>▁"))]
    tok = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], 0, False))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    tok.add_special_tokens(["<unk>", "</s>"])
    return to_kind(tok, {"eos_token": "</s>"})


def llama2_legacy_json() -> Kind:
    """What transformers' class makes of it does not follow from the file: a space in front of every stretch."""
    return llama2_metaspace()._replace(beside={"tokenizer_config": {**LLAMA_CONFIG, "legacy": True}})


def llama2_no_prefix_json() -> Kind:
    return llama2_metaspace()._replace(beside={"tokenizer_config": {**LLAMA_CONFIG, "add_prefix_space": False}})


def mistral_v1_json() -> Kind:
    """Read as it is, whatever class it names."""
    return llama2_prepend()._replace(beside={"tokenizer_config": {**LLAMA_CONFIG, "legacy": True}})


def mistral_v3_both() -> Kind:
    model = made("mistral_v3").tokenizer
    tok = bpe_of(model)
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tok.decoder = fallback_decoder(strip=True)
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", *MISTRAL_CONTROLS)])
    tok.post_processor = bos_template(tok, "<s>")
    return to_kind(tok, made("mistral_v3").beside["tokenizer_config"])._replace(other=model)


def chatml_both(special_tokens: bool = True) -> Kind:
    """ChatML on Llama 2: both files, of which the tokenizer.model knows nothing of ChatML."""
    tok = tokenizers.Tokenizer.from_str(made("llama2_metaspace").tokenizer.decode())
    add = tok.add_special_tokens if special_tokens else tok.add_tokens
    add([AddedToken(text, normalized=False) for text in CHATML])
    names = {**LLAMA_CONFIG, "eos_token": "<|im_end|>"}
    return to_kind(tok, names)._replace(other=llama_model())


def chatml_words_both() -> Kind:
    return chatml_both(special_tokens=False)


def chatml_added() -> Kind:
    """A tokenizer.json from before ChatML was added, which tokenizer_config.json alone knows."""
    return made("llama2_metaspace")._replace(beside=made("chatml").beside)


def phi3_json() -> Kind:
    tok = bpe_of(llama_model())
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = fallback_decoder(strip=True)
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>")])
    tok.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tok.add_special_tokens([AddedToken(t, normalized=False, rstrip=t in STRIPPING) for t in PHI3_TOKENS])
    names = {**LLAMA_NAMES, "add_bos_token": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    ends = [tok.token_to_id(text) for text in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    return to_kind(tok, names, generation_config={"eos_token_id": ends})


def gemma_json() -> Kind:
    tok = bpe_of(gemma_model(), ignore_merges=False)
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = fallback_decoder(strip=False)
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in controls])
    tok.add_tokens([AddedToken(t, normalized=False) for t in GEMMA_SYMBOLS if t not in controls])
    tok.post_processor = bos_template(tok, "<bos>")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "GemmaTokenizerFast"}
    return to_kind(tok, names, generation_config={"eos_token_id": [1, tok.token_to_id("<end_of_turn>")]})


# ---- byte-level BPE

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = CL100K.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    rf"|\p{{N}}{{1,3}}{_REST}"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, **options: object) -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE(**options))
    tok.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False))
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok


def neox() -> Kind:
    """Pythia and RedPajama-INCITE: NFC; runs of spaces are added tokens, searched for in the normalized text."""
    tok = byte_level()
    tok.normalizer = normalizers.NFC()
    tok.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tok.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return to_kind(tok, {**names, "add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"})


def stablelm_alpha() -> Kind:
    tok = byte_level()
    tok.normalizer = normalizers.NFC()
    tok.add_special_tokens(["<|endoftext|>", "<|padding|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"])
    tok.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return to_kind(tok, {**names, "tokenizer_class": "GPTNeoXTokenizer"}, config={"eos_token_id": 0, "bos_token_id": 0})


def stablecode() -> Kind:
    tok = byte_level()
    tok.normalizer = normalizers.NFC()
    fim = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<gh_stars>", "<reponame>"]
    tok.add_special_tokens(["<|endoftext|>", *fim])
    tok.add_tokens([AddedToken("\t" * n, normalized=False) for n in (3, 2)])
    return to_kind(tok, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})


def starcoder() -> Kind:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tok = byte_level(pre_tokenizers.Sequence(steps))
    tok.add_special_tokens(["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return to_kind(tok, {**names, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False})


def smollm2() -> Kind:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tok = byte_level(pre_tokenizers.Sequence(steps))
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<issue_start>"])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    config = {"eos_token_id": tok.token_to_id("<|im_end|>"), "bos_token_id": tok.token_to_id("<|im_start|>")}
    return to_kind(tok, {**names, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, config=config)


def falcon() -> Kind:
    steps = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    tok = byte_level(pre_tokenizers.Sequence(steps))
    words = ["TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION", "DOMAIN", "PREFIX"]
    tok.add_special_tokens([*(f">>{word}<<" for word in words), "<|endoftext|>"])
    config = {"eos_token_id": tok.token_to_id("<|endoftext|>"), "bos_token_id": tok.token_to_id("<|endoftext|>")}
    names = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    return to_kind(tok, names, config=config)


def falcon_rw() -> Kind:
    tok = byte_level()
    tok.add_special_tokens(["<|endoftext|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return to_kind(tok, {**names, "add_prefix_space": False, "tokenizer_class": "CodeGenTokenizer"})


def gpt2_prefix() -> Kind:
    tok = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    tok.add_special_tokens(["<|endoftext|>"])
    return to_kind(tok, {"eos_token": "<|endoftext|>", "add_prefix_space": True})


def llama3() -> Kind:
    tok = byte_level(split_by(CL100K), ignore_merges=True)
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    tok.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *headers])
    steps = [processors.ByteLevel(trim_offsets=False), bos_template(tok, "<|begin_of_text|>")]
    tok.post_processor = processors.Sequence(steps)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    ends = [tok.token_to_id(text) for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    generation = {"bos_token_id": tok.token_to_id("<|begin_of_text|>"), "eos_token_id": ends}
    return to_kind(tok, {**names, "clean_up_tokenization_spaces": True}, generation_config=generation)


def smollm3() -> Kind:
    tok = byte_level(split_by(CL100K), ignore_merges=True)
    tok.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>")])
    steps = [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing("$A", pair="$A $B", special_tokens=[]),
    ]
    tok.post_processor = processors.Sequence(steps)
    names = {"bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    bos = {"bos_token_id": tok.token_to_id("<|begin_of_text|>"), "eos_token_id": tok.token_to_id("<|im_end|>")}
    return to_kind(tok, names, generation_config=bos, config=bos)


def qwen2() -> Kind:
    tok = byte_level(split_by(QWEN))
    tok.normalizer = normalizers.NFC()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"])
    tok.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>", "<|fim_prefix|>")])
    names = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ends = [tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>")]
    generation = {"bos_token_id": tok.token_to_id("<|endoftext|>"), "eos_token_id": ends}
    return to_kind(tok, {**names, "tokenizer_class": "Qwen2Tokenizer"}, generation_config=generation)


def qwen3() -> Kind:
    tok = tokenizers.Tokenizer.from_str(made("qwen2").tokenizer.decode())
    tok.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    beside = made("qwen2").beside
    return to_kind(tok, beside["tokenizer_config"], generation_config=beside["generation_config"])


def nemo() -> Kind:
    tok = byte_level(split_by(TEKKEN), ignore_merges=True)
    controls = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "<pad>",
        "<SPECIAL_20>",
    ]
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in controls])
    tok.post_processor = bos_template(tok, "<s>")
    return to_kind(tok, {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})


def phi4() -> Kind:
    tok = byte_level(split_by(CL100K))
    strips = ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_0|>"]
    tok.add_special_tokens([AddedToken(t, lstrip=True, rstrip=True, normalized=False) for t in strips])
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}
    ends = [tok.token_to_id("<|endoftext|>"), tok.token_to_id("<|im_end|>")]
    return to_kind(tok, names, generation_config={"eos_token_id": ends})


def phi4_mini() -> Kind:
    tok = byte_level(split_by(O200K), ignore_merges=False)
    turns = ["<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>", "<|/tool|>"]
    tok.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tok.add_special_tokens([AddedToken(t, rstrip=True, normalized=False) for t in turns])
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    ends = [tok.token_to_id("<|end|>"), tok.token_to_id("<|endoftext|>")]
    config = {**names, "add_bos_token": False, "add_eos_token": False, "tokenizer_class": "GPT2Tokenizer"}
    return to_kind(tok, config, generation_config={"eos_token_id": ends})


def olmo2() -> Kind:
    tok = byte_level(split_by(CL100K))
    tok.add_tokens([AddedToken(text, normalized=False) for text in ("|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||")])
    tok.add_special_tokens(["<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|endofprompt|>", "<|pad|>"])
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    config = {"eos_token_id": 10**6, "bos_token_id": None}
    return to_kind(tok, {**names, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, config=config)


def stablelm2() -> Kind:
    tok = byte_level(split_by(QWEN))
    tok.normalizer = normalizers.NFC()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"])
    tok.add_tokens([AddedToken(text, normalized=False, single_word=True) for text in ("fim", "<|reg0|>")])
    return to_kind(
        tok, {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "tokenizer_class": "GPT2TokenizerFast"}
    )


def deepseek() -> Kind:
    steps = [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
        pre_tokenizers.Split(
            Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                  r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
            "isolated",
        ),
        BYTES,
    ]  # fmt: skip
    tok = byte_level(pre_tokenizers.Sequence(steps))
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    tok.add_special_tokens([AddedToken(text, normalized=True) for text in (bos, eos, "<｜▁pad▁｜>")])
    tok.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")]
    )
    names = {n: {"__type": "AddedToken", **special(t)} for n, t in (("bos_token", bos), ("eos_token", eos))}
    names |= {"tokenizer_class": "LlamaTokenizerFast"}
    return to_kind(tok, {**names, "add_bos_token": True, "add_eos_token": False})


MAKERS: dict[str, Callable[[], Kind]] = {
    maker.__name__: maker
    for maker in (
        *(llama2, llama2_legacy, chatml, codellama, mistral_v3, open_llama, hermes, phi3, gemma, t5_like, symbols),
        *(llama2_prepend, llama2_normalized, llama2_metaspace, metaspace_always, unigram_json, phi3_json, gemma_json),
        *(llama2_legacy_json, llama2_no_prefix_json, mistral_v1_json, mistral_v3_both, chatml_both, chatml_words_both),
        chatml_added,
        *(neox, stablelm_alpha, stablecode, starcoder, smollm2, falcon, falcon_rw, gpt2_prefix, llama3, smollm3),
        *(qwen2, qwen3, nemo, phi4, phi4_mini, olmo2, stablelm2, deepseek),
    )
}


# config.json's model_type, by which transformers decides whether a tokenizer's class counts; llama for all others
MODEL_TYPES = {
    **dict.fromkeys(("mistral_v3", "mistral_v3_both", "mistral_v1_json", "nemo"), "mistral"),
    **dict.fromkeys(("phi3", "phi3_json", "phi4", "phi4_mini"), "phi3"),
    **dict.fromkeys(("gemma", "gemma_json"), "gemma2"),
    **dict.fromkeys(("neox", "stablecode"), "gpt_neox"),
    **dict.fromkeys(("falcon", "falcon_rw"), "falcon"),
    **dict.fromkeys(("stablelm_alpha", "stablelm2"), "stablelm"),
    **{"smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"},
}


@cache
def made(name: str) -> Kind:
    return MAKERS[name]()


def write(directory: Path, name: str, **files: dict) -> Path:
    """A checkpoint_dir with tokenizer ``name`` and JSON ``files`` beside it, by stem: its own unless some are given.

    Its config.json names a model_type in any case.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kind = made(name)
    (directory / kind.file).write_bytes(kind.tokenizer)
    if kind.other is not None:
        (directory / "tokenizer.model").write_bytes(kind.other)
    files = files or kind.beside
    model = {"model_type": MODEL_TYPES.get(name, "llama")} | files.get("config", {})
    for stem, content in {**files, "config": model}.items():
        (directory / f"{stem}.json").write_text(json.dumps(content))
    return directory


# ---- oracles


@cache
def of_transformers(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that deployment uses."""
    with tempfile.TemporaryDirectory() as directory:
        return AutoTokenizer.from_pretrained(write(Path(directory), name))


def ids_of_text(name: str, text: str) -> list[int]:
    """The ids of a whole text in which control tokens are meant.

    Of a tokenizer.json those of AutoTokenizer. Of a tokenizer.model alone, which transformers reads with protobuf only,
    those of sentencepiece for each stretch between control tokens; by its documentation of ``legacy`` the space in
    front is put there where the text begins, if legacy is false, and in front of every stretch, if it is true.
    """
    if made(name).file == "tokenizer.json":
        return of_transformers(name)(text, add_special_tokens=False).input_ids
    config = made(name).beside.get("tokenizer_config", {})
    decoder = config.get("added_tokens_decoder", {})
    sp = sentencepiece.SentencePieceProcessor(model_proto=made(name).tokenizer)
    ids = {t["content"]: int(i) for i, t in decoder.items() if t["special"] and t["content"] != "<unk>"}
    ids |= {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
    strips = {t["content"]: t["rstrip"] for t in decoder.values()}
    found, start = [], 0
    for match in re.finditer("|".join(map(re.escape, ids)), text):
        if match.start() >= start:
            found += [*stretch_ids(sp, text[start : match.start()], start, config), ids[match[0]]]
            start = match.end()
            start += (len(text[start:]) - len(text[start:].lstrip())) * strips.get(match[0], False)
    return found + stretch_ids(sp, text[start:], start, config)


def stretch_ids(sp: sentencepiece.SentencePieceProcessor, text: str, start: int, config: dict) -> list[int]:
    puts_space_in_front = sp.encode("a", out_type=str)[0].startswith("▁")
    if start == 0 or config.get("legacy") or not puts_space_in_front:
        return sp.encode(text)
    newline = sp.encode("\n")  # what follows a line break gets no space in front
    ids = sp.encode("\n" + text)
    assert ids[: len(newline)] == newline
    return ids[len(newline) :]
