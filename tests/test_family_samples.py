"""Each family's chat template with its own kind of tokenizer: what is trained, and what generation starts from."""

from dataclasses import replace
from functools import cache

import pytest
import tokenizers
from family_templates import DROPS_SYSTEM, EVERY_TURN, FAMILIES, FORGETS, NO_SYSTEM, ONE_TURN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import ids_of_text, made, of_transformers, write
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lit_sft.prompts import CHAT_TEMPLATE, Message, Sample
from lit_sft.samples import Example, encode_prompt, encode_sample, stop_ids
from lit_sft.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("day_of_templates")
PAIRS = {  # (kind of tokenizer, template) → the end of an answer
    ("llama2", "LLAMA2"): "</s>",
    ("llama2_legacy", "LLAMA2"): "</s>",
    ("llama2_legacy_json", "LLAMA2"): "</s>",
    ("llama2_no_prefix_json", "LLAMA2"): "</s>",
    ("codellama", "LLAMA2"): "</s>",
    ("chatml", "SMOLLM2"): "<|im_end|>",
    ("chatml_both", "SMOLLM2"): "<|im_end|>",
    ("chatml_words_both", "SMOLLM2"): "<|im_end|>",
    ("chatml_added", "SMOLLM2"): "<|im_end|>",
    ("llama2_prepend", "LLAMA2"): "</s>",
    ("llama2_metaspace", "LLAMA2"): "</s>",
    ("llama2", "MISTRAL_V1"): "</s>",
    ("mistral_v1_json", "MISTRAL_V1"): "</s>",
    ("mistral_v1_json", "MISTRAL_V2"): "</s>",
    ("llama2", "MISTRAL_V2"): "</s>",
    ("llama2_metaspace", "MISTRAL_V2"): "</s>",
    ("llama2", "MIXTRAL"): "</s>",
    ("mistral_v3", "MISTRAL_V2"): "</s>",
    ("mistral_v3", "MISTRAL_V3"): "</s>",
    ("mistral_v3_both", "MISTRAL_V2"): "</s>",
    ("mistral_v3_both", "MISTRAL_V3"): "</s>",
    ("nemo", "MISTRAL_V3"): "</s>",
    ("llama3", "LLAMA31"): "<|eot_id|>",
    ("llama3", "LLAMA32_VISION"): "<|eot_id|>",
    ("qwen2", "QWEN25"): "<|im_end|>",
    ("qwen3", "QWEN3"): "<|im_end|>",
    ("qwen3", "THINKING"): "<|im_end|>",
    ("gemma", "GEMMA2"): "<end_of_turn>",
    ("gemma_json", "GEMMA2"): "<end_of_turn>",
    ("gemma", "GEMMA3"): "<end_of_turn>",
    ("gemma_json", "GEMMA3"): "<end_of_turn>",
    ("phi3", "PHI3"): "<|end|>",
    ("phi3_json", "PHI3"): "<|end|>",
    ("phi4", "PHI4"): "<|im_end|>",
    ("phi4_mini", "PHI4_MINI"): "<|end|>",
    ("smollm2", "SMOLLM2"): "<|im_end|>",
    ("smollm3", "SMOLLM3"): "<|im_end|>",
    ("olmo2", "OLMO2"): "<|endoftext|>",
    ("hermes", "ZEPHYR"): "</s>",
    ("open_llama", "VICUNA"): "</s>",
    ("llama2", "VICUNA"): "</s>",
    ("stablelm2", "STABLELM2"): "<|im_end|>",
    ("falcon", "FALCON"): "<|endoftext|>",
    ("deepseek", "DEEPSEEK"): "<｜end▁of▁sentence｜>",
    ("deepseek", "DEEPSEEK_R1"): "<｜end▁of▁sentence｜>",
    ("phi3_json", "MACROS"): "<|end|>",
}
EVERY = pytest.mark.parametrize(("kind", "name"), PAIRS, ids=lambda value: value)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    @cache
    def make(kind: str, name: str) -> Tokenizer:
        directory = write(tmp_path_factory.mktemp(f"{kind}_{name}"), kind)
        (directory / "chat_template.jinja").write_text(FAMILIES[name], encoding="utf-8")
        return Tokenizer(directory)

    return make


