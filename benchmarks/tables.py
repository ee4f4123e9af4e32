"""Markdown tables of the raw figures of train.py, with and without --growth, and of gpu.py.

python benchmarks/tables.py benchmarks/results/train_cpu.json …
"""

import json
import sys
from pathlib import Path

from predictions import BF16_FLOP_PER_S, BF16_ONLY, FP8_FLOP_PER_S, MICROSECONDS, TOKENS_PER_S, on_card

NAMES = {"lit_sft": "lit_sft", "litgpt": "litgpt", "trl": "TRL + PEFT, padded", "trl_packing": "TRL + PEFT, packed",
         "trl_padding_free": "TRL + PEFT, padding-free"}  # fmt: skip


def table(header: list[str], rows: list[list[object]]) -> str:
    """A markdown table; numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def training_tables(result: dict) -> str:
    """Of benchmarks/train.py: one table for each shape, each side at its best micro-batch."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["peers"].items()))
    parts = [
        f"{result['cpu']}, {result['cores']} cores; Python {result['python']}, {versions}. `{result['command']}`\n"
    ]
    for shape, found in result["shapes"].items():
        facts = found["facts"]
        parts.append(
            f"**{shape}**: {facts['tokens_an_example']:.0f} tokens an example, {facts['labelled']:.0%} labelled, "
            f"{facts['flop_per_token'] / 1e6:,.0f} MFLOP a useful token; ceiling "
            + ", ".join(f"{p} {rate / 1e9:,.0f} GFLOP/s" for p, rate in found["ceiling_flop_per_s"].items())
            + ".\n"
        )
        ours = {entry["precision"]: entry for entry in found["best"] if entry["tool"] == "lit_sft"}
        rows = []
        for entry in found["best"]:
            reference = ours.get(entry["precision"])
            peer = reference is not None and entry is not reference
            rows.append([
                f"{NAMES[entry['tool']]}, {entry['precision']}", entry["micro_batch"],
                f"{entry['tokens_per_s']:,.0f}",
                f"{reference['tokens_per_s'] / entry['tokens_per_s']:.2f}×" if peer else "",
                f"{entry['above_weights_mb']:,.0f}",
                f"{reference['above_weights_mb'] / entry['above_weights_mb']:.2f}×" if peer else "",
                f"{entry['first_step_s']:.1f}", f"{entry['share_of_ceiling']:.0%}",
                f"{entry['first_loss']:.4f}", f"{entry['last_loss']:.4f}",
            ])  # fmt: skip
        header = ["", "micro-batch", "useful tokens/s", "lit_sft is faster", "MB above weights", "lit_sft needs"]
        parts.append(table([*header, "first step, s", "of the ceiling", "first loss", "last loss"], rows))
        parts += [
            f"{NAMES[tool]}: a row of {seen['examples']} examples differs from them one by one by "
            f"{seen['largest_logit_difference']:.1e} in its logits (as one example by "
            f"{seen['difference_as_one_example']:.1e}), so examples "
            f"{'are kept apart' if seen['isolated'] else 'see each other'}.\n"
            for tool, seen in found["isolation"].items()
            if "isolated" in seen
        ]
        failed = [run for run in found["runs"] if "failed" in run]
        parts += [
            f"{NAMES[run['tool']]}, {run['precision']}, micro-batch {run['micro_batch']}: failed, "
            f"{run['failed'].strip().splitlines()[-1]}\n"
            for run in failed
        ]
    return "\n".join(parts)


def growth_tables(result: dict) -> str:
    """Of benchmarks/train.py --growth."""
    parts = [f"{result['cpu']}, {result['cores']} cores; torch {result['torch']}. `{result['command']}`\n"]
    for name, column in (("lengths", "tokens_an_example"), ("counts", "examples")):
        rows = [
            [
                f"{row[column]:,}", f"{row['tokens_per_s']:,.0f}", f"{row['per_flop']:.2f}",
                f"{row['attention_share']:.0%}", f"{row['outside_attention']:.2f}", f"{row['above_weights_mb']:,.0f}",
            ]
            for row in result[name]
        ]  # fmt: skip
        header = [column.replace("_", " "), "useful tokens/s", "FLOP/s, relative", "attention's share of the time"]
        header += ["outside it, relative", "MB above weights"]
        parts.append(table(header, rows))
    return "\n".join(parts)


# --- of a GPU ---


