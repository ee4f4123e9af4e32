"""The oracle is transformers' AutoTokenizer for tokenizer.json, sentencepiece for a tokenizer.model alone."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import MAKERS, ids_of_text, made, of_transformers, special, write
from tokenizers import processors
from transformers import AutoTokenizer

from lit_sft.errors import InputError
from lit_sft.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "   ",
    "hello world",
    " lead",
    "  two and trail  ",
    "a  b   c    d",
    "line one\nline two\r\n\n\n  indented\n",
    "\tx = 1\n\t\treturn x\t",
    "0 12 345 6789 3.14 1e-9 ١٢٣",
    "naïve café, Zürich, Ωμέγα, 日本語のテキスト, 한국어, עברית",
    "e\u0301 \u00a0 \u200b \u2028 \ufeff",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 👍🏽",
    "if x <= 3 and y != 'z': print(f\"{x:>10}\")",
    "nul \x00 and bell \x07",
    "▁ is sentencepiece's own, ĠĊ are byte-level BPE's, \ufffd is nobody's",
    "<0x0A> <0xFF> <unk>",
]
CONTROLS = ["<s>", "</s>", "<|endoftext|>", "<|eot_id|>", "<|turn|>", "[INST]"]
INSTRUCTION = "Say </s>, <|eot_id|> and <|endoftext|> <s>[INST]<|turn|></s></s>!"

SENTENCEPIECE = [name for name in MAKERS if made(name).file == "tokenizer.model"]
JSON = [name for name in MAKERS if name not in SENTENCEPIECE]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return cache(lambda name: Tokenizer(write(root / name, name)))


@cache
def library(name: str):
    """(encode, decode) of the oracle, control tokens in a text left text."""
    if name in SENTENCEPIECE:
        sp = sentencepiece.SentencePieceProcessor(model_proto=made(name).tokenizer)
        return sp.encode, sp.decode
    theirs, tok = of_transformers(name), tokenizers.Tokenizer.from_str(made(name).tokenizer.decode())
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return lambda text: theirs([text], **options).input_ids[0], lambda ids: tok.decode(ids, False)


EVERY = pytest.mark.parametrize("name", MAKERS)


def without_control(name: str, text: str) -> str:
    # the unigram tokenizer.json finds control tokens by itself, which is where it is not the oracle
    return text.replace(">", "") if name == "unigram_json" else text


CHARACTERS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text(alphabet=" \n\tabe<>|/s_▁é€😀\u200d\ufffd", max_size=30),
    st.lists(st.sampled_from([*TEXTS, "the ", " quick", "\n"]), max_size=4).map("".join),
)
FEW = settings(max_examples=60, deadline=None)

# ---- encode


@EVERY
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_librarys(tokenizer_of, name, text):
    tok, text = tokenizer_of(name), without_control(name, text)
    ids = library(name)[0](text)
    assert tok.encode(text, bos=False) == ids
    assert tok.encode(text) == [tok.bos_id] * tok.adds_bos + ids
    if tok.bos_id is not None:
        assert tok.encode(text, bos=True, eos=True) == [tok.bos_id, *ids, tok.eos_id]


@EVERY
@FEW
@given(text=CHARACTERS)
def test_ids_of_any_text_are_the_librarys(tokenizer_of, name, text):
    text = without_control(name, text)
    assert tokenizer_of(name).encode(text, bos=False) == library(name)[0](text)


def test_a_leading_space_comes_after_the_dummy_prefix(tokenizer_of):
    tok = tokenizer_of("llama2")
    assert tok.encode(" lead") != tok.encode("lead") and tok.decode(tok.encode(" lead")) == " lead"


@pytest.mark.parametrize("text", [t for t in TEXTS if "▁" not in t and not re.search("<0x|<unk>", t)])
def test_both_files_of_one_model_agree(tokenizer_of, text):
    if text and text[0] != " ":  # sentencepiece gives "" no space in front, and a second one where there is one
        assert tokenizer_of("llama2_prepend").encode(text) == tokenizer_of("llama2").encode(text)


@EVERY
@FEW
@given(data=st.data())
def test_control_tokens_in_user_text_stay_text(tokenizer_of, name, data):
    tok = tokenizer_of(name)
    own = sorted(tok._file.control)
    own = st.sampled_from([*own, *(text.replace("▁", " ") for text in own), *(text[1:] for text in own)])
    parts = data.draw(st.lists(st.one_of(own, st.sampled_from([" ", "\n", "<unk", *CONTROLS]), CHARACTERS), max_size=5))
    unknown = {tok.token_id("<unk>")}  # a character that the model does not know
    for continuation in (False, True):
        ids = tok.encode("".join(parts), bos=False, continuation=continuation)
        assert set(ids).isdisjoint(set(tok._control_ids) - unknown)


@pytest.mark.parametrize("name", ["llama2", "neox", "llama3", "llama2_prepend", "llama2_metaspace"])
def test_user_text_comes_back_whole(tokenizer_of, name):
    tok = tokenizer_of(name)
    assert tok.decode(tok.encode(INSTRUCTION)) == INSTRUCTION


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("text", [*TEXTS, INSTRUCTION, "<s>hi</s><s> hi", "x<|eot_id|>  y<|endoftext|>"])
def test_control_text_of_a_tokenizer_json_is_that_of_transformers(tokenizer_of, name, text):
    assert tokenizer_of(name).encode(text, bos=False, control=True) == ids_of_text(name, text)


@pytest.mark.parametrize("name", ["llama2", "llama2_legacy", "mistral_v3", "chatml", "codellama", "phi3", "gemma"])
@pytest.mark.parametrize("text", [*TEXTS, "<s>hi</s><s> hi", "<s>[INST] hi [/INST] there</s>\n", "a<|im_end|>\nb"])
def test_control_text_of_sentencepiece(tokenizer_of, name, text):
    assert tokenizer_of(name).encode(text, bos=False, control=True) == ids_of_text(name, text)


def test_where_sentencepiece_puts_a_space_in_front(tokenizer_of):
    text = "[INST] hi</s>there"
    sp = sentencepiece.SentencePieceProcessor(model_proto=made("llama2").tokenizer)
    first, legacy = (tokenizer_of(name).encode(text, bos=False, control=True) for name in ("llama2", "llama2_legacy"))
    assert legacy == [*sp.encode("[INST] hi"), 2, *sp.encode("there")]
    assert first == [*sp.encode("[INST] hi"), 2, *sp.encode("\nthere")[len(sp.encode("\n")) :]] != legacy


def test_a_text_that_begins_with_bos_gets_no_second_one(tokenizer_of):
    for name, bos in (("llama2", "<s>"), ("llama3", "<|begin_of_text|>"), ("llama2_prepend", "<s>")):
        tok = tokenizer_of(name)
        ids = tok.encode(bos + "hi", control=True)
        assert ids[0] == tok.bos_id and ids.count(tok.bos_id) == 1
        assert tok.encode(bos + "hi").count(tok.bos_id) == 1  # the one of the policy; the written one is text


@EVERY
@FEW
@given(left=CHARACTERS, right=CHARACTERS, space=st.sampled_from([" ", "\n"]))
def test_a_continuation_goes_on_where_no_merge_crosses_the_join(tokenizer_of, name, left, right, space):
    tok = tokenizer_of(name)
    head, tail = (left + "x", " y" + right) if space == " " else (left + "\n", "y" + right)
    whole = library(name)[0](head + tail)
    if name == "t5_like" and space == "\n":
        return  # it removes the spaces at the end of a text
    if any(library(name)[0](head) == whole[:n] for n in range(len(whole) + 1)):  # the join is between two tokens
        joined = tok.encode(head) + tok.encode(tail, continuation=True)
        assert joined == tok.encode(head + tail)


@pytest.mark.parametrize(
    "name", ["llama2", "gemma", "llama2_prepend", "llama2_metaspace", "metaspace_always", "gpt2_prefix"]
)
def test_a_continuation_has_no_prefix_space(tokenizer_of, name):
    tok = tokenizer_of(name)
    assert tok.encode("a\nb") == tok.encode("a\n") + tok.encode("b", continuation=True)
    if tok.bos_id is not None:
        assert tok.encode("b", continuation=True, bos=True) == [tok.bos_id, *tok.encode("b", continuation=True)]


@pytest.mark.parametrize("name", ["llama2", "llama2_prepend", "llama2_metaspace", "metaspace_always"])
def test_a_continuation_with_control_tokens_has_no_prefix_up_to_the_first(tokenizer_of, name):
    tok = tokenizer_of(name)
    whole = tok.encode("a\nb</s>c </s> d", control=True)
    assert tok.encode("a\n", control=True) + tok.encode("b</s>c </s> d", control=True, continuation=True) == whole


def test_a_model_that_removes_spaces_keeps_the_one_before_a_continuation(tokenizer_of):
    tok = tokenizer_of("t5_like")
    assert tok.decode(tok.encode("the quick") + tok.encode("  brown  fox", continuation=True)) == "the quick brown fox"


def test_encode_refuses_what_it_cannot_do(tokenizer_of, tmp_path):
    tok = Tokenizer(write(tmp_path, "gpt2_prefix", config={}))
    for asked, name in (({"bos": True}, "BOS"), ({"eos": True}, "EOS")):
        with pytest.raises(InputError, match=f"no {name} token"):
            tok.encode("a", **asked)
    for name in ("llama2", "neox"):
        with pytest.raises(InputError, match=r"character 2 .* surrogate"):
            tokenizer_of(name).encode("ab\ud83d")


def test_truncation_and_padding_left_in_a_tokenizer_json_are_ignored(tmp_path):
    left = tokenizers.Tokenizer.from_str(made("neox").tokenizer.decode())
    left.enable_truncation(4)
    left.enable_padding(length=9)
    left.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("the quick brown fox") == library("neox")[0]("the quick brown fox")


@pytest.mark.parametrize("name", ["symbols", "llama3"])
def test_has_control(tokenizer_of, name):
    tok = tokenizer_of(name)
    assert tok.has_control("a[INST]b" if name == "symbols" else "<|eot_id|>")
    assert not tok.has_control("[inst] <|eot_id |>") and not tok.has_control("")


FLAGS = st.fixed_dictionaries({f: st.booleans() for f in ("single_word", "lstrip", "rstrip", "normalized", "special")})


@pytest.mark.parametrize("name", ["llama2_prepend", "llama2_metaspace", "neox", "llama3", "gemma_json"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flags_of_added_tokens(tmp_path_factory, name, data):
    """Whatever space they take in, wherever they are searched for: the library's ids, and text in what people write."""
    document = json.loads(made(name).tokenizer)
    size = 1 + max([*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])])
    texts = ["<|a|>", "<|ab|>", "word", "é e", "ﬁ", "▁x"]
    flags = data.draw(st.lists(FLAGS, min_size=len(texts), max_size=len(texts)))
    tokens = [{"id": size + i, "content": t, **f} for i, (t, f) in enumerate(zip(texts, flags, strict=True))]
    directory = tmp_path_factory.mktemp("flags")
    document["added_tokens"] += tokens
    (directory / "tokenizer.json").write_text(json.dumps(document))
    tok, plain = Tokenizer(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    parts = data.draw(st.lists(st.sampled_from([*texts, " ", "\n", "a", "word", "s", "e\u0301 e", " x"]), max_size=8))
    text = "".join(parts)
    assert tok.encode(text, bos=False, control=True) == plain.encode(text, add_special_tokens=False).ids
    special = {t["id"] for t in tokens if t["special"]}
    for continuation in (False, True):
        assert special.isdisjoint(tok.encode(text, bos=False, continuation=continuation))
    ids = tok.encode(text, bos=False)
    assert "".join(tok.stream(ids)) == tok.decode(ids) == plain.decode(ids, skip_special_tokens=False)
    if not any(t["content"] in text for t in tokens if t["special"]):
        assert ids == plain.encode(text, add_special_tokens=False).ids or any(f["normalized"] for f in flags)


# ---- decode and stream


@EVERY
@FEW
@given(data=st.data())
def test_decode_is_the_librarys_without_control_tokens(tokenizer_of, name, data):
    tok = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=12))
    assert tok.decode(ids) == library(name)[1]([i for i in ids if i not in tok._control_ids])


