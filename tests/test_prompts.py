"""Named styles against texts written out from what was published; chat templates against transformers' rendering."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chat_templates
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import lit_sft.chat_template
from lit_sft.chat_template import Part
from lit_sft.errors import InputError
from lit_sft.prompts import Message, render, resolve_style, with_system
from lit_sft.styles import CHAT_TEMPLATE, PROMPT_STYLES

pytestmark = pytest.mark.usefixtures("day_of_templates")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def user(text: str, context: str = "") -> Message:
    return Message("user", text, context)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def system(text: str) -> Message:
    return Message("system", text)


def spell(parts: list[Part]) -> str:
    """The text, with what the model is to say in guillemets."""
    text = "".join(f"«{part.text}»" if part.response else part.text for part in parts)
    return text.replace("»«", "")


def refusal(messages: tuple[Message, ...], style: str, template: str | None = None, special: dict = SPECIAL) -> str:
    with pytest.raises(InputError) as caught:
        render(messages, style, special, template)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- named styles

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
BELUGA = (
    "### System:\nYou are Stable Beluga, an AI that follows instructions extremely well. Help as much as you can. "
    "Remember, be safe, and don't do anything illegal.\n\n"
)
HERMES = "### Instruction:\nAdd.\n\n### Response:\n"
PLATYPUS = "### Instruction:\n\nAdd.\n\n### Response:\n"
LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
LLAMA3_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n«{}<|eot_id|>»"
STABLELM = (
    "<|SYSTEM|># StableLM Tuned (Alpha version)\n"
    "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
    "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered "
    "harmful to the user.\n"
    "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, "
    "and make jokes.\n"
    "- StableLM will refuse to participate in anything that could harm a human.\n"
)
ONE, CONTEXT = (user("Add."), assistant("3")), (user("Add.", "1 2"), assistant("3"))
TWO = (*ONE, user("More."), assistant("4"))
TOLD = (system("Be brief."), *TWO)
STYLES = {
    "plain": ("plain", ONE, "Add.«3</s>»"),
    "plain, input": ("plain", CONTEXT, "Add.\n\n1 2«3</s>»"),
    "alpaca": ("alpaca", ONE, ALPACA + "\n«3</s>»"),
    "alpaca, input": ("alpaca", CONTEXT, ALPACA_INPUT + "\n«3</s>»"),
    "alpaca, no newline": ("alpaca-no-newline", ONE, ALPACA + "«3</s>»"),
    "alpaca, no newline, input": ("alpaca-no-newline", CONTEXT, ALPACA_INPUT + "«3</s>»"),
    "alpaca, turns": (
        "alpaca",
        TWO,
        ALPACA + "\n«3</s>»\n\n### Instruction:\nMore.\n\n### Response:\n«4</s>»",
    ),
    "alpaca, system": ("alpaca", (system("Be brief."), *ONE), "Be brief.\n\n" + ALPACA + "\n«3</s>»"),
    "alpaca, later input": (
        "alpaca",
        (*ONE, user("More.", "5"), assistant("4")),
        ALPACA + "\n«3</s>»\n\n### Instruction:\nMore.\n\n5\n\n### Response:\n«4</s>»",
    ),
    "llama2": ("llama2-chat", ONE, "[INST] Add. [/INST]« 3 </s>»"),
    "llama2, turns": (
        "llama2-chat",
        TOLD,
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd. [/INST]« 3 </s>»<s>[INST] More. [/INST]« 4 </s>»",
    ),
    "vicuna": ("vicuna", ONE, VICUNA + "USER: Add. ASSISTANT:« 3</s>»"),
    "vicuna, turns": ("vicuna", TWO, VICUNA + "USER: Add. ASSISTANT:« 3</s>»USER: More. ASSISTANT:« 4</s>»"),
    "vicuna, system": ("vicuna", TOLD[:3], "Be brief. USER: Add. ASSISTANT:« 3</s>»"),
    "hermes": ("hermes", ONE, HERMES + "«3</s>»"),
    "hermes, input": (
        "hermes",
        CONTEXT,
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n«3</s>»",
    ),
    "hermes, turns": ("hermes", TWO, HERMES + "«3</s>»\n\n### Instruction:\nMore.\n\n### Response:\n«4</s>»"),
    "platypus": ("platypus", ONE, PLATYPUS + "«3</s>»"),
    "platypus, input": ("platypus", CONTEXT, PLATYPUS.replace("Add.", "Add.\n\n1 2") + "«3</s>»"),
    "platypus, turns": ("platypus", TWO, PLATYPUS + "«3</s>»\n\n" + PLATYPUS.replace("Add.", "More.") + "«4</s>»"),
    "beluga": ("beluga", ONE, BELUGA + "### User:\nAdd.\n\n### Assistant:\n«3</s>»"),
    "beluga, system": (
        "beluga",
        TOLD,
        "### System:\nBe brief.\n\n### User:\nAdd.\n\n### Assistant:\n«3</s>»"
        "\n\n### User:\nMore.\n\n### Assistant:\n«4</s>»",
    ),
    "dolly": ("dolly", ONE, ALPACA + "\n«3</s>»"),
    "dolly, input": (
        "dolly",
        CONTEXT,
        ALPACA.replace("Add.", "Add.\n\nInput:\n1 2") + "\n«3</s>»",
    ),
    "dolly, turns": ("dolly", TWO, ALPACA + "\n«3</s>»\n\n### Instruction:\nMore.\n\n### Response:\n«4</s>»"),
    "flan": ("flan", ONE, ALPACA + "\n«3</s>»"),
    "flan, input": ("flan", CONTEXT, ALPACA.replace("Add.", "Add.\n\n1 2") + "\n«3</s>»"),
    "longform": ("longform", ONE, ALPACA_INPUT.replace("\n\n### Input:\n1 2", "") + "\n«3</s>»"),
    "longform, turns": (
        "longform",
        TWO,
        ALPACA_INPUT.replace("\n\n### Input:\n1 2", "")
        + "\n«3</s>»\n\n### Instruction:\nMore.\n\n### Response:\n«4</s>»",
    ),
    "lima": ("lima", ONE, "Add.«3</s>»"),
    "lima, turns": ("lima", TWO, "Add.«3</s>»More.«4</s>»"),
    "oasst": (
        "oasst",
        TOLD,
        "<|system|>Be brief.</s><|prompter|>Add.</s><|assistant|>«3</s>»<|prompter|>More.</s><|assistant|>«4</s>»",
    ),
    "codellama": ("codellama", ONE, "[INST] Add. [/INST]« 3 </s>»"),
    "stablecode": ("stablecode", ONE, "###Instruction\nAdd.###Response\n«3</s>»"),
    "stablecode, turns": (
        "stablecode",
        TWO,
        "###Instruction\nAdd.###Response\n«3</s>»###Instruction\nMore.###Response\n«4</s>»",
    ),
    "falcon": ("falcon", ONE, "User: Add.\nFalcon:« 3</s>»"),
    "falcon, turns": (
        "falcon",
        TOLD,
        "System: Be brief.\nUser: Add.\nFalcon:« 3</s>»\nUser: More.\nFalcon:« 4</s>»",
    ),
    "longchat": ("longchat", ONE, VICUNA + "USER: Add. ASSISTANT:« 3</s>»"),
    "redpajama-chat": (
        "redpajama-chat",
        TWO,
        "<human>: Add.\n<bot>:« 3</s>»\n<human>: More.\n<bot>:« 4</s>»",
    ),
    "redpajama-instruct": ("redpajama-instruct", TWO, "Q: Add.\nA:« 3</s>»\n\nQ: More.\nA:« 4</s>»"),
    "stablelm-alpha": ("stablelm-alpha", ONE, STABLELM + "<|USER|>Add.<|ASSISTANT|>«3</s>»"),
    "stablelm-alpha, turns": (
        "stablelm-alpha",
        TOLD,
        "<|SYSTEM|>Be brief.<|USER|>Add.<|ASSISTANT|>«3</s>»<|USER|>More.<|ASSISTANT|>«4</s>»",
    ),
    "chatml": (
        "chatml",
        TOLD,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
        "«3<|im_end|>»\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»",
    ),
    "zephyr": (
        "zephyr",
        TOLD,
        "<|system|>\nBe brief.</s>\n<|user|>\nAdd.</s>\n<|assistant|>\n«3</s>»\n<|user|>\nMore.</s>\n<|assistant|>\n"
        "«4</s>»",
    ),
    "stablelm-2": ("stablelm-2", ONE, "<|user|>\nAdd.</s>\n<|assistant|>\n«3</s>»"),
    "olmo-2": (
        "olmo-2",
        TOLD,
        "<|system|>\nBe brief.\n<|user|>\nAdd.\n<|assistant|>\n«3</s>»\n<|user|>\nMore.\n<|assistant|>\n«4</s>»",
    ),
    "mistral": ("mistral-instruct", TWO, "[INST] Add. [/INST]« 3</s>»[INST] More. [/INST]« 4</s>»"),
    "mistral, system": ("mistral-instruct", TOLD[:3], "[INST] Be brief.\n\nAdd. [/INST]« 3</s>»"),
    "llama3": (
        "llama3",
        TOLD,
        LLAMA3_TURN.format("system", "Be brief.")
        + LLAMA3_TURN.format("user", "Add.")
        + LLAMA3_ANSWER.format("3")
        + LLAMA3_TURN.format("user", "More.")
        + LLAMA3_ANSWER.format("4"),
    ),
    "gemma": (
        "gemma",
        TOLD,
        "<start_of_turn>user\nBe brief.\n\nAdd.<end_of_turn>\n<start_of_turn>model\n«3<end_of_turn>»\n"
        "<start_of_turn>user\nMore.<end_of_turn>\n<start_of_turn>model\n«4<end_of_turn>»",
    ),
    "phi-3": (
        "phi-3",
        TOLD,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nAdd.<|end|>\n<|assistant|>\n«3<|end|>»\n"
        "<|user|>\nMore.<|end|>\n<|assistant|>\n«4<|end|>»",
    ),
    "phi-4": (
        "phi-4",
        TOLD,
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Add.<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«3<|im_end|>»<|im_start|>user<|im_sep|>More.<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«4<|im_end|>»",
    ),
    "phi-4-mini": (
        "phi-4-mini",
        TOLD,
        "<|system|>Be brief.<|end|><|user|>Add.<|end|><|assistant|>«3<|end|>»"
        "<|user|>More.<|end|><|assistant|>«4<|end|>»",
    ),
}


@pytest.mark.parametrize(("style", "messages", "text"), STYLES.values(), ids=STYLES)
def test_named_styles(style, messages, text):
    parts = render(messages, style, SPECIAL, None)
    assert spell(parts) == text
    # what people wrote is never read as control tokens
    written = [m.content for m in messages] + [m.input for m in messages if m.input]
    assert all(any(part.text.strip().endswith(w) for w in written) for part in parts if not part.control)
    # generation begins with the same text, at every turn
    for i, message in enumerate(messages):
        if message.role == "assistant":
            before = text.split("«")[: 1 + sum(m.role == "assistant" for m in messages[:i])]
            prompt = "".join(part.text for part in render(messages[:i], style, SPECIAL, None))
            assert prompt == "".join(before).replace("»", "")


def test_every_style_is_tested():
    assert {style for style, _, _ in STYLES.values()} == PROMPT_STYLES.keys()


@pytest.mark.parametrize(
    ("style", "template", "told"),
    [
        ("chatml", "CHATML", True),
        ("gemma", "GEMMA", False),
        ("phi-3", "PHI3", False),
        ("llama2-chat", "LLAMA2", True),
        ("llama2-chat", "LLAMA2", False),
    ],
)
def test_named_styles_are_the_templates_of_their_models(style, template, told):
    """What generation starts from, as transformers renders the model's own template."""
    for messages in (TOLD[:2], TOLD[:4]) if told else (TWO[:1], TWO[:3]):
        text = "".join(part.text for part in render(messages, style, SPECIAL, None))
        assert text == oracle(messages, getattr(chat_templates, template)).removeprefix("<s>")


