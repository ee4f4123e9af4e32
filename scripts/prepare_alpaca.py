"""Prepare Alpaca's instructions (cleaned): from the Hub, a file of its format, or the address of one.

The data are CC BY-NC 4.0.
"""

from pathlib import Path

from lit_sft.args import PrepareAlpacaArgs
from lit_sft.cli import run


def main(args: PrepareAlpacaArgs) -> None:
    """Prepare Alpaca, by default into data/alpaca."""
    from lit_sft.hub import fetch_url
    from lit_sft.prepare import prepare
    from lit_sft.rows import Columns
    from lit_sft.sources import HubDataset

    if args.data_file:
        source = Path(args.data_file)
    elif args.data_file_url:
        name = args.data_file_name or args.data_file_url.rpartition("/")[2]
        source = fetch_url(args.data_file_url, Path("data") / Path(name).name)
    else:
        source = HubDataset(args.data_repo_id, token=args.access_token)
    prepare(args, source, "alpaca", Columns("instruction", "input", "output"))


if __name__ == "__main__":
    run(main)
