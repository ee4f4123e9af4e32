"""Export a model as a directory for transformers: base, merged, fine-tuned, or with an adapter merged on the way.

Sharded safetensors under the Hub's names, config.json, generation_config.json, tokenizer and chat template.
"""

from lit_sft.args import ExportHFArgs
from lit_sft.cli import run


def main(args: ExportHFArgs) -> None:
    """Write ``args.out_dir``."""
    from lit_sft.export import export_hf

    export_hf(args)


if __name__ == "__main__":
    run(main)
