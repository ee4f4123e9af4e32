"""Prepare FLAN: 1.75 million prompts of 66 tasks, from the Hub, or a file or address of its format.

--subsets chooses tasks. Upstream's splits are kept: its test split is val.
"""

from dataclasses import replace

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareFlanArgs


def main(args: PrepareFlanArgs) -> None:
    """Prepare FLAN, by default into data/flan."""
    from lit_sft.hub_datasets import HubDataset
    from lit_sft.prepare import prepare
    from lit_sft.sources import chosen_sources

    subsets = [name.strip() for name in (args.subsets or "").split(",") if name.strip()]
    source, val = (
        # the files of a task are called train/aeslc_10templates_train.jsonl, test/aeslc_10templates_test.jsonl, …
        replace(each, files=tuple(f"{each.split}/{name}_*{each.split}.jsonl" for name in subsets))
        if isinstance(each, HubDataset)
        else each
        for each in chosen_sources(args)
    )
    prepare(args, source, "flan", val_source=val)


if __name__ == "__main__":
    run(main)
