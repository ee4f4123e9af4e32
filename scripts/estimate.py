"""Say how much memory a fine-tuning run would take, and which settings fit; no GPU is needed, nothing is written.

Takes the flags of finetune/lora.py (--full true: of finetune/full.py), and --device_memory_gb for a GPU that is
elsewhere. Without --data_dir a row is taken to be one example of --micro_batch_tokens.
"""

from lit_sft.args import EstimateArgs
from lit_sft.cli import run


def main(args: EstimateArgs) -> None:
    """Print the table of --estimate."""
    from lit_sft.fitting import plan_elsewhere, show_estimate

    show_estimate(plan_elsewhere(args))


if __name__ == "__main__":
    run(main)
