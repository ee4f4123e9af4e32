"""Files ↔ tensors: base models and adapters."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lit_sft.args import LoRAArgs, LoRATrainArgs
from lit_sft.atomic import Manifest, publish_directory, write_atomically
from lit_sft.config import ModelConfig
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.bookkeeping import QUANTIZATION
from lit_sft.layout import (
    ACCEPTED,
    ADAPTER_CONFIG,
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    HF_CONFIG,
    MANIFEST,
    MODEL_CONFIG,
    MODEL_DIR,
    MODEL_WEIGHTS,
    check_checkpoint_dir,
    copied_files,
    saved_states,
)
from lit_sft.lora import apply_lora, lora_state_dict
from lit_sft.model import GPT
from lit_sft.prompts import PROMPT_FACTS, check_prompt_facts
from lit_sft.quantize import is_quantized, place_quantized, quantized
from lit_sft.weights import CHECKPOINT, Weight, write_checkpoint, write_safetensors

ADAPTER = "adapter"


def load_model(
    checkpoint_dir: str | Path,
    adapter_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    offload: bool = False,
) -> GPT:
    """A converted model in eval mode, with an adapter beside its weights when ``adapter_dir`` is given.

    Args:
        checkpoint_dir: with or without ``checkpoints/`` in front.
        adapter_dir: an ``adapter/`` folder, the folder of a LoRA run, or one of its saved states.
        dtype: of the base weights; None: as stored.
        device: where the weights go, tensor by tensor.
        quantize: how the blocks' linear layers are stored, nf4, nf4-dq or fp8, each as soon as it is read.
        offload: the weights of the blocks' linear layers stay in the host's memory, for ``stream_blocks``.

    Raises InputError when the directories do not hold exactly this model and an adapter made for it.
    """
    directory = check_checkpoint_dir(checkpoint_dir)
    manifest = check_model(directory)
    check_prompt_facts(manifest.facts, directory / MANIFEST)
    config = ModelConfig.from_dir(directory)
    asked, n = config.n_layer * max(1, config.n_expert), _count_weights(directory, manifest)
    if asked > n:  # before modules are made by the million
        kind = "experts" if config.n_expert else "layers"
        raise InputError(f"{directory}: {asked} {kind} are asked for, but there are {n} weights in all")
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights, narrow = {}, {}
    for name, tensor in _stored_weights(directory, manifest):
        if tensor.shape != shapes.get(name, tensor.shape):
            found = f"{name} has shape {tuple(tensor.shape)}, not {tuple(shapes[name])}"
            raise InputError(f"{directory} does not hold its own model: {found}; convert it again")
        linear = (quantize or offload) and is_quantized(model, name)
        stays = linear and offload and not quantize
        here = tensor.to("cpu" if stays else device, dtype or tensor.dtype)
        if linear and quantize:
            narrow[name] = layer = quantized(here, quantize)
            if offload:
                layer.hold([part.to("cpu") for part in layer.frozen()])
            here = here.to("meta")
        weights[name] = here
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    expected_missing = ["lm_head.weight"] if model.config.tie_embeddings else []
    if missing != expected_missing or unexpected:
        raise InputError(f"{directory} does not hold its own model: {(missing or unexpected)[0]}; convert it again")
    for name, layer in narrow.items():
        place_quantized(model, name, layer)
    model.tie_weights()
    if adapter_dir is not None:
        load_adapter(model, adapter_dir, directory)
    return model.eval()


def check_model(directory: Path) -> Manifest:
    """The manifest of a checkpoint_dir whose model is there; of the weights, which take long to read, by size alone."""
    manifest = Manifest.read(directory, CHECKPOINT)
    for name in _of_the_model(manifest):
        manifest.check_file(directory, name, hashed=not name.endswith(".safetensors"))
    return manifest


def _of_the_model(manifest: Manifest) -> list[str]:
    """Weights and config, by which a model is known; the tokenizer's files are for ``lit-sft verify``."""
    stem = MODEL_WEIGHTS.removesuffix(".safetensors")
    return sorted(name for name in manifest.files if name.startswith(stem) or name == MODEL_CONFIG)


def _count_weights(directory: Path, manifest: Manifest) -> int:
    total = 0
    for name in (name for name in manifest.files if name.endswith(".safetensors")):
        with opened(directory / name) as file:
            total += len(file.keys())
    return total