# --- the user's own styles

OWN = {
    "format string": ("Q: {instruction}\nA:", TWO, "Q: Add.\nA:«3</s>»Q: More.\nA:«4</s>»"),
    "input": ("{input} | {instruction} =", CONTEXT, "1 2 | Add. =«3</s>»"),
    "no input": ("{instruction}[{input}]", ONE, "Add.[]«3</s>»"),
    "input elsewhere": ("{instruction}:", CONTEXT, "Add.\n\n1 2:«3</s>»"),
    "system": ("<{system}> {instruction}", TOLD, "<Be brief.> Add.«3</s>»<> More.«4</s>»"),
    "system elsewhere": ("{instruction} =", TOLD[:3], "Be brief.\n\nAdd. =«3</s>»"),
    "braces": ("{{'a': 1}} {instruction}", ONE, "{'a': 1} Add.«3</s>»"),
    "tokens": ("{bos}{instruction}{eos}\n", ONE, "<s>Add.</s>\n«3</s>»"),
    "jinja": ("Q: {{ instruction }}\nA:", TWO, "Q: Add.\nA:«3</s>»Q: More.\nA:«4</s>»"),
    "jinja, input": (
        "{{ instruction }}{% if input %} ({{ input }}){% endif %}:",
        (*CONTEXT, user("More."), assistant("4")),
        "Add. (1 2):«3</s>»More.:«4</s>»",
    ),
    "jinja, system": (
        "{% if system %}{{ system }}!{% endif %} {{ instruction }}{{ eos_token }}",
        TOLD,
        "Be brief.! Add.</s>«3</s>» More.</s>«4</s>»",
    ),
    "jinja, no system": ("{% if system %}{{ system }}!{% endif %} {{ instruction }}", ONE, " Add.«3</s>»"),
    "jinja, system elsewhere": ("{{ instruction }}=", TOLD[:3], "Be brief.\n\nAdd.=«3</s>»"),
    "jinja, braces": ("{'a': {{ instruction }}}", ONE, "{'a': Add.}«3</s>»"),
    "chat template": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        TWO,
        "<s>[user] Add.</s>\n[assistant] «3</s>»\n[user] More.</s>\n[assistant] «4</s>»\n",
    ),
}


