"""Prepare any other data: a .json, .jsonl, .csv, .tsv, .parquet or .arrow file, its address, a folder that datasets'
save_to_disk wrote, or a dataset on the Hub; or several of them: --mix names a YAML list.

Recognises Alpaca's columns, prompt/completion, lists of messages (OpenAI's, ShareGPT's) and plain text, and says which;
the --*_column flags map any others.
"""

from pathlib import Path

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareDatasetArgs


def main(args: PrepareDatasetArgs) -> None:
    """Prepare the data, by default into data/<name of the file or dataset>."""
    from lit_sft.mixing import read_mix
    from lit_sft.prepare import prepare, prepare_mix
    from lit_sft.sources import chosen_sources, given_columns

    if args.mix:
        prepare_mix(args, read_mix(Path(args.mix), args), Path(args.mix).stem)
        return
    source, val = chosen_sources(args)
    name = args.data_repo_id.rpartition("/")[2] if args.data_repo_id else Path(args.data_file or source).stem
    prepare(args, source, name, given_columns(args), val_source=val)


if __name__ == "__main__":
    run(main)
