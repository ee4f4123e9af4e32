"""Let a model answer: a base model, one with a LoRA adapter, or a fine-tuned or merged one.

Prompt style and stop ids are those that the run was trained with. The answer is printed as it is made.
"""

from lit_sft.args import GenerateArgs
from lit_sft.cli import run


def main(args: GenerateArgs) -> None:
    """Print ``args.num_samples`` answers to ``args.prompt``."""
    from lit_sft.generate import answers

    for stream in answers(args):
        for piece in stream:
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
