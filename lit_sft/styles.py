"""The named ways to write a dialogue, as published with the models and data they are named after. Data, no code."""

from dataclasses import dataclass, replace

CHAT_TEMPLATE = "chat-template"
PLAIN = "plain"
AS_WRITTEN = "as-written"
"""Texts in which a template is already applied: control tokens written in them are meant, and nothing is added but an
end token where an answer has none."""


@dataclass(frozen=True)
class PromptStyle:
    """A way to write a dialogue, in Python format strings of the fields below; all other text is the style's own.

    ``{instruction}``, ``{input}``, ``{system}``: of the message. ``{bos}``, ``{eos}``: the tokenizer's, or nothing.
    """

    prompt: str
    """A user's turn, up to where the answer begins. A system message goes to its ``{system}``, else in front of it."""
    prompt_with_input: str = ""
    """Used for the first turn when there is an input; empty: the input follows the instruction after a blank line."""
    later_prompt: str = ""
    """Turns after the first; empty: like the first."""
    system: str = "{system}\n\n"
    """How a system message is written."""
    default_system: str = ""
    response_prefix: str = ""
    """What stands between the prompt's last token and the response, and is predicted with it."""
    response_suffix: str = ""
    """What stands between the response and its end token."""
    end: str = "{eos}"
    """The token that ends a response."""
    marks: tuple[str, ...] = ()
    """Control tokens that only a tokenizer for this style has: by them, and ``end``, a chat model is recognised."""


_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_HERMES = "### Instruction:\n{instruction}\n\n### Response:\n"
_HERMES_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_ALPACA = PromptStyle(_TASK + _HERMES, _TASK_WITH_INPUT + _HERMES_INPUT, "\n\n" + _HERMES)
_LLAMA2 = PromptStyle(
    "[INST] {system}{instruction} [/INST]",
    later_prompt="{bos}[INST] {instruction} [/INST]",
    system="<<SYS>>\n{system}\n<</SYS>>\n\n",
    response_prefix=" ",
    response_suffix=" ",
)
_VICUNA = PromptStyle(
    "USER: {instruction} ASSISTANT:",
    system="{system} ",
    default_system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    response_prefix=" ",
)


def _headed(turn: str, system: str, end: str, between: str = "", marks: tuple[str, ...] = ()) -> PromptStyle:
    """Turns that all have a head and an end token; ``between`` stands between turns."""
    return PromptStyle(turn, later_prompt=between + turn, system=system, end=end, marks=marks)


_CHATML_TURN = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
_LLAMA3_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
_LLAMA3_TURN = _LLAMA3_HEAD.format("user") + "{instruction}<|eot_id|>" + _LLAMA3_HEAD.format("assistant")
_ZEPHYR = _headed("<|user|>\n{instruction}{eos}\n<|assistant|>\n", "<|system|>\n{system}{eos}\n", "{eos}", "\n")

PROMPT_STYLES = {
    PLAIN: PromptStyle("{instruction}"),
    # instruction data
    "alpaca": _ALPACA,
    # Lit-GPT's in 2023: no newline before the response
    "alpaca-no-newline": PromptStyle(
        *(form.removesuffix("\n") for form in (_ALPACA.prompt, _ALPACA.prompt_with_input, _ALPACA.later_prompt))
    ),
    "dolly": replace(_ALPACA, prompt_with_input=_TASK + _HERMES_INPUT.replace("### Input:", "Input:")),
    "flan": replace(_ALPACA, prompt_with_input=""),
    "longform": PromptStyle(_TASK_WITH_INPUT + _HERMES, later_prompt="\n\n" + _HERMES),
    "lima": PromptStyle("{instruction}"),
    "oasst": _headed(
        "<|prompter|>{instruction}{eos}<|assistant|>", "<|system|>{system}{eos}", "{eos}", marks=("<|prompter|>",)
    ),
    # the article's families
    "llama2-chat": _LLAMA2,
    "codellama": _LLAMA2,
    "beluga": PromptStyle(
        "### User:\n{instruction}\n\n### Assistant:\n",
        later_prompt="\n\n### User:\n{instruction}\n\n### Assistant:\n",
        system="### System:\n{system}\n\n",
        default_system="You are Stable Beluga, an AI that follows instructions extremely well. "
        "Help as much as you can. Remember, be safe, and don't do anything illegal.",
    ),
    "stablecode": PromptStyle("###Instruction\n{instruction}###Response\n"),
    "falcon": PromptStyle(
        "User: {instruction}\nFalcon:",
        later_prompt="\nUser: {instruction}\nFalcon:",
        system="System: {system}\n",
        response_prefix=" ",
    ),
    "vicuna": _VICUNA,
    "longchat": _VICUNA,
    "redpajama-chat": PromptStyle(
        "<human>: {instruction}\n<bot>:", later_prompt="\n<human>: {instruction}\n<bot>:", response_prefix=" "
    ),
    "redpajama-instruct": PromptStyle(
        "Q: {instruction}\nA:", later_prompt="\n\nQ: {instruction}\nA:", response_prefix=" "
    ),
    "stablelm-alpha": PromptStyle(
        "<|USER|>{instruction}<|ASSISTANT|>",
        system="<|SYSTEM|>{system}",
        default_system="# StableLM Tuned (Alpha version)\n"
        "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
        "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered "
        "harmful to the user.\n"
        "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, "
        "and make jokes.\n"
        "- StableLM will refuse to participate in anything that could harm a human.\n",
        marks=("<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"),
    ),
    "platypus": PromptStyle(
        "### Instruction:\n\n{instruction}\n\n### Response:\n",
        later_prompt="\n\n### Instruction:\n\n{instruction}\n\n### Response:\n",
    ),
    "hermes": PromptStyle(_HERMES, _HERMES_INPUT, "\n\n" + _HERMES),
    # what people fine-tune today
    # before chatml, whose marks its tokenizer has too
    "phi-4": _headed(
        "<|im_start|>user<|im_sep|>{instruction}<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>{system}<|im_end|>",
        "<|im_end|>",
        marks=("<|im_start|>", "<|im_sep|>"),
    ),
    "chatml": _headed(
        _CHATML_TURN, "<|im_start|>system\n{system}<|im_end|>\n", "<|im_end|>", "\n", ("<|im_start|>", "<|im_end|>")
    ),
    "zephyr": _ZEPHYR,
    "stablelm-2": _ZEPHYR,
    "olmo-2": replace(
        _ZEPHYR,
        prompt="<|user|>\n{instruction}\n<|assistant|>\n",
        later_prompt="\n<|user|>\n{instruction}\n<|assistant|>\n",
        system="<|system|>\n{system}\n",
    ),
    "mistral-instruct": PromptStyle("[INST] {system}{instruction} [/INST]", response_prefix=" "),
    "llama3": _headed(
        _LLAMA3_TURN,
        _LLAMA3_HEAD.format("system") + "{system}<|eot_id|>",
        "<|eot_id|>",
        marks=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "gemma": PromptStyle(
        "<start_of_turn>user\n{system}{instruction}<end_of_turn>\n<start_of_turn>model\n",
        later_prompt="\n<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        marks=("<start_of_turn>",),
    ),
    "phi-3": _headed(
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
        "<|system|>\n{system}<|end|>\n",
        "<|end|>",
        "\n",
    ),
    "phi-4-mini": _headed("<|user|>{instruction}<|end|><|assistant|>", "<|system|>{system}<|end|>", "<|end|>"),
}