@pytest.mark.parametrize("door", ["text", "style.jinja", "style.txt", "style"])
@pytest.mark.parametrize(("own", "messages", "text"), OWN.values(), ids=OWN)
def test_own_styles(tmp_path, door, own, messages, text):
    given = own
    if door != "text":
        given = str(tmp_path / door)
        (tmp_path / door).write_bytes(b"\xef\xbb\xbf" + own.replace("\n", "\r\n").encode() + b"\r\n")
    style = resolve_style(given)
    assert style == own and resolve_style(style) == style  # in full: the file may vanish
    parts = render(messages, style, SPECIAL, None)
    assert spell(parts) == text
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = "".join(part.text for part in render(messages[:i], style, SPECIAL, None))
            assert text.replace("«", "").replace("»", "").startswith(prompt)


NOT_OWN = {
    "unknown name": ("alpca", "unknown prompt style 'alpca'; known: plain, alpaca, "),
    "absent": ("styles/mine.jinja", "--prompt_style styles/mine.jinja cannot be read: No such file or directory"),
    "unknown field": ("Q: {prompt}\n", "{prompt} is not a field (known: {instruction}, {input}, {system}"),
    "position": ("Q: {}", "{} is not a field"),
    "conversion": ("Q: {instruction!r}", "{instruction} is not a field"),
    "JSON": ('{"q": "{instruction}"}', "{{ is a brace"),
    "open brace": ("{instruction", "expected '}' before end of string"),
    "no instruction": ("{system}", "it has no {instruction}"),
    "broken Jinja": ("{{ instruction }", "the Jinja of the prompt style cannot be read: "),
    "Jinja of other names": ("{{ prompt }}", "it uses prompt; use messages, or instruction, input and system"),
    "a name too many": ("{{ instruction }}{{ persona }}", "it uses instruction, persona; use messages"),
    "rewritten": ("{{ instruction | upper }}", "it does not write the instruction as it is"),
    "failing": ("{{ instruction }}{{ raise_exception('no') }}", "the Jinja of the prompt style fails: no"),
    "escape": ("{{ instruction }}{{ ''.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize(("given", "fragment"), NOT_OWN.values(), ids=NOT_OWN)
def test_no_style(given, fragment):
    with pytest.raises(InputError) as caught:
        resolve_style(given)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_style_files_that_are_none(tmp_path):
    (tmp_path / "latin.txt").write_bytes("{instruction} é".encode("latin-1"))
    (tmp_path / "other.txt").write_text("Hello\n")
    (tmp_path / "folder.txt").mkdir()
    said = {
        "latin": "is not UTF-8",
        "other": "unknown prompt style 'Hello'",
        "folder": "is no regular file; put one in its place",
    }
    for name, fragment in said.items():
        with pytest.raises(InputError, match=f"{name}.txt:? {re.escape(fragment)}|{re.escape(fragment)}"):
            resolve_style(str(tmp_path / f"{name}.txt"))


def test_a_system_prompt_for_dialogues_without_one():
    assert with_system(ONE, "Be brief.") == TOLD[:3]
    assert with_system(ONE, None) == ONE and with_system(TOLD, "Be kind.") == TOLD
    assert with_system((assistant("a text"),), "Be brief.") == (assistant("a text"),)
    silenced = render(with_system(ONE, ""), "vicuna", SPECIAL, None)  # not even the style's own
    assert spell(silenced) == "USER: Add. ASSISTANT:« 3</s>»"


TURN = st.text(st.characters(codec="utf-8"), min_size=1)


@pytest.mark.parametrize("style", PROMPT_STYLES)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TURN, min_size=5, max_size=5))
def test_named_styles_write_any_text_as_it_is(style, texts):
    """Braces, Jinja, backslashes and other styles' words are text like any other."""
    messages = (system(texts[0]), user(texts[1]), assistant(texts[2]), user(texts[3]), assistant(texts[4]))
    plain = [Message(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)]
    pattern = "".join(part.text for part in render(tuple(plain), style, SPECIAL, None))
    written = "".join(part.text for part in render(messages, style, SPECIAL, None))
    assert written == re.sub("\ue000(.)\ue001", lambda m: texts[int(m[1])], pattern)


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_placeholders_in_contents_are_text(style):
    messages = (system("{instruction}"), user("{input} {system} {{x}}", "{instruction}"), assistant("{input}"))
    text = "".join(part.text for part in render(messages, style, SPECIAL, None))
    assert text.count("{input} {system} {{x}}") == 1 and text.count("{instruction}") == 2


