"""Export a model as a GGUF file for llama.cpp, its tokenizer inside; an adapter is merged on the way.

Needs the gguf package: pip install 'lit-sft[gguf]'.
"""

from lit_sft.args import ExportGGUFArgs
from lit_sft.cli import run


def main(args: ExportGGUFArgs) -> None:
    """Write ``args.out_file``."""
    from lit_sft.export_gguf import export_gguf

    export_gguf(args)


if __name__ == "__main__":
    run(main)
