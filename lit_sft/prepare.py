"""Raw data → shards: read, encode, cut, split, write, report."""

from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from lit_sft.args import PrepareArgs
from lit_sft.atomic import Manifest, publish_directory, replaceable
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.layout import MANIFEST, check_checkpoint_dir, only_checkpoint_dir
from lit_sft.prompts import CHAT_TEMPLATE, Sample
from lit_sft.rows import Columns
from lit_sft.samples import encode_sample, stop_ids
from lit_sft.shards import KIND, Example, write_shards
from lit_sft.sources import HubDataset, read_samples
from lit_sft.tokenizer import Tokenizer


def prepare(args: PrepareArgs, source: Path | HubDataset, name: str, columns: Columns, multiturn: bool = True) -> Path:
    """Make a data_dir of ``source`` for a checkpoint, and print what is in it; gives the directory.

    Raises InputError, with nothing written, when the data or the arguments do not allow it.
    """
    checkpoint_dir = check_checkpoint_dir(args.checkpoint_dir or only_checkpoint_dir())
    if args.checkpoint_dir is None:
        print(f"using {checkpoint_dir}, the only converted checkpoint")
    if args.ignore_index is not None:
        print("--ignore_index has no effect: labels are stored as a mask, by position")
    tokenizer = Tokenizer(checkpoint_dir)
    block_size = ModelConfig.from_dir(checkpoint_dir).block_size
    max_seq_length = min(args.max_seq_length or block_size, block_size)
    if max_seq_length < (args.max_seq_length or 0):
        print(f"--max_seq_length {args.max_seq_length} is beyond the model's context; {block_size} is used")
    style = args.prompt_style or (CHAT_TEMPLATE if tokenizer.chat_template else "alpaca")
    facts = {
        "checkpoint_dir": str(checkpoint_dir),
        "tokenizer": tokenizer.fingerprint,
        "prompt_style": style,
        "stop_ids": stop_ids(style, tokenizer),
        "mask_prompt": args.mask_prompt,
        "max_seq_length": max_seq_length,
        "arguments": {k: v for k, v in asdict(args).items() if k not in ("access_token", "debug")},
    }
    destination = Path(args.destination_path or Path("data") / name)
    _check_destination(destination)
    samples, skipped, description = read_samples(source, columns, args.on_error, multiturn)
    print(f"reading {description}")
    for problem in skipped[:10]:
        print(f"skipped: {problem}")
    progress = tqdm(samples, "tokenizing", disable=None)
    examples = [_encode(sample, style, tokenizer, args.mask_prompt) for sample in progress]
    kept, n_cut = fit_lengths(samples, examples, max_seq_length, args.on_overflow, block_size)
    train, val = split(kept, args.val_split_fraction, args.seed)
    facts |= {"n_train": len(train), "n_val": len(val), "n_skipped": len(skipped), "n_cut": n_cut}
    facts |= statistics(examples, kept)
    if (destination / MANIFEST).exists():
        print(f"replacing what {destination} held")
    with publish_directory(destination, KIND) as folder:
        names = write_shards(folder, "train", train) + write_shards(folder, "val", val)
        Manifest(KIND, facts).write(folder, names)
    print(summary(destination, facts))
    return destination


def _check_destination(destination: Path) -> None:
    """Refuse what is in the way before the work: also what somebody keeps beside shards, which go as a whole."""
    if not replaceable(destination, KIND):
        raise InputError(f"{destination} exists and is not a {KIND} directory of lit_sft; remove it or name another")
    if (destination / MANIFEST).is_file():
        own = {MANIFEST, *Manifest.read(destination).files}
        if others := sorted({path.name for path in destination.iterdir()} - own):
            raise InputError(
                f"{destination} holds {others[0]!r} beside earlier shards; move it, or name another folder"
            )


def _encode(sample: Sample, style: str, tokenizer: Tokenizer, mask_prompt: bool) -> Example:
    try:
        return encode_sample(sample, style, tokenizer, mask_prompt)
    except InputError as error:
        raise InputError(f"{sample.place}: {error}") from None


def fit_lengths(
    samples: list[Sample], examples: list[Example], max_seq_length: int, on_overflow: str, block_size: int
) -> tuple[list[Example], int]:
    """Apply the overflow rule; gives the examples kept and how many of them lost part of a response.

    ``truncate`` cuts the tail, back to the last label that remains; the first prompt is never cut, and an example
    that would keep no part of a response is refused. ``drop`` leaves every too long example out, ``error`` refuses any.
    """
    kept, lost, n_cut = [], [], 0
    for sample, example in zip(samples, examples, strict=True):
        if example.n_needed <= max_seq_length:
            kept.append(example.cut(max_seq_length))  # what may go here follows the last end token
        elif on_overflow == "truncate" and example.n_prompt < max_seq_length:
            rest = example.cut(max_seq_length)
            kept.append(rest.cut(rest.n_needed))
            n_cut += 1
        else:
            lost.append((sample.place, example))
    if lost and on_overflow != "drop":
        needed = max(e.n_prompt + 1 if on_overflow == "truncate" else e.n_needed for _, e in lost)
        what = "keep no label when cut" if on_overflow == "truncate" else "are longer than that"
        places = ", ".join(place for place, _ in lost[:3]) + (", …" if len(lost) > 3 else "")
        raise InputError(
            f"--max_seq_length {max_seq_length}: {len(lost)} examples {what} ({places}); "
            + (f"--max_seq_length {needed} keeps" if needed <= block_size else f"only a context of {needed} would keep")
            + f" all, --on_overflow drop leaves out all {len(lost) + n_cut} that are too long"
        )
    if not kept:
        needed = min(e.n_needed for _, e in lost)
        raise InputError(f"--max_seq_length {max_seq_length}: no example is left; the shortest has {needed} tokens")
    return kept, n_cut


def split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """A seeded split into train and val; with a fraction above 0 and two examples or more, each gets at least one."""
    n_val = min(max(int(len(examples) * fraction), fraction > 0), len(examples) - 1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[n_val:]], [examples[i] for i in order[:n_val]]


def statistics(examples: list[Example], kept: list[Example]) -> dict:
    """Counts of tokens, kept and lost, and lengths before any cut; pN: at least N % of the examples are not longer."""
    lengths = sorted(len(example.input_ids) for example in examples)
    n_tokens = sum(len(example.input_ids) for example in kept)
    percentiles = {f"p{p}": lengths[-(-len(lengths) * p // 100) - 1] for p in (50, 95, 99)}
    return {
        "n_tokens": n_tokens,
        "n_labels": sum(sum(example.labels_mask) for example in kept),
        "n_tokens_cut": sum(lengths) - n_tokens,
        "n_dropped": len(examples) - len(kept),
        "length": {**percentiles, "max": lengths[-1]},
    }


def summary(directory: Path, facts: dict) -> str:
    """What was prepared, in a few lines."""
    length = facts["length"]
    return (
        f"{directory}: {facts['n_train']} train and {facts['n_val']} val examples, "
        f"prompt style {facts['prompt_style']}\n"
        f"  tokens per example: p50 {length['p50']}, p95 {length['p95']}, p99 {length['p99']}, max {length['max']}; "
        f"max_seq_length {facts['max_seq_length']}\n"
        f"  {facts['n_tokens']:,} tokens, {facts['n_labels']:,} of them labels; {facts['n_cut']} examples cut, "
        f"{facts['n_dropped']} dropped ({facts['n_tokens_cut']:,} tokens lost), {facts['n_skipped']} skipped"
    )
