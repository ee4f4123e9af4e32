"""What was predicted of a GPU before anything was measured on one; benchmarks/gpu.py prints it beside each figure.

Worked out for LoRA of rank 16 on Llama 2's 7B shape and Alpaca's lengths, from counted operations and bytes, at 700
TFLOP/s and 3.6 TB/s on an H200; "now" is the engine of November 2026, "after" the one with fused adapters.
"""

from typing import NamedTuple

BF16_FLOP_PER_S, FP8_FLOP_PER_S = 700e12, 1400e12  # sustained; the second is assumed
BYTES_PER_S = {"H200": 3.6e12, "H100": 2.5e12}  # kernels that read and write; an H100's from its copies
COPY_BYTES_PER_S = {"H200": 4.3e12, "H100": 3.0e12}


class Predicted(NamedTuple):
    """One figure on each card; None: nobody said."""

    h200: float | None
    h100: float | None
    after: float | None
    """On an H200, once what was planned is done."""


MICROSECONDS = {
    "base products": Predicted(37.0, 37.0, 36.7),
    "head and loss": Predicted(0.85, 0.95, 0.85),
    "elementwise": Predicted(4.8, 6.7, 4.0),
    "layout copies": Predicted(0.6, 0.8, 0.0),
    "LoRA forward": Predicted(3.7, 5.2, 1.9),
    "LoRA backward": Predicted(4.3, 6.0, 2.8),
    "casts": Predicted(0.35, 0.35, 0.0),
    "attention": Predicted(3.5, 3.8, 3.5),
    "optimizer, host": Predicted(0.7, 0.75, 0.2),
    "prefix gather": Predicted(2.7, None, 0.5),  # of a row with shared prefixes: 5 to 6 % of its time
    "sum": Predicted(55.8, 61.5, 50.0),
}
"""Of a useful token, in bf16 without shared prefixes where nothing else is said."""
BF16_ONLY = ("base products", "elementwise", "sum")

TOKENS_PER_S = {
    (None, False): Predicted(18_250, 16_000, 20_500),
    (None, True): Predicted(19_000, None, 23_500),
    ("fp8", False): Predicted(22_000, None, 29_000),
    ("fp8", True): Predicted(23_000, None, 33_000),
}
"""Useful tokens a second of (quantize, share_prefix); the middle of a range where one was given."""


def card_of(device: str) -> str | None:
    """The card that ``device`` names, of those with predictions."""
    return next((card for card in BYTES_PER_S if card in device), None)


def on_card(predicted: Predicted | None, device: str) -> tuple[float | None, float | None]:
    """What was predicted now and after for ``device``; an H100's speed after is not known."""
    card = card_of(device)
    if predicted is None or card is None:
        return None, None
    if card == "H100":
        return predicted.h100, None
    return predicted.h200, predicted.after


def floor_seconds(flop: float, n_bytes: float, device: str, fp8: bool = False) -> float | None:
    """The time of one kernel that is bound by its operations or by the memory it reads and writes."""
    card = card_of(device)
    if card is None:
        return None
    return max(flop / (FP8_FLOP_PER_S if fp8 else BF16_FLOP_PER_S), n_bytes / BYTES_PER_S[card])
