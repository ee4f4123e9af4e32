"""Merge a LoRA adapter into its base model, as a checkpoint that every command takes.

What the adapter is, is read from its own config. The logits before and after must agree, or nothing is written.
"""

from lit_sft.args import MergeArgs
from lit_sft.cli import run


def main(args: MergeArgs) -> None:
    """Merge ``args.lora_path`` and write ``args.out_dir``."""
    from lit_sft.merge import merge_checkpoint

    merge_checkpoint(args)


if __name__ == "__main__":
    run(main)
