"""Check a directory that the toolkit wrote: a checkpoint, prepared data, a run, an adapter or a saved state.

Every file's size and sha256, indexes, counts, fingerprints; a line for each, exit code 2 when one is damaged.
"""

from lit_sft.args import VerifyArgs
from lit_sft.cli import run


def main(args: VerifyArgs) -> None:
    """Check ``args.path`` and print what was found."""
    from pathlib import Path

    from lit_sft.errors import InputError
    from lit_sft.integrity import check_directory

    findings = []
    for finding in check_directory(Path(args.path)):
        print(finding)
        findings.append(finding)
    if damaged := [finding for finding in findings if finding.problem]:
        raise InputError(f"{args.path}: {len(damaged)} of {len(findings)} checks failed; the first: {damaged[0]}")


if __name__ == "__main__":
    run(main)
