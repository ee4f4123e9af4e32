"""What a checkpoint directory holds, and what in it is unusable or suspicious, each with what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from lit_sft.args import DoctorArgs
from lit_sft.atomic import Manifest
from lit_sft.checkpoint import check_model
from lit_sft.config import ModelConfig
from lit_sft.convert import (
    accepted_keys,
    open_safetensors,
    read_config,
    source_weights,
    to_lit,
    vocabulary_note,
    weight_shapes,
    with_vocabulary_of,
)
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.bookkeeping import BOOKKEEPING, IMAGES_AND_SOUNDS
from lit_sft.families.family import Family
from lit_sft.families.fields import NEUTRAL, Fields
from lit_sft.layout import ACCEPTED, HF_CONFIG, MANIFEST, resolve_checkpoint_dir
from lit_sft.prompts import style_label
from lit_sft.samples import default_style, stop_ids
from lit_sft.styles import PROMPT_STYLES
from lit_sft.tokenizer import Tokenizer
from lit_sft.weight_files import adapter_note, choose_weights, weight_names
from lit_sft.weights import Weight

SHAPE = ("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "vocab_size", "block_size", "intermediate_size")


@dataclass
class Findings:
    """What was found, as it is printed."""

    lines: dict[str, str] = field(default_factory=dict)
    suspicious: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    style: str | None = None
    """The prompt style that the model was fine-tuned in, here."""

    @contextmanager
    def part(self) -> Iterator[None]:
        """What the block cannot use makes the checkpoint unusable; the rest is looked at all the same."""
        try:
            yield
        except InputError as error:
            self.unusable.append(str(error))


def examine(args: DoctorArgs) -> None:
    """Print what ``args.checkpoint_dir`` is; InputError, after that, when it cannot be used."""
    directory = resolve_checkpoint_dir(args.checkpoint_dir)
    found = Findings()
    config = None
    with found.part():
        config = _model(directory, args.accept_config_key, found)
    with found.part():
        _tokenizer(directory, config, found)
    if note := adapter_note(directory):
        found.suspicious.append(note)
    print(directory)
    for topic, text in found.lines.items():
        print(f"  {topic:<12}{text}")
    for kind in ("suspicious", "unusable"):
        for text in getattr(found, kind):
            print(f"{kind}: {text}")
    if found.unusable:
        raise InputError(f"{directory} cannot be used: {found.unusable[0]}")
    print("it can be used" + (f"; {len(found.suspicious)} suspicious, see above" if found.suspicious else ""))


def _model(directory: Path, accept_config_key: str | None, found: Findings) -> ModelConfig | None:
    """Config, weights and manifest; gives the config where it could be read."""
    hf_config = read_json(directory / HF_CONFIG)
    family = find_family(hf_config)
    architecture = ", ".join(hf_config.get("architectures") or [f"model_type {hf_config.get('model_type')}"])
    found.lines["family"] = f"{family.name} ({architecture})"
    accepted = [*accepted_keys(accept_config_key, family, hf_config), *_accepted_before(directory)]
    config, fields = _read(directory, family, hf_config, accepted)
    found.lines |= {"accepted": ", ".join(accepted)} if accepted else {}
    found.lines |= {"notes": "; ".join(fields.notes)} if fields.notes else {}
    config = _fitted(directory, family, config, found)
    found.lines["shape"] = ", ".join(f"{name} {getattr(config, name)}" for name in SHAPE)
    plain = asdict(ModelConfig(**{name: getattr(config, name) for name in SHAPE}))
    switches = [f"{name} {_short(value)}" for name, value in asdict(config).items() if value != plain[name]]
    found.lines["switches"] = ", ".join(switches) or "none"
    n_parameters = sum(torch.Size(shape).numel() for shape in weight_shapes(config).values())
    found.lines["parameters"] = f"{n_parameters:,}"
    known = fields.read | NEUTRAL.keys() | BOOKKEEPING | (IMAGES_AND_SOUNDS if family.wrapper else set())
    if unread := sorted(fields.content.keys() - known):
        found.lines["not read"] = ", ".join(unread)
    with found.part():
        _weights(directory, family, config, found)
    return config


def _accepted_before(directory: Path) -> list[str]:
    """The fields of config.json that the conversion took as absent."""
    return Manifest.read(directory).facts.get(ACCEPTED, []) if (directory / MANIFEST).is_file() else []


def _read(directory: Path, family: Family, hf_config: dict, accepted: list[str]) -> tuple[ModelConfig, Fields]:
    """What config.json says, and its fields."""
    try:
        source = source_weights(directory)
    except InputError:  # which is said by who looks at the weights
        return family.read_fields(hf_config, accepted)
    return read_config(family, hf_config, source, accepted)[:2]


def _fitted(directory: Path, family: Family, told: ModelConfig, found: Findings) -> ModelConfig:
    """With as many ids as the weights have; as told where they cannot be read, which is said by who looks at them."""
    try:
        if (directory / MANIFEST).is_file():
            config = replace(told, vocab_size=ModelConfig.from_dir(directory).vocab_size)
        else:
            config = with_vocabulary_of(source_weights(directory), family, told)
    except InputError:
        return told
    if config != told:
        found.suspicious.append(vocabulary_note(told, config))
    return config


def _short(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], bool):
        return f"{sum(value)} of {len(value)}"
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _weights(directory: Path, family: Family, config: ModelConfig, found: Findings) -> None:
    """The converted tensors, the source's, or both."""
    again = f"run: python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}"
    is_converted = (directory / MANIFEST).is_file()
    if is_converted:
        manifest = check_model(directory)
        names = [name for name in manifest.files if name.endswith(".safetensors")]
        stored = [weight for name in names for weight in open_safetensors(directory / name)]
        if {w.name: w.shape for w in stored} != weight_shapes(config):
            raise InputError(f"the converted weights are not those that config.json asks for; {again}")
        found.lines["converted"] = f"yes, by lit_sft {manifest.lit_sft_version}: {_summary(stored, found)}"
        found.style = manifest.facts.get("prompt_style")
        if ModelConfig.from_dir(directory) != config:
            found.suspicious.append(f"config.json has changed since it was converted; {again}")
    else:
        found.lines["converted"] = f"no; {again}"
        if any(directory.glob("lit_model*")):
            found.suspicious.append(
                f"lit_model files without a {MANIFEST} are of a conversion that did not end; {again}"
            )
    if is_converted and not weight_names(directory):
        return  # merged or fine-tuned here: there is no other source
    try:
        choice = choose_weights(directory)
        if note := choice.note(directory):
            found.suspicious.append(note)
        source, names = source_weights(directory), family.names(config)
        to_lit(source, family, config, None)
        source = [weight for weight in source if names.find(weight.name)]  # without buffers
        found.lines["files"] = f"{choice.read.lead}: {_summary(source, found)}"
    except InputError as error:
        if not is_converted:
            raise
        found.suspicious.append(f"the converted weights are whole, but they could not be converted again: {error}")


