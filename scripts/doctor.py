"""Say what a checkpoint is, whether it can be used, and what in it is suspicious; nothing is written.

It may be a download that is not converted yet. Exit code 0: it can be used; 2: it cannot, and why is said.
"""

from lit_sft.args import DoctorArgs
from lit_sft.cli import run


def main(args: DoctorArgs) -> None:
    """Examine ``args.checkpoint_dir``."""
    from lit_sft.doctor import examine

    examine(args)


if __name__ == "__main__":
    run(main)
