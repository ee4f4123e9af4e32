"""Prepare Dolly: 15,011 instructions by Databricks' employees, from the Hub, or a file or address of its format.

Its context becomes the input. The data are CC BY-SA 3.0.
"""

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareDollyArgs


def main(args: PrepareDollyArgs) -> None:
    """Prepare Dolly, by default into data/dolly."""
    from lit_sft.prepare import prepare
    from lit_sft.sources import chosen_sources

    source, val = chosen_sources(args)
    prepare(args, source, "dolly", val_source=val)


if __name__ == "__main__":
    run(main)