def _summary(weights: list[Weight], found: Findings) -> str:
    """Tensors, precision and size; a mix of precisions is suspicious."""
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights})
    size = sum(torch.Size(w.shape).numel() * w.dtype.itemsize for w in weights)
    if len(dtypes) > 1:
        odd = min(weights, key=lambda w: sum(other.dtype == w.dtype for other in weights))
        found.suspicious.append(
            f"weights are {' and '.join(dtypes)} ({odd.name} is {str(odd.dtype).removeprefix('torch.')}); convert with "
            "--dtype for one precision, if that is not meant"
        )
    return f"{len(weights)} tensors, {', '.join(dtypes)}, {size / 1e9:.3g} GB"


def _tokenizer(directory: Path, config: ModelConfig | None, found: Findings) -> None:
    """Ids, ends and the prompt style that preparing would take."""
    tokenizer = Tokenizer(directory)
    kind = next(name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).is_file())
    found.suspicious += tokenizer.notices()
    known = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id}
    texts = {"BOS": tokenizer.special_tokens.get("bos_token"), "EOS": tokenizer.special_tokens.get("eos_token")}
    named = [f"{name} {texts[name]} {i}" if i is not None else f"no {name}" for name, i in known.items()]
    begins = "put in front" if tokenizer.adds_bos else "not put in front"
    found.lines["tokenizer"] = f"{kind}, {tokenizer.vocab_size} ids, {', '.join(named)}; BOS is {begins}"
    pad = tokenizer.special_tokens.get("pad_token")
    if pad is not None and pad == texts["EOS"]:
        found.suspicious.append(
            f"the padding token is EOS, {pad}: without effect here; a tool that masks padding would not learn the end"
        )
    if tokenizer.eos_id is None:
        found.suspicious.append("no EOS: answers end where a chat template ends them, or never; name it in config.json")
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        used = [tokenizer.eos_id, tokenizer.bos_id if tokenizer.adds_bos else None]
        needed = any(i is not None and i >= config.vocab_size for i in used)
        (found.unusable if needed else found.suspicious).append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: the last ones, "
            f"{'EOS or BOS among them' if needed else 'where they are written'}, fail; take the weights' own tokenizer"
        )
    try:
        style = found.style or default_style(tokenizer, otherwise="alpaca")
        note = " to prepare data, plain text to generate from" if style == "alpaca" and not found.style else ""
        found.lines["prompts"] = (
            f"{style_label(style)}{note}; answers end at {', '.join(map(str, stop_ids(style, tokenizer)))}"
        )
    except InputError as error:
        found.suspicious.append(str(error))
    marks = [mark for known in PROMPT_STYLES.values() for mark in known.marks if tokenizer.token_id(mark) is not None]
    if marks and not tokenizer.chat_template:
        found.suspicious.append(
            f"the tokenizer has {marks[0]} and there is no chat template; if this is a chat model, get its "
            "tokenizer_config.json or chat_template.jinja, or name --prompt_style"
        )
