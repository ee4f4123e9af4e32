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
    "Falcon": (
        *(f"tiiuae/falcon-{size}{kind}" for size in ("7b", "40b") for kind in ("", "-instruct")),
        *(f"tiiuae/falcon-180B{chat}" for chat in ("", "-chat")),
        "tiiuae/falcon-rw-1b",
        "tiiuae/falcon-11B",
    ),
    "FreeWilly2, now StableBeluga2": ("stabilityai/StableBeluga2",),
    "Gemma (gated)": tuple(f"google/gemma-{size}b{chat}" for size in (2, 7) for chat in ("", "-it")),
    "Gemma 2 (gated)": tuple(f"google/gemma-2-{size}b{chat}" for size in (2, 9, 27) for chat in ("", "-it")),
    "Gemma 3, its text model (gated)": (
        *("google/gemma-3-270m", "google/gemma-3-270m-it"),
        *(f"google/gemma-3-{size}b-{kind}" for size in (1, 4, 12, 27) for kind in ("pt", "it")),
    ),
    "LongChat": tuple(f"lmsys/longchat-{size}b-16k" for size in (7, 13)),
    "Mistral": (
        *(
            f"mistralai/Mistral-7B-{kind}"
            for kind in ("v0.1", "v0.3", "Instruct-v0.1", "Instruct-v0.2", "Instruct-v0.3")
        ),
        *(f"mistralai/Mistral-Nemo-{kind}-2407" for kind in ("Base", "Instruct")),
    ),
    "Mixtral": (
        *(f"mistralai/Mixtral-8x7B-{kind}v0.1" for kind in ("", "Instruct-")),
        *(f"mistralai/Mixtral-8x22B-{kind}v0.1" for kind in ("", "Instruct-")),
    ),
    "Nous-Hermes": (
        "NousResearch/Nous-Hermes-13b",
        "NousResearch/Nous-Hermes-llama-2-7b",
        "NousResearch/Nous-Hermes-Llama2-13b",
    ),
    "OLMo 2": (
        "allenai/OLMo-2-0425-1B",
        "allenai/OLMo-2-0425-1B-Instruct",
        *(f"allenai/OLMo-2-1124-{size}B{kind}" for size in (7, 13) for kind in ("", "-Instruct")),
        *("allenai/OLMo-2-0325-32B", "allenai/OLMo-2-0325-32B-Instruct"),
    ),
    "open_llama": tuple(f"openlm-research/open_llama_{size}b" for size in (3, 7, 13)),
    "Phi-3, Phi-4": (
        *(f"microsoft/Phi-3-mini-{context}-instruct" for context in ("4k", "128k")),
        *(f"microsoft/Phi-3-medium-{context}-instruct" for context in ("4k", "128k")),
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/phi-4",
        "microsoft/Phi-4-mini-instruct",
    ),
    "Platypus": (
        "garage-bAInd/Platypus-30B",
        *(f"garage-bAInd/Platypus2-{size}B" for size in (7, 13, 70)),
        "garage-bAInd/Platypus2-70B-instruct",
        *(f"garage-bAInd/Camel-Platypus2-{size}B" for size in (13, 70)),
        "garage-bAInd/Stable-Platypus2-13B",
    ),
    "Pythia": tuple(
        f"EleutherAI/pythia-{size}{data}"
        for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
        for data in ("", "-deduped")
        if data == "" or size not in ("14m", "31m")
    ),
    "Qwen2.5": tuple(
        f"Qwen/Qwen2.5-{kind}{size}B{chat}"
        for kind, sizes in (("", (0.5, 1.5, 3, 7, 14, 32, 72)), ("Coder-", (0.5, 1.5, 3, 7, 14, 32)))
        for size in sizes
        for chat in ("", "-Instruct")
    ),
    "Qwen3": (
        *(f"Qwen/Qwen3-{size}B{kind}" for size in (0.6, 1.7, 4, 8, 14) for kind in ("-Base", "")),
        *("Qwen/Qwen3-32B", "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"),
    ),
    "Qwen3-MoE": (
        *("Qwen/Qwen3-30B-A3B-Base", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
        *(f"Qwen/Qwen3-{size}-{kind}-2507" for size in ("30B-A3B", "235B-A22B") for kind in ("Instruct", "Thinking")),
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    ),
    "RedPajama-INCITE": (
        *(f"togethercomputer/RedPajama-INCITE-{kind}-3B-v1" for kind in ("Base", "Chat", "Instruct")),
        *(f"togethercomputer/RedPajama-INCITE-7B-{kind}" for kind in ("Base", "Chat", "Instruct")),
    ),
    "SmolLM2": tuple(
        f"HuggingFaceTB/SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")
    ),
    "SmolLM3": ("HuggingFaceTB/SmolLM3-3B-Base", "HuggingFaceTB/SmolLM3-3B"),
    "StableCode": tuple(f"stabilityai/stablecode-{kind}-alpha-3b" for kind in ("completion", "instruct")),
    "StableLM": (
        "stabilityai/stablelm-3b-4e1t",
        "stabilityai/stablelm-zephyr-3b",
        *(f"stabilityai/stablelm-2-{size}" for size in ("1_6b", "zephyr-1_6b", "12b", "12b-chat")),
    ),
    "StableLM-alpha": tuple(f"stabilityai/stablelm-{kind}-alpha-{n}b" for kind in ("base", "tuned") for n in (3, 7)),
    "StableLM-alpha v2": tuple(f"stabilityai/stablelm-base-alpha-{size}b-v2" for size in (3, 7)),
    "Vicuna": (
        *(f"lmsys/vicuna-{size}b-v1.3" for size in (7, 13, 33)),
        *(f"lmsys/vicuna-{size}b-v1.5{long}" for size in (7, 13) for long in ("", "-16k")),
    ),
}
