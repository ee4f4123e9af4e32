"""The page about a run: how its loss went, what validation said, what went wrong on the way."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from lit_sft.atomic import write_atomically
from lit_sft.layout import METRICS, REPORT
from lit_sft.metrics import read_record
from lit_sft.report import render

N_POINTS = 400  # of a curve, at most: of more steps, means
N_LISTED = 100  # spikes and skipped steps, at most; the first of them

Points = list[tuple[float, float]]


class Line(NamedTuple):
    """One curve of a chart."""

    kind: str
    """Its class: train or val."""
    points: Points
    """(x, y), in percent of the chart from its left and its top."""


class Chart(NamedTuple):
    """Curves over the steps of a run, on one scale."""

    title: str
    low: str
    high: str
    first: str
    """Of the first curve, as is the next."""
    last: str
    lines: list[Line]
    spikes: list[tuple[float, float, str]]
    """x, y and what to say of it."""


def write_run_report(out_dir: Path, arguments: dict, max_steps: int) -> None:
    """Write the page about the run in ``out_dir`` from its metrics.jsonl; none where no step was made.

    Args:
        out_dir: where the run lies.
        arguments: what the run was started with, as in run.yaml.
        max_steps: how many steps there are to be.
    """
    metrics = out_dir / METRICS
    records = [read_record(line) for line in metrics.read_bytes().splitlines()] if metrics.is_file() else []
    if not records:
        return
    losses, val = _values(records, "loss"), _values(records, "val_loss")
    spikes = [r for r in records if r.get("spike") and r["loss"] is not None]
    context = {
        "name": out_dir.name,
        "arguments": arguments,
        "last_step": records[-1]["step"],
        "max_steps": max_steps,
        "n_tokens": sum(r["n_tokens"] for r in records),
        "n_labels": sum(r["n_labels"] for r in records),
        "seconds": sum(r["seconds"] for r in records),
        "tokens_per_s": median(r["tokens_per_s"] for r in records),
        "peak_gib": max(r["peak_mem_bytes"] for r in records) / 2**30,
        "last_loss": fmean(loss for _, loss in losses[-N_POINTS // 20 :]) if losses else None,
        "n_last": min(len(losses), N_POINTS // 20),
        "best": min(val, key=lambda point: point[1], default=None),
        "spikes": spikes[:N_LISTED],
        "n_spikes": len(spikes),
        "skipped": [r["step"] for r in records if r.get("skipped")],
        "charts": [
            _chart("loss", records, {"train": losses, "val": val}, spikes),
            _chart("learning rate", records, {"train": _values(records, "lr")}),
            _chart("norm of the gradient", records, {"train": _values(records, "grad_norm")}),
            _chart("useful tokens a second", records, {"train": _values(records, "tokens_per_s")}),
        ],
        "validations": _validations(records),
        "ticks": _ticks(records),
    }
    write_atomically(out_dir / REPORT, render("run.html", context))


def _values(records: list[dict], name: str) -> Points:
    """(step, value) where there is one: what is not finite is None in metrics.jsonl."""
    return [(r["step"], r[name]) for r in records if r.get(name) is not None]


def _thinned(points: Points) -> Points:
    """At most N_POINTS, each the mean of as many neighbours."""
    size = -(-len(points) // N_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _chart(title: str, records: list[dict], curves: dict[str, Points], spikes: list[dict] = ()) -> Chart | None:
    """The curves as percentages of their common range; None where there is nothing to draw."""
    curves = {kind: _thinned(points) for kind, points in curves.items() if points}
    values = [y for points in curves.values() for _, y in points] + [r["loss"] for r in spikes]
    if not values:
        return None
    low, high = min(values), max(values)
    height = (high - low) or 1

    def place(step: float, value: float) -> tuple[float, float]:
        return _across(records, step), round(100 * (high - value) / height, 2)

    lines = [Line(kind, [place(*point) for point in points]) for kind, points in curves.items()]
    marks = [(*place(r["step"], r["loss"]), f"step {r['step']}: {r['loss']:.4f}") for r in spikes[:N_LISTED]]
    shown = next(iter(curves.values()))
    return Chart(title, *map(_words, (low, high, shown[0][1], shown[-1][1])), lines, marks)


def _words(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _across(records: list[dict], step: float) -> float:
    first, last = records[0]["step"], records[-1]["step"]
    return round(100 * (step - first) / max(1, last - first), 2)


def _ticks(records: list[dict]) -> list[tuple[float, int]]:
    """Five steps and where they are, the first and the last among them."""
    first, last = records[0]["step"], records[-1]["step"]
    return [(_across(records, step), step) for step in sorted({first + (last - first) * i // 4 for i in range(5)})]


def _validations(records: list[dict]) -> list[dict]:
    """Each validation with the mean training loss since the one before."""
    at = [i for i, r in enumerate(records) if r.get("val_loss") is not None]
    rows = []
    for before, here in pairwise([-1, *at]):
        since = [r["loss"] for r in records[before + 1 : here + 1] if r["loss"] is not None]
        rows.append({"step": records[here]["step"], "val": records[here]["val_loss"],
                     "train": fmean(since) if since else None, "epoch": records[here]["epoch"]})  # fmt: skip
    return rows
