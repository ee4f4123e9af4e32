"""A GPU's clocks and power, read beside the work by nvidia-smi; its settings are left alone."""

import statistics
import subprocess
from pathlib import Path

FIELDS = (
    "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,memory.used,clocks_event_reasons.active"
)
PERIOD_MS = 200
BUSY = 50  # percent: below, the card waits


def query(fields: str) -> list[str] | None:
    """Ask nvidia-smi about the first GPU; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in said.splitlines()[0].split(",")]


class Clocks:
    """The log of one call, in a file."""

    def __init__(self, path: Path, wanted: bool) -> None:
        self.path, self.wanted = path, wanted
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin to sample."""
        if not self.wanted:
            return
        command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", f"-lms={PERIOD_MS}"]
        with self.path.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """End the sampling."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def count(self) -> int:
        """Samples so far."""
        return len(samples(self.path))

    def summary(self, first: int) -> dict:
        """Clocks in MHz and power in W while the card was busy, from sample ``first`` on."""
        busy = [row for row in samples(self.path)[first:] if row["utilization"] >= BUSY]
        if not busy:
            return {}
        sm, power = [row["sm"] for row in busy], [row["power"] for row in busy]
        return {
            "samples": len(busy),
            "sm_mhz": {"median": statistics.median(sm), "least": min(sm), "most": max(sm)},
            "memory_mhz": statistics.median(row["memory"] for row in busy),
            "power_w": {"median": statistics.median(power), "most": max(power)},
            "most_celsius": max(row["temperature"] for row in busy),
            "held_back_by": sorted({row["reasons"] for row in busy}),
        }


def samples(path: Path) -> list[dict]:
    """The log's lines as numbers; one that is cut short or says that a field is not to be had is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            _, sm, memory, power, temperature, utilization, _, reasons = (x.strip() for x in line.split(","))
            numbers = [float(x) for x in (sm, memory, power, temperature, utilization)]
        except ValueError:
            continue
        names = ("sm", "memory", "power", "temperature", "utilization")
        rows.append(dict(zip(names, numbers, strict=True)) | {"reasons": reasons})
    return rows
