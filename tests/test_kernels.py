"""Kernels of our own: their definitions against autograd, and their code, interpreted, against the definitions."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

from lit_sft.kernels import gated, gated_backward, gated_backward_plain, split_heads, transposed
from lit_sft.rope import rotate

SCRIPT = ROOT / "tests" / "interpreted_kernels.py"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_the_gated_units_gradient_is_autograds(activation: str) -> None:
    gate_up, upstream = random(5, 14).requires_grad_(), random(5, 7)
    out = gated(gate_up, activation)
    gate, up = gate_up.detach().chunk(2, dim=-1)
    function = torch.nn.functional.silu
    if activation != "silu":
        function = torch.nn.GELU("tanh" if activation == "gelu_tanh" else "none")
    assert torch.allclose(out, function(gate) * up, rtol=1e-12)
    (wanted,) = torch.autograd.grad(out, gate_up, upstream)
    for backward in (gated_backward, gated_backward_plain):
        gradient, again = backward(gate_up.detach(), upstream, activation)
        assert (gradient - wanted).norm() <= 1e-13 * wanted.norm()
        assert (again - out).norm() <= 1e-13 * out.norm()


@pytest.mark.parametrize(("n_head", "n_groups"), [(4, 4), (4, 2), (3, 1)])
def test_split_heads_are_turned_as_rope_turns_them(n_head: int, n_groups: int) -> None:
    """And so are the gradients."""
    n, size = n_head + 2 * n_groups, 6
    y, angles = random(5, n * size).requires_grad_(), random(5, size // 2)
    rotation = angles.cos(), angles.sin()
    query, key, value = y.unflatten(1, (n, size)).split([n_head, n_groups, n_groups], dim=1)
    wanted = [rotate(query[None], rotation)[0], rotate(key[None], rotation)[0], value]
    found = split_heads(y, *rotation, n_head, n_groups)
    upstream = [random(5, heads, size) for heads in (n_head, n_groups, n_groups)]
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-14 * theirs.norm()
        assert mine.is_contiguous() and mine.untyped_storage().nbytes() == mine.nbytes  # in memory of its own
    gradients = [torch.autograd.grad(parts, y, upstream)[0] for parts in (found, wanted)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-14 * gradients[1].norm()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_transposed(dtype: torch.dtype) -> None:
    bits = random(5, 3).to(torch.float32).to(dtype)
    turned = transposed(bits)
    assert turned.dtype == dtype and turned.is_contiguous() and turned.data_ptr() != bits.data_ptr()
    assert torch.equal(turned.float(), bits.float().T)


@pytest.mark.skipif(find_spec("triton") is None, reason="a CPU's torch comes without Triton, which reads the kernels")
def test_the_kernels_own_code_equals_their_definitions() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["equal"], done.stdout + done.stderr
