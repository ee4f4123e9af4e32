"""Prepare Alpaca's instructions: cleaned, original, Alpaca Libre or those answered by GPT-4 (--variant).

From the Hub, or a file or address of its format. Libre is CC0, the others are CC BY-NC 4.0.
"""

from dataclasses import replace

from lit_sft.cli import run
from lit_sft.prepare_args import PrepareAlpacaArgs

HUB = {"cleaned": "yahma/alpaca-cleaned", "original": "tatsu-lab/alpaca", "gpt4": "vicgalle/alpaca-gpt4"}
LIBRE = "https://raw.githubusercontent.com/mobarski/alpaca-libre/main/data/output/alpaca_libre_ok_tasks_v4.json"


def main(args: PrepareAlpacaArgs) -> None:
    """Prepare Alpaca, by default into data/alpaca or data/alpaca_<variant>."""
    from lit_sft.prepare import prepare
    from lit_sft.sources import chosen_sources

    given = args
    if not (args.data_file or args.data_file_url or args.data_repo_id):
        repo_id, url = HUB.get(args.variant), LIBRE if args.variant == "libre" else None
        given = replace(args, data_repo_id=repo_id, data_file_url=url)
    source, val = chosen_sources(given)
    name = "alpaca" if args.variant == "cleaned" else f"alpaca_{args.variant}"
    prepare(args, source, name, val_source=val)


if __name__ == "__main__":
    run(main)
