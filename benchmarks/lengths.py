"""How long examples are, and made-up examples of those lengths.

alpaca_lengths.json holds, of 999 real examples in Alpaca's format under Llama 2's tokenizer, whether each has an input
and how many tokens its prompt and response have, and how long the template's texts are; no texts. It was made by
``python benchmarks/lengths.py --data_file alpaca.json --tokenizer_dir FOLDER``.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("alpaca_lengths.json")
N_LIMA, LIMA_TOKENS, LIMA_SIGMA, LIMA_LONGEST, LIMA_PROMPT = 1030, 750_000, 0.8, 2048, 0.1
N_ALPACA = 51_759
N_WORDS, N_TEMPLATE_WORDS = 20_000, 64


class Example(NamedTuple):
    """One example as ids, and how many of them are its prompt; only the others are learned."""

    ids: list[int]
    n_prompt: int


def measure(data_file: Path, tokenizer_dir: Path) -> dict:
    """The contents of alpaca_lengths.json: the prompt and the response are encoded apart, as they are prepared."""
    from lit_sft.styles import PROMPT_STYLES
    from lit_sft.tokenizer import Tokenizer

    style, tokenizer = PROMPT_STYLES["alpaca"], Tokenizer(tokenizer_dir)
    rows, prompts = [], ([], [])
    for row in json.loads(data_file.read_text()):
        form = style.prompt_with_input if row["input"] else style.prompt
        ids = tokenizer.encode(form.replace("{instruction}", row["instruction"]).replace("{input}", row["input"]))
        prompts[bool(row["input"])].append(ids)
        response = tokenizer.encode(row["output"], bos=False)
        rows.append([int(bool(row["input"])), len(ids), len(response) + 1])  # and the end token
    empty = [tokenizer.encode(f.replace("{instruction}", "").replace("{input}", "")) for f in
             (style.prompt, style.prompt_with_input)]  # fmt: skip
    return {
        "tokenizer": tokenizer_dir.name,
        "preambles": [_common(of_kind) for of_kind in prompts],
        "common_preamble": _common(prompts[0] + prompts[1]),
        "templates": [len(ids) for ids in empty],
        "examples": rows,
    }


def _common(lists: list[list[int]]) -> int:
    """How many ids all lists begin with."""
    low, high = min(lists), max(lists)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def alpaca_like(n: int, vocab_size: int, seed: int = 0, longest: int | None = None) -> list[Example]:
    """Random ids with the lengths of Alpaca's examples and its two preambles, which all examples of a kind share.

    The first 999 have each length once; beyond, lengths are drawn with replacement. Responses are cut at ``longest``.
    """
    facts = json.loads(FILE.read_text())
    draw = random.Random(seed)
    rows = facts["examples"][:n] + draw.choices(facts["examples"], k=max(0, n - len(facts["examples"])))
    common = _ids(draw, facts["common_preamble"], vocab_size)
    preambles = [common + _ids(draw, length - len(common), vocab_size) for length in facts["preambles"]]
    made = []
    for kind, n_prompt, n_response in rows:
        n_prompt = min(n_prompt, (longest or n_prompt + 1) - 1)
        n_response = min(n_response, (longest or n_prompt + n_response) - n_prompt)
        own = _ids(draw, n_prompt + n_response - len(preambles[kind]), vocab_size)
        made.append(Example(preambles[kind] + own, n_prompt))
    return made


def preamble_of(number: int) -> tuple[int, int]:
    """Find the preamble that an example of ``alpaca_like`` begins with, one of the first 999, and its length."""
    facts = json.loads(FILE.read_text())
    kind = facts["examples"][number][0]
    return kind, facts["preambles"][kind]


def lima_like(vocab_size: int, seed: int = 0, n: int = N_LIMA) -> list[Example]:
    """Random ids in as many examples and tokens as LIMA has (1,030 and 750,000), nothing shared.

    Its lengths are not at hand: they are assumed log-normal with sigma 0.8, cut at 2,048 tokens and scaled to that
    total, a tenth of each the prompt.
    """
    draw = random.Random(seed)
    shape = [draw.lognormvariate(0, LIMA_SIGMA) for _ in range(n)]
    low, high = 1.0, 1e5
    for _ in range(60):  # the scale at which the cut lengths add up
        scale = (low + high) / 2
        total = sum(min(LIMA_LONGEST, x * scale) for x in shape)
        low, high = (scale, high) if total < LIMA_TOKENS * n / N_LIMA else (low, scale)
    lengths = [max(16, min(LIMA_LONGEST, round(x * high))) for x in shape]
    return [Example(_ids(draw, length, vocab_size), max(1, round(length * LIMA_PROMPT))) for length in lengths]


def uniform(n: int, length: int, vocab_size: int, seed: int = 0) -> list[Example]:
    """Random ids, all examples of one length, nothing shared, a quarter of each the prompt."""
    draw = random.Random(seed)
    return [Example(_ids(draw, length, vocab_size), length // 4) for _ in range(n)]


def _ids(draw: random.Random, n: int, vocab_size: int) -> list[int]:
    return draw.choices(range(3, vocab_size), k=n)  # past the ids that tokenizers give to controls


def made_up_rows(n: int, vocab_size: int, seed: int = 0) -> list[dict]:
    """Instructions, inputs and outputs of as many words as Alpaca's have tokens; word number k is drawn as 1 / k."""
    facts = json.loads(FILE.read_text())
    draw = random.Random(seed)
    words = made_up_words(vocab_size)
    weights = [1 / (k + 1) for k in range(len(words))]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, weights, k=max(1, length)))

    rows = []
    for kind, n_prompt, n_response in draw.choices(facts["examples"], k=n):
        own = n_prompt - facts["templates"][kind]
        first = own // 2 if kind else own
        rows.append({"instruction": text(first), "input": text(own - first) if kind else "",
                     "output": text(n_response - 1)})  # fmt: skip
    return rows


def made_up_words(vocab_size: int) -> list[str]:
    """The words of ``made_up_rows``, as many as fit beside those of the template."""
    return [f"w{k}" for k in range(min(N_WORDS, vocab_size - N_TEMPLATE_WORDS))]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer.json to which each made-up word, and each word of the template, is one token.

    So the template is shorter than with Llama 2's, and the texts are as long.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lit_sft.styles import PROMPT_STYLES

    style = PROMPT_STYLES["alpaca"]
    template = dict.fromkeys(f"{style.prompt} {style.prompt_with_input}".split())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *template, *made_up_words(vocab_size)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_file", type=Path, required=True, help="JSON of instruction, input, output")
    parser.add_argument("--tokenizer_dir", type=Path, required=True, help="folder of the tokenizer")
    arguments = parser.parse_args()
    FILE.write_text(json.dumps(measure(arguments.data_file, arguments.tokenizer_dir)) + "\n")
