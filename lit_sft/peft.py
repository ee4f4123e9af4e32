"""Adapters ↔ peft's: its names, its files, and layers that the Hub fuses while ours are separate.

A fused layer W = [W_q; W_k; W_v] (rows in the Hub's order) has one pair A, B in peft, its parts have a pair each here.
Out: A = [A_q; A_k; A_v], one above the other, and B holds B_q, B_k, B_v in their own rows and their own columns, zeros
elsewhere, so that B A is exactly the three products in the fused order. The rank is that of the adapted parts together,
and alpha grows with it: alpha / r stays. In: the rows of B are the parts', A is shared by them; columns that are zero
in a part's rows are dropped with their rows of A, which gives back what was exported.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from lit_sft.args import ExportPeftArgs, LoRAArgs
from lit_sft.atomic import Manifest, publish_directory, write_atomically
from lit_sft.checkpoint import read_adapter, read_adapter_config, resolve_base
from lit_sft.config import ModelConfig
from lit_sft.convert import weight_shapes
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.families.family import Fused, Target, WeightNames, split_numbers
from lit_sft.layout import DOWNLOAD_RECORD, HF_CONFIG, check_new
from lit_sft.weights import Weight, write_safetensors

PEFT = "PEFT adapter"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
OUR_FACTS = "lit_sft_adapter.json"
PREFIX = "base_model.model."
ADAPTABLE = r"blocks\.\d+\.(attn\.(query|key|value|projection)|mlp\.(experts\.\d+\.)?(gate|up|down))|lm_head"


@dataclass
class Pair:
    """One layer's adapter: adds scaling · B A to the weight."""

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    scaling: Fraction


def export_peft(args: ExportPeftArgs) -> Path:
    """Write ``args.lora_path`` as a directory that peft loads beside the Hub's model; gives it."""
    out_dir = check_new(args.out_dir, "out_dir")
    facts = read_adapter_config(args.lora_path)
    base = resolve_base(args.checkpoint_dir, facts)
    lora, tensors = read_adapter(args.lora_path, base)
    names, shapes = names_of(base)
    pairs = fuse(tensors, lora, names, shapes)
    if names.family.wrapper and any(".experts." in name for name in pairs):
        raise InputError(
            f"peft finds no experts inside {names.family.wrapper.architecture} and would leave their adapters out; "
            f"merge them instead: python scripts/export_hf.py --lora_path {args.lora_path} --out_dir DIR"
        )
    config = _peft_config(pairs, lora, names, base)
    state = {f"{name}.lora_{k}.weight": t for name, pair in pairs.items() for k, t in (("A", pair.a), ("B", pair.b))}
    weights = [
        Weight(PREFIX + name, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t) for name, tensor in state.items()
    ]
    with publish_directory(out_dir, PEFT) as folder:
        write_safetensors(folder / PEFT_WEIGHTS, weights)
        write_atomically(folder / PEFT_CONFIG, json.dumps(config, indent=2) + "\n")
        write_atomically(folder / OUR_FACTS, json.dumps(facts, indent=2) + "\n")
        Manifest(PEFT, {}).write(folder, [PEFT_WEIGHTS, PEFT_CONFIG, OUR_FACTS])
    print(f"saved {out_dir}: {len(pairs)} adapted layers for peft, on {config['base_model_name_or_path']}")
    return out_dir


def names_of(base: Path) -> tuple[WeightNames, dict[str, tuple[int, ...]]]:
    """The names of a checkpoint's weights on both sides, and the shapes of ours."""
    config = ModelConfig.from_dir(base)
    shapes = weight_shapes(config)
    shapes.setdefault("lm_head.weight", shapes["wte.weight"])
    return find_family(read_json(base / HF_CONFIG)).names(config), shapes


