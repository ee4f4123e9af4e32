"""Predictions about a GPU, made before anything was measured on one; benchmarks/gpu.py prints it beside each figure.

Worked out for LoRA of rank 16 on Llama 2's 7B shape and Alpaca's lengths, from counted operations and bytes, at 700
TFLOP/s and 3.6 TB/s on an H200; "now" is the engine of November 2026, "after" the one with fused adapters.
"""

from typing import NamedTuple

BF16_FLOP_PER_S, FP8_FLOP_PER_S = 700e12, 1400e12  # sustained; the second is assumed
BYTES_PER_S = {"H200": 3.6e12, "H100": 2.5e12}  # kernels that read and write; an H100's from its copies
COPY_BYTES_PER_S = {"H200": 4.3e12, "H100": 3.0e12}


class Predicted(NamedTuple):
    """One figure on each card, of the engine as it was and once what was planned is done."""

    h200: float
    h200_after: float
    h100: float
    h100_after: float
    """Scaled from the H200's as the other two are, or as their sums where nobody said."""


MICROSECONDS = {
    "base products": Predicted(37.0, 36.7, 37.0, 36.7),
    "head and loss": Predicted(0.85, 0.85, 0.95, 0.95),
    "elementwise": Predicted(4.8, 4.0, 6.7, 5.6),
    "layout copies": Predicted(0.6, 0.0, 0.8, 0.0),
    "LoRA forward": Predicted(3.7, 1.9, 5.2, 2.7),
    "LoRA backward": Predicted(4.3, 2.8, 6.0, 3.9),
    "casts": Predicted(0.35, 0.0, 0.35, 0.0),
    "attention": Predicted(3.5, 3.5, 3.8, 3.8),
    "optimizer, host": Predicted(0.7, 0.2, 0.75, 0.2),
    "prefix gather": Predicted(2.7, 0.5, 3.8, 0.7),  # of a row with shared prefixes: 5 to 6 % of its time
    "sum": Predicted(55.8, 50.0, 61.5, 53.9),
}
"""Of a useful token, in bf16 without shared prefixes where nothing else is said."""

BF16_ONLY = ("base products", "elementwise", "sum")

TOKENS_PER_S = {
    (None, False): Predicted(18_250, 20_500, 16_000, 18_500),
    (None, True): Predicted(19_000, 23_500, 17_000, 21_000),
    ("fp8", False): Predicted(22_000, 29_000, 20_000, 26_000),
    ("fp8", True): Predicted(23_000, 33_000, 21_000, 30_000),
}
"""Useful tokens a second of (quantize, share_prefix); the middle of a range where one was given."""


def card_of(device: str) -> str | None:
    """The card that ``device`` names, of those with predictions."""
    return next((card for card in BYTES_PER_S if card in device), None)


def on_card(predicted: Predicted | None, device: str) -> tuple[float | None, float | None]:
    """Predictions for ``device``, as it was and after; None where there is no prediction."""
    card = card_of(device)
    if predicted is None or card is None:
        return None, None
    return predicted[:2] if card == "H200" else predicted[2:]


def floor_seconds(flop: float, n_bytes: float, device: str, fp8: bool = False) -> float | None:
    """The time of one kernel that is bound by its operations or by the memory it reads and writes."""
    card = card_of(device)
    if card is None:
        return None
    return max(flop / (FP8_FLOP_PER_S if fp8 else BF16_FLOP_PER_S), n_bytes / BYTES_PER_S[card])
