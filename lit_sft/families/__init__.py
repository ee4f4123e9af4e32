"""All that is particular to one architecture: how its config.json reads and what its weights are called."""

from lit_sft.errors import InputError
from lit_sft.families import (
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    stablelm_alpha,
)
from lit_sft.families.family import Family

FAMILIES = (
    llama.FAMILY,
    gpt_neox.FAMILY,
    falcon.FAMILY,
    stablelm.FAMILY,
    stablelm_alpha.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    phi3.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
)


def find_family(hf_config: dict) -> Family:
    """The family of a Hub config.json, by its architecture and never by a folder's name; InputError when unknown."""
    architectures = hf_config.get("architectures") or []
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise InputError(f"config.json: architectures is {architectures!r:.99}, not a list of names")
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
        if not architectures and hf_config.get("model_type") in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise InputError(
        f"config.json: architectures {architectures}, model_type {hf_config.get('model_type')!r} is no known family "
        f"(known: {known})"
    )