def fuse(
    tensors: dict[str, Tensor], lora: LoRAArgs, names: WeightNames, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Pair]:
    """Our adapter's tensors as the pairs of transformers' modules, by their paths; fused layers as described above."""
    scaling = Fraction(lora.lora_alpha) / lora.lora_r
    pairs: dict[str, Pair] = {}
    for module in (name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")):
        theirs, target, numbers = names.source(f"{module}.weight")
        name = names.module_name(theirs).format(*numbers)
        if not isinstance(target, Fused):
            pairs[name] = Pair(tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"], scaling)
        elif name not in pairs:
            parts = [part.format(*numbers).removesuffix(".weight") for part in target.names]
            present = [part for part in parts if f"{part}.lora_A" in tensors]
            rank = len(present) * lora.lora_r
            blocks = [torch.zeros(shapes[f"{part}.weight"][0], rank) for part in parts]
            for i, part in enumerate(present):
                block = blocks[parts.index(part)]
                block[:, i * lora.lora_r : (i + 1) * lora.lora_r] = tensors[f"{part}.lora_B"]
            a = torch.cat([tensors[f"{part}.lora_A"] for part in present])
            pairs[name] = Pair(a, target.join(blocks, names.config), scaling)
    return pairs


def split(name: str, pair: Pair, names: WeightNames, shapes: dict[str, tuple[int, ...]]) -> dict[str, Pair]:
    """The pairs of our layers that one of the Hub's is; parts of a fused one that it does not touch are left out.

    InputError for a layer that has no adapter here, or an adapter of another shape.
    """
    target, numbers = find_module(name, names) or (None, [])
    parts = target.names if isinstance(target, Fused) else [target] if isinstance(target, str) else []
    parts = [part.format(*numbers).removesuffix(".weight") for part in parts]
    if not parts or not all(re.fullmatch(ADAPTABLE, part) and f"{part}.weight" in shapes for part in parts):
        raise InputError(f"the adapted layer {name!r} can have no adapter here; merge it with peft instead")
    rows, columns = [shapes[f"{part}.weight"][0] for part in parts], shapes[f"{parts[0]}.weight"][1]
    if (len(pair.b), pair.a.shape[1]) != (sum(rows), columns):
        found = (len(pair.b), pair.a.shape[1])
        raise InputError(f"the adapter of {name!r} is for a layer of shape {found}, not {(sum(rows), columns)}")
    if not isinstance(target, Fused):
        return {parts[0]: pair}
    pairs = {}
    for part, b in zip(parts, target.split(pair.b, rows, names.config), strict=True):
        used = b.any(0) if pair.b.any() else torch.ones(len(pair.a), dtype=torch.bool)
        if used.any():
            pairs[part] = Pair(pair.a[used], b[:, used], pair.scaling)
    return pairs


def find_module(name: str, names: WeightNames) -> tuple[Target, list[str]] | None:
    """The weight of a module, as in any file of the Hub, with the numbers in its name; None: it is not read here."""
    try:
        return names.find(f"{name}.weight")
    except InputError:
        return None


def _peft_config(pairs: dict[str, Pair], lora: LoRAArgs, names: WeightNames, base: Path) -> dict:
    """The fields of peft's LoraConfig; a layer of another rank than most has its own entry, and its own alpha."""
    kinds = {names.module_name(theirs): ours for theirs, ours in names.targets.items() if theirs.endswith(".weight")}
    adapted = {split_numbers(name)[0]: pair for name, pair in pairs.items()}
    targets = {kinds[kind] for kind in adapted}
    others = [kind for kind, target in kinds.items() if target not in targets]
    suffixes = {_suffix(kind, others): len(pair.a) for kind, pair in adapted.items()}
    ranks = {key: rank for key, rank in suffixes.items() if rank != lora.lora_r}
    record = read_json(base / DOWNLOAD_RECORD) if (base / DOWNLOAD_RECORD).is_file() else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.get("repo_id") or str(base),
        "revision": record.get("commit"),
        "r": lora.lora_r,
        "lora_alpha": _number(Fraction(lora.lora_alpha)),
        "lora_dropout": lora.lora_dropout,
        "target_modules": _pattern(adapted) if names.family.wrapper else sorted(suffixes),
        "rank_pattern": ranks,
        "alpha_pattern": {k: _number(Fraction(lora.lora_alpha) * rank / lora.lora_r) for k, rank in ranks.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _suffix(kind: str, others: list[str]) -> str:
    """The shortest end of a layer's name that no other kind of layer has."""
    parts = kind.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1) if parts[i] != "{}"]
    return next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))


def _pattern(kinds: Iterable[str]) -> str:
    """A regular expression of the whole paths of layers, since a tower for images may have others of the same ends."""
    return "|".join(re.escape(kind).replace(r"\{\}", r"\d+") for kind in sorted(kinds))


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
