"""Prompt styles and chat templates: from the turns of a dialogue to the text a model sees."""

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_sft.errors import InputError

CHAT_TEMPLATE = "chat-template"
PLAIN = "plain"


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str
    input: str = ""
    """A user turn's optional context, as in Alpaca's data; the prompt style decides where it goes."""


@dataclass(frozen=True)
class Sample:
    """One exchange or dialogue as text, before it is rendered and tokenized."""

    messages: tuple[Message, ...]
    place: str = ""
    """Where it came from, for messages: ``data.csv row 417``."""


@dataclass(frozen=True)
class Part:
    """A stretch of rendered text."""

    text: str
    control: bool = False
    """Whether control tokens written in it are meant: true for a template's own text, never for the user's."""
    response: bool = False
    """Whether the model is to say it: a response with its end token."""


@dataclass(frozen=True)
class PromptStyle:
    """A named way to write a dialogue. ``{instruction}`` and ``{input}`` are replaced, everything else is literal."""

    prompt: str
    prompt_with_input: str = ""
    """Used for the first turn when there is an input; empty: the input follows the instruction after a blank line."""
    later_prompt: str = ""
    """Turns after the first; empty: like the first."""
    system: str = "{system}\n\n"
    """How a system message goes before the first turn."""
    default_system: str = ""
    response_prefix: str = ""
    """What stands between the prompt's last token and the response, and is predicted with it."""
    bos_each_turn: bool = False


_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_LATER = "\n\n### Instruction:\n{instruction}\n\n### Response:"

