"""Text → tokens and labels, made together in one pass."""

from collections.abc import Iterator
from itertools import groupby

from lit_sft.chat_template import Part
from lit_sft.errors import InputError
from lit_sft.prompts import CHAT_TEMPLATE, Message, Sample, render
from lit_sft.shards import Example
from lit_sft.tokenizer import Tokenizer


def encode_sample(sample: Sample, style: str, tokenizer: Tokenizer, mask_prompt: bool) -> Example:
    """The tokens of a dialogue and which of them are to be predicted.

    Each stretch of prompt and each response is encoded on its own, the latter as a continuation: the prompt's ids are
    then exactly those that generation starts from, also where the tokenizer would merge across the join. A response's
    last label is its end token. With ``mask_prompt`` false every token but the first is a label.

    Raises InputError when the style cannot write the dialogue, the tokens would begin with two BOS, or what ends a
    response is no control token.
    """
    ids: list[int] = []
    mask: list[bool] = []
    n_prompt = 0
    for response, new in _stretches(sample.messages, style, tokenizer):
        if response and not n_prompt:
            n_prompt = len(ids)
        ids += new
        mask += [response or not mask_prompt] * len(new)
    mask[0] = False  # nothing comes before it that could predict it
    return Example(ids, mask, n_prompt)


def encode_prompt(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that generation starts from: those of ``encode_sample`` up to the response that is still to come."""
    return [i for _, new in _stretches(messages, style, tokenizer) for i in new]


def stop_ids(style: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer of a model trained in this style: the tokenizer's, and the style's own end token."""
    messages = (Message("user", "a"), Message("assistant", "a"))
    *_, end = (new[-1] for response, new in _stretches(messages, style, tokenizer) if response)
    return sorted({*tokenizer.stop_ids, end})


def _stretches(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> Iterator[tuple[bool, list[int]]]:
    """Prompts and responses in turn: whether it is a response, and its ids."""
    parts = render(messages, style, tokenizer.special_tokens, tokenizer.chat_template)
    first = True
    for response, stretch in groupby(parts, key=lambda part: part.response):
        stretch = list(stretch)
        if response and not tokenizer.has_control(stretch[-1].text):
            raise InputError(
                f"prompt style {style!r} ends a response with {stretch[-1].text.strip()!r}, which is no control token "
                f"of {tokenizer.checkpoint_dir}: no answer would ever end; name another --prompt_style"
            )
        yield response, _encode_stretch(stretch, tokenizer, style, first)
        first = False


def _encode_stretch(parts: list[Part], tokenizer: Tokenizer, style: str, first: bool) -> list[int]:
    """Ids of parts that belong together. A chat template writes its own BOS; a named style gets the model's."""
    bos = None if first and style != CHAT_TEMPLATE else False
    if any(not part.control and tokenizer.has_control(part.text) for part in parts):
        # somebody wrote a control token into a message: only the template's own may be read as such
        ids = tokenizer.encode("", bos=bos)
        runs = groupby(parts, key=lambda part: part.control and tokenizer.has_control(part.text))
        for i, (control, run) in enumerate(runs):
            text = "".join(part.text for part in run)
            ids += tokenizer.encode(text, bos=False, control=control, continuation=not first or i > 0)
    else:
        text = "".join(part.text for part in parts)
        control = any(part.control for part in parts)
        ids = tokenizer.encode(text, bos=bos, control=control, continuation=not first)
    if first and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise InputError(f"prompt style {style!r} begins with two BOS tokens; name another --prompt_style")
    return ids
