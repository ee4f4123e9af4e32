import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.recompute import cheaply, forgetfully, recomputing


def chain(x: Tensor, norm: nn.Module, weights: list[Tensor], tell: list[str]) -> Tensor:
    """A norm whose result three products need, and an activation in whose input a cast is nested."""

    def noted(name: str, function: nn.Module) -> nn.Module:
        class Noted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = function

            def forward(self, *inputs: Tensor) -> Tensor:
                tell.append(name)
                return self.inner(*inputs)

        return Noted()

    normed = cheaply(noted("norm", norm), x)
    q, k, gate = (normed.flatten(0, 1) @ w for w in weights)
    widened = cheaply(noted("double", nn.Softplus()), gate)
    hidden = cheaply(noted("activation", nn.SiLU()), widened)
    return (q * k).sum() + (hidden @ weights[0].T).sum()


def setting() -> tuple[Tensor, nn.LayerNorm, list[Tensor]]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double()
    nn.init.normal_(norm.weight)
    weights = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), norm, weights


def test_gradients_are_those_of_keeping_everything() -> None:
    found = []
    for recompute in (False, True):
        x, norm, weights = setting()
        if recompute:
            with recomputing():
                total = chain(x, norm, weights, [])
        else:
            total = chain(x, norm, weights, [])
        total.backward()
        found.append([total, x.grad, norm.weight.grad, norm.bias.grad, *(w.grad for w in weights)])
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-13, atol=1e-13)


def test_what_is_made_again_is_made_once_for_all_that_need_it_and_not_kept() -> None:
    x, norm, weights = setting()
    calls: list[str] = []
    with recomputing():
        total = chain(x, norm, weights, calls)
    assert calls == ["norm", "double", "activation"]
    total.backward()
    # once for the products that need it, and once for its own gradient
    assert {name: calls.count(name) - 1 for name in ("norm", "double", "activation")} == {
        "norm": 2, "double": 2, "activation": 2,
    }  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
def test_the_result_is_not_kept(recompute: bool) -> None:
    """A result in an array's memory, so that its end can be seen: a product needs it backward."""
    x, _, weights = setting()
    arrays: list[weakref.ref] = []

    def double(x: Tensor) -> Tensor:
        array = 2 * x.detach().numpy()
        arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    with recomputing() if recompute else nullcontext():
        total = (cheaply(double, x).flatten(0, 1) @ weights[0]).sum()
    assert (arrays[0]() is None) == recompute
    del total
    assert arrays[0]() is None


def test_without_gradients_and_outside_nothing_changes() -> None:
    x, norm, weights = setting()
    with torch.no_grad(), recomputing():
        inside = chain(x, norm, weights, [])
    outside = chain(x, norm, weights, [])
    assert torch.equal(inside, outside) and not inside.requires_grad


def test_identity_is_no_tensor_of_its_own() -> None:
    x, _, weights = setting()
    with recomputing():
        y = cheaply(nn.Identity(), x)
        total = F.linear(y, weights[0].T).sum()
    total.backward()
    assert y is x and x.grad is not None


def test_what_is_forgotten_without_a_session_has_the_same_gradients() -> None:
    x, _, weights = setting()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        total = forgetfully(lambda a, w: (a @ w).exp().tanh().square(), x, weights[0]).sum()
    plain = (x @ weights[0]).exp().tanh().square().sum()
    assert kept == [x.shape, weights[0].shape]
    ours, theirs = (torch.autograd.grad(t, (x, weights[0])) for t in (total, plain))
    assert all(torch.allclose(a, b, rtol=1e-13) for a, b in zip(ours, theirs, strict=True))
