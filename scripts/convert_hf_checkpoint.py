"""Convert a downloaded checkpoint: its weights under our names, its shape as model_config.json.

Reads .bin and .safetensors, single or sharded, one tensor at a time; the downloaded files stay as they are.
"""

from lit_sft.args import ConvertArgs
from lit_sft.cli import run


def main(args: ConvertArgs) -> None:
    """Convert ``args.checkpoint_dir`` in place."""
    if args.verify:
        from lit_sft.verify import convert_verified

        convert_verified(args)
    else:
        from lit_sft.convert import convert_checkpoint

        convert_checkpoint(args)


if __name__ == "__main__":
    run(main)
