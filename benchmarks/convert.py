"""How fast conversion copies, and how much memory it takes, against ``cp`` and fsync of the same bytes.

python benchmarks/convert.py [--gigabytes 2] [--repeats 3] [--out benchmarks/results/convert.json]

Makes a random Llama checkpoint in bf16, in shards of about 400 MB, in a temporary folder, then in turn: copies its
weights with cp and fsyncs them; converts it in a process of its own, which tells how long writing took and how much of
that was hashing. The copy phase is writing without hashing, and ends in fsync; hashing and start-up (imports) are given
beside it. Memory is the process's peak of RssAnon: mapped pages of the source are not counted.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKER = """
import hashlib, json, re, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
started = time.perf_counter()
from lit_sft import convert, weights
from lit_sft.args import ConvertArgs
loaded, peak, spent = time.perf_counter(), [0], {"write": 0.0, "hashing": 0.0}

def watch():
    while True:
        peak[0] = max(peak[0], int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
        time.sleep(0.005)

def timed(*args):
    begun = time.perf_counter()
    result = write(*args)
    spent["write"] += time.perf_counter() - begun
    return result

class TimedHash:
    def __init__(self):
        self.digest = hashlib.sha256()
        self.hexdigest = self.digest.hexdigest

    def update(self, content):
        begun = time.perf_counter()
        self.digest.update(content)
        spent["hashing"] += time.perf_counter() - begun

threading.Thread(target=watch, daemon=True).start()
write, weights.write_safetensors = weights.write_safetensors, timed
weights.hashlib = SimpleNamespace(sha256=TimedHash)
convert.convert_checkpoint(ConvertArgs(checkpoint_dir=sys.argv[1]))
print(json.dumps({"import": loaded - started, "copy": spent["write"] - spent["hashing"], **spent,
                  "all": time.perf_counter() - started, "peak_anon_bytes": peak[0] * 1024}))
"""


def make_checkpoint(directory: Path, gigabytes: float) -> int:
    """A random Llama of about this size; gives the bytes of its largest shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / (4 * 2048**2 + 3 * 2048 * 5632)))
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_hidden_layers=layers)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="400MB")
    return max(path.stat().st_size for path in directory.glob("*.safetensors"))


def copy(files: list[Path], to: Path) -> float:
    """Seconds of cp and fsync."""
    to.mkdir()
    begun = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(to)], check=True)
    for path in to.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begun
    shutil.rmtree(to)
    return seconds


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json")
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        largest = make_checkpoint(directory, args.gigabytes)
        files = sorted(directory.glob("*.safetensors"))
        n_bytes = sum(path.stat().st_size for path in files)
        for _ in range(args.repeats):
            os.sync()
            seconds = copy(files, Path(folder) / "copy")
            for path in directory.glob("lit_model*"):
                path.unlink()
            os.sync()
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", WORKER, str(directory)]
            run = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
            rounds.append(json.loads(run.stdout.splitlines()[-1]) | {"cp_fsync": seconds})
    median = {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
    result = {
        "bytes": n_bytes,
        "largest_source_shard_bytes": largest,
        "median": median,
        "copy_phase_share_of_cp_speed": median["cp_fsync"] / median["copy"],
        "with_hashing_share_of_cp_speed": median["cp_fsync"] / median["write"],
        "peak_anon_minus_largest_shard_bytes": median["peak_anon_bytes"] - largest,
        "rounds": rounds,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()},
        "command": " ".join([Path(sys.executable).name, "benchmarks/convert.py", *sys.argv[1:]]),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))


if __name__ == "__main__":
    main()
