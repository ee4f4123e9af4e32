"""peft's adapters → ours; what ours cannot hold is refused by name."""

import re
from collections.abc import Callable
from fractions import Fraction
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_sft.args import ImportPeftArgs, LoRAArgs
from lit_sft.checkpoint import adapter_facts, base_fingerprint, save_adapter
from lit_sft.config import ModelConfig
from lit_sft.convert import open_pickle, open_safetensors
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.export import open_source
from lit_sft.families.family import WeightNames
from lit_sft.layout import check_checkpoint_dir, check_new
from lit_sft.lora import LoRALinear, apply_lora
from lit_sft.model import GPT
from lit_sft.peft import OUR_FACTS, PEFT_CONFIG, PEFT_WEIGHTS, Pair, find_module, names_of, split
from lit_sft.prompts import resolve_style, style_label
from lit_sft.samples import default_style, stop_ids
from lit_sft.tokenizer import Tokenizer
from lit_sft.weights import SAFETENSORS_NAMES, Weight

PEFT_PICKLE = "adapter_model.bin"
# fields that say nothing about what a finished adapter computes, or are read here
KNOWN = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "ephemeral_gpu_offload",
}
# what takes no time to match: names, with one of a few in brackets, and with what may be anything in two places
PIECE, ANY = r"(?:\\\.|[\w.-])", r"(?:\.[+*]|(?:\\[dw]|\[[\w-]{1,9}\])[+*]?)"
SAFE = rf"\^?(?:{ANY}|{PIECE}|\((?:\?:)?{PIECE}+(?:\|{PIECE}+){{0,9}}\)|\|)+\$?"
ORDINARY_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights


def import_peft(args: ImportPeftArgs) -> Path:
    """Write the adapter in ``args.peft_dir`` as one of ours to ``args.out_dir``; gives it. Ranks that differ are filled
    up with zeros, and so is a layer that only others of its kind have adapted: the logits are those of peft.

    Raises InputError, having written nothing, for what our adapters cannot hold.
    """
    out_dir = check_new(args.out_dir, "out_dir")
    folder, base = Path(args.peft_dir), check_checkpoint_dir(args.checkpoint_dir)
    if not (folder / PEFT_CONFIG).is_file():
        raise InputError(f"--peft_dir {folder} holds no {PEFT_CONFIG}; give the folder that peft saved")
    config = read_json(folder / PEFT_CONFIG)
    _check(config, folder / PEFT_CONFIG)
    names, shapes = names_of(base)
    names = names.in_any_wrapper()  # an adapter of the whole model fits the text model alone
    ranks, alphas = _of(config, "rank_pattern", "r"), _of(config, "alpha_pattern", "lora_alpha")
    pairs: dict[str, Pair] = {}
    for name, (a, b) in _read_factors(folder, base, names).items():
        rank, alpha = ranks(name), alphas(name)
        if len(a) != rank or b.shape[1] != rank:
            raise InputError(f"{folder}: {name} has rank {len(a)}, not {rank} as {PEFT_CONFIG} says; save it again")
        pair = Pair(a, b, Fraction(alpha) / Fraction(sqrt(rank) if config.get("use_rslora") else rank))
        if names.of_another_part(name) and not b.any():
            continue  # a tower for images that peft adapted by the ends of its layers' names, and text never trained
        pairs |= split(name, pair, names, shapes)
    facts = adapter_facts(base, _prompt_facts(args, folder, base))
    lora, model = _assemble(pairs, names.config, float(config.get("lora_dropout") or 0.0))
    save_adapter(out_dir, model, lora, facts)
    style = style_label(facts["prompt_style"])
    print(f"saved {out_dir}: {len(pairs)} adapted layers, rank {lora.lora_r}, prompt style {style}")
    return out_dir


def _check(config: dict, path: Path) -> None:
    """InputError for a kind of adapter that ours is not."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not LORA, the only kind there is here")
    if type(dropout := config.get("lora_dropout") or 0.0) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout is {dropout!r}, not in [0, 1)")
    starts = config.get("init_lora_weights")
    wrong = {"init_lora_weights": starts} if starts not in ORDINARY_STARTS else {}
    wrong |= {"bias": config["bias"]} if config.get("bias") not in (None, "none") else {}
    wrong |= {k: v for k, v in config.items() if k not in KNOWN | {"init_lora_weights"} and v}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise InputError(f"{path}: {name} = {value!r} cannot be held by an adapter here; merge it with peft instead")


def _of(config: dict, field: str, default: str) -> Callable[[str], int | float]:
    """What finds a layer's rank or alpha, as peft looks it up: by the first pattern that the end of its name fits."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{PEFT_CONFIG}: {field} is {patterns!r:.80}, not an object")
    literal, others, values = {}, [], list(patterns.values())
    for number, key in enumerate(patterns):
        plain = key.removesuffix("$").replace(r"\.", ".")
        if re.fullmatch(r"[\w.-]+", plain):
            literal.setdefault(plain, number)
            continue
        few = len(key) <= 500 and len(others) < 20 and key.count("*") + key.count("+") <= 2 and key.count("(") <= 2
        try:
            compiled = re.compile(rf"(.*\.)?({key})$") if few and re.fullmatch(SAFE, key) else None
        except re.error:
            compiled = None
        if compiled is None:
            raise InputError(f"{PEFT_CONFIG}: {field} has {key!r:.80}, no pattern of layers' names that is read here")
        others.append((number, compiled))

    def find(name: str) -> int | float:
        parts = name.split(".")
        ends = (literal.get(".".join(parts[i:])) for i in range(len(parts)))
        found = [end for end in ends if end is not None] + [number for number, key in others if key.match(name)]
        value = values[min(found)] if found else config.get(default)
        if type(value) not in (int, float) or not 0 < value <= 1e6:
            raise InputError(f"{PEFT_CONFIG}: {default} is {value!r:.40}, not a number above 0, at most 1e6")
        return value

    return find


