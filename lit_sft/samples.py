"""Text → tokens and labels, made together in one pass."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from lit_sft.chat_template import Part, end_part
from lit_sft.errors import InputError
from lit_sft.prompts import Message, Sample, is_chat_template, render, style_label
from lit_sft.styles import AS_WRITTEN, CHAT_TEMPLATE, PLAIN, PROMPT_STYLES
from lit_sft.tokenizer import Tokenizer

LONGEST_CONTROL = 100  # characters of a control token's text


@dataclass(frozen=True)
class Example:
    """One sample as the model sees it."""

    input_ids: list[int]
    labels_mask: list[bool]
    """Which tokens are to be predicted; never the first, which nothing comes before."""
    n_prompt: int
    """Tokens before the first response that is learned."""

    @property
    def n_needed(self) -> int:
        """Tokens up to the last label: what comes after it teaches nothing."""
        return n_needed(self.labels_mask)

    def n_kept(self, max_seq_length: int) -> int:
        """Tokens that a limit leaves: all that fit, else a response cut back to its last label; 0: not even that.

        The first prompt is never cut. What may go when nothing else does follows the last end token.
        """
        if len(self.input_ids) <= max_seq_length:
            return len(self.input_ids)
        if self.n_needed <= max_seq_length:
            return max_seq_length
        return n_needed(self.labels_mask[:max_seq_length]) if self.n_prompt < max_seq_length else 0


def n_needed(labels_mask: list[bool]) -> int:
    """Tokens up to the last label."""
    last = len(labels_mask)
    while last and not labels_mask[last - 1]:
        last -= 1
    return last


def encode_sample(sample: Sample, style: str, tokenizer: Tokenizer, mask_prompt: bool) -> Example:
    """The tokens of a dialogue and which of them are to be predicted.

    Each stretch of prompt and each response is encoded on its own, the latter as a continuation: the prompt's ids are
    then exactly those that generation starts from, also where the tokenizer would merge across the join. A response's
    last label is its end token. With ``mask_prompt`` false every token but the first is a label. A response that the
    data say is not to be learned has no label, its end token neither.

    Raises InputError when the style cannot write the dialogue, the tokens would begin with two BOS, what ends a
    response is no control token, or the data say another thing of a prompt than ``mask_prompt``.
    """
    _check_prompts(sample.messages, mask_prompt)
    learned = (message.learned is not False for message in sample.messages if message.role == "assistant")
    ids: list[int] = []
    mask: list[bool] = []
    n_prompt = 0
    for response, new in _stretches(sample.messages, style, tokenizer):
        is_label = next(learned) if response else not mask_prompt
        if response and is_label and not n_prompt:
            n_prompt = len(ids)
        ids += new
        mask += [is_label] * len(new)
    mask[0] = False  # nothing comes before it that could predict it
    return Example(ids, mask, n_prompt)


def is_text(messages: tuple[Message, ...]) -> bool:
    """Whether a sample is plain text, which no prompt precedes."""
    return messages[0].role == "assistant"


def _check_prompts(messages: tuple[Message, ...], mask_prompt: bool) -> None:
    """Refuse prompts of which the data say that they are learned, or not, where all are treated otherwise."""
    n_user = 0
    for message in messages:
        n_user += message.role == "user"
        if message.role != "assistant" and message.learned is mask_prompt:
            told = "is to be learned, and prompts are not; --mask_prompt false learns all of them"
            if not mask_prompt:
                told = "is not to be learned, and --mask_prompt false learns all prompts; leave the flag away"
            which = "the system message" if message.role == "system" else f"the user's turn {n_user}"
            raise InputError(f"{which} says that it {told}, or name its field in --ignore_fields")


def encode_prompt(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that generation starts from: those of ``encode_sample`` up to the response that is still to come."""
    return [i for _, new in _stretches(messages, style, tokenizer) for i in new]


def check_ids(ids: Iterable[int], vocab_size: int, tokenizer: Tokenizer) -> None:
    """Require an embedding for each id; InputError names the first token without one, and what to do."""
    lost = next((i for i in ids if i >= vocab_size), None)
    if lost is not None:
        written = tokenizer.control_text(lost) or tokenizer.decode([lost])
        raise InputError(
            f"the token {written!r} has the id {lost}, and the model has embeddings for ids below {vocab_size}: the "
            f"tokenizer in {tokenizer.checkpoint_dir} is not that of its weights; download the checkpoint again, or "
            "name a --prompt_style that does without the token"
        )


