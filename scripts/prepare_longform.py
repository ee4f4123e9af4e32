"""Prepare LongForm: 23,652 long texts with instructions made for them, from the Hub, or a file or address of that.

Upstream's splits are kept: its validation split is val, its test split is not read. With --data_file, --val_file names
the file of the val split; without it one is drawn.
"""

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareLongFormArgs


def main(args: PrepareLongFormArgs) -> None:
    """Prepare LongForm, by default into data/longform."""
    from lit_sft.prepare import prepare
    from lit_sft.sources import chosen_sources

    source, val = chosen_sources(args)
    prepare(args, source, "longform", val_source=val)


if __name__ == "__main__":
    run(main)
