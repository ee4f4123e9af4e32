"""Text to ids and back, by the checkpoint's own files. The only user of sentencepiece and tokenizers."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from lit_sft.errors import InputError
from lit_sft.layout import resolve_checkpoint_dir
from lit_sft.tokenizer_config import Added, TokenizerConfig
from lit_sft.tokenizer_rules import options_of_class, rules_of_class
from lit_sft.word_cache import WordCache

# classes of transformers that add BOS unless told not to
BOS_CLASSES = tuple(f"{name}Tokenizer{fast}" for name in ("Llama", "CodeLlama", "Gemma") for fast in ("", "Fast"))
ANY_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")  # which say nothing of it
PROBE = "Name 12345, it's  naïve:\n\n\tif x: y = 'Z'  # 日本"  # what files that disagree are likely to cut differently

Encode = Callable[[str, bool], list[int]]


class Tokenizer:
    """The tokenizer of a checkpoint: its ``tokenizer.json`` if there, else its ``tokenizer.model`` (sentencepiece).

    Ids are those of transformers' AutoTokenizer, by which a model is deployed: it reads tokenizer.json as well where
    both files lie there. Of a tokenizer.model alone they are sentencepiece's, with a space in front of the text's first
    stretch, or of each (TokenizerConfig.prepend_scheme).

    ``vocab_size``: one more than the largest id. ``bos_id``, ``eos_id``: None where there is none. ``adds_bos``:
    whether the model's sequences begin with BOS. ``stop_ids``: EOS and every other ``eos_token_id`` of the configs.
    ``special_tokens``: the text of ``bos_token``, ``eos_token``, …, for templates. ``chat_template``: its Jinja source
    or None. ``template_names``: of several chat templates, none of which is the default. ``fingerprint``: the same for
    a copied directory, different for whatever gives different ids.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        """Read the tokenizer's files in ``checkpoint_dir``; InputError when there is none, or one is damaged."""
        self.checkpoint_dir = directory = resolve_checkpoint_dir(checkpoint_dir)
        path = next((p for p in (directory / "tokenizer.json", directory / "tokenizer.model") if p.is_file()), None)
        if path is None:
            raise InputError(f"no tokenizer in {directory}: neither tokenizer.model nor tokenizer.json; download it")
        self._config = config = TokenizerConfig.from_dir(directory)
        try:
            raw = path.read_bytes()
            if path.suffix == ".model":
                self._file = _SentencePiece(raw, config)
            else:
                with _silent():
                    self._file = _TokenizersFile(raw, config)
        except BaseException as error:
            if not (isinstance(error, Exception) or _of_library(error)):
                raise
            why = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read ({why:.300}); download it again") from None
        self._control_texts = {i: text for text, i in self._file.control.items()}
        self._control_ids = frozenset(self._control_texts)
        self.vocab_size: int = max(self._file.size, 1 + max(self._control_ids, default=-1))
        texts = self._file.special_tokens | config.names
        self.special_tokens: dict[str, str] = {name: text for name, text in texts.items() if text is not None}
        self.bos_id, self.eos_id = (self._find(name, config) for name in ("bos_token", "eos_token"))
        if self.bos_id is None and self._file.template_bos is not None:
            self.bos_id = self._file.template_bos
        by_class = config.tokenizer_class in BOS_CLASSES and not self._file.says_bos
        policy = by_class or self._file.first_id == self.bos_id
        self.adds_bos: bool = self.bos_id is not None and (policy if config.add_bos is None else config.add_bos)
        stops = {self.eos_id, *config.ids["eos_token"]}
        self.stop_ids: frozenset[int] = frozenset(i for i in stops if i is not None and 0 <= i < self.vocab_size)
        self.chat_template: str | None = config.chat_template
        self.template_names: tuple[str, ...] = config.template_names
        added = [token[:5] for token in config.added]
        rules = [added, sorted(self._file.control.items()), self.bos_id, self.eos_id, self.adds_bos]
        rules += [self._file.rules] if self._file.rules else []  # else the fingerprint is that of earlier versions
        self.fingerprint: str = hashlib.sha256(raw + json.dumps(rules).encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.checkpoint_dir,)  # read again: a pickled tokenizers.Tokenizer forgets how it was set

    def encode(
        self, text: str, bos: bool | None = None, eos: bool = False, control: bool = False, continuation: bool = False
    ) -> list[int]:
        """The ids of ``text``: those of the file's own library, between BOS and EOS where asked.

        ``bos`` None is the model's policy (no second one where the text itself begins with it). ``control``: read the
        control tokens written in the text as such, for templates; otherwise they stay text. ``continuation``: the text
        goes on from one already encoded, so no BOS by policy and no dummy prefix space. InputError when BOS or EOS is
        asked of a tokenizer without one, or for text with half a surrogate pair.
        """
        for name, missing in (("BOS", bos and self.bos_id is None), ("EOS", eos and self.eos_id is None)):
            if missing:
                raise InputError(f"the tokenizer in {self.checkpoint_dir} has no {name} token; do not ask for one")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"character {error.start} of a text is half a surrogate pair; correct the text") from None
        ids = self._asked(self._file.encode, text, control, continuation)
        if bos is None:
            bos = self.adds_bos and not continuation and ids[:1] != [self.bos_id]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; control tokens and ids beyond the vocabulary (a padded embedding's) give none."""
        return self._asked(self._file.decode, list(filter(self._is_text, map(int, ids))))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ``ids`` in pieces, each as soon as it is certain; joined they are ``decode(ids)``.

        Half a character is held back. So is a run of byte tokens of a tokenizer.json: one wrong byte spoils the run.
        """
        window, sent = [], 0  # the last tokens, of whose text ``sent`` characters have been given
        for i in filter(self._is_text, map(int, ids)):
            window.append(i)
            if i in self._file.held or (text := self.decode(window)).endswith("\ufffd"):
                continue
            if text[sent:]:
                yield text[sent:]
            ends = (window[start:] for start in range(len(window) - 1, -1, -1))  # with text: a leading space is lost
            window = next((end for end in ends if self.decode(end)), window)
            sent = len(self.decode(window))
        if rest := self.decode(window)[sent:]:
            yield rest

    def token_id(self, text: str) -> int | None:
        """The id of the control token written ``text``, None when there is none."""
        return self._file.control.get(text)

    def control_text(self, i: int) -> str | None:
        """How the control token ``i`` is written, None for every other id."""
        return self._control_texts.get(i)

    def has_control(self, text: str) -> bool:
        """Whether a control token is written in ``text``, so that reading it with ``control`` makes a difference."""
        return self._file.pattern.search(text) is not None

    @cached_property
    def ends(self) -> re.Pattern:
        """Finds the tokens that may end an answer: control tokens, and those at which the model stops."""
        stops = (self._file.text(i) for i in self.stop_ids if i not in self._control_texts)
        texts = sorted({*self._file.control, *filter(None, stops)}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    @cached_property
    def begins_anew(self) -> bool:
        """Whether a text behind a control token gets a space in front, as the first of all texts does."""
        control = next(iter(self._file.control), None)
        if control is None:
            return False
        behind = self.encode(f"{control}a", bos=False, control=True)[1:]
        return behind != self.encode("a", bos=False, continuation=True)

    def find_controls(self, text: str) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
        """Each control token written in ``text``: where it begins and ends with the spaces that it takes in, its id,
        and where it begins and ends without them.
        """
        for match in self._file.pattern.finditer(text):
            token = match[match.lastindex]
            yield match.start(), match.end(), self._file.control[token], match.span(match.lastindex)

    @property
    def pre_tokenizer(self) -> dict | None:
        """How texts are cut before merging, as a tokenizer.json has it; None for a tokenizer.model."""
        return None if isinstance(self._file, _SentencePiece) else self._file.pre_tokenizer

    def begins_with_control(self, text: str) -> bool:
        """Whether the first that is written in ``text`` is a control token."""
        text = text.lstrip()
        return self._file.pattern.match(text) is not None

    def end_of_last_control(self, text: str) -> int:
        """The character of ``text`` behind the last control token written in it, 0 if there is none."""
        return max((match.end(match.lastindex) for match in self._file.pattern.finditer(text)), default=0)

    def controls_in(self, text: str) -> list[str]:
        """The control tokens written in ``text``, in order, but for those that are words of a language."""
        texts = (match[match.lastindex] for match in self._file.pattern.finditer(text))
        return [text for text in texts if not text.isalnum()]

    def notices(self) -> list[str]:
        """A line for each disagreement among the files of the checkpoint that changes ids, with the one that counts."""
        if isinstance(self._file, _SentencePiece):
            return []
        ends = [self.special_tokens[name] for name in ("bos_token", "eos_token") if name in self.special_tokens]
        texts = [PROBE, *(end + PROBE for end in ends)]
        found = []
        if self._config.settings.get("split_special_tokens"):
            found.append(
                "split_special_tokens of tokenizer_config.json is not read: a template's control tokens are such"
            )
        own = _TokenizersFile(
            (self.checkpoint_dir / "tokenizer.json").read_bytes(), replace(self._config, settings={}, hf_config={})
        )
        both = ([self._asked(file.encode, text, True, False) for text in texts] for file in (own, self._file))
        if next(both) != next(both):
            found.append(
                f"tokenizer.json cuts texts otherwise than {self._config.tokenizer_class or 'the class of the model'}, "
                "by which transformers reads it; the class counts, here as there (tokenizer_class TokenizersBackend in "
                "tokenizer_config.json is the file's own)"
            )
        path = self.checkpoint_dir / "tokenizer.model"
        if path.is_file() and (difference := self._difference(path)):
            found.append(f"tokenizer.model and tokenizer.json disagree: {difference}; tokenizer.json counts")
        return found

    def _difference(self, path: Path) -> str | None:
        """How the ids of a tokenizer.model differ from these, if they do."""
        try:
            other = _SentencePiece(path.read_bytes(), self._config)
        except (OSError, RuntimeError):
            return "the former is no sentencepiece model"
        for i, (text, _, _) in enumerate(other.pieces()):
            if self._file.text(i) != text:
                return f"id {i} is {text!r} and {self._file.text(i)!r}"
        differ = self._asked(other.encode, PROBE, False, False) != self.encode(PROBE, bos=False)
        return "they cut texts differently" if differ else None

    def pieces(self) -> list[tuple[str, float, str]]:
        """Text, score and kind of each token of a SentencePiece model; none of a tokenizer.json.

        Kinds: normal, unknown, control, user_defined, unused, byte.
        """
        return self._file.pieces() if isinstance(self._file, _SentencePiece) else []

    def _asked(self, function: Callable, *arguments: object) -> Any:
        """What the library answers; InputError where its file does not allow an answer."""
        try:
            return function(*arguments)
        except BaseException as error:
            if not _of_library(error):
                raise
            why = " ".join(str(error).split())
            raise InputError(f"the tokenizer in {self.checkpoint_dir} fails ({why:.300}); download it again") from None

    def _is_text(self, i: int) -> bool:
        return 0 <= i < self._file.size and i not in self._control_ids

    def _find(self, name: str, config: TokenizerConfig) -> int | None:
        """The id of BOS or EOS: by its text, unless a file says that there is none, else by the model's configs."""
        if name in config.names and config.names[name] is None:
            return self.special_tokens.pop(name, None) and None
        known = (i for i in config.ids[name] if 0 <= i < self.vocab_size)
        found = self._file.id(self.special_tokens.get(name, ""))
        found = next(known, None) if found is None else found
        self.special_tokens.update((name, text) for text, i in self._file.control.items() if i == found)
        return found


def _of_library(error: BaseException) -> bool:
    """Whether tokenizers raised it: a bare Exception, or what a panic of Rust becomes, which is none."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def _silent() -> Iterator[None]:
    """Without what a panic of Rust writes to stderr by itself: what it means is raised, too."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class _SentencePiece:
    """A ``tokenizer.model``, with the tokens that the other files add to it."""

    held: frozenset[int] = frozenset()
    says_bos = False
    template_bos: int | None = None

    def __init__(self, raw: bytes, config: TokenizerConfig) -> None:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(raw)
        size, unk_id = model.vocab_size(), model.unk_id()
        pieces = [model.id_to_piece(i) for i in range(size)]
        words = {t.id: t.text.replace(" ", "▁") for t in config.added if t.id >= size and t.special is False}
        # what is appended to a protocol buffer is merged into it: pieces (1) of a text (1) and a type (3), user-defined
        # (4) or, to fill a gap, control (3); in normalizer_spec (3) add_dummy_prefix (3), false
        known, more = {*pieces}, []
        for i in range(size, max(words, default=-1) + 1):
            piece, kind = (words[i], 4) if i in words and words[i] not in known else (f"<gap {i}>", 3)
            more.append(_field(1, _field(1, piece.encode()) + bytes([0x18, kind])))
        raw += b"".join(more)
        protos = raw, raw + _field(3, b"\x18\x00")
        self._whole, self._bare = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in protos)
        self._words = WordCache(self._whole, self._bare)
        self._scheme = config.prepend_scheme
        has_prefix = self._whole.encode("a") != self._bare.encode("a")
        self.rules = {"prepend_scheme": self._scheme} if has_prefix and self._scheme != "always" else {}
        self.decode, self.size = self._whole.decode, self._whole.vocab_size()
        added = {t.id: t for t in config.added}
        tokens = [added.get(i, Added(i, p)) for i, p in enumerate(pieces) if model.is_control(i) or p in config.special]
        tokens += [t for t in config.added if t.special or (t.special is None and t.id >= size)]
        tokens = [t for t in tokens if t.id != unk_id]
        self.control, self.pattern = {t.text: t.id for t in tokens}, _pattern(tokens)
        self._unasked = frozenset(self.control.values()), _insides(self.control)
        self._user_defined = {t.id for t in config.added if t.special is False}
        names = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": unk_id, "pad": model.pad_id()}
        self.special_tokens = {f"{name}_token": pieces[i] for name, i in names.items() if i >= 0}
        # the file itself has no policy: Llama's, unless a class is named that has another
        self.first_id = model.bos_id() if config.tokenizer_class in ANY_CLASSES else None

    def encode(self, text: str, control: bool, continuation: bool) -> list[int]:
        """Each stretch between control tokens on its own."""
        ids, start = [], 0
        for match in self.pattern.finditer(text) if control else ():
            ids += self._encode_stretch(text[start : match.start()], start == 0, continuation)
            ids.append(self.control[match[match.lastindex]])
            start = match.end()
        return ids + self._encode_stretch(text[start:], start == 0, continuation)

    def _encode_stretch(self, text: str, first: bool, continuation: bool) -> list[int]:
        bare = {"first": continuation or not first, "always": continuation and first, "never": True}[self._scheme]
        return _as_text(self._stretch, text, bare, *self._unasked)

    def _stretch(self, text: str, continuation: bool) -> list[int]:
        spaces = text[: len(text) - len(text.lstrip())]
        # where the model removes leading spaces, the dummy prefix is what keeps the one before a word
        eaten = spaces and self._bare.encode(spaces + "a") == self._bare.encode("a")
        return self._words.encode(text, bool(continuation and not eaten))

    def pieces(self) -> list[tuple[str, float, str]]:
        model, names = self._whole, {i: text for text, i in self.control.items()}
        kinds = {"unknown": model.is_unknown, "byte": model.is_byte, "unused": model.is_unused}
        kinds = {"control": names.__contains__, "user_defined": self._user_defined.__contains__} | kinds
        kinds["normal"] = lambda i: True
        return [
            (
                names.get(i, model.id_to_piece(i)),
                model.get_score(i),
                next(kind for kind, test in kinds.items() if test(i)),
            )
            for i in range(self.size)
        ]

    def text(self, i: int) -> str:
        return self._whole.id_to_piece(i)

    def id(self, text: str) -> int | None:
        i = self.control.get(text, self._whole.piece_to_id(text))
        return None if i == self._whole.unk_id() else i


