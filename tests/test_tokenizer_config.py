import json

import pytest

from lit_sft.errors import InputError
from lit_sft.tokenizer_config import Added, TokenizerConfig


def read(directory, **files) -> TokenizerConfig:
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content))
    return TokenizerConfig.from_dir(directory)


def test_silence(tmp_path):
    assert read(tmp_path) == TokenizerConfig(
        added=[],
        names={},
        special=frozenset(),
        named=[],
        add_bos=None,
        tokenizer_class=None,
        prepend_scheme="first",
        settings={},
        hf_config={},
        ids={"bos_token": [], "eos_token": []},
        chat_template=None,
        template_names=(),
    )


def test_everything(tmp_path):
    config = read(
        tmp_path,
        tokenizer_config={
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {"content": "<s>", "lstrip": False},
            "pad_token": None,
            "unk_token": "",
            "tokenizer_class": "LlamaTokenizer",
            "additional_special_tokens": ["<a>", {"content": "<b>"}],
            "added_tokens_decoder": {
                "7": {"content": "<c>", "special": True, "lstrip": True},
                "5": {"content": "c", "special": False, "rstrip": True},
            },
        },
        special_tokens_map={"eos_token": "</s>", "bos_token": "<other>"},  # older: the decoder above leaves it no say
        added_tokens={"<c>": 7, "<d>": 8},
        generation_config={"eos_token_id": [1, 2], "bos_token_id": 0},
        config={"eos_token_id": 3, "bos_token_id": None},
    )
    told = [Added(5, "c", False, rstrip=True, normalized=True), Added(7, "<c>", True, lstrip=True)]
    assert config.added == [*told, Added(8, "<d>")]
    assert config.names == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None}
    assert config.special == {"<s>", "</s>", "<a>", "<b>", "<c>"}
    assert (config.add_bos, config.tokenizer_class) == (True, "LlamaTokenizer")
    assert config.ids == {"bos_token": [0], "eos_token": [1, 2, 3]}


@pytest.mark.parametrize("tokens", [["<a>", "<b>"], {"image_token": "<a>", "audio_token": {"content": "<b>"}}])
def test_extra_special_tokens(tmp_path, tokens):
    assert read(tmp_path, tokenizer_config={"extra_special_tokens": tokens}).special == {"<a>", "<b>"}


@pytest.mark.parametrize(
    "stem", ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config"]
)
@pytest.mark.parametrize("content", [b"", b'{"a": 1,}', b"[1]", b"\xff\xff", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, stem, content):
    (tmp_path / f"{stem}.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"{stem}\.json"):
        TokenizerConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<x>": "7"}},
        {"added_tokens": {"<x>": -1}},
        {"added_tokens": {"<x>": 10**9}},
        {"added_tokens": {"<x>": True}},
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
        {"tokenizer_config": {"added_tokens_decoder": {"seven": {"content": "x"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": 3}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": ""}}}},
        {"tokenizer_config": {"bos_token": {"text": "<s>"}}},
        {"tokenizer_config": {"additional_special_tokens": 3}},
        {"tokenizer_config": {"chat_template": 3}},
        {"tokenizer_config": {"chat_template": [{"name": "default"}]}},
    ],
)
def test_nonsense_is_refused(tmp_path, files):
    with pytest.raises(InputError, match=next(iter(files))):
        read(tmp_path, **files)


def test_a_chat_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="chat template"):
        TokenizerConfig.from_dir(tmp_path)