def _stored_weights(directory: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(name for name in manifest.files if name.endswith(".safetensors")):
        with opened(directory / name) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                yield key, file.get_tensor(key)


def base_fingerprint(checkpoint_dir: Path) -> str:
    """What tells one base model from another: the sha256 values of its weights and its config, from its manifest."""
    manifest = Manifest.read(checkpoint_dir, CHECKPOINT)
    return "+".join(manifest.files[name]["sha256"] for name in _of_the_model(manifest))


def save_adapter(directory: Path, model: GPT, lora: LoRAArgs, facts: dict) -> None:
    """Write adapter.safetensors, its config and manifest to ``directory``, which is complete or absent.

    ``facts`` is what generating and merging need beside the tensors: base, prompt style, stop ids.
    """
    with publish_directory(directory, ADAPTER) as folder:
        write_tensors(folder / ADAPTER_WEIGHTS, lora_state_dict(model))
        write_atomically(folder / ADAPTER_CONFIG, adapter_json(lora, facts))
        Manifest(ADAPTER, {}).write(folder, [ADAPTER_WEIGHTS, ADAPTER_CONFIG])


def adapter_facts(checkpoint_dir: Path, data_facts: dict) -> dict:
    """What generating and merging read beside LoRA's own arguments; ``data_facts``: of the shards' manifest."""
    return {
        "checkpoint_dir": str(checkpoint_dir),
        "base_fingerprint": base_fingerprint(checkpoint_dir),
        **{name: data_facts.get(name) for name in PROMPT_FACTS},
    }


def adapter_json(lora: LoRAArgs, facts: dict) -> str:
    """The text of adapter_config.json."""
    kept = {name: value for name, value in asdict(lora).items() if name.startswith("lora_")}
    return json.dumps(kept | facts, indent=2) + "\n"


def resolve_adapter_dir(path: str | Path) -> Path:
    """The folder that holds the adapter: ``path`` itself, or ``adapter/`` inside the folder of a run."""
    for folder in (Path(path), Path(path) / ADAPTER_DIR):
        if (folder / ADAPTER_CONFIG).is_file() and (folder / MANIFEST).is_file():
            return folder
    hint = "give the folder of a LoRA run"
    if (Path(path) / MODEL_DIR).is_dir():
        hint = f"it is a run of full fine-tuning: give --checkpoint_dir {Path(path) / MODEL_DIR} instead"
    elif states := saved_states(Path(path)):
        hint = f"the run is unfinished; its latest state can be given: {states[-1]}"
    raise InputError(f"no adapter at {str(path)!r}: neither it nor its {ADAPTER_DIR}/ holds {ADAPTER_CONFIG}; {hint}")


def resolve_base(checkpoint_dir: str | None, adapter: dict) -> Path:
    """The base an adapter goes on: the one named, else the one it was trained on."""
    try:
        return check_checkpoint_dir(checkpoint_dir or adapter["checkpoint_dir"])
    except InputError as error:
        if checkpoint_dir:
            raise
        raise InputError(f"the adapter's base is not found from here: {error}; or name it: --checkpoint_dir") from None


def read_adapter_config(path: str | Path) -> dict:
    """The contents of adapter_config.json: LoRA's arguments and the facts saved beside them.

    InputError when one of them is missing, unknown or of another type.
    """
    file = resolve_adapter_dir(path) / ADAPTER_CONFIG
    config, kinds = read_json(file), get_type_hints(LoRAArgs)
    for name in ("checkpoint_dir", "base_fingerprint", *(n for n in config if n.startswith("lora_"))):
        kind = kinds.get(name, None if name.startswith("lora_") else str)
        if kind is None:
            raise InputError(f"{file}: {name} is unknown; a later lit_sft may know it: update lit_sft")
        if type(value := config.get(name)) is not kind and not (kind is float and type(value) is int):
            raise InputError(f"{file}: {name} is {value!r}, not of the kind that is written there; train it again")
    check_prompt_facts(config, file)
    return config


def load_adapter(model: GPT, adapter_dir: str | Path, checkpoint_dir: Path) -> None:
    """Put a saved adapter on ``model``, in place; InputError when it was trained on another base or does not fit."""
    lora, path = _open_adapter(adapter_dir, checkpoint_dir)
    apply_lora(model, lora, seed=0)
    copy_tensors(lora_state_dict(model), path)


def init_adapter(model: GPT, args: LoRATrainArgs, checkpoint_dir: Path) -> None:
    """Copy the matrices of ``args.init_from`` into the adapter of ``model``, in place.

    InputError when it was trained on another base, or is of another shape or scale than the adapter of this run.
    """
    lora, path = _open_adapter(args.init_from, checkpoint_dir)
    for name, value in vars(lora).items():
        if name.startswith("lora_") and name != "lora_dropout" and value != getattr(args, name):
            raise InputError(
                f"--init_from {args.init_from} has {name} {value}, this run {getattr(args, name)}; "
                f"add --{name} {str(value).lower()}"
            )
    copy_tensors(lora_state_dict(model), path)


def read_adapter(adapter_dir: str | Path, checkpoint_dir: Path) -> tuple[LoRAArgs, dict[str, Tensor]]:
    """What ``load_adapter`` puts on a model, without the model: LoRA's arguments, and the tensors as stored, by name.

    InputError when the adapter was trained on another base or does not fit.
    """
    lora, path = _open_adapter(adapter_dir, checkpoint_dir)
    with torch.device("meta"):
        model = GPT(ModelConfig.from_dir(checkpoint_dir))
    apply_lora(model, lora, seed=0)
    copy_tensors(lora_state_dict(model), path)  # into nothing: names and shapes are compared
    return lora, load_file(path)


def _open_adapter(adapter_dir: str | Path, checkpoint_dir: Path) -> tuple[LoRAArgs, Path]:
    """LoRA's arguments and the file of tensors of an intact adapter that was trained on this base."""
    folder = resolve_adapter_dir(adapter_dir)
    Manifest.read(folder).check_files(folder)
    config = read_adapter_config(folder)
    if config["base_fingerprint"] != base_fingerprint(checkpoint_dir):
        raise InputError(
            f"{folder} was trained on {config['checkpoint_dir']}, whose weights differ from those of {checkpoint_dir}"
        )
    lora, path = LoRAArgs(**{k: v for k, v in config.items() if k.startswith("lora_")}), folder / ADAPTER_WEIGHTS
    with opened(path) as file:  # before memory is asked for by what the config says
        ranks = {tuple(file.get_slice(n).get_shape())[:1] for n in file.keys() if n.endswith("lora_A")}  # noqa: SIM118
    if ranks != {(lora.lora_r,)}:
        found = ", ".join(map(str, sorted(rank for (rank,) in ranks - {()}))) or "none"
        raise InputError(f"{path} holds adapters of rank {found}; {ADAPTER_CONFIG} beside it says {lora.lora_r}")
    return lora, path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, as the library opens it; InputError where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); write it again") from None


