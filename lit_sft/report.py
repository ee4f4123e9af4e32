"""The pages, for a reader who wants to know what a model will learn: one file each, without scripts or requests."""

from collections import defaultdict
from math import ceil
from pathlib import Path
from typing import TextIO

import jinja2
import numpy as np

from lit_sft import figures
from lit_sft.figures import SplitFigures, measure, measure_sharing, packed_rows, padded_tokens, repeats, shuffled
from lit_sft.layout import REPORT
from lit_sft.packing import bucket_length
from lit_sft.spelling import Shown, print_examples, show, spell
from lit_sft.tokenizer import Tokenizer

N_SHOWN = 20
N_EXTREMES = 5
N_BARS = 40
EXCERPT = 40  # tokens of a prefix or a response in a table


def write_data_report(folder: Path, name: str, facts: dict, tokenizer: Tokenizer) -> str:
    """Write the page about the shards in ``folder``, of the dataset ``name``; gives the file's name.

    ``facts`` tells how they were made; what it lacks is left out. The same shards and facts give the same bytes.
    """
    splits = train, val = [measure(folder, split, facts.get("stop_ids", ())) for split in ("train", "val")]
    names = [source["name"] for source in facts.get("sources", ())]
    context = {
        "name": name,
        "facts": defaultdict(lambda: None, facts),
        "sources": facts.get("sources", ()),
        "splits": [_counts(split, names) for split in splits],
        "histogram": _histogram(splits, facts.get("max_seq_length")),
        "masked": facts.get("mask_prompt", True) and any((s.n_labels < s.lengths - 1).any() for s in splits),
        "leaked": _leakage(train, val, names),
        "extremes": _extremes(splits, names, tokenizer),
        "sharing": _sharing(train, tokenizer),
        "padding": _padding(train),
        "examples": _shown(splits, names, N_SHOWN, tokenizer),
        "limits": figures,
    }
    (folder / REPORT).write_text(render("data.html", context), encoding="utf-8")
    return REPORT


def show_examples(folder: Path, facts: dict, count: int, tokenizer: Tokenizer, file: TextIO) -> None:
    """Print the first ``count`` of the page's examples: one at random, the longest, the shortest, others at random."""
    names = [source["name"] for source in facts.get("sources", ())]
    print_examples(_shown([measure(folder, split) for split in ("train", "val")], names, count, tokenizer), file)


def render(page: str, context: dict) -> str:
    """One of the templates in ``pages/`` with ``context``; every value is escaped, a missing one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lit_sft", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": "{:,}".format, "percent": percent}
    return environment.get_template(page).render(context)


def percent(share: float) -> str:
    """A share in percent; what is neither none nor all does not look like it."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    text = f"{100 * share:.1f}"
    return {"0.0": "<0.1", "100.0": ">99.9"}.get(text, text) + " %"


def _place(split: SplitFigures, i: int, names: list[str]) -> str:
    """What an example is called here, and the row that it comes from."""
    source, row = divmod(int(split.origins[i]), 1 << 32)
    return f"{split.split} {i}, {names[source] if source < len(names) else 'source'} row {row:,}"


def _counts(split: SplitFigures, names: list[str]) -> dict:
    ordered = np.sort(split.lengths)
    n_repeated, most, times = repeats(split.wholes, split.origins)
    return {
        "name": split.split,
        "n": len(split),
        "n_tokens": int(split.lengths.sum()),
        "n_labels": int(split.n_labels.sum()),
        "n_unended": split.n_unended,
        "lengths": [int(ordered[ceil(len(ordered) * p / 100) - 1]) for p in (50, 95, 99, 100) if len(ordered)],
        "n_repeated": n_repeated,
        "n_repeated_prompts": repeats(split.prompts, split.origins)[0],
        "most_repeated": f"{times:,} times: {_place(split, most, names)}" if times > 1 else "",
        "n_again": len(split) - len(np.unique(split.origins)),
    }


