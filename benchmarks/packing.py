"""Share of useful among computed tokens, and the balance of rows, when whole steps are packed.

python benchmarks/packing.py --data_dir data/alpaca

For each global batch and longest row: three shuffled epochs of a prepared data_dir. "Free": rows as long as what is in
them. "Buckets": each row padded to ``bucket_length``, as where shapes must repeat. Balance: the longest row of a step
over its shortest.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measure, print and write."""
    sys.path.insert(0, str(ROOT))
    from lit_sft.args import LoRATrainArgs
    from lit_sft.batches import TrainSteps, plan_rows
    from lit_sft.packing import bucket_length
    from lit_sft.shards import Shards

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, help="prepared data")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    shards, table = Shards(args.data_dir, "train"), []
    for batch_size in (16, 64, 128):
        for row_tokens in (2048, 4096, 8192):
            flags = {"global_batch_size": batch_size, "micro_batch_tokens": row_tokens, "epochs": args.epochs}
            steps = TrainSteps(shards, LoRATrainArgs(data_dir=args.data_dir, **flags))
            useful = bucketed = n_rows = 0
            balance, shapes = [], set()
            for number in range(1, steps.max_steps + 1):
                packed = plan_rows(shards, steps.examples(number), row_tokens, None, share_prefix=False)
                rows = [int(shards.lengths[plan.examples].sum()) for plan in packed]
                useful, n_rows = useful + sum(rows), n_rows + len(rows)
                bucketed += sum(map(bucket_length, rows))
                shapes |= set(map(bucket_length, rows))
                balance.append(max(rows) / min(rows))
            table.append(
                {
                    "global_batch_size": batch_size,
                    "micro_batch_tokens": row_tokens,
                    "rows_a_step": n_rows / steps.max_steps,
                    "free": 1.0,
                    "buckets": useful / bucketed,
                    "shapes": len(shapes),
                    "fixed": useful / (n_rows * row_tokens),
                    "worst_balance": max(balance),
                }
            )
    facts = {"examples": len(shards), "tokens_an_example": float(shards.lengths.float().mean()), "table": table}
    (ROOT / "benchmarks" / "results" / "packing.json").write_text(json.dumps(facts, indent=2) + "\n")
    print("batch  row   rows/step  useful: free  buckets (shapes)  fixed rows   longest/shortest row")
    for line in table:
        print(
            f"{line['global_batch_size']:5} {line['micro_batch_tokens']:5} {line['rows_a_step']:9.1f} "
            f"{line['free']:12.1%} {line['buckets']:9.1%} ({line['shapes']:2}) {line['fixed']:13.1%} "
            f"{line['worst_balance']:16.3f}"
        )


if __name__ == "__main__":
    main()
