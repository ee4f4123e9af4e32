"""What a run tells while it goes on: metrics.jsonl, one object a step, and one live line."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lit_sft.atomic import write_atomically
from lit_sft.errors import InputError
from lit_sft.layout import METRICS

PLAIN_INTERVAL = 10.0  # seconds between lines where the output is no terminal


class Metrics:
    """Writes a record per step and keeps the live line: loss, tokens/s, time left, peak memory."""

    def __init__(self, out_dir: Path, done: int, max_steps: int, quiet: bool = False) -> None:
        """Go on after step ``done``: records of later steps, left by a killed run, are dropped."""
        self.path, self.max_steps, self.quiet = out_dir / METRICS, max_steps, quiet
        self.started, self.done_before, self.last_line = time.perf_counter(), done, 0.0
        if not quiet:
            kept = [line for line in self._lines() if line["step"] <= done]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bar = tqdm(total=max_steps, initial=done, desc="training", unit="step", disable=True if quiet else None)

    def _lines(self) -> list[dict]:
        if not self.path.is_file():
            return []
        try:
            lines = self.path.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        except ValueError as error:
            raise InputError(f"{self.path} is damaged ({error}); move it away to go on without") from None

    def log(self, record: dict) -> None:
        """Append one step's record and refresh the line."""
        if self.quiet:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        text = {"loss": f"{record['loss']:.4f}", "tok/s": f"{record['tokens_per_s']:,.0f}"}
        text["lr"] = f"{record['lr']:.1e}"
        text["mem"] = f"{record['peak_mem_bytes'] / 2**30:.2f} GiB"
        self.bar.set_postfix(text, refresh=False)
        self.bar.update()
        if self.bar.disable and self._plain_line_due(record["step"]):
            left = (time.perf_counter() - self.started) / (record["step"] - self.done_before)
            text["left"] = tqdm.format_interval(left * (self.max_steps - record["step"]))
            self.say(f"step {record['step']}/{self.max_steps}: " + ", ".join(f"{k} {v}" for k, v in text.items()))

    def _plain_line_due(self, step: int) -> bool:
        now = time.perf_counter()
        if step not in (self.done_before + 1, self.max_steps) and now - self.last_line < PLAIN_INTERVAL:
            return False
        self.last_line = now
        return True

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        if not self.quiet:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the live line as it stands."""
        self.bar.close()