class _TokenizersFile:
    """A ``tokenizer.json``."""

    def __init__(self, raw: bytes, config: TokenizerConfig) -> None:
        document = {"added_tokens": []} | json.loads(raw)
        rules = rules_of_class(document, config.settings, config.hf_config) or {}
        self.rules = {key: rule for key, rule in rules.items() if rule != document.get(key)}
        if tokens := _completed(document["added_tokens"], config):
            self.rules["added_tokens"] = tokens
        document |= self.rules
        self.pre_tokenizer: dict | None = document.get("pre_tokenizer")
        said, prefix = document["model"], document["model"].get("continuing_subword_prefix")
        for merge in said.get("merges") or () if prefix else ():
            if not (merge.split(" ") if isinstance(merge, str) else merge)[-1].startswith(prefix):
                raise ValueError(f"the merge {merge!r} lacks the prefix {prefix!r}")  # which ends the process there
        model = tokenizers.Tokenizer.from_buffer(raw).model
        if document["model"].get("dropout"):
            model.dropout = None  # which would cut the same text otherwise each time
        options = options_of_class(config.settings, config.hf_config) if rules else {}
        for option, value in options.items():
            setattr(model, option, value)
        if others := {name: value for name, value in options.items() if bool(said.get(name)) != value}:
            self.rules["options"] = others  # for the fingerprint
        for token in document["added_tokens"]:
            token["special"] = token["special"] or token["content"] in config.special
        # the rules without the model, which takes time to read, and without what would cut texts, left by someone's run
        document |= {"model": {"type": "BPE", "vocab": {}, "merges": []}, "truncation": None, "padding": None}
        bare = document | {key: _without_prefix(document.get(key)) for key in ("normalizer", "pre_tokenizer")}
        # an instance for each use: to set one before each call is not safe among threads
        self._whole, self._text = (_instance(document, model, control) for control in (True, False))
        self._bare = self._text if bare == document else _instance(bare, model, control=False)
        known = self._whole.get_added_tokens_decoder().items()
        ids = said["vocab"].values() if isinstance(said["vocab"], dict) else range(len(said["vocab"]))
        self.size = 1 + max((*ids, *(i for i, _ in known)), default=-1)
        falls_back = "ByteFallback" in json.dumps(document.get("decoder"))
        self.held = frozenset(self._whole.token_to_id(f"<0x{i:02X}>") for i in range(256 * falls_back)) - {None}
        tokens = [Added(i, t.content, True, t.lstrip, t.rstrip) for i, t in known if t.special]
        self.control, self.pattern = {t.text: t.id for t in tokens}, _pattern(tokens)
        unknown = said.get("unk_id") if "unk_id" in said else self._whole.token_to_id(said.get("unk_token") or "")
        self._unasked = frozenset(self.control.values()) - {unknown}, _insides(self.control)
        self.special_tokens: dict[str, str] = {}
        self.id, self.text = self._whole.token_to_id, self._whole.id_to_token
        self.first_id = next(iter(self._whole.encode("a").ids), None)  # not "", to which some add EOS
        # BOS, whether or not another file has its name
        self.template_bos = self.first_id if self.first_id in self.control.values() else None
        # transformers 5 saves its BOS policy nowhere but here
        self.says_bos = "TemplateProcessing" in json.dumps(document.get("post_processor"))

    def encode(self, text: str, control: bool, continuation: bool) -> list[int]:
        """As tokenizers does; what goes on without a prefix ends at the first control token."""
        if not control:
            return _as_text(self._plain, text, continuation, *self._unasked)
        match = self.pattern.search(text)
        head = 0 if not continuation or self._bare is self._text else match.start() if match else len(text)
        ids = self._bare.encode(text[:head], add_special_tokens=False).ids if head else []
        return ids + self._whole.encode(text[head:], add_special_tokens=False).ids

    def _plain(self, text: str, continuation: bool) -> list[int]:
        return (self._bare if continuation else self._text).encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._whole.decode(ids, skip_special_tokens=False)


