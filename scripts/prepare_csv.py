"""Prepare a CSV of instructions: columns instruction, input (may be empty or absent) and output, or named by flags.

python scripts/prepare_csv.py --csv_path MyDataset.csv --checkpoint_dir checkpoints/ORG/MODEL
"""

from pathlib import Path

from lit_sft.args import PrepareCSVArgs
from lit_sft.cli import run


def main(args: PrepareCSVArgs) -> None:
    """Prepare ``args.data_file``, by default into data/csv."""
    from lit_sft.errors import InputError
    from lit_sft.prepare import prepare
    from lit_sft.rows import Columns

    if args.data_file is None:
        raise InputError("--csv_path is missing; name the CSV to prepare")
    columns = Columns(args.instruction_column, args.input_column, args.output_column, args.messages_column)
    prepare(args, Path(args.data_file), "csv", columns)


if __name__ == "__main__":
    run(main)
