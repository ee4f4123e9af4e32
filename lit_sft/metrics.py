"""What a run tells while it goes on: metrics.jsonl, one object a step, and one live line."""

import json
import math
import sys
import time
from collections import deque
from itertools import takewhile
from pathlib import Path
from statistics import median

from tqdm import tqdm

from lit_sft.atomic import fsync, write_atomically
from lit_sft.documents import read_bytes
from lit_sft.errors import InputError
from lit_sft.layout import METRICS
from lit_sft.output import outliving

PLAIN_INTERVAL = 10.0  # seconds between lines where the output is no terminal
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_SIGMAS = 50, 20, 6.0
LEAST = {"step": 1, "epoch": 1, "n_labels": 0, "n_tokens": 1, "peak_mem_bytes": 0}  # of a record's fields; of counts
LEAST |= dict.fromkeys(("lr", "tokens_per_s", "padding_share", "seconds"), 0.0)
NULLABLE = ("loss", "grad_norm", "val_loss")  # null where it was not finite; the last only where it was measured
METRICS_BYTES = 1 << 32  # ten million steps
MOST = 1e39  # more than fp32 holds, little enough to reckon with


def is_spike(loss: float, before: list[float]) -> bool:
    """Whether ``loss`` lies far above the losses of the steps before it, of which there must be enough to tell.

    Far is six standard deviations above the median, estimated by the median absolute deviation (1.4826 · MAD), which
    an earlier spike does not move, and at least a tenth of the median.
    """
    if len(before) < SPIKE_LEAST:
        return False
    middle = median(before)
    deviation = 1.4826 * median(abs(x - middle) for x in before)
    return loss > middle + max(SPIKE_SIGMAS * deviation, 0.1 * abs(middle))


def read_record(line: bytes) -> dict:
    """One line of metrics.jsonl; ValueError where it is no record of a step."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is no record of a step")
    for name in (*LEAST, *NULLABLE):
        least, value = LEAST.get(name, -MOST), record.get(name)
        if name not in record and name != "val_loss":
            raise ValueError(f"it has no {name}")
        if value is None and name in NULLABLE:
            continue
        kinds = (int,) if type(least) is int else (int, float)
        if type(value) not in kinds or not least <= value <= MOST:
            raise ValueError(f"its {name} is {value!r:.40}")
    return record


def shown(loss: float | None) -> str:
    """A loss for the terminal."""
    return "none" if loss is None else f"{loss:.4f}"


class Metrics:
    """Writes a record per step and keeps the live line: loss, tokens/s, time left, peak memory."""

    def __init__(self, out_dir: Path, done: int, max_steps: int, quiet: bool = False) -> None:
        """Go on after step ``done``: records of later steps, left by a killed run, are dropped."""
        self.path, self.max_steps, self.quiet = out_dir / METRICS, max_steps, quiet
        self.started, self.done_before, self.last_line = time.perf_counter(), done, 0.0
        kept = [] if quiet else self._lines(done)
        self.n_skipped = len(list(takewhile(lambda line: line.get("skipped"), reversed(kept))))
        """Steps without an update that the run had ended with."""
        self.losses = deque((line["loss"] for line in kept if line.get("loss") is not None), maxlen=SPIKE_WINDOW)
        if not quiet:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bar = tqdm(total=max_steps, initial=done, desc="training", unit="step", disable=True if quiet else None)

    def _lines(self, done: int) -> list[dict]:
        """The records of the steps up to ``done``; InputError when the file is there and lacks one."""
        if not self.path.exists():
            return []
        kept, damage = [], "it ends there"
        for line in read_bytes(self.path, METRICS_BYTES).splitlines(keepends=True):
            try:
                record = read_record(line)
                step = record["step"]
                if not line.endswith(b"\n") or (kept and step != kept[-1]["step"] + 1):
                    raise ValueError("another step")
            except (ValueError, RecursionError) as error:
                damage = str(error)  # a kill may have cut the last line, a loss of power more than that
                break
            if step > done:
                return kept
            kept.append(record)
        else:
            damage = "" if not kept else damage  # moved away once before, and nothing was recorded since
        last = kept[-1]["step"] if kept else 0
        if last < done and damage:
            raise InputError(
                f"{self.path} is damaged: after step {last} of the {done} made comes no other ({damage}); "
                "move it away to go on without"
            )
        return kept

    def log(self, record: dict) -> None:
        """Append one step's record, with ``spike`` where its loss is one, and refresh the line."""
        if self.quiet:
            return
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        loss = record["loss"]  # None, as JSON has no word for it, where it is not finite
        if loss is not None:
            if is_spike(loss, list(self.losses)):
                record = record | {"spike": True}
                self.say(f"step {record['step']}: loss {loss:.4f} is a spike; the median was {median(self.losses):.4f}")
            self.losses.append(loss)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        text = {"loss": shown(loss), "tok/s": f"{record['tokens_per_s']:,.0f}"}
        text["lr"] = f"{record['lr']:.1e}"
        text["mem"] = f"{record['peak_mem_bytes'] / 2**30:.2f} GiB"
        self.bar.set_postfix(text, refresh=False)
        with outliving(sys.stderr):
            self.bar.update()
        if self.bar.disable and self._plain_line_due(record["step"]):
            left = (time.perf_counter() - self.started) / (record["step"] - self.done_before)
            text["left"] = tqdm.format_interval(left * (self.max_steps - record["step"]))
            self.say(f"step {record['step']}/{self.max_steps}: " + ", ".join(f"{k} {v}" for k, v in text.items()))

    def flush(self) -> None:
        """See the records to the disk: a saved state must never be newer than they are."""
        if not self.quiet:
            fsync(self.path)

    def _plain_line_due(self, step: int) -> bool:
        now = time.perf_counter()
        if step not in (self.done_before + 1, self.max_steps) and now - self.last_line < PLAIN_INTERVAL:
            return False
        self.last_line = now
        return True

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        if not self.quiet:
            with outliving(sys.stdout):
                self.bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    def close(self) -> None:
        """Leave the live line as it stands, and see the records to the disk."""
        self.flush()
        with outliving(sys.stderr):
            self.bar.close()
