"""Prepare LIMA: 1,030 careful dialogues, from the Hub (gated: accept its licence there) or a file of its format.

First turns only, unless --include_multiturn_conversations true. The data are CC BY-NC-SA or stricter.
"""

from pathlib import Path

from lit_sft.args import PrepareLimaArgs
from lit_sft.cli import run


def main(args: PrepareLimaArgs) -> None:
    """Prepare LIMA, by default into data/lima."""
    from lit_sft.prepare import prepare
    from lit_sft.rows import Columns
    from lit_sft.sources import HubDataset

    source = Path(args.data_file) if args.data_file else HubDataset(args.data_repo_id, token=args.access_token)
    prepare(args, source, "lima", Columns(messages="conversations"), args.include_multiturn_conversations)


if __name__ == "__main__":
    run(main)
