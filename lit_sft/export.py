"""Ours → the Hub's layout: a directory that transformers loads, or one file of weights, written tensor by tensor."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_sft.args import ConvertLitArgs, ExportHFArgs, LoRAArgs
from lit_sft.atomic import Manifest, publish_directory, replacing, write_atomically
from lit_sft.checkpoint import check_model, read_adapter, read_adapter_config, resolve_base
from lit_sft.config import ModelConfig
from lit_sft.convert import cast, open_safetensors, source_weights, to_hf
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.family import Family
from lit_sft.layout import (
    ACCEPTED,
    GENERATION_CONFIG,
    HF_CONFIG,
    HF_WEIGHTS,
    MANIFEST,
    check_checkpoint_dir,
    check_new,
    copied_files,
)
from lit_sft.prompts import PROMPT_FACTS, check_prompt_facts
from lit_sft.weights import Weight, write_safetensors, write_shards

EXPORT = "export"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


@dataclass
class Source:
    """A converted checkpoint on its way out, an adapter merged into it where there is one."""

    directory: Path
    family: Family
    config: ModelConfig
    weights: list[Weight]
    """Under our names, nothing loaded yet."""
    facts: dict
    """``prompt_style``, ``system_prompt`` and ``stop_ids``, where the model was fine-tuned here."""


def open_source(checkpoint_dir: str | None, lora_path: str | None, dtype: str | None) -> Source:
    """What is to be exported; InputError when a directory is not what it should be.

    Args:
        checkpoint_dir: base, merged or fully fine-tuned; None: the adapter's own base.
        lora_path: an adapter, merged tensor by tensor in fp32 or better.
        dtype: name of the precision; None: as stored.
    """
    adapter = read_adapter_config(lora_path) if lora_path else {}
    directory = resolve_base(checkpoint_dir, adapter) if adapter else check_checkpoint_dir(checkpoint_dir)
    manifest = check_model(directory)
    copied_files(directory)  # none may lead elsewhere
    hf_config, config = read_json(directory / HF_CONFIG), ModelConfig.from_dir(directory)
    try:
        family = find_family(hf_config)
        family.read_config(hf_config, manifest.facts.get(ACCEPTED, ()))  # which may have been edited since
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    files = [name for name in sorted(manifest.files) if name.endswith(".safetensors")]
    weights = [weight for name in files for weight in open_safetensors(directory / name)]
    if adapter:
        config, weights = _merge(config, weights, *read_adapter(lora_path, directory))
    if dtype:
        to = getattr(torch, dtype)
        weights = [replace(weight, dtype=to, load=partial(cast, weight, to)) for weight in weights]
    facts = manifest.facts | adapter
    check_prompt_facts(facts, directory / MANIFEST)
    facts = {name: facts[name] for name in PROMPT_FACTS if facts.get(name) is not None}
    return Source(directory, family, config, weights, facts)


def _merge(
    config: ModelConfig, weights: list[Weight], lora: LoRAArgs, tensors: dict[str, Tensor]
) -> tuple[ModelConfig, list[Weight]]:
    """The weights with each adapter's product added to its own; an adapted head is tied no longer."""
    if config.tie_embeddings and "lm_head.lora_A" in tensors:
        embedding = next(weight for weight in weights if weight.name == "wte.weight")
        weights = [*weights, replace(embedding, name="lm_head.weight")]
        config = replace(config, tie_embeddings=False)
    scaling, merged = lora.lora_alpha / lora.lora_r, []
    for weight in weights:
        module = weight.name.removesuffix(".weight")
        if f"{module}.lora_A" in tensors:
            factors = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
            weight = replace(weight, load=partial(_merged, weight, *factors, scaling))
        merged.append(weight)
    return config, merged