def _histogram(splits: list[SplitFigures], cut: int | None) -> dict:
    """Bars of equal, round width up to the longest example; where few are much longer, these are in the last bar."""
    ordered = np.sort(np.concatenate([split.lengths for split in splits]))
    longest, p99 = int(ordered[-1]), int(ordered[ceil(len(ordered) * 0.99) - 1])
    reach = longest if longest <= 2 * p99 else p99
    width = next(w for e in range(19) for w in (10**e, 2 * 10**e, 5 * 10**e) if w * N_BARS >= reach)
    n = ceil(reach / width)
    columns = [np.bincount(np.minimum((split.lengths - 1) // width, n - 1), minlength=n).tolist() for split in splits]
    bars = [
        {"low": i * width + 1, "high": (i + 1) * width, "n": counts}
        for i, counts in enumerate(zip(*columns, strict=True))
    ]
    highest, every, rectangles = max(sum(bar["n"]) for bar in bars), ceil(n / 5), []
    for x, bar in enumerate(bars):
        y = 100.0
        for split, count in zip(splits, bar["n"], strict=True):
            height = max(98 * count / highest, 0.8) if count else 0  # one example among thousands is still seen
            y -= height
            rectangles.append({"split": split.split, "x": x, "y": round(y, 2), "height": round(height, 2)})
    return {
        "bars": bars,
        "highest": highest,
        "rectangles": rectangles,
        "open": longest > n * width,
        "ticks": [(100 * i / n, i * width) for i in range(0, n + 1, every)],
        "cut": cut,
        "cut_at": 100 * cut / (n * width) if cut and cut <= n * width else None,
    }


def _leakage(train: SplitFigures, val: SplitFigures, names: list[str]) -> dict:
    prompts = np.flatnonzero(np.isin(val.prompts, train.prompts))
    pairs = [
        (_place(val, i, names), _place(train, int((train.prompts == val.prompts[i]).argmax()), names))
        for i in prompts[:N_EXTREMES].tolist()
    ]
    return {"n": int(np.isin(val.wholes, train.wholes).sum()), "n_prompts": len(prompts), "pairs": pairs}


def _of_all(splits: list[SplitFigures], i: int, names: list[str]) -> tuple[str, list[int], list[bool]]:
    """Example ``i`` of train and val together: what it is called, its ids, its labels mask."""
    split, i = (splits[0], i) if i < len(splits[0]) else (splits[1], i - len(splits[0]))
    [(_, ids, mask)] = split.read([i])
    return _place(split, i, names), ids.tolist(), mask.tolist()


def _extremes(splits: list[SplitFigures], names: list[str], tokenizer: Tokenizer) -> dict[str, list[dict]]:
    order = np.argsort(np.concatenate([split.lengths for split in splits]), kind="stable").tolist()
    rows = {}
    for title, chosen in (("longest", order[::-1][:N_EXTREMES]), ("shortest", order[:N_EXTREMES])):
        rows[title] = []
        for place, ids, mask in (_of_all(splits, i, names) for i in chosen):
            response = ids[mask.index(True) :][:EXCERPT] if any(mask) else []
            row = {"place": place, "n_tokens": len(ids), "n_labels": sum(mask)}
            rows[title].append(row | {"text": "".join(spell(response, tokenizer))})
    return rows


def _sharing(train: SplitFigures, tokenizer: Tokenizer) -> dict:
    found, rows = measure_sharing(train), []
    for prefix in found.prefixes:
        texts = spell(prefix.ids, tokenizer)
        if len(texts) > 2 * EXCERPT:
            texts[EXCERPT:-EXCERPT] = [" … "]
        rows.append({"n_tokens": len(prefix.ids), "n_examples": prefix.n_examples, "text": "".join(texts)})
    return {"found": found, "prefixes": rows}


def _padding(train: SplitFigures) -> dict:
    lengths = train.lengths[shuffled(len(train))]
    useful, steps = int(lengths.sum()), packed_rows(lengths[: figures.SAMPLE])
    rows = [sum(row) for step in steps for row in step]
    uneven = [max(map(sum, step)) * len(step) / sum(map(sum, step)) - 1 for step in steps]
    return {
        "useful": useful,
        "padded": {size: padded_tokens(lengths, size) for size in (4, 8)},
        "n_packed": sum(len(row) for step in steps for row in step),
        "packed_useful": int(lengths[: figures.SAMPLE].sum()),
        "packed": {"": sum(rows), ", rows of lengths that repeat": sum(map(bucket_length, rows))},
        "rows_per_step": len(rows) / len(steps),
        "examples_per_row": sum(len(row) for step in steps for row in step) / len(rows),
        "uneven": sum(uneven) / len(uneven),
    }


def _shown(splits: list[SplitFigures], names: list[str], count: int, tokenizer: Tokenizer) -> list[Shown]:
    """``count`` examples, the same each time: one at random, the longest, the shortest, others at random."""
    lengths = np.concatenate([split.lengths for split in splits])
    first, *others = shuffled(len(lengths))[: count + 2].tolist()
    chosen = list(dict.fromkeys([first, int(lengths.argmax()), int(lengths.argmin()), *others]))[:count]
    return [show(*_of_all(splits, i, names), tokenizer) for i in chosen]
