"""Run with TRITON_INTERPRET=1: the kernels' own code, step by step on a CPU, beside their plain definitions."""

import sys

import torch
import triton

from lit_sft import kernels
from lit_sft.rope import rotate

torch.manual_seed(0)


def check_gated(rows: int, width: int, activation: str, dtype: torch.dtype) -> None:
    """The gated unit's backward, widths that fill no block among them."""
    gate_up, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    found = torch.full_like(gate_up, torch.nan), torch.full_like(grad, torch.nan)
    grid = (rows, triton.cdiv(width, kernels.BLOCK))
    kernels._gated_backward[grid](gate_up, grad, *found, width, activation, kernels.BLOCK)
    exact = kernels.gated_backward_plain(gate_up.double(), grad.double(), activation)
    compare(found, exact, dtype, f"gated {rows} × {width} {activation}")


def check_turn(rows: int, n_heads: int, size: int, backward: bool, dtype: torch.dtype) -> None:
    """Heads that are part of wider rows, turned or copied."""
    wide = torch.randn(rows, n_heads + 2, size).to(dtype)
    angles = torch.rand(rows, size // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    target = torch.full((rows, n_heads + 1, size), torch.nan, dtype=dtype)
    blocks = triton.next_power_of_2(n_heads), triton.next_power_of_2(size // 2)
    for turned in (True, False):
        source, into = wide[:, 2:], target[:, 1:]
        sine = -sin if backward else sin
        strides = source.stride(0), into.stride(0)
        kernels._turn[(rows,)](source, into, cos, sine, *strides, n_heads, size // 2, turned, *blocks)
        exact = rotate(source.double(), (cos.double(), sine.double())) if turned else source
        compare([into], [exact], dtype, f"turn {rows} × {n_heads} × {size}")
        assert target[:, 0].isnan().all()


def check_transpose(n: int, k: int) -> None:
    """Bytes, sizes that fill no tile among them."""
    bits = torch.randint(0, 255, (n, k), dtype=torch.uint8)
    out = torch.zeros(k, n, dtype=torch.uint8)
    tile = kernels.TILE
    kernels._transpose[(triton.cdiv(n, tile), triton.cdiv(k, tile))](bits, out, n, k, tile)
    assert torch.equal(out, bits.T)


def compare(found: object, exact: object, dtype: torch.dtype, name: str) -> None:
    """Nothing left unwritten, and one rounding apart at most."""
    bound = 1e-6 if dtype == torch.float32 else 8e-3  # the interpreter cuts off where a GPU rounds
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.isfinite().all(), name
        error = (mine.double() - theirs).norm() / theirs.double().norm()
        assert error < bound, (name, dtype, float(error))


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        for activation in ("silu", "gelu_tanh", "gelu"):
            check_gated(3, 40, activation, dtype)
            check_gated(2, 2500, activation, dtype)
        for backward in (False, True):
            check_turn(5, 4, 16, backward, dtype)
            check_turn(3, 3, 24, backward, dtype)
    check_transpose(70, 130)
    check_transpose(128, 64)
    print("equal", file=sys.stdout)
