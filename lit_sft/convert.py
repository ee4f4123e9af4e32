"""Hub checkpoint → ours: names and nothing else change, one tensor in memory at a time."""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_sft.args import ConvertArgs
from lit_sft.atomic import renewing
from lit_sft.config import ModelConfig
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.bookkeeping import QUANTIZATION
from lit_sft.families.family import Family, Fused, Stacked, Target, WeightNames
from lit_sft.families.fields import Fields
from lit_sft.layout import ACCEPTED, HF_CONFIG, resolve_checkpoint_dir
from lit_sft.locks import lock
from lit_sft.model import GPT
from lit_sft.weight_files import adapter_note, choose_weights
from lit_sft.weights import SAFETENSORS_NAMES, Weight, write_checkpoint

QUANTIZED = "quantized checkpoints do not convert; take the unquantized weights"
STORED = {text: dtype for dtype, text in SAFETENSORS_NAMES.items()} | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Precisions in safetensors files; those that no weight can have are of buffers or of quantized weights."""
QUANTIZED_ALWAYS = ("bitnet",)
"""Methods of quantization whose full-precision weights are not what the model computes with."""


def convert_checkpoint(args: ConvertArgs) -> Path:
    """Add our weights, config and manifest to a downloaded checkpoint_dir; gives the directory.

    Raises InputError, having written nothing, when a weight is missing, unknown or of the wrong shape.
    """
    directory = resolve_checkpoint_dir(args.checkpoint_dir)
    hf_config, source = read_json(directory / HF_CONFIG), source_weights(directory)
    files_note = choose_weights(directory).note(directory)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        family = find_family(hf_config)
        accepted = accepted_keys(args.accept_config_key, family, hf_config)
        told, fields, leftover = read_config(family, hf_config, source, accepted)
        config = with_vocabulary_of(source, family, told)
        weights = to_lit(source, family, config, dtype)
    except InputError as error:
        raise InputError("; ".join(filter(None, (f"{directory}: {error}", files_note)))) from None
    notes = [files_note, adapter_note(directory)]
    notes += [f"config.json: {note}" for note in fields.notes]
    notes.append(f"config.json: {', '.join(accepted)}: not read, as you say" if accepted else None)
    notes.append(vocabulary_note(told, config) if config != told else None)
    for note in filter(None, notes):
        print(f"notice: {note}")
    accepted += leftover
    with lock(directory), renewing(directory, "lit_model*") as folder:
        facts = {"family": family.name} | ({ACCEPTED: accepted} if accepted else {})
        write_checkpoint(folder, config, weights, facts)
    n_parameters = sum(torch.Size(w.shape).numel() for w in weights)
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights})
    print(f"{directory}: {family.name}, {n_parameters:,} parameters, {', '.join(dtypes)}, context {config.block_size}")
    return directory


def accepted_keys(given: str | None, family: Family, hf_config: dict) -> list[str]:
    """The fields of config.json that --accept_config_key names; InputError for one that is not there."""
    names = [name for part in (given or "").split(",") if (name := part.strip())]
    for name in names:
        place: object = family.text_fields(hf_config)
        for key in name.split("."):
            if not isinstance(place, dict) or key not in place:
                raise InputError(f"--accept_config_key {name}: config.json has no such field; leave it out")
            place = place[key]
    return names


def read_config(
    family: Family, hf_config: dict, source: list[Weight], accepted: list[str]
) -> tuple[ModelConfig, Fields, list[str]]:
    """What config.json says, its fields, and which of them speak of a quantization that the weights do not have.

    Those are of a model that was trained quantized and merged, or of one that would be quantized when it is loaded.
    InputError as for ``Family.read_fields``, and where the weights are quantized, or are to be in every forward pass.
    """
    content = family.text_fields(hf_config)
    leftover = [name for name in QUANTIZATION if content.get(name) and name not in accepted]
    config, fields = family.read_fields(hf_config, accepted + leftover)
    names, said = family.names(config), ""
    for name in leftover:
        method = content[name].get("quant_method") if isinstance(content[name], dict) else None
        what = f"{name} ({method})" if method else name
        if method in QUANTIZED_ALWAYS:
            raise InputError(f"config.json: {what} quantizes weights and activations in every pass: {QUANTIZED}")
        fields.notes.append(f"{what}: not read, all weights are in full precision")
        said = f"config.json has {what}, "
    for weight in source:
        if _is_quantized(weight) and not _is_buffer(weight, names):
            raise InputError(f"{said}weight {weight.name!r} is stored as {weight.dtype}: {QUANTIZED}")
    return config, fields, leftover


def _is_quantized(weight: Weight) -> bool:
    return not weight.dtype.is_floating_point or weight.dtype.itemsize < 2


def _is_buffer(weight: Weight, names: WeightNames) -> bool:
    """True for what is known and passed over; what is not known is a part of the model here."""
    try:
        return names.find(weight.name) is None
    except InputError:
        return False


def with_vocabulary_of(source: list[Weight], family: Family, config: ModelConfig) -> ModelConfig:
    """``config`` with as many ids as the embedding has rows: fine-tunes add tokens, and some forget config.json.

    As it was where the head has other rows than the embedding, which ``to_lit`` refuses by name.
    """
    names, rows = family.names(config), set()
    for weight in source:
        target = (names.find(weight.name) or [None])[0]
        if target in ("wte.weight", "lm_head.weight") and weight.shape[1:] == (config.n_embd,):
            rows.add(weight.shape[0])
    return replace(config, vocab_size=rows.pop()) if len(rows) == 1 and min(rows) > 0 else config


def vocabulary_note(told: ModelConfig, config: ModelConfig) -> str:
    """What is said where config.json and the weights differ."""
    return f"config.json says vocab_size {told.vocab_size}, the embedding has {config.vocab_size} rows, which are taken"


def source_weights(directory: Path) -> list[Weight]:
    """Every tensor of a Hub checkpoint, in the files that transformers would read; nothing is loaded yet.

    InputError when no set of files is whole.
    """
    read = choose_weights(directory).read
    weights = []
    for name in read.files:
        opener = open_safetensors if name.endswith(".safetensors") else open_pickle
        weights += opener(directory / name)
    if lost := sorted(set(read.tensors) - {weight.name for weight in weights}):
        raise InputError(
            f"{directory / read.lead} promises {lost[0]!r} ({len(lost)} in all), which no file holds; download the "
            "checkpoint again"
        )
    return weights


def open_safetensors(path: Path) -> Iterator[Weight]:
    """The tensors of a file, each read when it is asked for; InputError when the file is damaged."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and download again") from None
    for name in file.keys():  # noqa: SIM118 (not a dict)
        entry = file.get_slice(name)
        dtype = STORED.get(entry.get_dtype())
        if dtype is None:
            raise InputError(f"{path}: weight {name!r} is stored as {entry.get_dtype()}: {QUANTIZED}")
        # opened anew for each tensor: the pages of what was read before are given back
        yield Weight(name, tuple(entry.get_shape()), dtype, lambda n=name: _get_tensor(path, n))


