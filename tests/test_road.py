"""The commands of README and of the article of 2023, as written, as real processes against a Hub on this machine."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_hf_llama
from hub_server import HubServer, Repo

ARTICLE = """
python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf
python scripts/convert_hf_checkpoint.py --checkpoint_dir meta-llama/Llama-2-7b-hf
python scripts/prepare_lima.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --max_seq_length 2048
python scripts/prepare_lima.py --max_seq_length 2048
python finetune/lora.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --data_dir data/lima
python scripts/prepare_csv.py --csv_dir MyDataset.csv --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf
python scripts/prepare_dataset.py --data_repo_id GAIR/lima --destination_path data/any
python finetune/lora.py --data_dir data/lima --override_max_seq_length 400 --max_iters 30 --out_dir out/lima
python scripts/generate.py --adapter_dir out/lima --prompt "What food do llamas eat?" --max_new_tokens 20
python scripts/merge_lora.py --lora_path out/lima --out_dir checkpoints/mine/merged
python scripts/generate.py --checkpoint_dir mine/merged --max_new_tokens 20
"""


def rows_of_lima() -> list[dict]:
    """LIMA's shape: lists of turns in turn, some with several, some ending on a question."""
    with (ROOT / "demo" / "instructions.csv").open(newline="", encoding="utf-8") as file:
        cells = [(row["instruction"], row["output"]) for row in csv.DictReader(file)][:40]
    single = [{"conversations": list(pair), "source": "stackexchange"} for pair in cells[:30]]
    return single + [
        {"conversations": [*cells[i], *cells[i + 1], cells[i + 2][0]][: 4 + i % 2], "source": "multi_turn"}
        for i in range(30, 38)
    ]


@pytest.mark.slow
def test_the_articles_commands_run_as_written(tmp_path: Path, tokenizer_model: bytes) -> None:
    make_hf_llama(tmp_path / "model", tokenizer_model)
    lima = "".join(json.dumps(row) + "\n" for row in rows_of_lima()).encode()
    script = b"raise SystemExit('the code of a repository was run')"
    models = {"meta-llama/Llama-2-7b-hf": Repo.from_folder(tmp_path / "model")}
    datasets = {"GAIR/lima": Repo({"lima.py": script, "train.jsonl": lima, "test.jsonl": lima})}
    (tmp_path / "MyDataset.csv").write_bytes((ROOT / "demo" / "instructions.csv").read_bytes())
    for folder in ("scripts", "finetune"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    with HubServer(models, datasets) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment.pop("HF_TOKEN", None)
        for line in ARTICLE.strip().splitlines():
            run = subprocess.run(shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"
    assert json.loads((tmp_path / "data/lima/manifest.json").read_text())["facts"]["n_train"] == 35
    assert (tmp_path / "out/lora/adapter/adapter.safetensors").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/lima/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 5))  # 30 examples in steps of 35 // 4
