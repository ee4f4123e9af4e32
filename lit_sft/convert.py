"""Hub checkpoint → ours: names and nothing else change, one tensor in memory at a time."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from lit_sft.args import ConvertArgs
from lit_sft.atomic import Manifest, fsync, write_atomically
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.family import Family
from lit_sft.layout import (
    HF_CONFIG,
    MANIFEST,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    TOKENIZER_FILES,
    resolve_checkpoint_dir,
)
from lit_sft.model import GPT

KIND = "checkpoint"
SHARD_BYTES = 5 * 10**9
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Weight:
    """One tensor on its way: name and shape known now, content when asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def convert_checkpoint(args: ConvertArgs) -> Path:
    """Add our weights, config and manifest to a downloaded checkpoint_dir; gives the directory.

    Raises InputError, having written nothing, when a weight is missing, unknown or of the wrong shape.
    """
    directory = resolve_checkpoint_dir(args.checkpoint_dir)
    hf_config = read_json(directory / HF_CONFIG)
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    weights = map_weights(source_weights(directory), family, config, dtype)
    (directory / MANIFEST).unlink(
        missing_ok=True
    )  # from here until the new manifest the directory counts as unconverted
    write_checkpoint(directory, config, weights, {"family": family.name})
    n_parameters = sum(torch.Size(w.shape).numel() for w in weights)
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights})
    print(f"{directory}: {family.name}, {n_parameters:,} parameters, {', '.join(dtypes)}, context {config.block_size}")
    return directory


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download the checkpoint again with scripts/download.py") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def source_weights(directory: Path) -> list[Weight]:
    """Every tensor of a Hub checkpoint, safetensors preferred, in the order of its files; nothing is loaded yet."""
    for single, index, opener in (
        ("model.safetensors", "model.safetensors.index.json", _open_safetensors),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", _open_pickle),
    ):
        if (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise InputError(f"{directory / index} has no weight_map of names to files")
            names = sorted(set(weight_map.values()))
        elif (directory / single).is_file():
            weight_map, names = {}, [single]
        else:
            continue
        weights = []
        for name in names:
            if Path(name).name != name:
                raise InputError(f"{directory / index} names {name!r}, which is not a file of {directory}")
            if not (directory / name).is_file():
                raise InputError(f"{directory / name} is missing, though the index names it; download again to resume")
            weights += opener(directory / name)
        if lost := sorted(set(weight_map) - {w.name for w in weights}):
            raise InputError(f"{directory / index} promises {lost[0]!r} ({len(lost)} in all), which no file holds")
        return weights
    raise InputError(
        f"{directory} holds no model.safetensors or pytorch_model.bin, whole or sharded; download it first"
    )


def _open_safetensors(path: Path) -> Iterator[Weight]:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and download again") from None
    for name in file.keys():  # noqa: SIM118 (not a dict)
        entry = file.get_slice(name)
        dtype = next((d for d, text in SAFETENSORS_NAMES.items() if text == entry.get_dtype()), None)
        if dtype is None:
            raise InputError(f"{path}: weight {name!r} is stored as {entry.get_dtype()}, which is not supported")
        # opened anew for each tensor: the pages of what was read before are given back
        yield Weight(name, tuple(entry.get_shape()), dtype, lambda n=name: _get_tensor(path, n))


def _get_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _open_pickle(path: Path) -> Iterator[Weight]:
    try:
        try:
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, weights_only=True, map_location="cpu")  # before torch 1.6: no zip, no mapping
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path} holds more than weights, or is damaged; it was not run ({reason})") from None
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
        yield Weight(name, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)