def _instance(document: dict, model: tokenizers.models.Model, control: bool) -> tokenizers.Tokenizer:
    """A tokenizer of its own with a model that others use too."""
    instance = tokenizers.Tokenizer.from_str(json.dumps(document | {"added_tokens": []}))
    instance.model = model
    for token in document["added_tokens"]:
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
        add = instance.add_special_tokens if token["special"] else instance.add_tokens
        add([tokenizers.AddedToken(token["content"], **flags)])
    instance.encode_special_tokens = not control
    return instance


def _completed(tokens: list[dict], config: TokenizerConfig) -> list[dict] | None:
    """The added tokens of a tokenizer.json with what tokenizer_config.json says of them; None where that is no more."""
    by_text = {token["content"]: dict(token) for token in tokens}
    for told in config.added:
        token = by_text.setdefault(told.text, {"content": told.text, "special": False})
        if told.special is not None:  # said by tokenizer_config.json, not by the older added_tokens.json
            token |= {key: getattr(told, key) for key in ("special", "lstrip", "rstrip", "single_word", "normalized")}
    for told in config.named:
        if told.text not in by_text:
            flags = {key: getattr(told, key) for key in ("lstrip", "rstrip", "single_word")}
            by_text[told.text] = {"content": told.text, "special": True, "normalized": False, **flags}
    completed = list(by_text.values())
    return completed if completed != tokens else None


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer or pre_tokenizer of tokenizer.json without what it puts in front of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    for key in {"normalizers", "pretokenizers"} & part.keys():
        part = part | {key: [kept for each in part[key] if (kept := _without_prefix(each))]}
    never = {"add_prefix_space": False, "prepend_scheme": "never"}
    return part | {key: value for key, value in never.items() if key in part}


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size = [len(value)] if len(value) < 128 else [len(value) & 127 | 128, len(value) >> 7]
    return bytes([number << 3 | 2, *size]) + value