def _merged(weight: Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = scaling * (lora_b.to(wide) @ lora_a.to(wide))
    return (weight.load().to(wide) + delta).to(weight.dtype)


def export_hf(args: ExportHFArgs) -> Path:
    """Write a complete directory for transformers to ``args.out_dir``; gives it.

    A base checkpoint gives the bits of the weights that it was converted from. Nothing is left behind on failure.
    """
    out_dir = check_new(args.out_dir, "out_dir")
    source = open_source(args.checkpoint_dir, args.lora_path, args.dtype)
    _export_directory(source, out_dir)
    return out_dir


def _export_directory(source: Source, out_dir: Path) -> None:
    weights = to_hf(source.weights, source.family, source.config)
    config = _hf_config(source)
    texts = {HF_CONFIG: config, GENERATION_CONFIG: _generation_config(source, config)}
    with publish_directory(out_dir, EXPORT) as folder:
        for name in copied_files(source.directory):
            if name not in texts:
                write_atomically(folder / name, (source.directory / name).read_bytes())
        for name, content in texts.items():
            write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
        hashes = write_shards(folder, HF_WEIGHTS, weights)
        facts = {"family": source.family.name, "exported_from": str(source.directory)} | source.facts
        Manifest(EXPORT, facts).write(folder, [path.name for path in folder.iterdir()], hashes)
    print(f"saved {out_dir}: {source.family.name}, {len(weights)} tensors in {_dtypes(weights)}, for transformers")


def _dtypes(weights: list[Weight]) -> str:
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}))


def _hf_config(source: Source) -> dict:
    """The original config.json in today's spelling, with what has changed since: the head's tie, the precision."""
    config = source.family.exported_config(read_json(source.directory / HF_CONFIG))
    config["tie_word_embeddings"] = source.config.tie_embeddings
    if config.get("vocab_size", source.config.vocab_size) != source.config.vocab_size:
        config["vocab_size"] = source.config.vocab_size
    dtypes = _dtypes(source.weights)
    if "," not in dtypes:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtypes
    return config


def _generation_config(source: Source, config: dict) -> dict:
    """The original one, ending answers where the fine-tuned model does; made from config.json where there is none."""
    path = source.directory / GENERATION_CONFIG
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = read_json(path) if path.is_file() else {name: config[name] for name in names if config.get(name) is not None}
    known = kept.get("eos_token_id")
    known = known if isinstance(known, list) else [known] * (known is not None)
    if not all(type(i) is int for i in known):
        where = path if path.is_file() else path.with_name(HF_CONFIG)
        raise InputError(f"{where}: eos_token_id {kept['eos_token_id']!r} is no token id and no list of them; mend it")
    if more := sorted(set(source.facts.get("stop_ids", ())) - set(known)):
        ends = [*known, *more]
        kept["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return kept


def _as_in_files(weights: list[Weight], source: Source) -> list[Weight]:
    """The weights named as in the Hub's files of the source, which are a multimodal model's where it is one."""
    names, files = source.family.names(source.config), []
    if source.family.wrapper:
        with suppress(InputError):  # the Hub's files may be gone
            files = [weight.name for weight in source_weights(source.directory)]
    return [replace(weight, name=names.spelled_as(files, weight.name)) for weight in weights]


def convert_lit_checkpoint(args: ConvertLitArgs) -> Path:
    """Lit-GPT's way back: a file of weights under the Hub's names, or the whole directory; gives its path.

    A pickled file needs memory for all weights at once, as its format asks for; the others one tensor at a time.
    """
    given, out = Path(args.checkpoint_path), check_new(args.output_path, "output_path")
    if given.suffix in PICKLES:
        raise InputError(f"--checkpoint_path {given} is a file of Lit-GPT itself; give a checkpoint_dir of lit_sft")
    if given.suffix == ".safetensors" and not given.is_file():
        raise InputError(f"--checkpoint_path {given} is not there; give a converted checkpoint's folder")
    source = open_source(str(given.parent if given.suffix == ".safetensors" else given), None, None)
    if out.suffix not in (*PICKLES, ".safetensors"):
        _export_directory(source, out)
        return out
    if out.is_dir():
        raise InputError(f"--output_path {out} is a folder; name a file, or a folder without {out.suffix}")
    weights = _as_in_files(to_hf(source.weights, source.family, source.config), source)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        write_safetensors(out, weights)
    else:
        with replacing(out) as temporary, temporary.open("wb") as file:
            try:
                torch.save({weight.name: weight.load().clone() for weight in weights}, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(None, str(error).split("\n")[0]) from error
    print(f"saved {out}: {len(weights)} tensors in {_dtypes(weights)}, named as on the Hub")
    return out
