"""Weights on their way to the disk: written tensor by tensor, hashed while they are written."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lit_sft.atomic import Manifest, replacing, sha256_of, write_atomically
from lit_sft.config import ModelConfig
from lit_sft.layout import MODEL_CONFIG, MODEL_WEIGHTS

CHECKPOINT = "checkpoint"
SHARD_BYTES = 5 * 10**9
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Weight:
    """One tensor on its way: name and shape known now, content when asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_checkpoint(
    directory: Path, config: ModelConfig, weights: list[Weight], facts: dict, others: Iterable[str] = ()
) -> None:
    """Write weights (in shards past 5 GB), config and, last, the manifest of a checkpoint_dir.

    ``others``: further files that are there, recorded too.
    """
    hashes = write_shards(directory, MODEL_WEIGHTS, weights)
    write_atomically(directory / MODEL_CONFIG, config.to_json())
    recorded = [*hashes, MODEL_CONFIG, *others]
    Manifest(CHECKPOINT, facts).write(directory, recorded, hashes)


def write_shards(directory: Path, name: str, weights: list[Weight]) -> dict[str, str]:
    """Write safetensors: one file called ``name``, or past 5 GB several and their index; gives name → sha256."""
    files = plan_shards(name, weights)
    hashes = {}
    total = sum(_n_bytes(w) for w in weights)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as progress:
        for file, part in files.items():
            hashes[file] = write_safetensors(directory / file, part, progress.update)
    if len(files) > 1:
        weight_map = {w.name: file for file, part in files.items() for w in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(directory / f"{name}.index.json", json.dumps(index, indent=2) + "\n")
        hashes[f"{name}.index.json"] = sha256_of(directory / f"{name}.index.json")
    return hashes


def plan_shards(name: str, weights: list[Weight]) -> dict[str, list[Weight]]:
    """File name → its tensors, in order, each file at most 5 GB (or one tensor)."""
    parts: list[list[Weight]] = [[]]
    for weight in weights:
        if parts[-1] and sum(map(_n_bytes, parts[-1])) + _n_bytes(weight) > SHARD_BYTES:
            parts.append([])
        parts[-1].append(weight)
    if len(parts) == 1:
        return {name: parts[0]}
    stem = name.removesuffix(".safetensors")
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
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            file.write(piece)
            digest.update(piece)
        for weight in weights:
            content = weight.load().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
            progress(len(content))
    return digest.hexdigest()
