"""Peak memory of a preparation of big JSON lines, in a process of its own, with all its worker processes.

python benchmarks/prepare_memory.py --data_file alpaca.json --checkpoint_dir checkpoints/ORG/MODEL --gigabytes 2

The file is made of the rows of ``data_file``, no two with the same words. Two figures: the most resident memory that
all processes had together, shared pages counted once (Pss), and the most that the first process alone had, as the
kernel counts it. Exit 1 when the former reaches ``--limit_mb``.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prepare import ROOT, family, resident

STEP = 0.2  # seconds between two looks


def make_lines(source: Path, size: int, path: Path) -> int:
    """At least ``size`` bytes of rows; gives their number."""
    rows, draw = [row for row in json.loads(source.read_text()) if row["output"].strip()], random.Random(0)
    words = [word for row in rows for word in row["output"].split()]
    written = n = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            row = rows[n % len(rows)]
            varied = row["output"].split(" ")
            for _ in range(len(varied) // 10):
                varied[draw.randrange(len(varied))] = draw.choice(words)
            changed = {"instruction": f"{row['instruction']} ({n})", "output": " ".join(varied)}
            written, n = written + file.write(json.dumps(row | changed) + "\n"), n + 1
    return n


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds, and the peaks of its memory in MB."""
    together = alone = 0.0
    started = time.perf_counter()
    running = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while running.poll() is None:
        together = max(together, sum(map(resident, family(running.pid))))
        try:
            status = Path(f"/proc/{running.pid}/status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        alone = max([alone, *(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))])
        time.sleep(STEP)
    if running.returncode:
        sys.exit(f"the command failed with exit code {running.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_pss_mb": together, "peak_rss_of_first_mb": alone}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_file", type=Path, required=True, help="JSON of instruction, input, output")
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="a converted model")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file to prepare, in 10^9 bytes")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--limit_mb", type=float, default=1000.0)
    args = parser.parse_args()
    checkpoint_dir = args.checkpoint_dir.resolve()
    # beside the checkpoint, not in the system's folder, which may be memory
    with tempfile.TemporaryDirectory(dir=checkpoint_dir.parent) as folder:
        path, made = Path(folder) / "big.jsonl", Path(folder) / "data"
        rows = make_lines(args.data_file, int(args.gigabytes * 1e9), path)
        facts = {"rows": rows, "bytes": path.stat().st_size, "num_workers": args.num_workers}
        flags = {
            "data_file": path,
            "destination_path": made,
            "checkpoint_dir": checkpoint_dir,
            "prompt_style": "alpaca",
        }
        flags |= {"num_workers": args.num_workers}
        script = [sys.executable, ROOT / "scripts" / "prepare_dataset.py"]
        facts |= watch([*map(str, script), *(f"--{name}={value}" for name, value in flags.items())])
        facts["tokens"] = json.loads((made / "manifest.json").read_text())["facts"]["n_tokens"]
        shutil.rmtree(made)
    print(json.dumps(facts, indent=2))
    if facts["peak_pss_mb"] >= args.limit_mb:
        sys.exit(f"{facts['peak_pss_mb']:,.0f} MB is not below {args.limit_mb:,.0f} MB")
    (ROOT / "benchmarks" / "results" / "prepare_memory.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
