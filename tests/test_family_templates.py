"""The families' chat templates: text and what is learned, against transformers' rendering and its generation blocks."""

import re

import pytest
from family_templates import DROPS_SYSTEM, EOS, EVERY_TURN, FAMILIES, FORGETS, NO_SYSTEM, ONE_TURN
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lit_sft.chat_template import Part
from lit_sft.errors import InputError
from lit_sft.prompts import CHAT_TEMPLATE, Message, render

Dialogue = tuple[Message, ...]
pytestmark = pytest.mark.usefixtures("day_of_templates")


def special(name: str) -> dict[str, str]:
    bos = {"LLAMA31": "<|begin_of_text|>", "LLAMA32_VISION": "<|begin_of_text|>", "DEEPSEEK": "<｜begin▁of▁sentence｜>"}
    return {"bos_token": bos.get(name, "<s>"), "eos_token": EOS.get(name, "</s>")}


def plain(name: str) -> str:
    """The template without generation blocks, the white space around them as it was."""
    text = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", FAMILIES[name])
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", text)


def turns(messages: Dialogue) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def oracle(name: str, messages: Dialogue) -> str:
    """What transformers renders, and with the answers in guillemets; a last turn of the user's asks for an answer."""
    asks = messages[-1].role == "user"
    texts, spans = render_jinja_template(
        [turns(messages)],
        chat_template=FAMILIES[name],
        return_assistant_tokens_mask=True,
        add_generation_prompt=asks,
        **special(name),
    )
    text, spans = texts[0], spans[0]
    roles = [m.role for m in messages][-len(spans) :] if name in EVERY_TURN else ["assistant"] * len(spans)
    for (start, end), role in reversed(list(zip(spans, roles, strict=True))):
        if role == "assistant":
            forgotten = special(name)["eos_token"] if name in FORGETS else ""
            text = text[:start] + "«" + text[start:end] + forgotten + "»" + text[end:]
    return text


def written(name: str, messages: Dialogue, template: str | None = None, rewritten: bool = False) -> str:
    parts = render(messages, CHAT_TEMPLATE, special(name), template or plain(name))
    if not rewritten:
        check_contents(parts, messages)
    return "".join(f"«{part.text}»" if part.response else part.text for part in parts).replace("»«", "")


def check_contents(parts: list[Part], messages: Dialogue) -> None:
    """What people wrote is nowhere read for control tokens; an answer ends in one that is."""
    given = "".join("".join(m.content for m in messages).split())
    assert "".join("".join(part.text for part in parts if not part.control).split()) == given
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        assert part.control or not part.response or (after is not None and after.response)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


CONTENTS = [
    ("Add 1 and 2.", "3"),
    ("  spaces around ", " \n and more\t\n"),
    ("\nnewline\r\nfirst", "\n\n日本語 👩‍👩‍👧 e\u0301\n"),
    ("say </s> <s> <|im_end|> [INST] <end_of_turn>", "<|im_start|>user\n<|eot_id|></s> done <|end|>"),
    ("{{ bos_token }} {% if x %}", "{# comment #} «»"[:-2]),
    ("same", "same"),
]


def dialogues(name: str, question: str, answer: str) -> list[Dialogue]:
    """One to three turns, with and without a system message, each also as a prompt for its last answer."""
    found = []
    for n in (1,) if name in ONE_TURN else (1, 2, 3):
        exchanges = [m for i in range(n) for m in (user(question + str(i)), assistant(str(i) + answer))]
        found.append(tuple(exchanges))
        if name not in (*NO_SYSTEM, *DROPS_SYSTEM):
            found.append((Message("system", "Be " + answer), *exchanges))
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("question", "answer"), CONTENTS)
def test_text_and_answers_are_those_of_transformers(name, question, answer):
    for messages in dialogues(name, question, answer):
        assert written(name, messages) == oracle(name, messages)
        assert written(name, messages, FAMILIES[name]) == oracle(name, messages)
        for n, message in enumerate(messages):
            if message.role == "assistant":  # what generation starts from is what comes before the answer
                prompt = written(name, messages[:n])
                assert prompt == oracle(name, messages[:n])
                assert written(name, messages).startswith(prompt + "«")


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="«»"), min_size=1), min_size=4, max_size=4)
)
def test_any_contents(name, texts):
    texts = [text if text.strip() else text + "x" for text in texts]
    roles = ("user", "assistant") * (1 if name in ONE_TURN else 2)
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
    assert written(name, messages) == oracle(name, messages)


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_no_system_message(name):
    with pytest.raises(InputError, match=r"refuses the dialogue: (System role not supported|Only user|must alternate)"):
        written(name, (Message("system", "x"), user("a"), assistant("b")))


@pytest.mark.parametrize("name", DROPS_SYSTEM)
def test_a_system_message_that_is_dropped(name):
    """Mistral's writes it into the last message if that is the user's: into prompts, not into dialogues."""
    with pytest.raises(InputError, match="writes the system's turn 1 0 times"):
        written(name, (Message("system", "x"), user("a"), assistant("b")))