def map_weights(source: list[Weight], family: Family, config: ModelConfig, dtype: torch.dtype | None) -> list[Weight]:
    """The source's tensors under our names, checked to be exactly those of the model; InputError names what is not."""
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in GPT(config).state_dict().items()}
    if config.tie_embeddings:
        del wanted["lm_head.weight"]
    mapped: dict[str, Weight] = {}
    for weight in source:
        name = family.lit_name(weight.name)
        if name is None:
            continue
        if name == "lm_head.weight" and config.tie_embeddings:
            _check_tied(weight, mapped, source, family)
            continue
        if name not in wanted:
            raise InputError(f"weight {weight.name!r} is not part of the model that config.json describes")
        if weight.shape != wanted[name]:
            raise InputError(f"weight {weight.name!r} has shape {weight.shape}; config.json asks for {wanted[name]}")
        if not weight.dtype.is_floating_point:
            raise InputError(
                f"weight {weight.name!r} is stored as {weight.dtype}: quantized checkpoints do not convert"
            )
        to = dtype or weight.dtype
        mapped[name] = Weight(name, weight.shape, to, lambda w=weight, to=to: w.load().to(to))
    if missing := [family.hf_name(name) for name in wanted if name not in mapped]:
        raise InputError(f"weight {missing[0]!r} is missing from the checkpoint ({len(missing)} in all)")
    return list(mapped.values())


def _check_tied(head: Weight, mapped: dict[str, Weight], source: list[Weight], family: Family) -> None:
    embedding = next((w for w in source if family.lit_name(w.name) == "wte.weight"), None)
    if embedding is not None and not torch.equal(head.load(), embedding.load()):
        raise InputError(
            f"{head.name!r} differs from {embedding.name!r} although config.json ties them; "
            "set tie_word_embeddings to false there if the head is meant to be its own"
        )


def write_checkpoint(directory: Path, config: ModelConfig, weights: list[Weight], facts: dict) -> None:
    """Write weights (in shards past 5 GB), config and, last, the manifest of a checkpoint_dir."""
    files = plan_shards(weights)
    hashes = {}
    total = sum(_n_bytes(w) for w in weights)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as progress:
        for name, part in files.items():
            hashes[name] = write_safetensors(directory / name, part, progress.update)
    if len(files) > 1:
        weight_map = {w.name: name for name, part in files.items() for w in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(directory / MODEL_INDEX, json.dumps(index, indent=2) + "\n")
    write_atomically(directory / MODEL_CONFIG, config.to_json())
    recorded = [*files, MODEL_CONFIG, *([MODEL_INDEX] if len(files) > 1 else [])]
    recorded += [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    Manifest(KIND, facts).write(directory, recorded, hashes)
    for leftover in set(directory.glob("lit_model*")) - {directory / name for name in recorded}:
        leftover.unlink()  # of an earlier conversion with other shards


def plan_shards(weights: list[Weight]) -> dict[str, list[Weight]]:
    """File name → its tensors, in order, each file at most 5 GB (or one tensor)."""
    parts: list[list[Weight]] = [[]]
    for weight in weights:
        if parts[-1] and sum(map(_n_bytes, parts[-1])) + _n_bytes(weight) > SHARD_BYTES:
            parts.append([])
        parts[-1].append(weight)
    if len(parts) == 1:
        return {MODEL_WEIGHTS: parts[0]}
    stem = MODEL_WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _n_bytes(weight: Weight) -> int:
    return torch.Size(weight.shape).numel() * weight.dtype.itemsize


def write_safetensors(path: Path, weights: list[Weight], progress: Callable[[int], object] = lambda n: None) -> str:
    """Write one file tensor by tensor (the library's own writer wants all of them at once); gives its sha256.

    Format: github.com/huggingface/safetensors: the header's length (8 bytes, little-endian), a JSON header padded with
    spaces to a multiple of 8, the tensors' bytes one behind the other.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + _n_bytes(weight)
        dtype = SAFETENSORS_NAMES[weight.dtype]
        header[weight.name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for piece in (struct.pack("<Q", len(text)), text):
                file.write(piece)
                digest.update(piece)
            for weight in weights:
                content = weight.load().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(content)
                digest.update(content)
                progress(len(content))
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()
