"""Hub checkpoint → ours: names and nothing else change, one tensor in memory at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_sft.args import ConvertArgs
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.family import Family
from lit_sft.layout import HF_CONFIG, MANIFEST, read_json, resolve_checkpoint_dir
from lit_sft.model import GPT
from lit_sft.weights import SAFETENSORS_NAMES, Weight, write_checkpoint


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
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor with a name")
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
        if name in mapped:
            raise InputError(f"weight {weight.name!r} is there twice, in different files; delete the one that is stale")
        if weight.dtype not in SAFETENSORS_NAMES:
            raise InputError(
                f"weight {weight.name!r} is stored as {weight.dtype}: quantized checkpoints do not convert"
            )
        to = dtype or weight.dtype
        mapped[name] = Weight(name, weight.shape, to, lambda w=weight, to=to: _cast(w, to))
    if missing := [family.hf_name(name) for name in wanted if name not in mapped]:
        raise InputError(f"weight {missing[0]!r} is missing from the checkpoint ({len(missing)} in all)")
    return list(mapped.values())


def _cast(weight: Weight, dtype: torch.dtype) -> Tensor:
    tensor = weight.load().to(dtype)
    if dtype == torch.float16 != weight.dtype and not tensor.isfinite().all():
        raise InputError(f"weight {weight.name!r} has values beyond the range of float16; take --dtype bfloat16")
    return tensor


def _check_tied(head: Weight, mapped: dict[str, Weight], source: list[Weight], family: Family) -> None:
    embedding = next((w for w in source if family.lit_name(w.name) == "wte.weight"), None)
    if embedding is not None and not torch.equal(head.load(), embedding.load()):
        raise InputError(
            f"{head.name!r} differs from {embedding.name!r} although config.json ties them; "
            "set tie_word_embeddings to false there if the head is meant to be its own"
        )
