"""The rotary fields of a config.json, spelled as of old (rope_theta, rope_scaling) or anew (rope_parameters).

Source: transformers' modeling_rope_utils.py.
"""

import math
from typing import Any

from lit_sft.errors import InputError
from lit_sft.families.bookkeeping import HARMLESS_SCALINGS
from lit_sft.families.fields import Fields, is_unused

KNOWN = {
    "default": {"original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "linear": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    },
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"},
}
# what Phi-3 called it first; three positions for each token, which of a text are one
RENAMED = {"su": "longrope", "mrope": "default"}
COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}


def read_rope(
    fields: Fields,
    block_size: int,
    head_size: int,
    theta: float = 10000.0,
    share: float = 1.0,
    local_theta: float | None = None,
) -> dict:
    """ModelConfig's rotary fields; ``theta`` and ``share`` (of a head's dimensions) are the family's defaults.

    ``local_theta``: the default of a family whose sliding layers have a theta of their own. InputError for a scaling
    that is unknown, lacks a value or is said twice.
    """
    old, new = fields.get("rope_scaling", default={}), fields.get("rope_parameters", default={})
    place, local = "rope_parameters", {}
    if local_theta is not None:
        local_base = fields.get("rope_local_base_freq", default=local_theta)
        if new.keys() & {"full_attention", "sliding_attention"}:
            new, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
            place = "rope_parameters.full_attention"
        if local.get("rope_type", "default") != "default" or local.keys() - {"rope_type", "rope_theta"}:
            raise InputError(f"config.json: {local} for the sliding layers is not supported; they cannot be scaled")
        local = {"rope_local_theta": float(local.get("rope_theta") or local_base)}
    if old and new and any(new.get("rope_type" if k == "type" else k) != v for k, v in old.items()):
        raise InputError(f"config.json: rope_scaling {old} differs from rope_parameters {new}; delete one of them")
    rope = {**old, **new}
    condense = fields.get("rope_condense_ratio")
    if condense:  # LongChat's first revisions: linear scaling by another name
        rope = {"type": "linear", "factor": condense, "rope_theta": rope.get("rope_theta")}
    base = fields.get("rope_theta", "rotary_emb_base", default=theta)
    partial = fields.get("partial_rotary_factor", "rotary_pct", "rope_pct", default=share)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = RENAMED.get(kind, kind)
    if kind not in KNOWN:
        known = ", ".join(map(repr, KNOWN))
        raise InputError(f"config.json: rope scaling {kind!r} is not supported; supported: {known}")
    _check_keys(kind, {"rope_scaling": old, place: new})
    if unread := sorted(rope.keys() & HARMLESS_SCALINGS):
        fields.notes.append(f"{', '.join(unread)} of the rope scaling: not read, as in transformers")
    if kind == "dynamic":
        fields.notes.append(f"rope scaling 'dynamic': none within the context of {block_size} tokens")
        kind = "default"
    size = int(head_size * (rope.get("partial_rotary_factor") or partial))
    found = {"rope_theta": float(rope.get("rope_theta") or base), "rope_type": kind, **local}
    if size != head_size:
        found["rotary_size"] = size
    original = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    try:
        return found | _scaling(kind, rope, original, block_size)
    except KeyError as error:
        raise InputError(f"config.json: rope scaling {kind!r} lacks {error}") from None


def _check_keys(kind: str, places: dict[str, dict]) -> None:
    """InputError for keys that the scaling does not know; ``places``: where they are → those that are there."""
    known = KNOWN[kind] | COMMON | HARMLESS_SCALINGS
    odd = {}
    for place, rope in places.items():
        for name, value in rope.items():
            is_neutral = is_unused(value) or (kind == "default" and name == "factor" and value == 1)
            if name not in known and not is_neutral:
                odd[f"{place}.{name}"] = value
    if odd:
        told = ", ".join(f"{name} = {value!r:.60}" for name, value in odd.items())
        raise InputError(
            f"config.json: {told}: not known to the rope scaling {kind!r}, and the toolkit does not know whether that "
            "changes what the model computes; if you know that it does not, convert with --accept_config_key "
            f"{','.join(odd)}"
        )


def respell_rope(hf_config: dict) -> dict:
    """A config.json whose rotary scaling is spelled so that today's transformers sees it."""
    config = dict(hf_config)
    if condense := config.pop("rope_condense_ratio", None):
        theta = {k: v for k, v in (config.get("rope_parameters") or {}).items() if k == "rope_theta"}
        config["rope_parameters" if theta else "rope_scaling"] = {"type": "linear", "factor": float(condense)} | theta
    for name in ("rope_scaling", "rope_parameters"):
        if kind := (config.get(name) or {}).get("type"):
            config[name] = {"rope_type": RENAMED.get(kind, kind)} | config[name] | {"type": RENAMED.get(kind, kind)}
    return config


def _scaling(kind: str, rope: dict[str, Any], original: int | None, block_size: int) -> dict:
    """The fields of one kind of scaling; KeyError for one that is missing."""
    if kind == "default":
        return {}
    if kind == "longrope":
        original = original or rope["original_max_position_embeddings"]
        factor = rope.get("factor") or block_size / original
        stretch = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return {
            "rope_short_factors": tuple(map(float, rope["short_factor"])),
            "rope_long_factors": tuple(map(float, rope["long_factor"])),
            "rope_original_block_size": original,
            "rope_attention_factor": float(rope.get("attention_factor") or stretch),
        }
    factor, original = rope["factor"], int(original or block_size)
    if factor is None and kind == "yarn":
        factor = block_size / original
    factor = float(factor)
    if kind == "linear":
        return {"rope_factor": factor}
    if kind == "llama3":
        return {
            "rope_factor": factor,
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
            "rope_original_block_size": original,
        }
    if rope.get("truncate") is False:
        raise InputError("config.json: rope scaling 'yarn' with truncate = False is not supported: other angles")
    return {
        "rope_factor": factor,
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
        "rope_original_block_size": original,
        "rope_attention_factor": float(rope.get("attention_factor") or _yarn_attention_factor(rope, factor)),
    }


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by: the two ``mscale`` of DeepSeek where both are given, else the paper's."""

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return stretch(rope["mscale"]) / stretch(rope["mscale_all_dim"])
    return stretch(1.0)
