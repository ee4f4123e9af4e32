"""Export a LoRA adapter as a directory that peft loads beside the Hub's model.

Where the Hub's file fuses query, key and value, their adapters become one of the summed rank.
"""

from lit_sft.args import ExportPeftArgs
from lit_sft.cli import run


def main(args: ExportPeftArgs) -> None:
    """Write ``args.out_dir``."""
    from lit_sft.peft import export_peft

    export_peft(args)


if __name__ == "__main__":
    run(main)
