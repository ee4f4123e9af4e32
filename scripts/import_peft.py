"""Import a PEFT adapter: what peft saved becomes an adapter for generate, merge_lora and the exports.

What our adapters cannot hold (DoRA, saved modules, adapted embeddings, …) is refused by name.
"""

from lit_sft.args import ImportPeftArgs
from lit_sft.cli import run


def main(args: ImportPeftArgs) -> None:
    """Write ``args.out_dir``."""
    from lit_sft.peft_import import import_peft

    import_peft(args)


if __name__ == "__main__":
    run(main)