# ---- a system message that says nothing

NOTHING = Message("system", "")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*NO_SYSTEM, *DROPS_SYSTEM)])
def test_an_empty_system_message_is_transformers_own(name):
    """Not the template's default text, where the template lets it be none."""
    for messages in dialogues(name, "Q", "A"):
        if messages[0].role != "system":
            for n in range(1, len(messages) + 1):
                assert written(name, (NOTHING, *messages[:n])) == oracle(name, (NOTHING, *messages[:n]))


@pytest.mark.parametrize("name", [*NO_SYSTEM, *DROPS_SYSTEM])
def test_an_empty_system_message_is_left_out_where_the_template_takes_none(name):
    """The dialogue is transformers', and generation starts from what comes before its answer."""
    for messages in dialogues(name, "Q", "A"):
        for n in range(1, len(messages) + 1):
            assert written(name, (NOTHING, *messages[:n])) == oracle(name, messages[:n])


def test_a_default_that_stands_where_nothing_is_written():
    """The text around an empty message is not that around one with contents."""
    template = (
        "{% set told = messages[0].content if messages[0].role == 'system' else 'Be kind.' %}"
        "{% if told %}{{ '<sys>' + told }}{% endif %}"
        "{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    exchange = (user("a"), assistant("b"))
    for messages in ((NOTHING, *exchange), exchange, (Message("system", "S"), *exchange), (NOTHING, exchange[0])):
        asks = messages[-1].role == "user"
        texts, _ = render_jinja_template(
            [turns(messages)], chat_template=template, add_generation_prompt=asks, eos_token="</s>"
        )
        parts = render(messages, CHAT_TEMPLATE, {"eos_token": "</s>"}, template)
        assert "".join(part.text for part in parts) == texts[0]


# ---- thoughts

THOUGHTS = [
    "<think>\nfirst this,\n\nthen that\n</think>\n\nThree.",
    "<think>this</think>Three.",
    "<think>\n\n</think>\n\nThree.",
    "this\n</think>\nThree.\n",
    "<think>\n\n this \n\n</think> Three.",
]


@pytest.mark.parametrize("name", ["QWEN3", "THINKING", "DEEPSEEK_R1", "DEEPSEEK", "SMOLLM3", "LLAMA31", "GEMMA3"])
@pytest.mark.parametrize("thought", THOUGHTS)
def test_thoughts_are_where_the_template_writes_them(name, thought):
    cases = [(user("Add."), assistant(thought))]
    if name not in ONE_TURN:
        cases += [(*cases[0], user("More."), assistant(last)) for last in ("Four.", thought)]
    for messages in cases:
        said = written(name, messages, rewritten=True)
        assert said == oracle(name, messages)
        assert said.startswith(written(name, messages[:-1], rewritten=True) + "«")
        # what people wrote is text in the thought as well
        poisoned = (*messages[:-1], assistant(messages[-1].content.replace("Three", "<|im_end|>")))
        parts = render(poisoned, CHAT_TEMPLATE, special(name), plain(name))
        assert sum("<|im_end|>" in part.text for part in parts if not part.control) == (
            "</think>" in poisoned[-1].content
        )


def test_a_prompt_that_opens_a_thought_is_no_history():
    with pytest.raises(InputError, match=r"turn 2: the chat template's prompt .*<think>.* is not how"):
        written("THINKING", (user("a"), assistant("b"), user("c"), assistant("d")))


@pytest.mark.parametrize(
    ("template", "answer", "fragment"),
    [
        ("{{ m.content | upper }}", "so what", "'so what' as 'SO WHAT"),
        ("{{ m.content.replace('\\r\\n', '\\n') }}", "one\r\ntwo", r"'one\\r\\ntwo' as 'one\\ntwo"),
        ("{{ m.content | replace('/no_think', '') }}", "be /no_think brief", "'be /no_think brief' as 'be  brief"),
        ("{{ m.content.replace('dot', '.') }}", "a" * 50 + " dot", "'a{19} dot' as 'a{19} .</s>'"),
    ],
)
def test_what_a_template_makes_of_contents_is_told(template, answer, fragment):
    template = "{% for m in messages %}{{ '<' + m.role + '>' }}CONTENT{{ eos_token }}{% endfor %}".replace(
        "CONTENT", template
    )
    template += "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    with pytest.raises(InputError, match=rf"rewrites the contents of messages, {fragment}.*; name a --prompt_style"):
        render((user("1"), assistant(answer)), CHAT_TEMPLATE, {"eos_token": "</s>"}, template)


def test_an_end_that_the_last_answer_lacks():
    """Some write EOS between turns only: it is not doubled there, and added at the end."""
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% if m.role == 'assistant' and not loop.last %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    parts = render(
        (user("a"), assistant("b"), user("c"), assistant("d")), CHAT_TEMPLATE, {"eos_token": "</s>"}, template
    )
    text = "".join(f"«{part.text}»" if part.response else part.text for part in parts).replace("»«", "")
    assert text == "<user>a<assistant>«b</s>»<user>c<assistant>«d</s>»"
