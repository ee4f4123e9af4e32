"""Repositories on the Hub that are known to convert, by family. Others of the same architectures convert too."""

REPOSITORIES = {
    "Llama 2 (gated)": tuple(f"meta-llama/Llama-2-{size}b{chat}-hf" for size in (7, 13, 70) for chat in ("", "-chat")),
    "Llama 3 (gated)": (
        *(f"meta-llama/Meta-Llama-3-{size}B{kind}" for size in (8, 70) for kind in ("", "-Instruct")),
        *(f"meta-llama/Llama-3.1-{size}B{kind}" for size in (8, 70) for kind in ("", "-Instruct")),
        *(f"meta-llama/Llama-3.2-{size}B{kind}" for size in (1, 3) for kind in ("", "-Instruct")),
        "meta-llama/Llama-3.3-70B-Instruct",
    ),
    "CodeLlama": tuple(
        f"codellama/CodeLlama-{size}b{kind}-hf" for size in (7, 13, 34) for kind in ("", "-Python", "-Instruct")
    ),
    "FreeWilly2, now StableBeluga2": ("stabilityai/StableBeluga2",),
    "LongChat": tuple(f"lmsys/longchat-{size}b-16k" for size in (7, 13)),
    "Nous-Hermes": (
        "NousResearch/Nous-Hermes-13b",
        "NousResearch/Nous-Hermes-llama-2-7b",
        "NousResearch/Nous-Hermes-Llama2-13b",
    ),
    "open_llama": tuple(f"openlm-research/open_llama_{size}b" for size in (3, 7, 13)),
    "Platypus": (
        "garage-bAInd/Platypus-30B",
        *(f"garage-bAInd/Platypus2-{size}B" for size in (7, 13, 70)),
        "garage-bAInd/Platypus2-70B-instruct",
        *(f"garage-bAInd/Camel-Platypus2-{size}B" for size in (13, 70)),
        "garage-bAInd/Stable-Platypus2-13B",
    ),
    "SmolLM2": tuple(
        f"HuggingFaceTB/SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")
    ),
    "Vicuna": (
        *(f"lmsys/vicuna-{size}b-v1.3" for size in (7, 13, 33)),
        *(f"lmsys/vicuna-{size}b-v1.5{long}" for size in (7, 13) for long in ("", "-16k")),
    ),
}