def _read_factors(folder: Path, base: Path, names: WeightNames) -> dict[str, tuple[Tensor, Tensor]]:
    """The Hub's layer → its A and B, in fp32 or better."""
    path = next((p for p in (folder / PEFT_WEIGHTS, folder / PEFT_PICKLE) if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder} holds no {PEFT_WEIGHTS}; give the folder that peft saved")
    if path.name == PEFT_WEIGHTS and (folder / PEFT_PICKLE).is_file():
        print(f"notice: {folder}: {PEFT_WEIGHTS} is read, as by peft; {PEFT_PICKLE} is ignored")
    found: dict[str, dict[str, Tensor]] = {}
    for weight in open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path):
        if _is_of_base(weight, base, names):
            continue
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", weight.name)
        if not match or len(weight.shape) != 2 or weight.dtype not in SAFETENSORS_NAMES:
            raise InputError(f"{path}: {weight.name!r} cannot be held by an adapter here; merge it with peft instead")
        tensor = weight.load()
        found.setdefault(match[1], {})[match[2]] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if half := [name for name, pair in found.items() if len(pair) < 2]:
        raise InputError(f"{path}: {half[0]!r} has one of lora_A and lora_B only; save it again")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _is_of_base(weight: Weight, base: Path, names: WeightNames) -> bool:
    """Whether it is the base's own embedding or head, which peft saves beside an adapter of the head."""
    name = re.sub(r"^base_model\.model\.|\.base_layer(?=\.weight$)", "", weight.name)
    ours, _ = find_module(name.removesuffix(".weight"), names) or (None, [])
    if ours not in ("wte.weight", "lm_head.weight"):
        return False
    stored = {w.name: w for w in open_source(str(base), None, None).weights}
    return torch.equal(stored.get(ours, stored["wte.weight"]).load().to(weight.dtype), weight.load())


def _prompt_facts(args: ImportPeftArgs, folder: Path, base: Path) -> dict:
    """Prompt style, system prompt and stop ids: as typed, as exported from here, or what the base is usually given."""
    facts = read_json(folder / OUR_FACTS) if (folder / OUR_FACTS).is_file() else {}
    if facts and facts.get("base_fingerprint") != base_fingerprint(base):
        raise InputError(
            f"{folder} was exported for {facts.get('checkpoint_dir')}, whose weights differ from those of {base}"
        )
    style = resolve_style(args.prompt_style) if args.prompt_style else facts.get("prompt_style")
    if style and style == facts.get("prompt_style"):
        return facts
    tokenizer = Tokenizer(base)
    style = style or default_style(tokenizer, otherwise="alpaca")
    return {"prompt_style": style, "stop_ids": stop_ids(style, tokenizer)}


def _assemble(pairs: dict[str, Pair], config: ModelConfig, dropout: float) -> tuple[LoRAArgs, GPT]:
    """One rank and one scaling for all layers, on a model without weights."""
    if not pairs:
        raise InputError("the PEFT adapter adapts nothing")
    rank, scaling = max(len(pair.a) for pair in pairs.values()), next(iter(pairs.values())).scaling
    kinds = {name.rpartition(".")[2] for name in pairs}
    parts = {f"lora_{part}": part in kinds for part in ("query", "key", "value", "projection")}
    parts |= {"lora_mlp": bool(kinds & {"gate", "up", "down"}), "lora_head": "lm_head" in kinds}
    lora = LoRAArgs(lora_r=rank, lora_alpha=float(scaling * rank), lora_dropout=dropout, **parts)
    with torch.device("meta"):
        model = GPT(config)
    apply_lora(model, lora, seed=0)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            a, b = torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank)
            if pair := pairs.get(name):
                a[: len(pair.a)] = pair.a
                b[:, : len(pair.a)] = pair.b if pair.scaling == scaling else pair.b * float(pair.scaling / scaling)
            module.lora_A, module.lora_B = nn.Parameter(a), nn.Parameter(b)
    return lora, model
