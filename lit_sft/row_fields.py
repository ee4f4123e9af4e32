"""Fields of rows and turns, beside their text, that change what is learned: each is read or refused, never skipped."""

import re
from typing import Any

LEARNED = {
    "weight": True,  # OpenAI, Mistral, Together, Fireworks
    "train": True,  # Axolotl
    "training": True,
    "trainable": True,
    "train_on_turn": True,
    "learn": True,
    "compute_loss": True,
    "output_with_loss": True,  # XTuner
    "loss": True,  # ms-swift, XTuner
    "loss_scale": True,
    "loss_weight": True,
    "sample_weight": True,
    "loss_mask": True,  # 1: counts in the loss
    "step_loss_mask": True,  # slime
    "masked": False,  # torchtune; 1: does not count
}
"""Fields that say by 0 or 1 (false or true) if a turn, or a whole row, is learned; the value is what 1 says."""

_PART = "parts of a turn to learn"
_CALL = "a call of a tool"
_TOOLS = "definitions of tools"
_THOUGHT = "a thought"
_MEDIA = "media"
_MASK = "a mask of tokens or roles"
LOST = {
    "train_detail": _PART,  # Axolotl
    "training_detail": _PART,
    "weights": "weights of turns or tokens",
    "mask": _MASK,
    "assistant_mask": _MASK,
    "assistant_masks": _MASK,
    "completion_mask": _MASK,
    "labels_mask": _MASK,
    "train_mask": _MASK,
    "tool_calls": _CALL,
    "tool_call": _CALL,
    "function_call": _CALL,
    "function_calls": _CALL,
    "tool_plan": "a plan of tool calls",  # Cohere
    "tool_responses": "answers of tools",
    "tools": _TOOLS,
    "functions": _TOOLS,
    "reasoning_content": _THOUGHT,
    "reasoning": _THOUGHT,
    "reasoning_details": _THOUGHT,
    "thinking": _THOUGHT,
    "thinking_blocks": _THOUGHT,
    "thinking_content": _THOUGHT,
    "thought": _THOUGHT,
    "thoughts": _THOUGHT,
    "refusal": "a refusal",
    "chat_template_kwargs": "options of the chat template",  # trl
    "image": _MEDIA,
    "images": _MEDIA,
    "video": _MEDIA,
    "videos": _MEDIA,
    "audio": _MEDIA,
    "audios": _MEDIA,
}
"""Fields that hold something which is not rendered yet, and what that is."""

ADVICE = {
    _THOUGHT: "write it into the text as the model is to say it, or ",
    "a refusal": "write it into the text, or ",
}

DIALOGUE = {
    "system": "system",
    "system_prompt": "system",
    "system_message": "system",
    "history": "history",
    "chat_history": "history",
    "conversation_history": "history",
}
"""Columns that are parts of a dialogue, and which; refused where they are not read."""

PREFERENCE = (
    *("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages"),
    *("preferred_output", "non_preferred_output"),
)
"""Columns of which one at most is to be learned; the user names it."""

ENDS = ("eot", "need_eos_token")
"""Fields by which torchtune and XTuner leave the end token away: false is refused."""

JUDGEMENTS = ("label", "kto_tag")
"""Columns by which trl and LLaMA-Factory call an answer good or bad: false is refused."""

_NOTHING = ("", "[]", "{}", "null")


def folded(name: str) -> str:
    """A field's name without case, white space and what parts its words: ``toolCalls`` is ``tool_calls``."""
    return re.sub(r"[\s_-]", "", name).lower()


_NAMES = (*LEARNED, *LOST, *DIALOGUE, *PREFERENCE, *ENDS, *JUDGEMENTS)
KNOWN = {folded(name): name for name in _NAMES}
"""Folded name → the name as the tables have it."""


def parse_ignored(names: str | None) -> frozenset[str]:
    """The folded names in a list with commas between."""
    return frozenset(folded(name) for name in (names or "").split(",") if name.strip())


def says_something(value: Any) -> bool:
    """Say whether a value has any content: lists and objects do if something in them has."""
    open_values = [value]
    while open_values:
        item = open_values.pop()
        if isinstance(item, dict):
            open_values += item.values()
        elif isinstance(item, list):
            open_values += item
        elif isinstance(item, str):
            if item.strip() not in _NOTHING:
                return True
        elif item is not False and not is_missing(item):
            return True
    return False


def as_truth(value: Any) -> bool | None:
    """Read 0 or 1, false or true, also as text; None: it is neither."""
    if isinstance(value, str):
        value = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def is_missing(value: Any) -> bool:
    """Say whether a value is null, or NaN, which is an empty cell of pandas."""
    return value is None or value != value


def is_given(value: Any) -> bool:
    """Say whether a field is there: neither missing nor blank text."""
    return not is_missing(value) and not (isinstance(value, str) and not value.strip())


def fault_of(key: str, value: Any) -> str | None:
    """The fault of a field that holds something which would be lost; None: it may go unread.

    ``key`` is the name as it stands in the data.
    """
    name = KNOWN.get(folded(key))
    if name in LOST and says_something(value):
        held = LOST[name]
        if name == "mask" and isinstance(value, str) and value.strip().lower() == "user":
            return None  # NeMo's word for what is done in any case
        return f"holds {held}, which would be lost; {ADVICE.get(held, '')}--ignore_fields {name} learns without it"
    if name in ENDS and as_truth(value) is False:
        return f"takes the end token away, which is always learned here; --ignore_fields {name} learns it"
    return None