def rendered(tokenizer: Tokenizer, name: str, messages: tuple[Message, ...]) -> str:
    """What transformers renders, with the end token that a template forgets."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    asks = messages[-1].role == "user"
    special = tokenizer.special_tokens
    if name in FORGETS:
        turns = [t | {"content": t["content"] + special["eos_token"] * (t["role"] == "assistant")} for t in turns]
    text, _ = render_jinja_template([turns], chat_template=FAMILIES[name], add_generation_prompt=asks, **special)
    return text[0]


def deployment_ids(kind: str, tokenizer: Tokenizer, name: str, messages: tuple[Message, ...]) -> list[int]:
    """What transformers gives a model for a dialogue, or for a prompt when the last turn is the user's."""
    if made(kind).file == "tokenizer.model" or name in FORGETS:
        return ids_of_text(kind, rendered(tokenizer, name, messages))
    turns = [{"role": m.role, "content": m.content} for m in messages]
    options = {"chat_template": FAMILIES[name], "add_generation_prompt": messages[-1].role == "user"}
    return of_transformers(kind).apply_chat_template(turns, return_dict=False, **options)


def answers(example: Example) -> list[list[int]]:
    """The labelled ids of each answer."""
    mask = example.labels_mask
    starts = [i for i in range(len(mask)) if mask[i] and not mask[i - 1]]
    return [
        example.input_ids[i : next(k for k in range(i, len(mask) + 1) if k == len(mask) or not mask[k])] for i in starts
    ]


def dialogues(name: str, texts: list[str]) -> list[tuple[Message, ...]]:
    roles = ("user", "assistant") * (1 if name in ONE_TURN else len(texts) // 2)
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
    system = () if name in (*NO_SYSTEM, *DROPS_SYSTEM) else ((Message("system", "Be brief."), *messages),)
    return [messages, *system]


def check(kind: str, name: str, tokenizer: Tokenizer, messages: tuple[Message, ...]) -> Example:
    example = encode_sample(Sample(messages), CHAT_TEMPLATE, tokenizer, mask_prompt=True)
    end = tokenizer.token_id(PAIRS[kind, name])
    assert end is not None and end in stop_ids(CHAT_TEMPLATE, tokenizer) and end not in tokenizer.encode("a b")
    for answer in answers(example):
        assert answer[-1] == end and end not in answer[:-1]
    n_first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    assert example.n_prompt == len(encode_prompt(messages[:n_first], CHAT_TEMPLATE, tokenizer))
    for n, message in enumerate(messages):
        if message.role == "assistant":  # what generation starts from is what was trained
            prompt = encode_prompt(messages[:n], CHAT_TEMPLATE, tokenizer)
            assert example.input_ids[: len(prompt)] == prompt
            assert example.labels_mask[len(prompt)] and not example.labels_mask[len(prompt) - 1]
    return example


TEXTS = [
    "What is 1 + 2?",
    "It is 3.",
    "naïve café, 日本語 👩‍👩‍👧",
    "def add(a, b):\n    return a + b",
    "1234567",
    "The end.",
]


@EVERY
def test_ids_are_those_of_deployment(tokenizer_of, kind, name):
    tokenizer = tokenizer_of(kind, name)
    for messages in dialogues(name, TEXTS):
        example = check(kind, name, tokenizer, messages)
        assert example.input_ids == deployment_ids(kind, tokenizer, name, messages)
        contents = [m.content for m in messages if m.role == "assistant"]
        for answer, content in zip(answers(example), contents, strict=True):
            said = tokenizer.decode(answer)
            content = content.replace("    ", " ") if kind == "open_llama" else content  # which removes extra spaces
            assert said.strip() == content or ("</think>" in said and said.endswith(content))
        for n, message in enumerate(messages):
            if message.role == "assistant":
                ids = encode_prompt(messages[:n], CHAT_TEMPLATE, tokenizer)
                assert ids == deployment_ids(kind, tokenizer, name, messages[:n])


MASKED = [(kind, name) for kind, name in PAIRS if made(kind).file == "tokenizer.json"]
MASKED = [(kind, name) for kind, name in MASKED if name not in (*ONE_TURN, *EVERY_TURN, *FORGETS)]


@pytest.mark.parametrize(("kind", "name"), MASKED, ids=lambda value: value)
def test_an_answer_that_is_not_learned_is_transformers_mask_without_it(tokenizer_of, kind, name):
    messages = dialogues(name, TEXTS)[0]
    turns = [{"role": m.role, "content": m.content} for m in messages]
    whole = of_transformers(kind).apply_chat_template(
        turns, chat_template=FAMILIES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    mask = whole["assistant_masks"]
    starts = [i for i in range(len(mask)) if mask[i] and not mask[i - 1]]
    assert len(starts) == 3
    for left_out in range(3):
        expected = list(map(bool, mask))
        i = starts[left_out]
        while i < len(mask) and mask[i]:
            expected[i] = False
            i += 1
        said = list(messages)
        said[2 * left_out + 1] = replace(said[2 * left_out + 1], learned=False)
        example = encode_sample(Sample(tuple(said)), CHAT_TEMPLATE, tokenizer_of(kind, name), mask_prompt=True)
        assert (example.input_ids, example.labels_mask) == (whole["input_ids"], expected)


ANY = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=20).filter(str.strip),
    st.lists(st.sampled_from(["the", " a", "\n", "  ", "é", "👍🏽", "1", "\r\n", "\t", "x"]), min_size=1)
    .map("".join)
    .filter(str.strip),
)