def gpu_tables(result: dict) -> str:
    """Tables of benchmarks/gpu.py: whatever is there, each figure beside what was predicted of it."""
    machine, stages = result["machine"], result["stages"]
    device = machine["device"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = f"{device}, driver {machine['driver']}; Python {machine['python']}, {versions}"
    parts = [f"{facts}; commit {machine['commit'] or 'unknown'}.\n"]
    parts += [kernel_table(stages), ceiling_table(stages), speed_table(stages, device)]
    parts += [category_table(f, device) for f in every(stages, "microseconds")]
    parts += [
        f"An epoch of 51,759 examples, from {f['examples']:,} in {f['seconds']:.1f} s: {f['epoch_s'] / 60:.2f} min.\n"
        for f in every(stages, "epoch_s")
    ]
    parts += [losses_table(stages), stage_table(stages), *remarks(stages)]
    return "\n".join(filter(None, parts))


def every(stages: dict, key: str) -> list[dict]:
    """The findings that have ``key``."""
    return [f for stage in stages.values() for f in stage["findings"] if key in f]


def rounded(value: float | None) -> str:
    """Three digits; nothing where there is no value."""
    if value is None:
        return ""
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def kernel_table(stages: dict) -> str:
    """Single kernels."""
    rows = []
    for f in every(stages, "micro"):
        if "seconds" in f:
            predicted = f["predicted_s"]
            rows.append([
                f["micro"], rounded(f["seconds"] * 1e6), rounded(predicted * 1e6) if predicted else "",
                rounded(f["flop"] / f["seconds"] / 1e12) if f["flop"] else "",
                rounded(f["bytes"] / f["seconds"] / 1e9) if f["bytes"] else "",
            ])  # fmt: skip
    return table(["kernel", "µs", "predicted", "TFLOP/s", "GB/s"], rows) if rows else ""


def ceiling_table(stages: dict) -> str:
    """Products of a whole block, forward and backward."""
    predicted = {"bf16": BF16_FLOP_PER_S, "fp8": FP8_FLOP_PER_S}
    rows = []
    for f in every(stages, "ceiling"):
        rates = f["burst_flop_per_s"], f["sustained_flop_per_s"], predicted[f["ceiling"]]
        rows.append([f"{f['ceiling']}, {f['layers']}", *(rounded(rate / 1e12) for rate in rates)])
    return table(["ceiling, TFLOP/s", "burst", "sustained", "predicted"], rows) if rows else ""


def speed_table(stages: dict, device: str) -> str:
    """One row for each way of training that gave a speed, lit_sft's and the others'."""
    rows = []
    for f in every(stages, "tokens_per_s"):
        now = after = None
        if "tool" not in f and f["shape"] == "llama-7b" and f["data"] in ("alpaca", "epoch"):
            now, after = on_card(TOKENS_PER_S[f["quantize"], f["share_prefix"]], device)
        error = f.get("estimate_error")
        rows.append([
            case_name(f), rounded(f["tokens_per_s"]), rounded(now), rounded(after), rounded(f["flop_per_s"] / 1e12),
            f"{f['share_of_sustained']:.0%}" if "share_of_sustained" in f else "",
            f"{f['peak_bytes'] / 2**30:.1f}", f"{f.get('reserved_bytes', 0) / 2**30:.1f}",
            f"{error:+.0%}" if error is not None else "",
            f"{f['first_step_s']:.0f}" if "first_step_s" in f else "",
            f"{f['compilations']} + {f['recompilations']}" if "compilations" in f else "",
        ])  # fmt: skip
    header = ["", "useful tokens/s", "predicted", "after", "TFLOP/s", "of sustained", "peak GiB", "reserved",
              "estimate off by", "first step, s", "graphs"]  # fmt: skip
    return table(header, rows) if rows else ""


def case_name(found: dict) -> str:
    """One way of training."""
    if "tool" in found:
        order = {True: ", by length", False: ", in order"}.get(found.get("grouped"), "")
        return f"{found['tool']}, micro-batch {found['micro_batch']}{order}"
    name = f"{found['shape']}, {found['quantize'] or 'bf16'}, {found['data']}, {found['micro_batch_tokens']:,}"
    name += ", prefixes" * found["share_prefix"]
    recomputed = found["activation_checkpointing"]
    name += f", recomputed: {recomputed}" * (recomputed != "none")
    return name + ", not compiled" * (not found["compiled"])


def category_table(found: dict, device: str) -> str:
    """Table of where a step's time goes."""
    spent = dict(found["microseconds"])
    spent["optimizer, host"] = spent.pop("optimizer", 0.0) + spent.pop("gaps")
    spent["sum"] = sum(spent.values())
    rows = []
    for kind, value in sorted(spent.items(), key=lambda item: -item[1]):
        known = found["shape"] == "llama-7b" and (found["quantize"] is None or kind not in BF16_ONLY)
        now, after = on_card(MICROSECONDS.get(kind) if known else None, device)
        rows.append([kind, f"{value:.2f}", rounded(now), rounded(after)])
    return table([f"µs a useful token, {case_name(found)}", "measured", "predicted", "after"], rows)


def losses_table(stages: dict) -> str:
    """The first losses of every side that began with an adapter of zeros."""
    rows = [[case_name(f), *(f"{loss:.4f}" for loss in f["first_losses"][:1])] for f in every(stages, "first_losses")]
    return table(["", "first loss"], rows) if rows else ""


def stage_table(stages: dict) -> str:
    """Table of how long each stage took, at which clock and power."""
    rows = []
    for name, stage in stages.items():
        if "seconds" in stage:
            found = stage["clocks"]
            speed = [f"{found['sm_mhz']['median']:.0f}", f"{found['power_w']['median']:.0f}"] if found else ["", ""]
            rows.append([name, f"{stage['seconds']:.0f}", *speed])
    return table(["stage", "seconds", "SM MHz", "W"], rows)


def remarks(stages: dict) -> list[str]:
    """Tests, notes, and what did not work and why."""
    said = []
    for name, stage in stages.items():
        for f in stage["findings"]:
            why = f.get("ended") or f.get("failed")
            what = f.get("micro") or f.get("tool") or ""
            if "tests" in f:
                wrong = f["failures"] + f["errors"]
                said.append(f"{name}: {f['tests']} run, {wrong} failed, {f['skipped']} skipped {f['wrong'] or ''}")
            if "note" in f:
                said.append(f"{name}: {f['note']} {', '.join(map(rounded, f.get('differences', [])))}")
            if why:
                last = f.get("log", "").strip().splitlines()[-1:]
                said.append(" ".join([f"{name}:", what, *why.splitlines()[:1], *last])[:200])
    return said


def tables(result: dict) -> str:
    """The tables of any of the three programs."""
    if "stages" in result:
        return gpu_tables(result)
    return training_tables(result) if "shapes" in result else growth_tables(result)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        print(tables(json.loads(Path(path).read_text())))
