"""The cache gives sentencepiece's own ids, for every kind of model; where that is not certain it is not used."""

import io

import pytest
import sentencepiece
from conftest import instruction_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sft.word_cache import WordCache

TEXTS = [*instruction_texts(), "naïve café 日本語 🦙 ﬁ ①", "  two  spaces", "def f(x):\n    return x\n\n\n"]
MODELS = {  # settings of the trainer, and whether the cache may be used
    "as Llama's": ({}, True),
    "with line breaks in pieces": ({"user_defined_symbols": ["\n", "\n\n", "<html>"]}, True),
    "a piece across a space": ({"user_defined_symbols": ["of▁the"]}, False),
    "unigram": ({"model_type": "unigram"}, False),
    "normalized": ({"normalization_rule_name": "nmt_nfkc"}, False),
    "spaces removed": ({"remove_extra_whitespaces": True}, False),
    "unknown characters": ({"byte_fallback": False}, False),
}
WORDS = st.sampled_from(
    [*" \n\t▁\u00a0", "  ", "\n\n", "the", " of", "of the", "a1", "é", "ﬁ", "日本", "🦙", "<html>", "."]
)
TEXT = st.one_of(st.text(), st.lists(WORDS, max_size=20).map("".join))


@pytest.fixture(scope="module", params=MODELS)
def models(request) -> tuple:
    """The processor, the one without a dummy prefix, and whether the cache may be used."""
    model = io.BytesIO()
    given = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"}
    given |= {"remove_extra_whitespaces": False, "minloglevel": 2} | MODELS[request.param][0]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=model, **given)
    bare = model.getvalue() + b"\x1a\x02\x18\x00"  # merged into the model: normalizer_spec.add_dummy_prefix, false
    whole, bare = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (model.getvalue(), bare))
    assert whole.encode("a") != bare.encode("a")
    return whole, bare, MODELS[request.param][1]


def test_it_is_used_where_words_are_apart(models):
    whole, bare, used = models
    assert (WordCache(whole, bare).words is not None) == used


def test_ids_are_sentencepieces(models):
    whole, bare, _ = models
    cache = WordCache(whole, bare)

    @settings(deadline=None, max_examples=200)
    @given(text=TEXT)
    def check(text: str) -> None:
        for _ in range(2):  # as met first, and as met before
            assert cache.encode(text, continuation=False) == whole.encode(text)
            assert cache.encode(text, continuation=True) == bare.encode(text)

    check()
    for text in TEXTS:
        assert cache.encode(text, continuation=False) == whole.encode(text)


def test_memory_is_bounded(models, monkeypatch):
    whole, bare, used = models
    monkeypatch.setattr("lit_sft.word_cache.MOST_WORDS", 5)
    cache = WordCache(whole, bare)
    text = "one two three four five six seven eight nine ten " + "x" * 40
    for _ in range(2):
        assert cache.encode(text, continuation=True) == bare.encode(text)
    assert len(cache.spaced) == (5 if used else 0)
    if used:
        for i in range(2000):
            assert cache.encode(f"line {i}", continuation=True) == bare.encode(f"line {i}")
        assert len(cache.spaced) == 5 and len(cache.lines) == 1024
