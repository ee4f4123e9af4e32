"""What the JSON files beside a tokenizer say about it: added tokens, names, BOS policy, prefix, ends, chat template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lit_sft.documents import read_bytes
from lit_sft.errors import InputError
from lit_sft.layout import HF_CONFIG
from lit_sft.tokenizer_rules import names_of_class, prepend_scheme

MOST_IDS = 1 << 20  # four times the largest vocabulary known; more is a damaged file

MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # the second is transformers 5's name


class Added(NamedTuple):
    """A token added to a vocabulary; ``special`` is None where not said; ``lstrip`` takes in the spaces before it."""

    id: int
    text: str
    special: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The wishes of the files beside a tokenizer; empty where they are silent."""

    added: list[Added]
    """In order of their ids."""
    names: dict[str, str | None]
    """``bos_token``, ``eos_token``, … as text; None where a file says that there is none."""
    special: frozenset[str]
    """The text of every token that is called special."""
    named: list[Added]
    """The tokens that are called special, without their ids."""
    add_bos: bool | None
    tokenizer_class: str | None
    prepend_scheme: str
    """Where a sentencepiece model puts a space in front: ``first``, ``always`` or ``never`` (tokenizer_rules)."""
    settings: dict[str, Any]
    """What tokenizer_config.json says, with special_tokens_map.json under it."""
    hf_config: dict[str, Any]
    """config.json."""
    ids: dict[str, list[int]]
    """``bos_token`` and ``eos_token`` as ids, by generation_config.json and config.json: models often stop at more."""
    chat_template: str | None
    template_names: tuple[str, ...]
    """The names of several chat templates, where none of them is the default; ``chat_template`` is None then."""

    @classmethod
    def from_dir(cls, directory: Path) -> "TokenizerConfig":
        """Read the files of ``directory``, each of which may be missing; InputError when one is damaged."""
        settings = _read_json(directory / "tokenizer_config.json")
        older = _read_json(directory / "special_tokens_map.json")
        # as transformers: what lists the added tokens leaves the older file without a say, else that has the last one
        settings = older | settings if "added_tokens_decoder" in settings else settings | older
        models = [_read_json(directory / name) for name in ("generation_config.json", HF_CONFIG)]
        try:
            added = {i: Added(i, text) for text, i in _read_json(directory / "added_tokens.json").items()}
            added |= {int(i): _added(int(i), t) for i, t in (settings.get("added_tokens_decoder") or {}).items()}
            if wrong := [t for t in added.values() if type(t.id) is not int or not 0 <= t.id < MOST_IDS]:
                raise ValueError(f"{wrong[0].text!r} has the id {wrong[0].id!r}")
            names = {key: value for key, value in settings.items() if key.endswith("_token") and _is_name(value)}
            names = {key: _text(value) if value else None for key, value in names.items()}
            names = names_of_class(settings, models[1]) | names
            if isinstance(extra := settings.get("extra_special_tokens"), dict):
                names |= {key: _text(value) for key, value in extra.items()}  # which templates may name
            more = [_text(token) for key in MORE_SPECIAL for token in _values(settings.get(key) or [])]
            named = [_named(value) for key, value in settings.items() if key.endswith("_token") and _is_name(value)]
            named += [_named(token) for key in MORE_SPECIAL for token in _values(settings.get(key) or [])]
            template, template_names = _chat_template(directory, settings.get("chat_template"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{directory}: the special tokens or the chat template in tokenizer_config.json, added_tokens.json "
                f"or special_tokens_map.json cannot be understood ({error!r}); download them again"
            ) from None
        policy, kind = settings.get("add_bos_token"), settings.get("tokenizer_class")
        return cls(
            added=sorted(added.values()),
            names=names,
            special=frozenset({*filter(None, names.values()), *more, *(t.text for t in added.values() if t.special)}),
            named=list(dict.fromkeys(token for token in named if token is not None)),
            add_bos=policy if isinstance(policy, bool) else None,
            tokenizer_class=kind if isinstance(kind, str) else None,
            prepend_scheme=prepend_scheme(settings),
            settings=settings,
            hf_config=models[1],
            ids={name: [i for m in models for i in _ids(m.get(f"{name}_id"))] for name in ("bos_token", "eos_token")},
            chat_template=template,
            template_names=template_names,
        )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``, empty when there is no such file."""
    try:
        found = json.loads(read_bytes(path)) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object; download it again")
    return found


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str | dict)  # add_bos_token and its like are not


def _text(token: str | dict[str, Any]) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{token!r} is no token")
    text.encode()  # a ValueError for half a surrogate pair
    return text


def _values(tokens: list[Any] | dict[str, Any]) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens


def _named(token: str | dict[str, Any] | None) -> Added | None:
    """A named token, with the flags that its name comes with."""
    if not token:
        return None
    return _added(-1, (token if isinstance(token, dict) else {"content": token}) | {"special": True})


def _added(i: int, token: dict[str, Any]) -> Added:
    flags = (bool(token.get(flag, False)) for flag in ("special", "lstrip", "rstrip", "single_word"))
    return Added(i, _text(token["content"]), *flags, normalized=bool(token.get("normalized", not token.get("special"))))


def _ids(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _chat_template(
    directory: Path, value: str | list[dict[str, str]] | dict[str, str] | None
) -> tuple[str | None, tuple[str, ...]]:
    """chat_template.jinja if there, else tokenizer_config.json's own, else chat_template.json's (a processor's).

    Gives the template, or None with the names of several that have no default among them.
    """
    # where transformers 5 keeps those that are not the default, beside it or alone
    others = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    path = others.get("default", directory / "chat_template.jinja")
    if path.is_file():
        return read_bytes(path).decode().replace("\r\n", "\n").replace("\r", "\n"), ()
    if others:
        return None, tuple(others)
    value = value or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        value = {template["name"]: template["template"] for template in value}
    if isinstance(value, dict):
        if value and "default" not in value:
            return None, tuple(sorted(map(str, value)))
        value = value.get("default")
    if not isinstance(value, str | None):
        raise TypeError(f"chat_template is a {type(value).__name__}")
    (value or "").encode()
    return value, ()
