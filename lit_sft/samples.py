"""Text → tokens and labels, made together in one pass."""

from itertools import groupby

from lit_sft.errors import InputError
from lit_sft.prompts import CHAT_TEMPLATE, Message, Part, Sample, render
from lit_sft.shards import Example
from lit_sft.tokenizer import Tokenizer


def encode_sample(sample: Sample, style: str, tokenizer: Tokenizer, mask_prompt: bool) -> Example:
    """The tokens of a dialogue and which of them are to be predicted.

    Each stretch of prompt and each response is encoded on its own, the latter as a continuation: the prompt's ids are
    then exactly those that generation starts from, also where the tokenizer would merge across the join. A response's
    last label is its end token. With ``mask_prompt`` false every token but the first is a label.

    Raises InputError when the style cannot write the dialogue or the tokens would begin with two BOS.
    """
    parts = render(sample.messages, style, tokenizer.special_tokens, tokenizer.chat_template)
    ids: list[int] = []
    mask: list[bool] = []
    n_prompt = 0
    for response, stretch in groupby(parts, key=lambda part: part.response):
        if response and not n_prompt:
            n_prompt = len(ids)
        new = _encode_stretch(list(stretch), tokenizer, style, first=not ids)
        ids += new
        mask += [response or not mask_prompt] * len(new)
    mask[0] = False  # nothing comes before it that could predict it
    return Example(ids, mask, n_prompt)


def encode_prompt(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that generation starts from: those of ``encode_sample`` up to the response that is still to come."""
    parts = render(messages, style, tokenizer.special_tokens, tokenizer.chat_template)
    ids: list[int] = []
    for _, stretch in groupby(parts, key=lambda part: part.response):
        ids += _encode_stretch(list(stretch), tokenizer, style, first=not ids)
    return ids


def _encode_stretch(parts: list[Part], tokenizer: Tokenizer, style: str, first: bool) -> list[int]:
    """Ids of parts that belong together. A chat template writes its own BOS; a named style gets the model's."""
    bos = None if first and style != CHAT_TEMPLATE else False
    if any(not part.control and tokenizer.has_control(part.text) for part in parts):
        # somebody wrote a control token into a message: only the template's own may be read as such
        ids = tokenizer.encode("", bos=bos)
        for i, part in enumerate(parts):
            ids += tokenizer.encode(part.text, bos=False, control=part.control, continuation=not first or i > 0)
    else:
        text = "".join(part.text for part in parts)
        control = any(part.control for part in parts)
        ids = tokenizer.encode(text, bos=bos, control=control, continuation=not first)
    if first and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise InputError("the prompt begins with two BOS tokens: the text writes one that the tokenizer adds as well")
    return ids
