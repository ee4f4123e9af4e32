"""Prompt styles and chat templates: from the turns of a dialogue to the text a model sees."""

import re
from dataclasses import dataclass
from typing import Literal

from lit_sft.chat_template import Part, end_part, render_template
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
    response_suffix: str = ""
    """What stands between the response and its end token."""
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
        response_suffix=" ",
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
        default_system="You are Stable Beluga, an AI that follows instructions extremely well. "
        "Help as much as you can. Remember, be safe, and don't do anything illegal.",
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

    Raises InputError when the style is unknown, or the template refuses the dialogue, rewrites its contents or writes
    them otherwise in a prompt than in a whole dialogue.
    """
    if style == CHAT_TEMPLATE:
        if template is None:
            raise InputError(f"prompt style {CHAT_TEMPLATE!r}: the checkpoint has no chat template; {known_styles()}")
        roles = tuple(m.role for m in messages)
        contents = [m.content if not m.input else f"{m.content}\n\n{m.input}" for m in messages]
        return render_template(template, roles, contents, special_tokens)
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
            text = style.response_prefix + message.content + style.response_suffix
            parts += [Part(text, response=True), end_part(special_tokens)]
        elif message.role == "user":
            values = {"instruction": message.content, "input": message.input}
            form = style.prompt if first or not style.later_prompt else style.later_prompt
            if message.input and first and style.prompt_with_input:
                form = style.prompt_with_input
            elif message.input:
                values["instruction"] += "\n\n" + message.input
            if first and system:
                values["system"] = system
                # Llama 2 writes the system message inside the first [INST]; elsewhere the form has no text before it
                inside = style.bos_each_turn
                form = form.replace("{instruction}", style.system + "{instruction}") if inside else style.system + form
            elif not first and style.bos_each_turn:
                parts.append(Part(special_tokens.get("bos_token", ""), control=True))
            parts.append(Part(re.sub(r"\{(system|instruction|input)\}", lambda m, v=values: v[m[1]], form)))
            first = False
    return [part for part in parts if part.text]
