"""The most that the machine can do: matrix products at a shape's own sizes, in bursts and for seconds on end."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from measure import seconds_of, synchronize
from shapes import Shape
from torch import Tensor

Work = Callable[[], object]
TOKENS = {"cuda": 14_000, "cpu": 256}  # rows of the inputs: a packed row of 64 examples like Alpaca's
BURST = 10  # calls: too short for the card to slow down


def product_rates(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> list[dict]:
    """FLOP/s of a linear layer, forward and gradient of its input, at each size that the shape has.

    Args:
        shape: whose linear layers, head included.
        tokens: rows of the input.
        dtype: of inputs and weights; random, never zeros.
        device: where.
    """
    sizes = dict.fromkeys(shape.linears())
    rates = [_rate(i, o, tokens, dtype, device) for i, o in sizes]
    return [*rates, _rate(shape.hidden_size, shape.vocab_size, min(tokens, 2048), dtype, device)]


def _rate(n_in: int, n_out: int, tokens: int, dtype: torch.dtype, device: str) -> dict:
    x = torch.randn(tokens, n_in, device=device).to(dtype)
    grad = torch.randn(tokens, n_out, device=device).to(dtype)
    weight = torch.randn(n_out, n_in, device=device).to(dtype)
    flop = 2 * tokens * n_in * n_out
    names = {"in": n_in, "out": n_out, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    seconds = [seconds_of(work, device) for work in (lambda: F.linear(x, weight), lambda: grad @ weight)]
    return names | {"forward_flop_per_s": flop / seconds[0], "backward_flop_per_s": flop / seconds[1]}


def ceiling(shape: Shape, rates: list[dict]) -> float:
    """FLOP/s of the shape's linear layers when each runs at its measured rate: their work over their time."""
    by_size = {(r["in"], r["out"]): (1 / r["forward_flop_per_s"] + 1 / r["backward_flop_per_s"]) / 2 for r in rates}
    work = [(i * o, by_size[i, o]) for i, o in shape.linears()]
    return sum(flop for flop, _ in work) / sum(flop * each for flop, each in work)


# --- on a device, without waiting for it between calls ---


class Mark:
    """A point in the work that a device was given; on a CPU the moment itself."""

    def __init__(self, device: str) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        if self.event:
            self.event.record()
        self.moment = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come this far."""
        if self.event:
            self.event.synchronize()

    def since(self, earlier: "Mark") -> float:
        """Seconds from ``earlier``; the device has come this far."""
        return earlier.event.elapsed_time(self.event) / 1e3 if self.event else self.moment - earlier.moment


def mean_seconds(works: Sequence[Work], device: str, calls: int = 20, repeats: int = 3) -> float:
    """Seconds of one call: the median over ``repeats`` of the mean over ``calls``, which take ``works`` in turn.

    Those are the same work on different tensors, so that no cache serves them; each has been called once before.
    """
    for work in works:
        work()
    means = []
    for _ in range(repeats):
        synchronize(device)
        begin = Mark(device)
        for work in islice(cycle(works), calls):
            work()
        end = Mark(device)
        end.wait()
        means.append(end.since(begin) / calls)
    return statistics.median(means)


def sustained_seconds(works: Sequence[Work], device: str, seconds: float) -> float:
    """Seconds of all ``works`` once, when they are repeated for ``seconds``; of the last two thirds of that time."""
    began, marks = time.perf_counter(), [Mark(device)]
    while time.perf_counter() - began < seconds or len(marks) < 4:
        for work in works:
            work()
        marks.append(Mark(device))
        marks[-2].wait()  # the device always has the next ones in its queue
    marks[-1].wait()
    third = len(marks) // 3
    return marks[-1].since(marks[third]) / (len(marks) - 1 - third)


def product_pair(n_in: int, n_out: int, tokens: int, device: str) -> tuple[Work, Work]:
    """Forward and gradient of the input of one linear layer in bf16."""
    x, grad, weight = (randn(shape, device) for shape in ((tokens, n_in), (tokens, n_out), (n_out, n_in)))
    return lambda: F.linear(x, weight), lambda: grad @ weight


def fp8_pair(n_in: int, n_out: int, tokens: int, device: str, fast: bool) -> tuple[Work, Work]:
    """The same in FP8, a scale for each row of either operand, without the scaling.

    ``fast``: sums within the matrix units are kept in fewer bits (torch's ``use_fast_accum``).
    """
    x, grad, weight = (randn(shape, device) for shape in ((tokens, n_in), (tokens, n_out), (n_out, n_in)))
    return _fp8_product(x, weight, fast), _fp8_product(grad, weight.T.contiguous(), fast)


def _fp8_product(x: Tensor, weight: Tensor, fast: bool) -> Work:
    """The product of x (N, K) with weight (M, K)ᵀ."""
    rows, row_scale = _to_fp8(x)
    columns, column_scale = _to_fp8(weight)
    column_scale = column_scale.T.contiguous()
    return lambda: torch._scaled_mm(
        rows,
        columns.T,
        scale_a=row_scale,
        scale_b=column_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def randn(shape: tuple[int, ...], device: str) -> Tensor:
    """Random numbers in bf16: a card computes faster, and a cache holds more, of zeros."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def mixed_ceiling(sizes: list[tuple[int, int]], device: str, seconds: float, kind: str) -> dict[str, float]:
    """FLOP/s of linear layers of these sizes, forward and gradient of the input, in bursts and for ``seconds``.

    Args:
        sizes: (in, out) of each layer of a block.
        device: where.
        seconds: of the sustained run.
        kind: "bf16" or "fp8", that with fast sums.
    """
    tokens = TOKENS[device]
    pairs: dict[tuple[int, int], tuple[Work, Work]] = {}
    for i, o in dict.fromkeys(sizes):
        pairs[i, o] = product_pair(i, o, tokens, device) if kind == "bf16" else fp8_pair(i, o, tokens, device, True)
    flop = sum(4 * tokens * i * o for i, o in sizes)
    once = {size: sum(mean_seconds([work], device, BURST) for work in pair) for size, pair in pairs.items()}
    works = [work for size in sizes for work in pairs[size]]
    return {
        "burst_flop_per_s": flop / sum(once[size] for size in sizes),
        "sustained_flop_per_s": flop / sustained_seconds(works, device, seconds),
    }
