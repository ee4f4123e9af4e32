"""Training imports neither what only preparation needs nor what only the command line does."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from test_loop import data  # noqa: F401 (a fixture)

TRAIN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[3].split(","):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from finetune import lora
from lit_sft.args import LoRATrainArgs

lora.main(LoRATrainArgs(data_dir=sys.argv[1], out_dir=sys.argv[2], device="cpu", max_steps=2, global_batch_size=8))
"""


def train(data_dir: Path, out_dir: Path, blocked: tuple[str, ...]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TRAIN, data_dir, out_dir, ",".join(blocked)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_two_steps_without_datasets_and_jsonargparse(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    done = train(data[1], tmp_path / "out", ("datasets", "jsonargparse"))
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [1, 2]
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").is_file()


def test_the_block_can_fail(data: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    done = train(data[1], tmp_path / "out", ("sentencepiece",))
    assert done.returncode == 1 and "sentencepiece is blocked" in done.stderr