def test_unknown_style_names_the_known():
    assert "unknown prompt style 'alpca'; known: plain, alpaca, " in refusal(ONE, "alpca")


def test_chat_template_of_a_checkpoint_without():
    assert "the checkpoint has no chat template; known: " in refusal(ONE, CHAT_TEMPLATE)


@pytest.mark.parametrize("template", [None, chat_templates.ENDLESS])
def test_no_end_token(template):
    style = CHAT_TEMPLATE if template else "alpaca"
    assert "the tokenizer has no EOS token" in refusal(ONE, style, template, {"bos_token": "<s>"})


def test_llama2_without_bos():
    assert spell(render(TWO, "llama2-chat", {"eos_token": "</s>"}, None)).count("[INST]") == 2


# --- chat templates

CHATML_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LLAMA3_SYSTEM = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|>"
)
LLAMA3_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_TURN = LLAMA3_HEAD.format("user") + "{}<|eot_id|>" + LLAMA3_HEAD.format("assistant") + "«{}<|eot_id|>»"
CHATML_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n«{}<|im_end|>»\n"
GEMMA_TURN = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n«{}<end_of_turn>»\n"
SPANS = {  # name → one exchange and two, with what the model is to say
    "CHATML": (CHATML_SYSTEM, CHATML_TURN, ""),
    "LLAMA2": ("", "<s>[INST] {} [/INST]« {} </s>»", ""),
    "LLAMA3": (LLAMA3_SYSTEM, LLAMA3_TURN, ""),
    "MISTRAL": ("<s>", "[INST] {} [/INST]«{}</s>» ", ""),
    "MISTRAL_V3": ("<s>", "[INST] {}[/INST]« {}</s>»", ""),
    "ZEPHYR": ("", "<|user|>\n{}</s>\n<|assistant|>\n«{}</s>»\n", ""),
    "GEMMA": ("<s>", GEMMA_TURN, ""),
    "PHI3": ("", "<|user|>\n{}<|end|>\n<|assistant|>\n«{}<|end|>»\n", "</s>"),
    "MARKED": ("", "<|user|>{}<|end|><|assistant|>«{}<|end|>»", ""),
}


