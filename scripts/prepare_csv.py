"""Prepare a CSV of instructions: columns instruction, input (may be empty or absent) and output, or named by flags.

A file, its address, or a dataset on the Hub:

python scripts/prepare_csv.py --csv_path MyDataset.csv --checkpoint_dir checkpoints/ORG/MODEL
"""

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareCSVArgs


def main(args: PrepareCSVArgs) -> None:
    """Prepare the data, by default into data/csv."""
    from lit_sft.prepare import prepare
    from lit_sft.sources import chosen_sources, given_columns

    source, val = chosen_sources(args)
    prepare(args, source, "csv", given_columns(args), val_source=val)


if __name__ == "__main__":
    run(main)
