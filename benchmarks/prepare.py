"""How fast data are prepared, side by side in one run: lit_sft, litgpt's own dataset classes, TRL's tokenization.

python benchmarks/prepare.py --data_file alpaca.json --tokenizer_dir checkpoints/ORG/MODEL

The same file of Alpaca's shape, the same tokenizer. litgpt and TRL are installed into a virtual environment of the
benchmark's own. Timed is what lies between the file's path and every example tokenized: reading, rendering (TRL gets
its prompts rendered, for nothing), tokenizing, and what the tool writes. Imports and TRL's model are not timed. The
order of the tools is turned with every repetition; medians are printed, all numbers go into benchmarks/results/.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# litgpt 0.5.13 needs requests and does not say so
PACKAGES = [
    "torch==2.13.0",
    "litgpt==0.5.13",
    "trl==1.16.0",
    "requests",
    "datasets",
    "sentencepiece",
    "protobuf",
    "transformers",
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
)


def run_lit_sft(data_file: Path, checkpoint_dir: Path, num_workers: int) -> dict:
    """The whole command: checks, tokens, shards, hashes."""
    from lit_sft.prepare import prepare
    from lit_sft.prepare_args import PrepareAlpacaArgs
    from lit_sft.rows import Columns

    os.chdir(data_file.parent)
    shutil.rmtree("data", ignore_errors=True)
    args = PrepareAlpacaArgs(checkpoint_dir=str(checkpoint_dir), prompt_style="alpaca", num_workers=num_workers)
    started = time.perf_counter()
    folder = prepare(args, data_file, "alpaca", Columns("instruction", "input", "output"))
    seconds = time.perf_counter() - started
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    return {"seconds": seconds, "tokens": facts["n_tokens"], "examples": facts["n_train"] + facts["n_val"]}


def run_litgpt(data_file: Path, checkpoint_dir: Path, num_workers: int) -> dict:
    """Its Alpaca data module, every item once; with several processes through the DataLoader that it makes itself."""
    from litgpt.data import Alpaca
    from litgpt.tokenizer import Tokenizer
    from torch.utils.data import DataLoader

    tokenizer = Tokenizer(checkpoint_dir)
    started = time.perf_counter()
    module = Alpaca(download_dir=data_file.parent, file_name=data_file.name, num_workers=num_workers)
    module.connect(tokenizer, batch_size=64, max_seq_length=4096)
    module.setup()
    tokens = examples = 0
    for dataset in (module.train_dataset, module.test_dataset):
        if num_workers == 1:
            counts = [
                item["token_counts"]["raw_plus_prompt_template"]
                for item in map(dataset.__getitem__, range(len(dataset)))
            ]
        else:  # its loaders pad, which costs it time; here they do not
            loader = DataLoader(dataset, batch_size=64, num_workers=num_workers, collate_fn=list)
            counts = [item["token_counts"]["raw_plus_prompt_template"] for batch in loader for item in batch]
        tokens, examples = tokens + sum(counts), examples + len(counts)
    return {"seconds": time.perf_counter() - started, "tokens": tokens, "examples": examples}


def run_trl(data_file: Path, checkpoint_dir: Path, num_workers: int) -> dict:
    """SFTTrainer's own preparation of a dataset of prompts and completions, as it is made with a trainer."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    cache = data_file.parent / "hf"
    shutil.rmtree(cache, ignore_errors=True)
    datasets.config.HF_DATASETS_CACHE = cache
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    rendered = data_file.with_suffix(".rendered.jsonl")
    with rendered.open("w") as file:
        for row in json.loads(data_file.read_text()):
            prompt = ALPACA[bool(row["input"])].format(**row)
            file.write(json.dumps({"prompt": prompt, "completion": row["output"]}) + "\n")
    config = SFTConfig(
        output_dir=str(data_file.parent / "trl"),
        dataset_num_proc=num_workers if num_workers > 1 else None,
        max_length=4096,
        report_to=[],
        bf16=False,
        use_cpu=True,
    )
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(rendered), split="train", cache_dir=str(cache))
    seconds = time.perf_counter() - started
    prepare, taken = SFTTrainer._prepare_dataset, []

    def timed(*args: object, **kwargs: object) -> object:
        began = time.perf_counter()
        result = prepare(*args, **kwargs)
        taken.append(time.perf_counter() - began)
        return result

    SFTTrainer._prepare_dataset = timed
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {"seconds": seconds + sum(taken), "tokens": tokens, "examples": len(trainer.train_dataset)}


RUNS = {"lit_sft": run_lit_sft, "litgpt": run_litgpt, "trl": run_trl}


