"""Raw data → shards: read, encode, select, write, report."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from lit_sft.applied import check_as_written, template_notices
from lit_sft.atomic import Manifest, publish_directory, replaceable, sweep
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError, Interrupted, RunFailed
from lit_sft.layout import MANIFEST, REPORT, SKIPPED, check_checkpoint_dir, only_checkpoint_dir, work_dir
from lit_sft.locks import lock
from lit_sft.mixing import MixedSource, with_flags
from lit_sft.prepare_args import PrepareArgs
from lit_sft.prompts import Sample, resolve_style, style_label
from lit_sft.redact import without_address_secrets
from lit_sft.report import show_examples, write_data_report
from lit_sft.row_fields import parse_ignored
from lit_sft.rows import Columns
from lit_sft.samples import default_style, is_text, stop_ids
from lit_sft.selection import Selection, select
from lit_sft.shards import FACTS, KIND, write_shards
from lit_sft.sources import SHOWN, SampleStream, Source
from lit_sft.spool import Encoding, Spool, fill
from lit_sft.styles import AS_WRITTEN, CHAT_TEMPLATE, PLAIN
from lit_sft.tokenizer import Tokenizer

MOST_WORKERS = 8
DATA_FLAGS = (
    "data_file", "data_file_url", "data_repo_id", "data_config", "data_split", "mix", "variant", "subsets", "languages"
)  # fmt: skip
"""Flags that say which data are read."""
MOST_EXAMINED = 1000
"""Examples whose end tokens are collected."""


def prepare(
    args: PrepareArgs,
    source: Source,
    name: str,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    multiturn: bool = True,
    val_source: Source | None = None,
) -> Path:
    """Make a data_dir of ``source`` for a checkpoint, and print what is in it; gives the directory.

    ``val_source`` is the val split, as it is; without one it is drawn from ``source``.

    Raises InputError, with nothing written, when the data or the arguments do not allow it.
    """
    ignored = parse_ignored(args.ignore_fields)
    streams = [
        SampleStream(each, columns, multiturn, args.system_prompt, ignored) for each in (source, val_source) if each
    ]
    return prepare_mix(args, with_flags(args, streams), name)


def prepare_mix(args: PrepareArgs, sources: list[MixedSource], name: str) -> Path:
    """``prepare`` of several sources together."""
    checkpoint_dir = check_checkpoint_dir(args.checkpoint_dir or only_checkpoint_dir())
    if args.checkpoint_dir is None:
        print(f"using {checkpoint_dir}, the only converted checkpoint")
    if args.ignore_index is not None:
        print("--ignore_index has no effect: labels are stored as a mask, by position")
    tokenizer = Tokenizer(checkpoint_dir)
    for notice in tokenizer.notices():
        print(f"notice: {notice}")
    config = ModelConfig.from_dir(checkpoint_dir)
    block_size = config.block_size
    max_seq_length = min(args.max_seq_length or block_size, block_size)
    if max_seq_length < (args.max_seq_length or 0):
        print(f"--max_seq_length {args.max_seq_length} is beyond the model's context; {block_size} is used")
    style = PLAIN if _is_plain_text(args, sources, tokenizer) else _chosen_style(args, tokenizer)
    facts = {
        "checkpoint_dir": str(checkpoint_dir),
        "tokenizer": tokenizer.fingerprint,
        "prompt_style": style,
        "system_prompt": args.system_prompt,
        "stop_ids": stop_ids(style, tokenizer),
        "mask_prompt": args.mask_prompt,
        "max_seq_length": max_seq_length,
        "order": args.order,
        "arguments": recorded_arguments(args),
    }
    destination = Path(args.destination_path or Path("data") / name)
    _check_destination(destination, args)
    quality = args.min_alphanumeric_share is not None or args.max_repetition_share is not None
    near = args.deduplicate == "near"
    encoding = Encoding(
        checkpoint_dir=checkpoint_dir,
        tokenizer=tokenizer.fingerprint,
        style=style,
        mask_prompt=args.mask_prompt,
        max_seq_length=max_seq_length,
        vocab_size=config.vocab_size,
        quality=quality,
        near=near,
        refuses_templates=args.template_applied is None,
    )
    num_workers = args.num_workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    with _working(destination) as folder:
        spool, n_rows = fill(folder, [s.stream for s in sources], encoding, tokenizer, args.on_error, num_workers)
        for source, n in zip(sources, n_rows, strict=True):
            source.check_scores(n)
        names = [source.stream.name for source in sources]
        if args.template_applied is None:
            for notice in template_notices(spool.rows, names, style):
                print(f"notice: {notice}")
        elif args.template_applied:
            check_as_written(spool.rows, names)
        chosen = select(spool.rows, spool.signatures, sources, args, max_seq_length, block_size)
        facts |= _what_was_done(args, spool, style, chosen, tokenizer)
        facts |= statistics(spool.rows, chosen, n_rows, names, max_seq_length)
        if (destination / MANIFEST).exists():
            print(f"replacing what {destination} held")
        with publish_directory(destination, KIND) as made:
            names = _write(made, "train", spool, chosen.train) + _write(made, "val", spool, chosen.val)
            if facts["n_skipped"]:
                names.append(_write_skipped(made / SKIPPED, spool))
            names.append(write_data_report(made, name, facts, tokenizer))
            Manifest(KIND, facts).write(made, names)
    print(f"{summary(destination, facts)}\n  {destination / REPORT} shows what a model will learn from them")
    if args.show:
        show_examples(destination, facts, args.show, tokenizer, sys.stdout)
    return destination


def recorded_arguments(args: PrepareArgs) -> dict:
    """The arguments that the manifest holds: those that decide what is made, without secrets."""
    return {
        name: without_address_secrets(value) if isinstance(value, str) else value
        for name, value in asdict(args).items()
        if name not in ("access_token", "debug", "num_workers", "show", "overwrite")
    }


def _chosen_style(args: PrepareArgs, tokenizer: Tokenizer) -> str:
    """The prompt style of dialogues."""
    if args.template_applied:
        if args.prompt_style not in (None, AS_WRITTEN):
            raise InputError(
                "--template_applied true takes texts as they are written, which leaves no place for --prompt_style; "
                "give one of them"
            )
        if args.system_prompt is not None:
            raise InputError(
                "--template_applied true takes texts as they are written, which leaves no place for --system_prompt; "
                "write it into them"
            )
        return AS_WRITTEN
    if args.prompt_style == CHAT_TEMPLATE and not tokenizer.chat_template:
        return default_style(tokenizer, otherwise=CHAT_TEMPLATE)  # which says what there is instead
    return resolve_style(args.prompt_style) if args.prompt_style else default_style(tokenizer, otherwise="alpaca")


def _is_plain_text(args: PrepareArgs, sources: list[MixedSource], tokenizer: Tokenizer) -> bool:
    """Whether the data are plain texts, where a template that would not be applied to them is out of order."""
    if args.template_applied or args.prompt_style:
        return False
    try:
        stop_ids(_chosen_style(args, tokenizer), tokenizer)
    except InputError:
        with suppress(InputError):  # of the template is said, which comes first
            firsts = (next((item for item in s.stream if isinstance(item, Sample)), None) for s in sources)
            return all(first is not None and is_text(first.messages) for first in firsts)
    return False


def _what_was_done(args: PrepareArgs, spool: Spool, style: str, chosen: Selection, tokenizer: Tokenizer) -> dict:
    """The facts about prompts that later commands go by, where the data are not simply dialogues in ``style``."""
    trained = chosen.train if len(chosen.train) else chosen.val
    only_text = bool(spool.rows["is_text"][trained].all())
    if style == AS_WRITTEN:
        if only_text:
            print("notice: a text column is learned whole, its prompts too; messages have their answers learned only")
        return {"stop_ids": sorted({*tokenizer.stop_ids, *_ends(spool, tokenizer)})}
    # no style was applied to plain text, so a model of it is not asked in one
    if only_text and (args.prompt_style or args.system_prompt):
        print("notice: --prompt_style and --system_prompt have no effect on plain text, which no prompt precedes")
    return {"prompt_style": PLAIN, "system_prompt": None, "stop_ids": stop_ids(PLAIN, tokenizer)} if only_text else {}


def _ends(spool: Spool, tokenizer: Tokenizer) -> set[int]:
    """The control tokens that answers end with as they are written, by the first examples."""
    ends = set()
    for _, ids, mask in spool.read(np.arange(min(MOST_EXAMINED, len(spool.rows)))):
        ends.update(ids[mask][-1:].tolist())
    return {i for i in ends if tokenizer.control_text(i) is not None}


def _check_destination(destination: Path, args: PrepareArgs) -> None:
    """Refuse what is in the way before the work: shards of other data, and what somebody keeps beside shards."""
    if not replaceable(destination, KIND):
        raise InputError(f"{destination} exists and is not a {KIND} directory of lit_sft; remove it or name another")
    if (destination / MANIFEST).is_file():
        manifest = Manifest.read(destination)
        if not args.overwrite:
            _check_same_data(destination, manifest.facts.get("arguments") or {}, args)
        own = {MANIFEST, *manifest.files}
        if others := sorted({path.name for path in destination.iterdir()} - own):
            raise InputError(
                f"{destination} holds {others[0]!r} beside earlier shards; move it, or name another folder"
            )


def _check_same_data(destination: Path, before: dict, args: PrepareArgs) -> None:
    """Require that shards in the way were made of the data that are named now; the files may have been edited."""
    now = recorded_arguments(args)
    if args.data_file and "://" not in args.data_file and not Path(args.data_file).exists():
        return  # which is what is wrong, and is said when it is read
    differences = [name for name in DATA_FLAGS if _source(before.get(name)) != _source(now.get(name))]
    if differences:
        then, given = (", ".join(str(a.get(name) or f"no {name}") for name in differences) for a in (before, now))
        raise InputError(
            f"{destination} holds other data ({then}) than are asked for now ({given}); name another "
            "--destination_path, or add --overwrite true"
        )


def _source(value: object) -> object:
    is_path = isinstance(value, str) and "://" not in value
    return Path(value).resolve() if is_path else value


@contextmanager
def _working(destination: Path) -> Iterator[Path]:
    """Hold the work folder of ``destination``, which vanishes at the end: unless a signal, or a worker's death, ended
    what had finished several chunks, for then the same command goes on. A kill leaves it in any case.
    """
    folder = work_dir(destination.resolve())
    absent = [parent for parent in folder.parents if not parent.exists()]
    with lock(folder):
        sweep(folder)
        keep = ""
        try:
            yield folder
        except (KeyboardInterrupt, Interrupted, RunFailed) as end:
            if sum(1 for _ in folder.glob("*.npy")) < 2:
                raise
            keep = f"; what is done is kept in {folder}: the same command goes on from there"
            if isinstance(end, RunFailed):
                raise RunFailed(f"{end}{keep}") from None
            code = end.exit_code if isinstance(end, Interrupted) else 130
            raise Interrupted(f"error: interrupted{keep}", code) from None
        finally:
            if not keep:
                shutil.rmtree(folder)
                for parent in absent:
                    if not any(parent.iterdir()):
                        parent.rmdir()


def _write(directory: Path, split: str, spool: Spool, examples: np.ndarray) -> list[str]:
    rows = spool.rows
    lengths = torch.from_numpy(rows["n_kept"][examples].astype(np.int64))
    facts = {name: torch.from_numpy(rows[name][examples]) for name in FACTS}

    def read(start: int, end: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        return ((start + i, ids, mask) for i, ids, mask in spool.read(examples[start:end]))

    return write_shards(directory, split, lengths, facts, read)


def _write_skipped(path: Path, spool: Spool) -> str:
    """Write the rows left out, one JSON object each, and print the first; gives the file's name."""
    with path.open("w", encoding="utf-8") as file:
        for i, problem in enumerate(spool.problems()):
            file.write(json.dumps(vars(problem)) + "\n")
            if i < SHOWN:
                print(f"skipped: {problem}")
    return path.name


