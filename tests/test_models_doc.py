"""docs/models.md says what the registry of families and the tests' variants say.

``UPDATE_DOCS=1 python -m pytest tests/test_models_doc.py`` writes its tables anew.
"""

import os
import re
from pathlib import Path

from conftest import ROOT
from family_variants import VARIANTS
from wrapped_models import WRAPPED

from lit_sft.families import FAMILIES
from lit_sft.families.family import Family
from lit_sft.families.repositories import REPOSITORIES
from lit_sft.families.wrappers import WRAPPERS, Wrapper
from lit_sft.styles import PROMPT_STYLES

PAGE = ROOT / "docs" / "models.md"
BOTH, JSON = "tokenizer.model or tokenizer.json", "tokenizer.json"
# family → its published tokenizers, the named styles that its published fine-tunes were made with
PUBLISHED = {
    "Llama": (
        f"{BOTH}; BOS",
        ("llama2-chat", "codellama", "llama3", "vicuna", "longchat", "hermes", "platypus", "beluga", "chatml"),
    ),
    "GPT-NeoX": (f"{JSON}; no BOS", ("redpajama-chat", "redpajama-instruct", "stablelm-alpha", "stablecode", "oasst")),
    "Falcon": (f"{JSON}; no BOS", ("falcon",)),
    "StableLM": (f"{JSON}; no BOS", ("zephyr", "stablelm-2", "chatml")),
    "StableLM-alpha v2": (f"{JSON}; no BOS", ()),
    "Mistral": (f"{BOTH}; BOS", ("mistral-instruct",)),
    "Mixtral": (f"{BOTH}; BOS", ("mistral-instruct",)),
    "Phi-3": (f"{BOTH}; BOS as the file says", ("phi-3", "phi-4", "phi-4-mini")),
    "Qwen2": (f"{JSON}; no BOS", ("chatml",)),
    "Qwen3": (f"{JSON}; no BOS", ("chatml",)),
    "Qwen3-MoE": (f"{JSON}; no BOS", ("chatml",)),
    "Gemma": (f"{BOTH}; BOS", ("gemma",)),
    "Gemma 2": (f"{BOTH}; BOS", ("gemma",)),
    "Gemma 3": (f"{BOTH}; BOS", ("gemma",)),
    "SmolLM3": (f"{JSON}; no BOS", ("chatml",)),
    "OLMo 2": (f"{JSON}; no BOS", ("olmo-2",)),
}


def variants_of(family: Family) -> list[str]:
    return [name for name, variant in VARIANTS.items() if variant.model_type in family.model_types]


def texts_of(wrapper: Wrapper) -> list[str]:
    """The families of the text models that a wrapper is tested around."""
    wrapped = [w for w in WRAPPED.values() if f"{w.name}ForConditionalGeneration" == wrapper.architecture]
    kinds = {wrapper.same_as or w.text.get("model_type", wrapper.text_model_type) for w in wrapped}
    return [family.name for family in FAMILIES if kinds & {*family.model_types}]


def tables() -> dict[str, str]:
    """The generated parts of the page by name."""
    families = [
        "| family | architectures | model_type | tokenizer | named prompt styles | GGUF | variants tested |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        tokenizer, styles = PUBLISHED[family.name]
        cells = (
            family.name,
            ", ".join(f"`{name}`" for name in family.architectures),
            ", ".join(f"`{name}`" for name in family.model_types),
            tokenizer,
            ", ".join(f"`{style}`" for style in styles) or "–",
            f"`{family.gguf}`" if getattr(family, "gguf", "") else "–",
            "; ".join(variants_of(family)),
        )
        families.append(f"| {' | '.join(cells)} |")
    wrappers = ["| architecture | model_type | text models tested |", "|---|---|---|"]
    wrappers += [f"| `{w.architecture}` | `{w.model_type}` | {', '.join(texts_of(w))} |" for w in WRAPPERS]
    repositories = ["| | repositories |", "|---|---|"]
    repositories += [f"| {name} | {', '.join(found)} |" for name, found in REPOSITORIES.items()]
    found = {"families": families, "wrappers": wrappers, "repositories": repositories}
    return {name: "\n".join(lines) for name, lines in found.items()}


def written(page: str) -> str:
    for name, table in tables().items():
        part = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        assert part.search(page), name
        page = part.sub(lambda m, table=table: m[1] + table + "\n" + m[2], page)
    return page


def test_the_page_is_what_the_code_says() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(written(PAGE.read_text()))
    assert PAGE.read_text() == written(PAGE.read_text()), "run this test with UPDATE_DOCS=1 and look at the change"


def test_every_family_is_tested_and_described() -> None:
    assert PUBLISHED.keys() == {family.name for family in FAMILIES}
    assert all(variants_of(family) for family in FAMILIES)
    assert all(texts_of(wrapper) for wrapper in WRAPPERS)
    assert sum(len(variants_of(family)) for family in FAMILIES) == len(VARIANTS)
    assert {style for _, styles in PUBLISHED.values() for style in styles} <= PROMPT_STYLES.keys()


def test_the_page_is_found() -> None:
    assert "docs/models.md" in (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / Path(link)).exists(), link