def measured(tool: str, python: Path, arguments: list[str]) -> dict:
    """Run a tool in a process of its own; adds the peak of the resident memory of it and its children together."""
    command = [str(python), __file__, "--run", tool, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(ROOT)} if tool == "lit_sft" else {}
    load, peak = os.getloadavg()[0], 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        while running.poll() is None:
            peak = max(peak, sum(map(resident, family(running.pid))))
            time.sleep(0.2)
        out.seek(0), err.seek(0)
        if running.returncode:
            sys.exit(f"{tool} failed:\n{err.read()[-3000:]}")
        result = json.loads(out.read().strip().splitlines()[-1])
    return result | {"tokens_per_s": result["tokens"] / result["seconds"], "peak_rss_mb": peak, "load_before": load}


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def resident(pid: int) -> float:
    """Resident memory in MB that is the process's own; what it shares is counted in part, by who shares it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):
        return 0


def make_data(source: Path, n: int, path: Path) -> None:
    """``n`` rows of Alpaca's shape: those of ``source`` again and again, no two with the same words."""
    rows, draw = json.loads(source.read_text()), random.Random(0)
    rows = [row for row in rows if row["output"].strip()]
    words = [word for row in rows for word in row["output"].split()]
    made = []
    for i in range(n):
        row = dict(rows[i % len(rows)])
        varied = row["output"].split(" ")
        for _ in range(len(varied) // 10):  # a tenth of the words are others'
            varied[draw.randrange(len(varied))] = draw.choice(words)
        made.append(row | {"instruction": f"{row['instruction']} ({i})", "output": " ".join(varied)})
    path.write_text(json.dumps(made))


def make_checkpoint(tokenizer_dir: Path, directory: Path, python: Path) -> None:
    """A tiny model around the tokenizer: downloaded files, so to say, and the conversion."""
    shutil.copytree(tokenizer_dir, directory)
    code = (
        "import sys; from transformers import LlamaConfig, LlamaForCausalLM as Model;"
        "Model(LlamaConfig(vocab_size=65536, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        "num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096)).save_pretrained(sys.argv[1])"
    )
    subprocess.run([python, "-c", code, directory], check=True, capture_output=True)
    convert = [sys.executable, ROOT / "scripts" / "convert_hf_checkpoint.py", "--checkpoint_dir", directory]
    subprocess.run(convert, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_file", type=Path, required=True, help="JSON of instruction, input, output")
    parser.add_argument(
        "--tokenizer_dir", type=Path, required=True, help="folder with tokenizer.model or tokenizer.json"
    )
    parser.add_argument("--examples", type=int, default=52_000, help="rows to make of the file, with variation")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 2], help="processes, for each tool")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-benchmark", help="environment of litgpt and TRL")
    parser.add_argument("--run", choices=RUNS, help="what this process measures")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(RUNS[args.run](args.data_file, args.tokenizer_dir, args.num_workers[0])))
        return
    python = args.venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", args.venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data_file, checkpoint_dir = Path(folder) / "alpaca.json", Path(folder) / "checkpoints" / "test" / "model"
        make_data(args.data_file, args.examples, data_file)
        make_checkpoint(args.tokenizer_dir, checkpoint_dir, python)
        kinds = [(tool, n) for n in args.num_workers for tool in RUNS]
        for repeat in range(args.repeats):
            for tool, n in kinds[repeat % len(kinds) :] + kinds[: repeat % len(kinds)]:
                arguments = ["--data_file", data_file, "--tokenizer_dir", checkpoint_dir, "--num_workers", n]
                result = measured(
                    tool, Path(sys.executable) if tool == "lit_sft" else python, list(map(str, arguments))
                )
                results.setdefault(f"{tool}, {n} processes", []).append(result)
                print(
                    f"{tool}, {n}: {result['tokens_per_s']:,.0f} tokens/s, load {result['load_before']:.1f}", flush=True
                )
    medians = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in results.items()}
    versions = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    named = ("litgpt", "trl", "transformers", "tokenizers", "sentencepiece", "datasets", "torch")
    summary = {
        "examples": args.examples,
        "tokenizer": args.tokenizer_dir.name,
        "cores": os.cpu_count(),
        "versions": {v.partition("==")[0]: v.partition("==")[2] for v in versions.split() if v.split("==")[0] in named},
        "median_tokens_per_s": medians,
        "ratios": {
            f"lit_sft / {tool}, {n} processes": medians[f"lit_sft, {n} processes"] / medians[f"{tool}, {n} processes"]
            for n in args.num_workers
            for tool in ("litgpt", "trl")
        },
        "runs": results,
    }
    path = ROOT / "benchmarks" / "results" / f"prepare_{args.tokenizer_dir.name}.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    for name, runs in results.items():
        memory = statistics.median(run["peak_rss_mb"] for run in runs)
        print(f"{name:24} {medians[name]:12,.0f} tokens/s {memory:8,.0f} MB")
    for name, ratio in summary["ratios"].items():
        print(f"{name:32} {ratio:.2f}")


if __name__ == "__main__":
    main()