@EVERY
@FEW
@given(text=CHARACTERS)
def test_stream_of_a_text(tokenizer_of, name, text):
    tok = tokenizer_of(name)
    pieces = list(tok.stream(tok.encode(text)))
    assert "".join(pieces) == tok.decode(tok.encode(text))
    assert all(pieces) and ("\ufffd" in text or not any("\ufffd" in piece for piece in pieces))


@EVERY
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids(tokenizer_of, name, data):
    tok = tokenizer_of(name)
    ids = st.one_of(st.integers(0, 262), st.integers(0, tok.vocab_size - 1), st.integers(-2, tok.vocab_size + 9))
    some = data.draw(st.lists(ids, max_size=25))
    assert "".join(tok.stream(iter(some))) == tok.decode(some)


def test_stream_gives_a_character_when_its_last_byte_arrives(tokenizer_of):
    for name in ("llama2", "neox"):
        tok, given = tokenizer_of(name), []
        ids = tok.encode("a😀b", bos=False)

        def one_by_one(ids=ids, given=given):
            for i in ids:
                given.append(i)
                yield i

        for piece in tok.stream(one_by_one()):
            if "😀" in piece:
                break
        assert tok.decode(given) == "a😀"  # not held until the b


@pytest.mark.parametrize("name", ["llama2", "neox", "llama2_prepend"])
def test_the_cost_of_a_token_does_not_grow(tokenizer_of, name, monkeypatch):
    tok, longest = tokenizer_of(name), 0
    decode = tok._file.decode

    def watched(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(tok._file, "decode", watched)
    list(tok.stream(tok.encode("The quick brown fox   is 😀 for é.\n" * 50)))
    assert longest < 12


@EVERY
def test_ids_beyond_the_vocabulary_give_no_text(tokenizer_of, name):
    tok = tokenizer_of(name)
    ids = tok.encode("the end")
    assert tok.decode([-100, *ids, tok.vocab_size, 10**9]) == tok.decode(ids)
    assert tok.decode(ids).lstrip() == "the end"  # byte-level BPE keeps its prefix space
    assert tok.decode([]) == "" and list(tok.stream([])) == []


# ---- what the other files say


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("llama2", None, True),
        ("llama2", {}, True),
        ("llama2", {"add_bos_token": False}, False),
        ("llama2", {"tokenizer_class": "LlamaTokenizer"}, True),
        ("llama2", {"tokenizer_class": "OtherTokenizer"}, False),
        ("llama2", {"tokenizer_class": "OtherTokenizer", "add_bos_token": True}, True),
        ("llama2", {"bos_token": None}, False),
        ("llama2", {"tokenizer_class": "TokenizersBackend"}, True),
        ("gemma", None, True),
        ("gemma", {"tokenizer_class": "GemmaTokenizer"}, True),
        ("gemma", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False}, False),
        ("gemma_json", {"bos_token": "<bos>"}, True),
        ("gemma_json", {"bos_token": "<bos>", "add_bos_token": False}, False),
        ("llama3", {}, True),  # nothing but the file's template says so
        ("llama3", {"bos_token": None}, True),
        ("llama3", {"bos_token": None, "add_bos_token": False}, False),
        ("nemo", {}, True),
        ("nemo", {"tokenizer_class": "GPT2Tokenizer"}, True),
        ("qwen2", {"bos_token": None}, False),
        ("qwen2", {"bos_token": "<|endoftext|>"}, False),
        ("smollm3", {"bos_token": "<|begin_of_text|>"}, False),
        ("smollm3", {"bos_token": "<|begin_of_text|>", "tokenizer_class": "LlamaTokenizerFast"}, False),
        ("llama2_normalized", {"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}, True),
        ("deepseek", {"bos_token": "<｜begin▁of▁sentence｜>", "add_bos_token": True}, True),
        ("neox", {"bos_token": "<|endoftext|>"}, False),
        ("neox", {"bos_token": "<|endoftext|>", "add_bos_token": None}, False),
        ("neox", {"bos_token": "<|endoftext|>", "add_bos_token": True}, True),
        ("neox", {"add_bos_token": True}, True),  # that of its class
        ("llama3", {"bos_token": "<|begin_of_text|>"}, True),
        ("llama3", {"bos_token": "<|begin_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}, True),
        ("llama3", {"bos_token": "<|begin_of_text|>", "add_bos_token": False}, False),
        ("llama2_prepend", {"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}, True),
        ("metaspace_always", {"bos_token": "<s>", "tokenizer_class": "OtherTokenizer"}, False),
    ],
)
def test_bos_policy(tmp_path, name, config, expected):
    tok = Tokenizer(write(tmp_path, name, **({"config": {}} if config is None else {"tokenizer_config": config})))
    assert tok.adds_bos is expected
    assert (tok.encode("a")[0] == tok.bos_id) is expected


# whose BOS transformers 5 no longer adds, as its tokenizer.json does not say so
WITHOUT_BOS = ("deepseek", "llama2_normalized", "metaspace_always")


@pytest.mark.parametrize("name", [n for n in JSON if n not in WITHOUT_BOS])
def test_whole_sequences_are_those_of_transformers(tmp_path, name):
    theirs, ours = of_transformers(name), Tokenizer(write(tmp_path, name))
    for text in [*TEXTS, INSTRUCTION, *ours._file.control]:
        ids = theirs(text).input_ids
        assert ours.encode(text, control=True) == ids[ids[:2] == [ours.bos_id] * 2 :]  # but for a doubled BOS
    assert theirs(["a"], split_special_tokens=True).input_ids == [ours.encode("a")]


@pytest.mark.parametrize("name", ["llama3", "neox", "nemo", "qwen2", "gemma_json"])
@pytest.mark.parametrize("named", [True, False])
def test_bos_policy_is_that_of_transformers_where_no_file_has_one_of_its_own(tmp_path, name, named):
    bos = {"bos_token": None if not named else Tokenizer(write(tmp_path / "own", name)).special_tokens.get("bos_token")}
    for kind in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        directory = write(tmp_path / kind, name, tokenizer_config={**bos, "tokenizer_class": kind})
        assert Tokenizer(directory).encode("a") == AutoTokenizer.from_pretrained(directory)("a").input_ids


def test_what_transformers_saves_has_the_same_ids(tmp_path):
    for name in ("llama2_metaspace", "gemma_json", "llama3", "qwen3", "falcon", "neox", "nemo"):
        theirs = AutoTokenizer.from_pretrained(write(tmp_path / name, name))
        theirs.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
        theirs.save_pretrained(tmp_path / name / "saved")
        saved = Tokenizer(tmp_path / name / "saved")
        assert saved.token_id("<|new|>") == len(theirs) - 1
        assert saved.adds_bos == Tokenizer(tmp_path / name).adds_bos
        for text in [*TEXTS, "a<|new|> b"]:
            assert saved.encode(text, control=True) == theirs(text).input_ids


def test_a_template_without_bos_in_tokenizer_json_is_the_policy_even_of_llama(tmp_path):
    saved = tokenizers.Tokenizer.from_str(
        made("llama2_prepend").tokenizer.decode()
    )  # as transformers 5 writes add_bos_token false
    saved.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    assert (
        Tokenizer(
            write(tmp_path, "llama2_prepend", **made("llama2_prepend").beside, tokenizer=json.loads(saved.to_str()))
        ).adds_bos
        is False
    )


def test_ends_and_names_of_sentencepiece_alone(tokenizer_of):
    tok = tokenizer_of("llama2")
    assert (tok.bos_id, tok.eos_id, tok.stop_ids) == (1, 2, {2})
    assert tok.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tok.chat_template is None
    assert [tok.token_id(t) for t in ("<s>", "</s>", "the", "")] == [1, 2, None, None]


STOPS = {
    "llama2": ["</s>"],
    "llama3": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    "gemma": ["<eos>", "<end_of_turn>"],
    "gemma_json": ["<eos>", "<end_of_turn>"],
    "qwen2": ["<|endoftext|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_end|>"],
    "phi3": ["<|endoftext|>", "<|assistant|>", "<|end|>"],
    "phi3_json": ["<|endoftext|>", "<|assistant|>", "<|end|>"],
    "phi4_mini": ["<|endoftext|>", "<|end|>"],
    "smollm3": ["<|im_end|>"],
    "olmo2": ["<|endoftext|>"],  # config.json's is beyond the vocabulary
    "falcon": ["<|endoftext|>"],
    "nemo": ["</s>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
}


@pytest.mark.parametrize("name", STOPS)
def test_a_familys_answers_stop_at_each_of_its_ends(tokenizer_of, name):
    tok = tokenizer_of(name)
    assert sorted(tok.stop_ids) == sorted(tok.token_id(text) for text in STOPS[name])


def test_ends_from_the_configs(tmp_path):
    ids = {text: library_id("llama3", text) for text in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")}
    directory = write(
        tmp_path,
        "llama3",
        tokenizer_config={"add_bos_token": True},
        generation_config={"eos_token_id": [ids["<|end_of_text|>"], ids["<|eot_id|>"], 10**6, None]},
        config={"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": 10**6},
    )
    tok = Tokenizer(directory)
    assert (tok.bos_id, tok.eos_id) == (ids["<|begin_of_text|>"], ids["<|end_of_text|>"])
    assert tok.stop_ids == {ids["<|end_of_text|>"], ids["<|eot_id|>"]}
    assert tok.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def library_id(name: str, text: str) -> int:
    return tokenizers.Tokenizer.from_str(made(name).tokenizer.decode()).token_to_id(text)


def test_a_null_bos_is_no_bos_even_if_config_json_has_one(tmp_path):
    tok = Tokenizer(write(tmp_path, "neox", tokenizer_config={"bos_token": None}, config={"bos_token_id": 3}))
    assert tok.bos_id is None and "bos_token" not in tok.special_tokens


@pytest.mark.parametrize("decoder", [True, False])
def test_special_tokens_map_has_its_say_where_no_decoder_is(tmp_path, decoder):
    config = made("llama2_metaspace").beside["tokenizer_config"] | {"eos_token": "</s>"}
    config |= (
        {"added_tokens_decoder": made("llama2").beside["tokenizer_config"]["added_tokens_decoder"]} if decoder else {}
    )
    files = {"special_tokens_map": {"eos_token": "<unk>"}, "tokenizer_config": config}
    directory = write(tmp_path, "llama2_metaspace", **files)
    assert Tokenizer(directory).special_tokens["eos_token"] == AutoTokenizer.from_pretrained(directory).eos_token


ADDINGS = {  # tokens that transformers adds when it loads a tokenizer.json that has them otherwise, or not at all
    "extra, nowhere else": ("qwen2", {"extra_special_tokens": ["<|turn|>"]}, "<|turn|>"),
    "additional, nowhere else": ("llama3", {"additional_special_tokens": ["<|turn|>"]}, "<|turn|>"),
    "named with flags": ("llama3", {"pad_token": {"__type": "AddedToken", **special("<pad>", rstrip=True)}}, "<pad>"),
    "named": ("falcon", {"sep_token": "<sep>"}, "<sep>"),
    "a map": ("qwen2", {"extra_special_tokens": {"turn_token": "<|turn|>"}}, "<|turn|>"),
    "a piece": ("llama3", {"additional_special_tokens": ["Ġthe"]}, "Ġthe"),
}


@pytest.mark.parametrize("name", ADDINGS)
def test_tokens_that_transformers_adds_are_control_tokens(tmp_path, name):
    kind, config, text = ADDINGS[name]
    files = made(kind).beside | {"tokenizer_config": made(kind).beside["tokenizer_config"] | config}
    directory = write(tmp_path, kind, **files)
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for written in (text, f"a{text}  b {text}\nc"):
        assert ours.encode(written, bos=False, control=True) == theirs(written, add_special_tokens=False).input_ids
    assert ours.token_id(text) == theirs.convert_tokens_to_ids(text) not in ours.encode(f"a{text}b")


@pytest.mark.parametrize(
    ("kind", "drop", "edit"),
    [
        ("gemma_json", ["bos_token", "eos_token"], {}),
        ("smollm2", ["bos_token", "eos_token", "unk_token"], {}),
        ("qwen2", ["eos_token", "pad_token"], {}),
        ("llama2_metaspace", ["bos_token", "eos_token", "unk_token"], {}),
        ("llama2_metaspace", [], {"byte_fallback": False}),
        ("qwen2", [], {"dropout": 0.9}),
        ("llama2_prepend", [], {"type": None}),
    ],
)
def test_what_transformers_class_has_of_its_own(tmp_path, kind, drop, edit):
    """Names where no file has them, and the model's options."""
    config = {key: value for key, value in made(kind).beside["tokenizer_config"].items() if key not in drop}
    document = json.loads(made(kind).tokenizer)
    document["model"] = {k: v for k, v in (document["model"] | edit).items() if v is not None or k != "type"}
    directory = write(tmp_path, kind, **(made(kind).beside | {"tokenizer_config": config, "tokenizer": document}))
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for key in drop:
        assert ours.special_tokens[key] == getattr(theirs, key)
    for text in [*TEXTS, "ÿ þ"]:
        assert ours.encode(text, bos=False, control=True) == theirs(text, add_special_tokens=False).input_ids


def test_a_class_that_config_json_names(tmp_path):
    config = {k: v for k, v in made("llama2_prepend").beside["tokenizer_config"].items() if k != "tokenizer_class"}
    directory = write(tmp_path, "llama2_prepend", tokenizer_config=config, config={"tokenizer_class": "LlamaTokenizer"})
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    text = "<s>[INST] a</s> b"
    assert ours.encode(text, bos=False, control=True) == theirs(text, add_special_tokens=False).input_ids


ADDED = {
    "400": {"content": "<|im_start|>", "special": True, "rstrip": True},
    "401": {"content": "<|im_end|>", "special": True},
    "403": {"content": "new word", "special": False},
    "404": {"content": "w" * 300, "special": False},
    "405": {"content": "the", "special": False},  # a piece has this text already, it keeps it
}


@pytest.fixture
def extended(tmp_path):
    size = sentencepiece.SentencePieceProcessor(model_proto=made("llama2").tokenizer).vocab_size()
    decoder = {str(int(i) - 400 + size): token for i, token in ADDED.items()}
    directory = write(
        tmp_path, "llama2", tokenizer_config={"added_tokens_decoder": decoder}, added_tokens={"<pad>": size + 9}
    )
    return Tokenizer(directory), size


def test_tokens_added_to_sentencepiece(extended):
    tok, size = extended
    encode = library("llama2")[0]
    start, end, word, long, pad = size, size + 1, size + 3, size + 4, size + 9
    assert tok.vocab_size == size + 10
    text = "<|im_start|>\nhi<|im_end|> x<pad>"
    assert tok.encode(text, bos=False, control=True) == [start, *encode("\nhi")[2:], end, *encode("x"), pad]
    assert tok.encode(text) == [1, *encode(text)]  # as a user writes it
    assert tok.encode("a new words" + "w" * 300, bos=False) == [*encode("a "), word, *encode("\ns")[2:], long]
    assert tok.decode([start, word, end, long, size + 2, pad]) == "new word" + "w" * 300
    assert "".join(tok.stream([word, 300, size + 2, word, 301])) == tok.decode([word, 300, word, 301])


def test_user_defined_pieces_that_are_called_special_are_control_tokens(tmp_path):
    plain = Tokenizer(write(tmp_path / "plain", "symbols"))
    turn = plain._file._whole.piece_to_id("<|turn|>")
    assert turn in plain.encode("a<|turn|>b")  # as sentencepiece
    for files in (
        {"tokenizer_config": {"added_tokens_decoder": {str(turn): {"content": "<|turn|>", "special": True}}}},
        {"special_tokens_map": {"additional_special_tokens": ["<|turn|>"]}},
    ):
        tok = Tokenizer(write(tmp_path / "special", "symbols", **files))
        assert turn not in tok.encode("a<|turn|>b<|turn|>") and turn in tok.encode("a<|turn|>b", control=True)
        assert tok.decode(tok.encode("a<|turn|>b<|turn|>")) == "a<|turn|>b<|turn|>"
        assert tok.decode([turn]) == ""
        shutil.rmtree(tmp_path / "special")


def test_tokens_that_the_config_calls_special_are_control_tokens_of_a_tokenizer_json(tmp_path):
    document = json.loads(made("llama3").tokenizer)
    for token in document["added_tokens"]:
        token["special"] = False
    tok = Tokenizer(write(tmp_path, "llama3", **made("llama3").beside, tokenizer=document))
    assert tok.eos_id not in tok.encode("a<|eot_id|>") and tok.eos_id in tok.encode("a<|eot_id|>", control=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{{ messages }}", "{{ messages }}"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "tool_use", "template": "T"}], None),
        ([], None),
        (None, None),
    ],
)
def test_chat_template(tmp_path, value, expected):
    directory = write(tmp_path, "llama2", tokenizer_config={"chat_template": value})
    assert Tokenizer(directory).chat_template == expected
    assert Tokenizer(directory).template_names == (("tool_use",) if isinstance(value, list) and len(value) == 1 else ())
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    if value is None or value == []:
        assert Tokenizer(directory).chat_template == "of a processor"
    (directory / "chat_template.jinja").write_text("{{ bos_token }}é", encoding="utf-8")
    assert Tokenizer(directory).chat_template == "{{ bos_token }}é"


def test_chat_templates_beside_the_default(tmp_path):
    """As in transformers: with a jinja file there tokenizer_config.json has no say; one of them may be the default."""
    directory = write(tmp_path, "qwen2", tokenizer_config={"chat_template": "of the config"})
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert (Tokenizer(directory).chat_template, Tokenizer(directory).template_names) == (None, ("rag",))
    with pytest.raises(ValueError, match="no default"):
        AutoTokenizer.from_pretrained(directory).get_chat_template()
    for path in (directory / "chat_template.jinja", directory / "additional_chat_templates" / "default.jinja"):
        path.write_text(path.stem)
        theirs = AutoTokenizer.from_pretrained(directory).get_chat_template()
        assert Tokenizer(directory).chat_template == theirs == path.stem


# ---- the fingerprint, damage, surroundings


def test_fingerprint(tmp_path, tokenizer_of):
    prints = {name: tokenizer_of(name).fingerprint for name in MAKERS}
    assert len(set(prints.values())) == len(prints)
    copy = shutil.copytree(tokenizer_of("llama3").checkpoint_dir, tmp_path / "copy")
    assert Tokenizer(copy).fingerprint == prints["llama3"]
    (copy / "chat_template.jinja").write_text("another")
    (copy / "config.json").write_text('{"n": 1}')
    assert Tokenizer(copy).fingerprint == prints["llama3"]
    for number, files in enumerate(
        (
            {"tokenizer_config": {"add_bos_token": False}},
            {"added_tokens": {"<pad>": 500}},
            {"tokenizer_config": {"eos_token": "<s>"}},
        )
    ):
        assert Tokenizer(write(tmp_path / str(number), "llama2", **files)).fingerprint != prints["llama2"]


def test_tokenizer_json_goes_first(tmp_path):
    write(write(tmp_path, "llama2"), "neox")
    assert Tokenizer(tmp_path).encode("a b", bos=False) == library("neox")[0]("a b")


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path))}.*tokenizer\.model.*tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(InputError, match="no checkpoint directory"):
        Tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"\xff\xfe", b"[]"])
def test_a_damaged_tokenizer(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / file))):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "file"), [("llama2", "tokenizer.model"), ("neox", "tokenizer.json")])
def test_a_truncated_tokenizer(tmp_path, name, file):
    whole = made(name).tokenizer
    for length in (len(whole) // 2, len(whole) - 1):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(InputError, match=re.escape(str(tmp_path / file))):
            Tokenizer(tmp_path)


def test_workers_and_threads(tokenizer_of):
    for name in ("llama2", "llama3"):
        tok = tokenizer_of(name)
        expected = [tok.encode(INSTRUCTION), tok.encode(INSTRUCTION, control=True)]
        copy = pickle.loads(pickle.dumps(tok))
        assert [copy.encode(INSTRUCTION), copy.encode(INSTRUCTION, control=True)] == expected
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda n, tok=tok: tok.encode(INSTRUCTION, control=bool(n % 2)), range(200))
        assert all(ids == expected[n % 2] for n, ids in enumerate(found))


def test_torch_is_not_imported():
    code = "import sys, lit_sft.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