@EVERY
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(ANY, min_size=4, max_size=4))
def test_any_dialogue(tokenizer_of, kind, name, texts):
    for messages in dialogues(name, texts):
        check(kind, name, tokenizer_of(kind, name), messages)


@EVERY
def test_control_tokens_that_people_write_are_text(tokenizer_of, kind, name):
    """A dialogue has the control tokens of the template, however many are written in its messages."""
    tokenizer = tokenizer_of(kind, name)
    own = sorted(tokenizer._file.control)
    poison = "say " + " ".join(own) + "".join(own) + "".join(text.replace("▁", " ") for text in own) + " now"
    for clean, dirty in zip(dialogues(name, ["a", "b"] * 2), dialogues(name, [poison] * 4), strict=True):
        found = []
        for messages in (clean, dirty):
            example = check(kind, name, tokenizer, messages)
            unknown = tokenizer.token_id("<unk>")
            found.append([i for i in example.input_ids if i in tokenizer._control_ids and i != unknown])
        assert found[0] == found[1] and found[0]


@pytest.mark.parametrize("kind", ["qwen3", "smollm3"])
def test_thoughts(tokenizer_of, kind):
    """Tags of thoughts are words of the vocabulary, and learned."""
    tokenizer = tokenizer_of(kind, {"qwen3": "QWEN3", "smollm3": "SMOLLM3"}[kind])
    content = "<think>\none and two\n</think>\n\nThree."
    messages = (Message("user", "Add."), Message("assistant", content))
    (answer,) = answers(encode_sample(Sample(messages), CHAT_TEMPLATE, tokenizer, mask_prompt=True))
    tags = [
        tokenizers.Tokenizer.from_str(made(kind).tokenizer.decode()).token_to_id(t) for t in ("<think>", "</think>")
    ]
    assert tokenizer.decode(answer) == content and answer[0] == tags[0] and tags[1] in answer


# --- templates and tokens of no family


