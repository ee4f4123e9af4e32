"""How time and memory grow: useful tokens a second over the length and over the number of examples, lit_sft alone.

python benchmarks/train.py --growth [--out FILE]

Random ids, nothing shared, a 31M GPT-NeoX shape in fp32, about 16,384 tokens a step. ``per_flop`` is useful tokens a
second times the floating-point operations that a token of that length costs, relative to the first row: 1 where only
attention's own operations grow. ``outside_attention`` is what it would be without the time that one profiled step spent
in attention, relative to the first row too. Memory is what is resident above the loaded model, before that step.
"""

import sys
import tempfile
from pathlib import Path

from engine import write_data
from lengths import uniform
from measure import start
from shapes import SHAPES, mean_context

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
COUNTS = (1_000, 10_000, 100_000)
SHAPE = SHAPES["pythia-31m"]
TOKENS = 16_384
LABELLED = 0.75  # of lengths.uniform


def measured(length: int, count: int, n_steps: int, repeats: int) -> dict:
    """The best of several runs over ``count`` examples of ``length`` tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_data(Path(name) / "data", uniform(count, length, SHAPE.vocab_size))
        command = [sys.executable, Path(__file__).with_name("engine.py"), "--tool", "growth", "--folder", folder]
        command += ["--precision", "32-true", "--micro_batch", 4096, "--steps", n_steps]
        runs = [start(command, {}) for _ in range(repeats)]
    if failed := [run for run in runs if "failed" in run]:
        raise SystemExit(failed[0]["failed"])
    best = max(runs, key=tokens_per_s)
    flop = SHAPE.flop_per_token(LABELLED, mean_context([length]))
    return {
        "tokens_an_example": length,
        "examples": count,
        "tokens_per_s": tokens_per_s(best),
        "flop_per_s": tokens_per_s(best) * flop,
        "attention_share": best["attention_share"],
        "above_weights_mb": best["peak_mb"] - best["weights_mb"],
        "runs": runs,
    }


def tokens_per_s(run: dict) -> float:
    """Useful tokens a second of all steps after the first."""
    steps = run["steps"][1:]
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def outside_attention(row: dict) -> float:
    """Useful tokens a second of the time not spent in attention."""
    return row["tokens_per_s"] / (1 - row["attention_share"])


def grow(lengths: list[int], counts: list[int], n_steps: int, repeats: int) -> dict:
    """The two tables, printed as they grow."""
    tables = {"lengths": [], "counts": []}
    cases = [("lengths", n, TOKENS * (n_steps + 1) // n) for n in lengths]
    cases += [("counts", min(lengths), count) for count in counts]
    for name, length, count in cases:
        row = measured(length, count, n_steps, repeats)
        first = (tables[name] or [row])[0]
        row["per_flop"] = row["flop_per_s"] / first["flop_per_s"]
        row["outside_attention"] = outside_attention(row) / outside_attention(first)
        tables[name].append(row)
        said = {"useful tokens/s": "tokens_per_s", "per FLOP": "per_flop", "outside attention": "outside_attention"}
        told = ", ".join(f"{row[key]:,.5g} {name}" for name, key in (said | {"MB": "above_weights_mb"}).items())
        print(f"{length:6,} tokens, {count:8,} examples: {told}", flush=True)
    return tables