def oracle(messages: tuple[Message, ...], template: str, special: dict = SPECIAL) -> str:
    """What transformers renders; where the last turn is the user's, with the beginning of an answer."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    prompt = messages[-1].role == "user"
    rendered, _ = render_jinja_template([turns], chat_template=template, add_generation_prompt=prompt, **special)
    return rendered[0]


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one", "two"])
def test_template_spans(name, messages):
    template = getattr(chat_templates, name)
    before, turn, after = SPANS[name]
    turns = [turn.format(messages[i].content, messages[i + 1].content) for i in range(0, len(messages), 2)]
    parts = render(messages, CHAT_TEMPLATE, SPECIAL, template)
    assert spell(parts) == before + "".join(turns) + after
    assert "".join(part.text for part in parts) == oracle(messages, template)


CONTENTS = [
    ("  spaces around ", " \n and more\t\n"),
    ("\nnewline first", "\n\nnewlines around\n"),
    ("{{ bos_token }} {% if x %}", "{# comment #} {{ messages }} {% raw %}"),
    ("say </s> <s> <|im_end|> [INST]", "<|im_start|>user\n<|eot_id|> <end_of_turn></s> done"),
    ("\ue0000\ue001 \ue002 private \ue003", "\ue0001\ue001\ue004"),
    ("\u2003wide\u2003", "\u00a0hard\u3000"),
    ("same", "same"),
    ("a", "<think>"),
    ("```\ncode\n```\r\n", "\\n \\1 $1 %s"),
]
TEMPLATES = [name for name in dir(chat_templates) if name.isupper() and name not in ("THINKING", "ENDLESS")]
NO_SYSTEM = ("GEMMA", "MISTRAL")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("question, answer", CONTENTS)
def test_templates_as_transformers_renders_them(name, question, answer):
    template = getattr(chat_templates, name)
    one = (user(question), assistant(answer))
    two = (*one, user(answer), assistant(question))
    cases = [one, two] + ([] if name in NO_SYSTEM else [(system(question), *one)])
    if name not in (*NO_SYSTEM, "MISTRAL_V3"):
        cases.append((system(answer), *two))
    for messages in cases:
        parts = render(messages, CHAT_TEMPLATE, SPECIAL, template)
        assert "".join(part.text for part in parts) == oracle(messages, template)
        # a response is the answer, as the template strips it, and an end token; what precedes it generation writes
        for i, message in enumerate(messages):
            prompt = oracle(messages[:i], template) if message.role == "assistant" else ""
            if message.role == "assistant":
                assert "".join(p.text for p in render(messages[:i], CHAT_TEMPLATE, SPECIAL, template)) == prompt
                said = [k for k, part in enumerate(parts) if part.response and not part.control]
                k = said[sum(m.role == "assistant" for m in messages[:i])]
                assert parts[k].text.strip() == message.content.strip()
                begin = next(j for j in range(k, -1, -1) if j == 0 or not parts[j - 1].response)
                assert "".join(part.text for part in parts[:begin]) == prompt
                assert parts[k + 1].response and re.fullmatch(r"\s?<[^<>]+>", parts[k + 1].text)
        assert all(not p.control for p in parts if p.text in (question, answer))


TOKENS = ["</s>", "<s>", "<|im_end|>", " ", "\n", "{{", "}}", "{%", "\ue000", "1", "\ue001", "a", "é", "\t", "\u2003"]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.one_of(TURN, st.lists(st.sampled_from(TOKENS)).map("".join)), min_size=4, max_size=4))
def test_any_contents_as_transformers(name, texts):
    texts = [text if text.strip() else text + "x" for text in texts]
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    template = getattr(chat_templates, name)
    try:
        parts = render(messages, CHAT_TEMPLATE, SPECIAL, template)
    except InputError as error:  # Qwen3 rewrites thoughts
        assert "rewrites the contents" in str(error) and "think" in "".join(texts)
        return
    assert "".join(part.text for part in parts) == oracle(messages, template)
    users = [part.text.strip() for part in parts if not part.control]
    assert users == [text.strip() for text in texts]


def test_input_follows_the_instruction():
    parts = render((user("Add.", "1 2"), assistant("3")), CHAT_TEMPLATE, SPECIAL, chat_templates.CHATML)
    assert "user\nAdd.\n\n1 2<|im_end|>" in "".join(part.text for part in parts)


def test_forgotten_end_token_is_added():
    parts = render(TWO, CHAT_TEMPLATE, SPECIAL, chat_templates.ENDLESS)
    assert spell(parts) == "user: Add.\nassistant: «3</s>»\nuser: More.\nassistant: «4</s>»\n"
    prompt = render(TWO[:3], CHAT_TEMPLATE, SPECIAL, chat_templates.ENDLESS)
    assert "".join(p.text for p in prompt) == "user: Add.\nassistant: 3</s>\nuser: More.\nassistant: "


def test_what_the_template_writes_before_the_end_token_is_said_too():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<q>' + m.content + '</q>\\n<answer>' }}"
        "{% else %}{{ m.content + '</answer>\\n' + eos_token }}{% endif %}{% endfor %}"
    )
    assert spell(render(ONE, CHAT_TEMPLATE, SPECIAL, template)) == "<q>Add.</q>\n<answer>«3</answer>\n</s>»"


def test_json_in_templates_is_plain():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{{ {'a': '<é>'} | tojson }}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    template = (
        "{{ {'a': '<é>'} | tojson(indent=2) }}"
        + template.partition("{{ {'a'")[0].replace("{{ m.role", "{{ '\\n' + m.role")
        + "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
    )
    parts = render(ONE, CHAT_TEMPLATE, SPECIAL, template)
    assert "".join(p.text for p in parts) == oracle(ONE, template)
    assert '"<é>"' in parts[0].text


REFUSED = {
    "system": (chat_templates.GEMMA, TOLD, "the chat template refuses the dialogue: System role not supported"),
    "rewritten": (
        "{% for m in messages %}{{ m.role + ': ' + m.content | upper + eos_token }}{% endfor %}assistant: ",
        (user("a"), assistant("b")),
        "rewrites the contents",
    ),
    "replaced": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content.replace('bad', '***') + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        (user("a bad word"), assistant("b")),
        "rewrites the contents",
    ),
    "rewritten without an end": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content.replace('bad', '***') }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        (user("a"), assistant("a bad word")),
        "rewrites the contents",
    ),
    "thoughts": (chat_templates.QWEN3, (user("a"), assistant("<think>x</think>y</think>z")), "rewrites the contents"),
    "dropped": (
        "{% for m in messages[-2:] %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
        TWO,
        "writes the user's turn 1 0 times",
    ),
    "dropped system": (
        "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
        TOLD,
        "writes the system's turn 1 0 times",
    ),
    "twice": (
        "{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}",
        ONE,
        "writes the user's turn 1 2 times",
    ),
    "other prompt": (
        chat_templates.THINKING,
        ONE,
        "prompt for an answer ('<s><|User|>…<|Assistant|><think>\\n') is not",
    ),
    "other history": (chat_templates.MISTRAL_V3, TOLD, "is not how the dialogue with the answer begins"),
    "syntax": ("{% for m in messages %}{{ m.content }", ONE, "refuses the dialogue: unexpected '}'"),
    "unclosed": ("{% for m in messages %}\n{{ m.content }}", ONE, "refuses the dialogue: Unexpected end of template"),
    "undefined": ("{{ messages[0].content + nothing.at.all }}", ONE, "'nothing' is undefined"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ONE, "recursion"),
    "mutation": ("{{ messages.pop() }}", ONE, "is unsafe"),
    "several lines": ("{{ raise_exception('a\nb\n\nc') }}", ONE, "a b c; name a --prompt_style"),
}


@pytest.mark.parametrize(("template", "messages", "fragment"), REFUSED.values(), ids=REFUSED)
def test_template_refused(template, messages, fragment):
    message = refusal(messages, CHAT_TEMPLATE, template)
    assert fragment in message and "--prompt_style" in message


BLOCK = "{{% block b{i} %}}{{% if self.b{j}() or self.b{j}() %}}{{% endif %}}{{% endblock %}}"
ONE_LIMIT = "it takes more than"  # of time or of memory
HOSTILE = {  # template → what the one line of the refusal says
    "classes": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
    "globals": ("{{ raise_exception.__globals__['os'] }}", "unsafe"),
    "modules": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "is unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "is unsafe"),
    "attr": ("{{ (messages | attr('__class__')).__mro__ }}", "unsafe"),
    "mutation": ("{{ messages.append(messages) }}", "is unsafe"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "modules by name": ("{% import 'os' as os %}", "no loader"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0.2 s",
    ),
    "loops that filter": (
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "takes more than 0.2 s",
    ),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "takes more than 0.2 s",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth exceeded"),
    "power": ("{{ 10 ** (10 ** 9) }}", "takes more than 0.2 s"),
    "squares": (
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "takes more than 0.2 s",
    ),
    "text": ("{{ 'a' * 10 ** 10 }}", "more than 1 GB of memory"),
    "list": ("{{ ([0] * 10 ** 10) | length }}", "more than 1 GB of memory"),
    "width": ("{{ 'a' | center(10 ** 10) }}", "more than 1 GB of memory"),
    "digits": ("{{ '%010000000000d' % 1 }}", "more than 1 GB of memory"),
    "doubling": (
        "{% set n = namespace(x='a' * 9999) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "it takes more than",
    ),
    "latin": ("{{ lipsum(n=10 ** 6) }}", "'lipsum' is undefined"),
    "rounding": ("{{ 1 | round(10 ** 8, 'floor') }}", "takes more than 0.2 s"),
    # in C, where nothing but the end of the process interrupts them
    "blocks": (
        "".join(BLOCK.format(i=i, j=i + 1) for i in range(40)) + "{% block b40 %}{% endblock %}",
        "takes more than 0.2 s",
    ),
    "shared text": ("{% set s = 'a' * 10**7 %}{{ ([s] * 10**7) | map('upper') | map('length') | sum }}", ONE_LIMIT),
    "a sum of lists": ("{{ (([[1]] * 3000000) | sum(start=[])) | length }}", ONE_LIMIT),
    "wrapping": ("{{ ('a ' * 20000000) | wordwrap(1) | length }}", ONE_LIMIT),
    "nested lists": ("{{ ([[[['a'] * 50] * 50] * 50] * 50) | pprint | length }}", ONE_LIMIT),
    "a precision": ("{{ '%.999999999f' | format(1.5) }}", ONE_LIMIT),
    "centered": ("{{ range(100000) | map('center', 1000000) | map('length') | sum }}", ONE_LIMIT),
    "a wide number": ("{{ '%1000000000d' | format(1) }}", ONE_LIMIT),
    "a wide JSON": ("{{ [1] | tojson(indent=1500000000) }}", ONE_LIMIT),
    "a hash": (
        "{% set n = namespace(t=()) %}{% for i in range(60) %}{% set n.t = (n.t, n.t) %}{% endfor %}{{ {n.t: 1} }}",
        ONE_LIMIT,
    ),
    "a long text": ("{{ 'a' * 2000000 }}", "it writes 2,000,000 characters"),
    "a long refusal": ("{{ raise_exception('a' * 100000) }}", "aaa"),
    # parsing
    "conditions": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "re"),
    "nots": ("{{ " + "not " * 5000 + "1 }}", "re"),
    "terms": ("{{ " + "1 + " * 20000 + "1 }}", "re"),
    "a long number": ("{{ " + "1" * 5000 + " }}", "digits"),
}


@pytest.mark.parametrize(("template", "fragment"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates(monkeypatch, template, fragment):
    if "memory" in fragment and not Path("/proc/self/statm").exists():
        pytest.skip("only Linux limits a process's memory")
    monkeypatch.setattr(lit_sft.sandbox, "TEMPLATE_SECONDS", 0.2)
    message = refusal(ONE, CHAT_TEMPLATE, template)
    assert fragment in message and message.endswith("; name a --prompt_style") and len(message) < 700


def test_an_endless_template_ends_in_every_thread(monkeypatch):
    monkeypatch.setattr(lit_sft.sandbox, "TEMPLATE_SECONDS", 0.2)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(refusal, ONE, CHAT_TEMPLATE, HOSTILE[kind][0]) for kind in ("loops", "macros")]
        assert all("it takes more than 0.2 s" in one.result() for one in found)


def test_a_style_of_ones_own_has_the_same_limits(monkeypatch):
    monkeypatch.setattr(lit_sft.sandbox, "TEMPLATE_SECONDS", 0.2)
    for kind in ("blocks", "a sum of lists", "brackets", "nots", "terms", "a long number"):
        with pytest.raises(InputError, match=r"the Jinja of the prompt style (fails|cannot be read): "):
            resolve_style("{{ instruction }}" + HOSTILE[kind][0])


def test_a_template_over_a_limit_is_not_run_again(monkeypatch):
    """Each of a thousand rows would take ten seconds."""
    monkeypatch.setattr(lit_sft.sandbox, "TEMPLATE_SECONDS", 0.2)
    template = HOSTILE["loops"][0] + "{{ 1 }}"
    message = refusal(ONE, CHAT_TEMPLATE, template)
    start = time.monotonic()
    assert [refusal((user(f"{i}"),), CHAT_TEMPLATE, template) for i in range(9)] == [message] * 9
    assert time.monotonic() - start < 0.2


def test_slow_renderings_have_the_limit_together(monkeypatch):
    monkeypatch.setattr(lit_sft.sandbox, "TEMPLATE_SECONDS", 0.8)
    slow = "{% set x = (range(99999) | map('center', 1999) | map('length') | sum) * 0 %}" + chat_templates.CHATML
    with pytest.raises(InputError, match=r"takes more than 0\.8 s"):
        for i in range(99):
            render((user(f"{i}"), assistant("x")), CHAT_TEMPLATE, SPECIAL, slow)


def test_a_process_that_died_is_started_again():
    arguments = (ONE, CHAT_TEMPLATE, SPECIAL, chat_templates.MARKED)
    before, other = render(*arguments), chat_templates.MARKED + "{# another #}"
    lit_sft.sandbox._process.child.kill()
    assert "it ends Python" in refusal(ONE, CHAT_TEMPLATE, other)
    assert render(*arguments) == before


def test_an_answer_that_was_not_waited_for_is_nobodys():
    """A signal between request and answer: the next request is not answered with the last one's text."""
    arguments = (ONE, CHAT_TEMPLATE, SPECIAL, chat_templates.MARKED)
    before = render(*arguments)

    class Interrupted:
        def __init__(self, child):
            self.child, self.stdin, self.stdout = child, child.stdin, self

        def readline(self):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.child.stdout if name == "close" else self.child, name)

    lit_sft.sandbox._process.child = Interrupted(lit_sft.sandbox._process.child)
    with pytest.raises(KeyboardInterrupt):
        render((user("never"), assistant("x")), CHAT_TEMPLATE, SPECIAL, chat_templates.MARKED)
    assert render(*arguments) == before


