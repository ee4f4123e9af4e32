"""Markdown tables of the raw figures of train.py, with and without --growth, and of gpu.py.

python benchmarks/tables.py benchmarks/results/train_cpu.json …
"""

import json
import sys
from pathlib import Path

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


def gpu_tables(result: dict) -> str:
    """Of benchmarks/gpu.py: whatever parts are there."""
    parts = result["parts"]
    if not parts:
        return "nothing was measured\n"
    machine = next(iter(parts.values()))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    written = [f"{machine['device']}; Python {machine['python']}, CUDA {machine['cuda']}, {versions}.\n"]
    ceilings = {(f["shape"], f["kind"]): f["flop_per_s"] for f in findings(parts, "ceilings") if "kind" in f}
    if ceilings:
        rows = [[f"{shape}, {kind}", f"{rate / 1e12:,.3g}"] for (shape, kind), rate in ceilings.items()]
        copies = [f["copy_bytes_per_s"] for f in findings(parts, "ceilings") if "copy_bytes_per_s" in f]
        rows += [["copies, TB/s", f"{rate / 1e12:.2f}"] for rate in copies]
        written.append(table(["ceiling", "TFLOP/s"], rows))
    for name in ("bf16", "fp8", "nf4", "trainer", "others"):
        if rows := [speed_row(name, f, ceilings) for f in findings(parts, name) if "ended" not in f]:
            header = [name, "useful tokens/s", "TFLOP/s", "of bf16's ceiling", "peak GiB", "first step, s", "compiled",
                      "again", "first loss"]  # fmt: skip
            written.append(table(header, rows))
    large = [f for part in ("large_bf16", "large_fp8") for f in findings(parts, part) if "ended" not in f]
    if large:
        written.append(table(["LIMA-sized epoch", "useful tokens/s", "peak GiB", "seconds an epoch", "steps measured"],
                             [large_row(f) for f in large]))  # fmt: skip
    for f in findings(parts, "epoch"):
        if "seconds" in f:
            written.append(f"An epoch of {f['examples']:,} examples of Alpaca's lengths on {f['shape']}, "
                           f"{f['quantize'] or 'bf16'}: {f['seconds'] / 60:.1f} minutes, "
                           f"{f['tokens_per_s']:,.0f} useful tokens/s.\n")  # fmt: skip
    for f in findings(parts, "profile"):
        if "categories" in f:
            rows = sorted(f["categories"].items(), key=lambda item: -item[1])
            written.append(table([f"one step, {f['quantize'] or 'bf16'}: {f['seconds'] * 1e3:,.0f} ms", "ms"],
                                 [[kind, f"{seconds * 1e3:,.1f}"] for kind, seconds in rows]))  # fmt: skip
    written += [
        f"{name}: ended early, {f['ended']}.\n" for name in parts for f in findings(parts, name) if "ended" in f
    ]
    return "\n".join(written)


def findings(parts: dict, name: str) -> list[dict]:
    """What one part found."""
    return parts.get(name, {}).get("findings", [])


def speed_row(part: str, found: dict, ceilings: dict) -> list[object]:
    """One configuration of lit_sft or of a peer."""
    if "tool" in found or part == "trainer":
        order = {True: ", length-grouped", False: ", in order"}.get(found.get("grouped"), "")
        name = f"{found['tool']}, micro-batch {found.get('micro_batch', '–')}{order}"
    else:
        name = f"{found['data']}, {found['micro_batch_tokens']:,}" + (", prefixes" if found["share_prefix"] else "")
        name += ", recomputed" if found["activation_checkpointing"] != "none" else ""
    if "failed" in found:
        return [name, found["failed"].splitlines()[0][:60], *[""] * 7]
    ceiling = ceilings.get((found["shape"], "bf16"))
    return [
        name, f"{found['tokens_per_s']:,.0f}", f"{found['flop_per_s'] / 1e12:,.3g}",
        f"{found['flop_per_s'] / ceiling:.0%}" if ceiling else "", f"{found['peak_bytes'] / 2**30:.1f}",
        f"{found['first_step_s']:.1f}" if "first_step_s" in found else "", found.get("compilations", ""),
        found.get("recompilations", ""), f"{found['first_losses'][0]:.4f}" if "first_losses" in found else "",
    ]  # fmt: skip


def large_row(found: dict) -> list[object]:
    """One run of the large shape."""
    name = f"{found['shape']}, {found['quantize'] or 'bf16'}, recomputed: {found['activation_checkpointing']}"
    if "failed" in found:
        return [name, found["failed"].splitlines()[0][:60], "", "", ""]
    return [name, f"{found['tokens_per_s']:,.0f}", f"{found['peak_bytes'] / 2**30:.1f}", f"{found['epoch_s']:,.0f}",
            f"{found['measured_steps']} of {found['epoch_steps']}"]  # fmt: skip


def tables(result: dict) -> str:
    """The tables of any of the three programs."""
    if "parts" in result:
        return gpu_tables(result)
    return training_tables(result) if "shapes" in result else growth_tables(result)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        print(tables(json.loads(Path(path).read_text())))