PROMPT_STYLES = {
    PLAIN: PromptStyle("{instruction}"),
    "alpaca": PromptStyle(_ALPACA + "\n", _ALPACA_INPUT + "\n", _ALPACA_LATER + "\n"),
    # Lit-GPT's in 2023: no newline before the response
    "alpaca-no-newline": PromptStyle(_ALPACA, _ALPACA_INPUT, _ALPACA_LATER),
    "llama2-chat": PromptStyle(
        "[INST] {instruction} [/INST]",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        response_prefix=" ",
        bos_each_turn=True,
    ),
    "vicuna": PromptStyle(
        "USER: {instruction} ASSISTANT:",
        system="{system} ",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        response_prefix=" ",
    ),
    "hermes": PromptStyle(
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "platypus": PromptStyle(
        "### Instruction:\n\n{instruction}\n\n### Response:\n",
        later_prompt="\n\n### Instruction:\n\n{instruction}\n\n### Response:\n",
    ),
    "beluga": PromptStyle(
        "### User:\n{instruction}\n\n### Assistant:\n",
        later_prompt="\n\n### User:\n{instruction}\n\n### Assistant:\n",
        system="### System:\n{system}\n\n",
    ),
}


def render(
    messages: tuple[Message, ...], style: str, special_tokens: dict[str, str], template: str | None
) -> list[Part]:
    """Write a dialogue in a style, as parts whose texts joined are what the model sees.

    Args:
        messages: an optional system message, then user and assistant in turn. When the last is the user's, the parts
            end where the model's answer begins: a prompt to generate from.
        style: a key of PROMPT_STYLES, or ``chat-template``.
        special_tokens: the texts of ``bos_token`` and ``eos_token``.
        template: the checkpoint's own Jinja template, for ``chat-template``.

    Raises InputError when the style is unknown, or the template refuses the dialogue or rewrites its contents.
    """
    if style == CHAT_TEMPLATE:
        if template is None:
            raise InputError(f"prompt style {CHAT_TEMPLATE!r}: the checkpoint has no chat template; {known_styles()}")
        return _render_template(messages, template, special_tokens)
    if style not in PROMPT_STYLES:
        raise InputError(f"unknown prompt style {style!r}; {known_styles()}")
    return _render_style(messages, PROMPT_STYLES[style], special_tokens)


def known_styles() -> str:
    """The sentence that lists the names."""
    return f"known: {', '.join((*PROMPT_STYLES, CHAT_TEMPLATE))}"


def _render_style(messages: tuple[Message, ...], style: PromptStyle, special_tokens: dict[str, str]) -> list[Part]:
    system = next((m.content for m in messages if m.role == "system"), style.default_system)
    parts: list[Part] = []
    first = True
    for message in messages:
        if message.role == "assistant":
            parts += [Part(style.response_prefix, response=True), Part(message.content, response=True)]
            parts.append(Part(special_tokens["eos_token"], control=True, response=True))
        elif message.role == "user":
            values = {"instruction": message.content, "input": message.input}
            form = style.prompt if first or not style.later_prompt else style.later_prompt
            if message.input and first and style.prompt_with_input:
                form = style.prompt_with_input
            elif message.input:
                values["instruction"] += "\n\n" + message.input
            if first and system:
                before, placeholder, after = form.partition("{instruction}")
                wrapped = style.system.replace("{system}", system)
                # Llama 2 writes the system message inside the first [INST]; elsewhere the form has no text before it
                form = before + wrapped + placeholder + after if style.bos_each_turn else wrapped + form
            elif not first and style.bos_each_turn:
                parts.append(Part(special_tokens["bos_token"], control=True))
            parts.append(Part(re.sub(r"\{(instruction|input)\}", lambda m, v=values: v[m[1]], form)))
            first = False
    return [part for part in parts if part.text]


def _render_template(messages: tuple[Message, ...], template: str, special_tokens: dict[str, str]) -> list[Part]:
    """Find what is the template's and what is the user's by rendering marks in place of the contents.

    A response begins where the prompt that generation would use ends, and ends after its end token.
    """
    to_answer = messages[-1].role == "user"
    contents = [m.content if not m.input else f"{m.content}\n\n{m.input}" for m in messages]
    marks = [f"{_PROBE}\ue000{i}\ue001{_PROBE}" for i in range(len(messages))]
    marked = _jinja(template, messages, marks, special_tokens, to_answer)
    spans, unended = [], set()
    for i, message in enumerate(messages):
        if (times := marked.count(marks[i].strip(_PROBE))) != 1:
            raise InputError(
                f"the chat template writes the {message.role}'s turn {i} {times} times; name a --prompt_style"
            )
        if message.role == "assistant":
            prompt = _jinja(template, messages[:i], marks[:i], special_tokens, True)
            mark = re.search(f"{_PROBE}?\ue000{i}\ue001{_PROBE}?", marked)
            start = len(prompt) if marked.startswith(prompt) else mark.start()
            end = re.compile(_END_OF_TURN + "|" + re.escape(special_tokens["eos_token"])).match(marked, mark.end())
            unended |= set() if end else {i}
            spans.append((start, end.end() if end else mark.end()))
    parts, position = [], 0
    for piece in re.split(f"({_PROBE}?\ue000\\d+\ue001{_PROBE}?)", marked):
        cuts = sorted({0, len(piece)} | {c - position for span in spans for c in span if 0 < c - position < len(piece)})
        for start, end in pairwise(cuts):
            response = any(first <= position + start < last for first, last in spans)
            if number := re.fullmatch(f"{_PROBE}?\ue000(\\d+)\ue001{_PROBE}?", piece):
                parts.append(Part(_strip_alike(contents[int(number[1])], piece), False, response))
                if int(number[1]) in unended:
                    parts.append(Part(special_tokens["eos_token"], True, True))
            else:
                parts.append(Part(piece[start:end], True, response))
        position += len(piece)
    if not unended and "".join(p.text for p in parts) != _jinja(
        template, messages, contents, special_tokens, to_answer
    ):
        raise InputError("the chat template rewrites the contents of messages; name a --prompt_style instead")
    return [part for part in parts if part.text]


_PROBE = "\u2003"  # a space that templates strip and do not write: where it is gone, the template strips contents
_END_OF_TURN = r"\s*(?:<\|[^<>|\s]+\|>|<end_of_turn>|</s>)"


def _strip_alike(content: str, piece: str) -> str:
    content = content if piece.startswith(_PROBE) else content.lstrip()
    return content if piece.endswith(_PROBE) else content.rstrip()


def _jinja(
    template: str, messages: tuple[Message, ...], contents: list[str], special_tokens: dict[str, str], to_answer: bool
) -> str:
    turns = [{"role": m.role, "content": content} for m, content in zip(messages, contents, strict=True)]
    try:
        return _compile(template).render(messages=turns, add_generation_prompt=to_answer, **special_tokens)
    except Exception as error:  # whatever a template written elsewhere runs into
        raise InputError(f"the chat template refuses the dialogue: {error}") from None


@lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