def _pattern(tokens: list[Added]) -> re.Pattern:
    """Finds the texts, the longest first, each in the group ``lastindex``, with the spaces that they take in."""
    tokens, spaces = sorted(tokens, key=lambda t: (-len(t.text), t.lstrip, t.rstrip)), r"\s*"
    # neighbours of a kind in one group: a pattern that is one group of texts is searched for by their first characters
    kinds = groupby(tokens, key=lambda t: (t.lstrip, t.rstrip))
    texts = (
        f"{spaces * lstrip}({'|'.join(re.escape(t.text) for t in run)}){spaces * rstrip}"
        for (lstrip, rstrip), run in kinds
    )
    return re.compile("|".join(texts) or "(?!)")  # which never matches


def _insides(texts: Iterable[str]) -> re.Pattern:
    """Finds the places behind the first character of the texts, in which a sentencepiece may stand for a space."""
    cores = (text.strip("▁ ") for text in texts)
    places = (rf"(?<={re.escape(c[0])})(?={re.escape(c[1:]).replace('▁', '[▁ ]')})" for c in cores if c[1:])
    return re.compile("|".join(places) or "(?!)")


def _as_text(encode: Encode, text: str, continuation: bool, unwanted: frozenset[int], insides: re.Pattern) -> list[int]:
    """``encode(text, continuation)``, cut where the library finds a control token unasked: unigram models do."""
    ids = encode(text, continuation)
    if unwanted.isdisjoint(ids):
        return ids
    ids = []
    for a, b in pairwise([0, *(m.start() for m in insides.finditer(text)), len(text)]):
        piece = encode(text[a:b], continuation or a > 0)
        found = not unwanted.isdisjoint(piece)  # in other letters, which the normalizer makes the token's
        ids += [i for k in range(a, b) for i in encode(text[k], continuation or k > 0)] if found else piece
    return ids
