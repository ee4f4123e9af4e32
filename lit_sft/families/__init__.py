"""All that is particular to one architecture: how its config.json reads and what its weights are called."""

from dataclasses import replace

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
from lit_sft.families.wrappers import WRAPPERS

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
    """The family of a Hub config.json, by its architecture and never by a folder's name; InputError when unknown.

    Of a multimodal one it is the family of its text model, with the wrapper that it is in.
    """
    architectures, model_type = hf_config.get("architectures") or [], hf_config.get("model_type")
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise InputError(f"config.json: architectures is {architectures!r:.99}, not a list of names")
    for wrapper in WRAPPERS:
        if wrapper.architecture in architectures or (not architectures and model_type == wrapper.model_type):
            family = _text_family(wrapper.text_of(hf_config)["model_type"])
            known = {"tokenizer_class": wrapper.tokenizer_class, "overrides_tokenizer_class": False}
            return replace(family, wrapper=wrapper, **known)
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
        if not architectures and model_type in family.model_types:
            return family
    known = ", ".join(
        (*(n for family in FAMILIES for n in family.architectures), *(wrapper.architecture for wrapper in WRAPPERS))
    )
    raise InputError(
        f"config.json: architectures {architectures}, model_type {model_type!r} is no known family (known: {known})"
    )


def _text_family(kind: object) -> Family:
    """The family of a text model in a wrapper, by its ``model_type``; InputError when it is none that is known so."""
    for family in FAMILIES:
        if kind in family.model_types and family.prefix == "model.":
            return family
    raise InputError(f"config.json: text_config has model_type {kind!r:.99}, no text model that is known here")