ENDINGS = ["<end_of_utterance>", "[|endofturn|]", "<sep>", "<extra_id_1>", "</assistant>"]


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("kind", ["llama3", "llama2_metaspace"])
def test_an_answer_ends_at_the_control_token_of_its_template(tmp_path, kind, end):
    """Whatever it looks like; nothing is inserted that the template does not write."""
    files = made(kind).beside
    config = files["tokenizer_config"] | {"extra_special_tokens": [end]}
    directory = write(tmp_path, kind, **(files | {"tokenizer_config": config}))
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '" + end + "\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    tokenizer, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    messages = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True))
    example = encode_sample(Sample(messages), CHAT_TEMPLATE, tokenizer, mask_prompt=True)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    assert example.input_ids == theirs.apply_chat_template(turns, return_dict=False)
    end_id = theirs.convert_tokens_to_ids(end)
    assert [answer[-1] for answer in answers(example)] == [end_id] * 2 and end_id in stop_ids(CHAT_TEMPLATE, tokenizer)
    prompt = theirs.apply_chat_template(turns[:3], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(messages[:3], CHAT_TEMPLATE, tokenizer) == prompt


@pytest.mark.parametrize(
    ("kind", "head"), [("llama3", "<|start_header_id|>"), ("phi3_json", "<|user|>"), ("qwen2", "<|im_start|>")]
)
def test_the_head_of_the_next_turn_ends_no_answer(tmp_path, kind, head):
    """A template that writes no end: every answer gets EOS, and learns nothing of what follows."""
    directory = write(tmp_path, kind)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '" + head + "' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + head + "assistant\\n' }}{% endif %}"
    )
    tokenizer = Tokenizer(directory)
    messages = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True))
    example = encode_sample(Sample(messages), CHAT_TEMPLATE, tokenizer, mask_prompt=True)
    assert [tokenizer.decode(answer) for answer in answers(example)] == ["b", "d"]
    assert [answer[-1] for answer in answers(example)] == [tokenizer.eos_id] * 2


@pytest.mark.parametrize(("kind", "name"), [k for k in PAIRS if made(k[0]).file == "tokenizer.json"])
def test_a_control_token_that_somebody_wrote_changes_no_other(tokenizer_of, kind, name):
    """The oracle splits the text where the template's own tokens are, and reads the rest as characters."""
    tokenizer, theirs = tokenizer_of(kind, name), of_transformers(kind)
    control = next(text for text in sorted(tokenizer._file.control) if not text.isalnum() and text != "<unk>")
    question = f"What is {control}?  And"
    clean = deployment_ids(kind, tokenizer, name, (Message("user", "What is @@?  And"),))
    ids = encode_prompt((Message("user", question),), CHAT_TEMPLATE, tokenizer)
    controls = set(theirs.all_special_ids) | set(tokenizer._control_ids)
    assert [i for i in ids if i in controls] == [i for i in clean if i in controls]
    place = next(n for n, (a, b) in enumerate(zip(ids, clean, strict=False)) if a != b)
    head = theirs.decode(clean[:place])
    assert head.endswith(("What is", "What is ")), "what stands in front of it is as without it"


def test_an_end_that_is_no_special_token_but_a_stop(tmp_path):
    """<|im_end|> as an added word: it is one token, and the model stops there."""
    kind = "chatml_words_both"
    config = made(kind).beside["tokenizer_config"] | {"eos_token": "</s>"}
    end = of_transformers(kind).convert_tokens_to_ids("<|im_end|>")
    directory = write(tmp_path, kind, tokenizer_config=config, generation_config={"eos_token_id": [2, end]})
    (directory / "chat_template.jinja").write_text(FAMILIES["SMOLLM2"])
    tokenizer = Tokenizer(directory)
    messages = (Message("user", "a"), Message("assistant", "b"))
    (answer,) = answers(encode_sample(Sample(messages), CHAT_TEMPLATE, tokenizer, mask_prompt=True))
    assert answer[-1] == end
