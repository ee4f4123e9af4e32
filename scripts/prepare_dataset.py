"""Prepare any other data: a .json, .jsonl, .csv, .tsv or .parquet file, or a dataset on the Hub.

Recognises Alpaca's columns, prompt/completion and lists of messages by name; the --*_column flags map any others.
"""

from pathlib import Path

from lit_sft.args import PrepareDatasetArgs
from lit_sft.cli import run


def main(args: PrepareDatasetArgs) -> None:
    """Prepare the data, by default into data/<name of the file or dataset>."""
    from lit_sft.prepare import prepare
    from lit_sft.rows import Columns
    from lit_sft.sources import HubDataset

    if args.data_file:
        source, name = Path(args.data_file), Path(args.data_file).stem
    else:
        source = HubDataset(args.data_repo_id, args.data_config, args.data_split, args.access_token)
        name = args.data_repo_id.rpartition("/")[2]
    columns = Columns(args.instruction_column, args.input_column, args.output_column, args.messages_column)
    prepare(args, source, name, columns)


if __name__ == "__main__":
    run(main)