def test_spaces_before_no_thought_are_read_once():
    answer = " " * 200000 + "y"
    parts = render((user("x"), assistant(answer)), CHAT_TEMPLATE, SPECIAL, chat_templates.CHATML)
    assert answer in "".join(part.text for part in parts)


def test_templates_render_in_threads():
    found = []
    arguments = (ONE, CHAT_TEMPLATE, SPECIAL, chat_templates.MARKED)
    thread = threading.Thread(target=lambda: found.extend(render(*arguments)))
    thread.start()
    thread.join()
    assert found == render(*arguments)


def test_rendering_costs_one_render_a_dialogue(monkeypatch):
    """What depends on the template and the roles alone is found once, not for each of 50,000 dialogues."""
    render(TWO, CHAT_TEMPLATE, SPECIAL, chat_templates.CHATML)
    calls, original = [], lit_sft.chat_template.render_jinja
    monkeypatch.setattr(lit_sft.chat_template, "render_jinja", lambda *a: calls.append(a) or original(*a))
    for i in range(5):
        render((user(f"{i}"), assistant("x"), user("y"), assistant("z")), CHAT_TEMPLATE, SPECIAL, chat_templates.CHATML)
    assert len(calls) == 5


def test_the_help_lists_every_style():
    from lit_sft import args, prompts

    assert {*prompts.PROMPT_STYLES, prompts.CHAT_TEMPLATE} < set(re.split(r", ", args.STYLES))