def stop_ids(style: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer of a model trained in this style: the tokenizer's, and the style's own end token."""
    messages = (Message("user", "a"), Message("assistant", "a"))
    *_, end = (new[-1] for response, new in _stretches(messages, style, tokenizer) if response)
    return sorted({*tokenizer.stop_ids, end})


def default_style(tokenizer: Tokenizer, otherwise: str) -> str:
    """The style that a checkpoint's files ask for: its own chat template, else the one that its tokenizer is made for.

    A base model's tokenizer may know the control tokens of a style as well; so the checkpoint's configs must also say
    that the model stops at the style's end token. ``otherwise``: where nothing says anything. InputError: the
    checkpoint has several chat templates, and none is the default.
    """
    if tokenizer.chat_template:
        return CHAT_TEMPLATE
    if tokenizer.template_names:
        raise InputError(
            f"{tokenizer.checkpoint_dir} has the chat templates {', '.join(tokenizer.template_names)}, none of which "
            "is the default; save the one that is meant as chat_template.jinja there, or name a --prompt_style"
        )
    for name, style in PROMPT_STYLES.items():
        end = tokenizer.eos_id if style.end == "{eos}" else tokenizer.token_id(style.end)
        known = all(tokenizer.token_id(mark) is not None for mark in style.marks)
        if style.marks and known and end in tokenizer.stop_ids:
            return name
    return otherwise


def _stretches(messages: tuple[Message, ...], style: str, tokenizer: Tokenizer) -> Iterator[tuple[bool, list[int]]]:
    """Prompts and responses in turn: whether it is a response, and its ids."""
    if is_text(messages) and style != AS_WRITTEN:
        style = PLAIN
    parts = render(messages, style, tokenizer.special_tokens, tokenizer.chat_template, tokenizer.ends)
    if style == AS_WRITTEN:
        parts = list(_with_ends(parts, tokenizer))
    last, ids = "", None
    for response, stretch in groupby(parts, key=attrgetter("response")):
        stretch = list(stretch)
        before = None if ids is None else _last_control(last, ids, tokenizer)
        last = stretch[-1].text
        if response and not tokenizer.ends.search(last):
            raise InputError(
                f"prompt style {style_label(style)!r} ends a response with {last.strip()!r}, which is no control token "
                f"of {tokenizer.checkpoint_dir}: no answer would ever end; name another --prompt_style"
            )
        ids = _encode_first(stretch, tokenizer, style) if before is None else _encode_next(stretch, tokenizer, before)
        yield response, ids


def _with_ends(parts: list[Part], tokenizer: Tokenizer) -> Iterator[Part]:
    """The parts, each response up to the control token that ends it, or with EOS behind it where none does."""
    for part in parts:
        if not part.response:
            yield part
            continue
        end = tokenizer.end_of_last_control(part.text)
        behind = part.text[end:]
        if end and not behind.strip():
            yield part._replace(text=part.text[:end])
            if behind:
                yield Part(behind, control=True)
        else:
            yield part
            yield end_part(tokenizer.special_tokens)


def _encode_first(parts: list[Part], tokenizer: Tokenizer, style: str) -> list[int]:
    """The ids that a dialogue begins with. A template writes its own BOS; a named style gets the model's."""
    from_template = is_chat_template(style) or (style == AS_WRITTEN and tokenizer.begins_with_control(parts[0].text))
    ids = [tokenizer.bos_id] if tokenizer.adds_bos and not from_template else []
    if (pieces := _pieces(parts, tokenizer)) is None:
        text = "".join([part.text for part in parts])
        ids += tokenizer.encode(text, bos=False, control=any(part.control for part in parts))
    else:
        ids += _encode_pieces(pieces, tokenizer, continuation=False)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        if style == AS_WRITTEN:
            raise InputError("the text begins with two BOS tokens; delete one of them")
        raise InputError(f"prompt style {style_label(style)!r} begins with two BOS tokens; name another --prompt_style")
    return ids


def _encode_next(parts: list[Part], tokenizer: Tokenizer, before: str) -> list[int]:
    """The ids of what goes on: from text, or from the control token ``before``, behind which some begin anew."""
    if (pieces := _pieces(parts, tokenizer)) is not None:
        return _encode_pieces(pieces, tokenizer, continuation=not (before and tokenizer.begins_anew))
    text = "".join([part.text for part in parts])
    control = any(part.control for part in parts)
    if before and (control or not tokenizer.has_control(text)):
        return tokenizer.encode(before + text, bos=False, control=True, continuation=True)[1:]
    return tokenizer.encode(text, bos=False, control=control, continuation=not before)


def _pieces(parts: list[Part], tokenizer: Tokenizer) -> list[str | int] | None:
    """The texts between control tokens that are meant, and the ids of these; None: all that are written are meant.

    Somebody wrote a control token into a message: only the template's own are read as such, and what lies between them
    is one text, whoever wrote it.
    """
    if not any(tokenizer.has_control(part.text) for part in parts if not part.control):
        return None
    text, meant = "", []
    for part in parts:
        if part.control:
            meant.append((len(text), len(text) + len(part.text)))
        text += part.text
    pieces: list[str | int] = []
    position = 0
    for start, end, token, inside in tokenizer.find_controls(text):
        if any(first <= inside[0] and inside[1] <= last for first, last in meant):
            pieces += [text[position:start], token]
            position = end
    return [*pieces, text[position:]]


def _encode_pieces(pieces: list[str | int], tokenizer: Tokenizer, continuation: bool) -> list[int]:
    """The ids of what ``_pieces`` gives; ``continuation``: of the first text."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continuation = not tokenizer.begins_anew
        elif piece:
            ids += tokenizer.encode(piece, bos=False, continuation=continuation)
    return ids


def _last_control(text: str, ids: list[int], tokenizer: Tokenizer) -> str:
    """The control token that ``text`` ends with, with the spaces it may take in, or nothing."""
    text = text.rstrip()[-LONGEST_CONTROL:]
    ends = (text[-n:] for n in range(1, len(text) + 1)) if tokenizer.has_control(text) else ()
    return next((end for end in ends if tokenizer.token_id(end) == ids[-1]), "")