def _get_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def open_pickle(path: Path) -> Iterator[Weight]:
    """The tensors of a file that torch.save wrote; InputError, and nothing is run, when it holds anything else."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path} is compressed, which torch.save does not do; save the weights again")
    try:
        try:
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, weights_only=True, map_location="cpu")  # before torch 1.6: no zip, no mapping
    except Exception as error:
        # not torch's advice to load it all the same
        calls, said = (re.search(pattern, str(error)) for pattern in (r"GLOBAL (\S+)", r"error:\s+(\S.*)"))
        reason = f"it calls {calls[1]}" if calls else said[1] if said else str(error).split("\n")[0]
        raise InputError(f"{path} holds more than weights, or is damaged; it was not run ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor with a name")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = "on meta" if tensor.device.type != "cpu" else str(tensor.layout).removeprefix("torch.")
            raise InputError(f"{path}: weight {name!r} is {kind}, not a dense tensor with contents; save it as one")
        if tensor.numel() * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: weight {name!r} has more values than the file holds; save it expanded")
        yield Weight(name, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names of all weights of a model, and their shapes; a tied head is none."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def to_lit(source: list[Weight], family: Family, config: ModelConfig, dtype: torch.dtype | None) -> list[Weight]:
    """The source's tensors under our names, checked to be exactly those of the model; InputError names what is not."""
    names = family.names(config)
    if config.n_layer * max(1, config.n_expert) > len(source):  # before modules are made by the million
        asked = f"{config.n_layer} layers" + f" of {config.n_expert} experts" * (config.n_expert > 0)
        raise InputError(f"config.json asks for {asked}, but there are {len(source)} weights in all")
    wanted = weight_shapes(config)
    if config.tie_embeddings:
        source = _with_embedding(source, names)
    mapped: dict[str, Weight] = {}
    rows: dict[str, dict[int, Weight]] = {}
    for weight in source:
        found = names.find(weight.name)
        if found is None:
            continue
        target, numbers = found
        if target == "lm_head.weight" and config.tie_embeddings:
            _check_tied(weight, source, names)
            continue
        if weight.dtype not in SAFETENSORS_NAMES:
            raise InputError(f"weight {weight.name!r} is stored as {weight.dtype}: {QUANTIZED}")
        if isinstance(target, Stacked):
            rows.setdefault(target.name.format(*numbers), {})[int(numbers[-1])] = weight
            continue
        parts = target.names if isinstance(target, Fused) else (target,)
        parts = [part.format(*numbers) for part in parts]
        if unknown := [part for part in parts if part not in wanted]:
            raise InputError(
                f"weight {weight.name!r} is not part of the model that config.json describes ({unknown[0]})"
            )
        _check_shape(weight, [wanted[part] for part in parts])
        if parts[0] in mapped:
            raise InputError(f"weight {weight.name!r} is there twice, in different files; delete the one that is stale")
        to = dtype or weight.dtype
        for i, part in enumerate(parts):
            mapped[part] = Weight(part, wanted[part], to, partial(_part, weight, to, target, i, parts, wanted, config))
    for name, of_name in rows.items():
        if name not in wanted or sorted(of_name) != list(range(wanted[name][0])):
            raise InputError(f"weights {sorted(w.name for w in of_name.values())[0]!r}, …: config.json asks for others")
        stack = [of_name[i] for i in range(len(of_name))]
        for weight in stack:
            _check_shape(weight, [wanted[name][1:]])
        to = dtype or stack[0].dtype
        mapped[name] = Weight(name, wanted[name], to, lambda s=stack, to=to: torch.stack([cast(w, to) for w in s]))
    if missing := [names.hf_name(name) for name in wanted if name not in mapped]:
        raise InputError(f"weight {missing[0]!r} is missing from the checkpoint ({len(missing)} in all)")
    return list(mapped.values())