def copy_tensors(targets: dict[str, Tensor], path: Path) -> None:
    """Fill ``targets`` in place from a safetensors file that must hold exactly them; InputError names what differs."""
    with opened(path) as file, torch.no_grad():
        if different := sorted(set(file.keys()) ^ set(targets)):
            raise InputError(f"{path} does not fit the model: {different[0]} is in one only ({len(different)} in all)")
        for name, target in targets.items():
            stored = file.get_tensor(name)
            if stored.shape != target.shape:
                raise InputError(f"{path}: {name} has shape {tuple(stored.shape)}, not {tuple(target.shape)}")
            target.copy_(stored)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as they are, dtypes included, to a safetensors file."""
    weights = [Weight(n, tuple(t.shape), t.dtype, lambda t=t: t.detach().cpu()) for n, t in tensors.items()]
    write_safetensors(path, weights)


def save_model(directory: Path, model: GPT, source_dir: Path, facts: dict) -> None:
    """Write ``model`` as a new checkpoint_dir, with the tokenizer and config files of ``source_dir``.

    Of a multimodal ``source_dir`` the config.json is the text model's alone, which is what the directory then holds.
    """
    names = copied_files(source_dir)
    if accepted := Manifest.read(source_dir).facts.get(ACCEPTED):
        facts = facts | {ACCEPTED: accepted}
    hf_config = read_json(source_dir / HF_CONFIG)
    family = find_family(hf_config)
    if family.wrapper:  # the rest of a multimodal model does not come along
        hf_config = family.exported_config(hf_config)
    hf_config = {name: value for name, value in hf_config.items() if name not in QUANTIZATION}  # no weight is
    hf_config["tie_word_embeddings"] = model.config.tie_embeddings
    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    with publish_directory(directory, CHECKPOINT) as folder:
        for name in names:
            write_atomically(folder / name, (source_dir / name).read_bytes())
        write_atomically(folder / HF_CONFIG, json.dumps(hf_config, indent=2) + "\n")
        weights = [Weight(n, tuple(t.shape), t.dtype, lambda t=t: t.detach().cpu()) for n, t in state.items()]
        write_checkpoint(folder, model.config, weights, facts, [HF_CONFIG, *names])
