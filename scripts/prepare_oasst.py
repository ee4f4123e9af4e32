"""Prepare Open Assistant's conversations: the best-ranked path through each tree of messages, with its history.

From the Hub (oasst1), or a file: rows of single messages (.parquet, .jsonl) or whole trees (.trees.jsonl, unpacked).
--languages en keeps English. Upstream's validation split is val. The data are Apache-2.0.
"""

from functools import partial

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareOASSTArgs


def main(args: PrepareOASSTArgs) -> None:
    """Prepare Open Assistant's conversations, by default into data/oasst."""
    from lit_sft.prepare import prepare
    from lit_sft.sources import Reshaped, chosen_sources
    from lit_sft.trees import best_paths

    languages = frozenset(code.strip() for code in (args.languages or "").split(",") if code.strip())
    reshape = partial(best_paths, languages=languages)
    source, val = (each and Reshaped(each, reshape) for each in chosen_sources(args))
    prepare(args, source, "oasst", val_source=val)


if __name__ == "__main__":
    run(main)
