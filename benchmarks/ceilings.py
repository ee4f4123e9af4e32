"""What the machine can do at most: matrix products at a shape's own sizes, and copies."""

import torch
import torch.nn.functional as F
from measure import seconds_of
from shapes import Shape
from torch import Tensor


def product_rates(shape: Shape, tokens: int, dtype: torch.dtype, device: str, fp8: bool = False) -> list[dict]:
    """FLOP/s of a linear layer, forward and gradient of its input, at each size that the shape has.

    Args:
        shape: whose linear layers, head included (never in FP8).
        tokens: rows of the input.
        dtype: of inputs and weights; random, never zeros.
        device: where.
        fp8: rows of both operands scaled to FP8 beforehand: what the product alone can do.
    """
    sizes = dict.fromkeys(shape.linears())
    rates = [_rate(i, o, tokens, dtype, device, fp8) for i, o in sizes]
    return [*rates, _rate(shape.hidden_size, shape.vocab_size, min(tokens, 2048), dtype, device, False)]


def _rate(n_in: int, n_out: int, tokens: int, dtype: torch.dtype, device: str, fp8: bool) -> dict:
    x = torch.randn(tokens, n_in, device=device).to(dtype)
    grad = torch.randn(tokens, n_out, device=device).to(dtype)
    weight = torch.randn(n_out, n_in, device=device).to(dtype)
    if fp8:
        turned = weight.T.contiguous()
        forward, back = _fp8_product(x, weight), _fp8_product(grad, turned)
    else:
        forward, back = lambda: F.linear(x, weight), lambda: grad @ weight
    flop = 2 * tokens * n_in * n_out
    names = {"in": n_in, "out": n_out, "tokens": tokens, "dtype": "fp8" if fp8 else str(dtype).removeprefix("torch.")}
    seconds = [seconds_of(work, device) for work in (forward, back)]
    return names | {"forward_flop_per_s": flop / seconds[0], "backward_flop_per_s": flop / seconds[1]}


def _fp8_product(x: Tensor, weight: Tensor):
    """The product of x (N, K) with weight (M, K)ᵀ, both in FP8 with a scale for each row, without the scaling."""
    operands = []
    for tensor in (x, weight):
        scale = tensor.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        operands.append(((tensor.float() / scale).to(torch.float8_e4m3fn), scale))
    (rows, row_scale), (columns, column_scale) = operands
    column_scale = column_scale.T.contiguous()
    return lambda: torch._scaled_mm(rows, columns.T, scale_a=row_scale, scale_b=column_scale, out_dtype=torch.bfloat16)


def ceiling(shape: Shape, rates: list[dict]) -> float:
    """FLOP/s of the shape's linear layers when each runs at its measured rate: their work over their time."""
    by_size = {(r["in"], r["out"]): (1 / r["forward_flop_per_s"] + 1 / r["backward_flop_per_s"]) / 2 for r in rates}
    work = [(i * o, by_size[i, o]) for i, o in shape.linears()]
    return sum(flop for flop, _ in work) / sum(flop * each for flop, each in work)


def copy_rate(device: str, megabytes: int) -> float:
    """Bytes a second of a copy on the device, read and written counted."""
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)