def to_hf(weights: list[Weight], family: Family, config: ModelConfig) -> list[Weight]:
    """Our tensors under the Hub's names, fused and numbered as there: the way back of ``to_lit``."""
    names = family.names(config)
    ours = {weight.name: weight for weight in weights}
    mapped: dict[str, Weight] = {}
    for weight in weights:
        template, target, numbers = names.source(weight.name)
        if isinstance(target, Stacked):
            for i in range(weight.shape[0]):
                name = template.format(*numbers, i)
                mapped[name] = Weight(name, weight.shape[1:], weight.dtype, lambda w=weight, i=i: w.load()[i])
            continue
        name = template.format(*numbers)
        if isinstance(target, Fused):
            parts = [ours[part.format(*numbers)] for part in target.names]
            shape = (sum(part.shape[0] for part in parts), *weight.shape[1:])
            join = partial(_joined, target, parts, config)
            mapped.setdefault(name, Weight(name, shape, weight.dtype, join))
        else:
            mapped[name] = replace(weight, name=name)
    return list(mapped.values())


def _joined(target: Fused, parts: list[Weight], config: ModelConfig) -> Tensor:
    return target.join([part.load() for part in parts], config)


def _check_shape(weight: Weight, parts: list[tuple[int, ...]]) -> None:
    """InputError unless ``weight`` has the rows of all its parts."""
    asked = (sum(shape[0] for shape in parts), *parts[0][1:])
    if weight.shape != asked:
        raise InputError(f"weight {weight.name!r} has shape {weight.shape}; config.json asks for {asked}")


def _part(weight: Weight, to: torch.dtype, target: Target, i: int, parts: list, shapes: dict, config: ModelConfig):
    """The tensor of part ``i`` of a source weight."""
    if not isinstance(target, Fused):
        return cast(weight, to)
    n_rows = [shapes[part][0] for part in parts]
    return _checked(target.split(weight.load(), n_rows, config)[i].to(to), weight, to)


def cast(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The tensor of ``weight`` as ``dtype``; InputError when float16 cannot hold its values."""
    return _checked(weight.load().to(dtype), weight, dtype)


def _checked(tensor: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16 != weight.dtype and not tensor.isfinite().all():
        raise InputError(f"weight {weight.name!r} has values beyond the range of float16; take --dtype bfloat16")
    return tensor


def _with_embedding(source: list[Weight], names: WeightNames) -> list[Weight]:
    """Of tied weights some files hold the head alone: give it the embedding's name then."""
    targets = {weight.name: (names.find(weight.name) or [None])[0] for weight in source}
    if "wte.weight" in targets.values():
        return source
    embedding = names.hf_name("wte.weight")
    return [replace(w, name=embedding) if targets[w.name] == "lm_head.weight" else w for w in source]


def _check_tied(head: Weight, source: list[Weight], names: WeightNames) -> None:
    embedding = next((w for w in source if (names.find(w.name) or [None])[0] == "wte.weight"), None)
    if embedding is not None and not torch.equal(head.load(), embedding.load()):
        raise InputError(
            f"{head.name!r} differs from {embedding.name!r} although config.json ties them; "
            "set tie_word_embeddings to false there if the head is meant to be its own"
        )
