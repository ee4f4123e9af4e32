"""Prepare a CSV of instructions: columns instruction, input (may be empty or absent) and output.

python scripts/prepare_csv.py --csv_path MyDataset.csv --checkpoint_dir checkpoints/ORG/MODEL
"""

from pathlib import Path

from lit_sft.args import PrepareArgs
from lit_sft.cli import run


def main(args: PrepareArgs) -> None:
    """Prepare ``args.data_file``, by default into data/csv."""
    from lit_sft.errors import InputError
    from lit_sft.prepare import prepare
    from lit_sft.rows import Columns

    if args.data_file is None:
        raise InputError("--csv_path is missing; name the CSV to prepare")
    prepare(args, Path(args.data_file), "csv", Columns())


if __name__ == "__main__":
    run(main)