def statistics(rows: np.ndarray, chosen: Selection, n_rows: list[int], names: list[str], limit: int) -> dict:
    """Counts of examples and tokens, kept and lost, of each source and in all.

    Lengths are those before any cut of what filters and duplicates left; pN: at least N % are not longer. A repeated
    example counts as often among n_train, n_tokens and n_labels, and once elsewhere.
    """

    def by_source(examples: np.ndarray, of: str | None = None) -> list[int]:
        weights = None if of is None else rows[of][examples].astype(np.int64)
        return np.bincount(rows["source"][examples], weights, len(names)).astype(np.int64).tolist()

    stored, once = np.concatenate([chosen.train, chosen.val]), np.union1d(chosen.train, chosen.val)
    read = by_source(np.arange(len(rows)))
    lost = zip(by_source(chosen.dropped, "length"), by_source(once, "length"), by_source(once, "n_kept"), strict=True)
    columns = {
        "n_rows": n_rows,
        "n_skipped": [n - made for n, made in zip(n_rows, read, strict=True)],
        **{f"n_{rule}": [counts[rule] for counts in chosen.counts] for rule in chosen.counts[0]},
        "n_cut": by_source(once[rows["n_needed"][once] > limit]),
        "n_tokens_cut": [dropped + whole - kept for dropped, whole, kept in lost],
        "n_train": by_source(chosen.train),
        "n_val": by_source(chosen.val),
        "n_tokens": by_source(stored, "n_kept"),
        "n_labels": by_source(stored, "n_labels"),
    }
    lengths = np.sort(rows["length"][chosen.candidates])
    percentiles = {f"p{p}": int(lengths[-(-len(lengths) * p // 100) - 1]) for p in (50, 95, 99)}
    sources = [{"name": name} | {key: column[i] for key, column in columns.items()} for i, name in enumerate(names)]
    totals = {key: sum(column) for key, column in columns.items()}
    return totals | {"length": {**percentiles, "max": int(lengths[-1])}, "sources": sources}


def summary(directory: Path, facts: dict) -> str:
    """What was prepared, in a few lines."""
    length = facts["length"]
    told = {"n_low_score": "rated too low", "n_too_short": "too short", "n_too_long": "too long"}
    told |= {"n_short_response": "with a short response", "n_few_letters": "with few letters or digits"}
    told |= {"n_repetitive": "repetitive", "n_duplicates": "duplicates", "n_near_duplicates": "near duplicates"}
    told |= {"n_not_drawn": "not drawn"}
    left_out = ", ".join(f"{facts[key]:,} {what}" for key, what in told.items() if facts.get(key))
    lines = [
        f"{directory}: {facts['n_train']} train and {facts['n_val']} val examples, "
        f"prompt style {style_label(facts['prompt_style'])}",
        f"  tokens per example: p50 {length['p50']}, p95 {length['p95']}, p99 {length['p99']}, max {length['max']}; "
        f"max_seq_length {facts['max_seq_length']}",
        f"  {facts['n_tokens']:,} tokens, {facts['n_labels']:,} of them labels; {facts['n_cut']} examples cut, "
        f"{facts['n_dropped']} dropped ({facts['n_tokens_cut']:,} tokens lost), {facts['n_skipped']} skipped",
        f"  left out: {left_out}",
        f"  {facts['n_leaked']} val examples have a prompt that is in train too, {facts['n_leaked_exactly']} of them "
        f"word for word; --on_leakage says what becomes of such ({facts['arguments']['on_leakage']})",
    ]
    lines += [
        f"  {source['name']}: {source['n_rows']:,} rows → {source['n_train']:,} train, {source['n_val']:,} val, "
        f"{source['n_tokens']:,} tokens ({source['n_tokens'] / max(1, facts['n_tokens']):.1%})"
        for source in facts["sources"]
    ]
    wanted = (True, True, True, bool(left_out), facts["n_leaked"] > 0, *[len(facts["sources"]) > 1] * len(lines))
    return "\n".join(line for line, is_wanted in zip(lines, wanted, strict=False) if is_wanted)
