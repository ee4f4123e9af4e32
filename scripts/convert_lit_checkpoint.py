"""Lit-GPT's name for the way back to the Hub's weights: one .bin or .safetensors file, or a directory for transformers.

It does what scripts/export_hf.py does, under the flags that Lit-GPT had.
"""

from lit_sft.args import ConvertLitArgs
from lit_sft.cli import run


def main(args: ConvertLitArgs) -> None:
    """Write ``args.output_path``."""
    from lit_sft.export import convert_lit_checkpoint

    convert_lit_checkpoint(args)


if __name__ == "__main__":
    run(main)
