"""Prepare LIMA: 1,030 careful dialogues, from the Hub (gated: accept its licence there) or a file of its format.

First turns only, unless --include_multiturn_conversations true. The data are CC BY-NC-SA or stricter.
"""

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareLimaArgs


def main(args: PrepareLimaArgs) -> None:
    """Prepare LIMA, by default into data/lima."""
    from lit_sft.prepare import prepare
    from lit_sft.sources import chosen_sources

    source, val = chosen_sources(args)
    prepare(args, source, "lima", multiturn=args.include_multiturn_conversations, val_source=val)


if __name__ == "__main__":
    run(main)
