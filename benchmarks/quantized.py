"""What NF4 and FP8 cost in exactness: one product, a whole model's loss, and loss curves beside bf16's.

python benchmarks/quantized.py --data_dir data/alpaca [--steps 100] [--out FILE]

``data_dir``: any data prepared with a tokenizer of at most 50,304 ids; their examples train LoRA r 16 on a random 31M
GPT-NeoX shape, 8 examples a step, on the CPU. Every curve starts from the same weights and sees the same examples.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from engine import Training, lora_args, random_model
from shapes import SHAPES

from lit_sft.batches import TrainSteps
from lit_sft.quantize import quantized
from lit_sft.runtime import BASE_DTYPE
from lit_sft.shards import Shards

SHAPE = SHAPES["pythia-31m"]
CURVES = {"fp32": ("32-true", None), "bf16": ("bf16-true", None), "nf4": ("bf16-true", "nf4"),
          "nf4-dq": ("bf16-true", "nf4-dq"), "fp8": ("bf16-true", "fp8")}  # fmt: skip


def error_of_one_product(kind: str) -> float:
    """Relative error of x Wᵀ against fp64, for random normal x (512, 1024) and W (1024, 1024)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 1024, generator=generator) for n in (512, 1024))
    expected = x.double() @ weight.double().T
    return float((quantized(weight, kind)(x) - expected).norm() / expected.norm())


def curve(data_dir: Path, name: str, n_steps: int) -> list[float]:
    """The loss of each step."""
    precision, quantize = CURVES[name]
    args = lora_args(data_dir, precision=precision, global_batch_size=8, micro_batch_tokens=4096, device="cpu")
    model = random_model(SHAPE, "cpu", BASE_DTYPE[precision], quantize)
    training = Training(model, args, compiled=False)
    steps = TrainSteps(Shards(data_dir, "train"), args, share_prefix=True)
    return [record["loss"] for record in training.run(steps, args, 1, n_steps)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantized.json")
    args = parser.parse_args()
    products = {kind: error_of_one_product(kind) for kind in ("nf4", "nf4-dq", "fp8")}
    curves = {}
    for name in CURVES:
        curves[name] = curve(args.data_dir, name, args.steps)
        print(f"{name:7} step 1 {curves[name][0]:.5f}, step {args.steps} {curves[name][-1]:.5f}", flush=True)
    table = {}
    for name, losses in curves.items():
        apart = [abs(a - b) for a, b in zip(losses, curves["bf16"], strict=True)]
        table[name] = {
            "first_loss_from_fp32": losses[0] - curves["fp32"][0],
            "mean_apart_from_bf16": statistics.mean(apart),
            "most_apart_from_bf16": max(apart),
            "mean_of_last_ten": statistics.mean(losses[-10:]),
        }
    args.out.write_text(json.dumps({"products": products, "table": table, "curves": curves}, indent=2) + "\n")
    print(json.dumps({"products": products, "table": table}, indent=2))


if __name__ == "__main__":
    main()
