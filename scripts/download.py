"""Download a checkpoint from the Hugging Face Hub into checkpoints/<repo_id>/.

Without --repo_id the known models are listed. What is complete already is not fetched again, also offline.
"""

from lit_sft.args import DownloadArgs
from lit_sft.cli import run


def main(args: DownloadArgs) -> None:
    """List the known models, or download one."""
    from lit_sft.hub import download, list_models

    if args.repo_id is None:
        print(list_models())
    else:
        download(args)


if __name__ == "__main__":
    run(main)
