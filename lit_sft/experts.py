"""Mixtures of experts as grouped products; what they compute is defined by ``MoE``.

The loop of ``MoE`` asks which tokens each expert gets, for which the host must wait for the GPU once an expert. Here
the tokens are sorted by their experts, and one product multiplies each expert's rows with its own weight. How many
rows an expert gets stays on the device:

    order    places (T k) of the chosen experts, sorted by expert
    rows     x[order // k] (T k, C)
    hidden   rows through gate and up, one grouped product plus two for their adapters, times the tokens' shares
    result   hidden through down, likewise, back in the order of the tokens and summed over k

A share scales the input of down and not its output, which would have to be kept for the share's gradient.

On GPUs before Hopper, and in fp32, torch's grouped product is a loop over experts that waits once for their numbers of
rows. Sums run in a fixed order: nothing is added atomically. An expert without a token has zero gradients, where the
loop gives none at all.

A mixture stays a loop where its experts are quantized, drop out inputs of their adapters, have biases or no gate, or
are in fp64; and on a CPU where they are few, for which the loop is faster.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.lora import LoRALinear
from lit_sft.model import GPT, MLP, MoE
from lit_sft.recompute import cheaply

ALIGNED = 8  # a grouped product on a GPU reads rows of a multiple of 16 bytes
MANY = 32  # experts; measured on a CPU, forward and backward, 64 take 10 to 50 % less time, 8 up to 10 % more


def group_experts(model: GPT) -> None:
    """Let the mixtures of experts in ``model`` compute as grouped products where that is faster, in place.

    ``model`` has frozen weights; what it computes, the names of its parameters and its adapter stay.
    """
    for block in model.blocks:
        if isinstance(block.mlp, MoE) and _can_group(block.mlp) and _is_faster(block.mlp):
            block.mlp.grouped = GroupedExperts(block.mlp)


def _can_group(mixture: MoE) -> bool:
    """Say whether all experts are alike, of plain weights and of sizes that a grouped product takes."""
    for name in ("gate", "up", "down"):
        layers = [getattr(expert, name) for expert in mixture.experts]
        if len({type(layer) for layer in layers}) > 1 or not _is_plain(layers[0]):
            return False
    return True


def _is_plain(layer: nn.Module | None) -> bool:
    """Say whether a layer is a frozen product without bias or dropout, in 32 or 16 bits."""
    if isinstance(layer, LoRALinear):
        if layer.dropout is not None:
            return False
        layer = layer.base
    if not isinstance(layer, nn.Linear) or layer.bias is not None or layer.weight.requires_grad:
        return False
    aligned = layer.in_features % ALIGNED == 0 and layer.out_features % ALIGNED == 0
    return aligned and layer.weight.dtype.itemsize <= 4


def _is_faster(mixture: MoE) -> bool:
    """Say whether grouped products are faster than the loop: on a GPU, and for many experts on a CPU."""
    device = mixture.router.weight.device.type
    return device == "cuda" or (device == "cpu" and len(mixture.experts) >= MANY)


class GroupedExperts:
    """The experts of one mixture; in memory their frozen weights become views of two tensors."""

    def __init__(self, mixture: MoE) -> None:
        """``mixture``: its experts' weights are moved, in place."""
        experts: list[MLP] = list(mixture.experts)
        self.n_expert = len(experts)
        self.gate_up = GroupedLinear([[expert.gate for expert in experts], [expert.up for expert in experts]])
        self.down = GroupedLinear([[expert.down for expert in experts]])
        self.activation = experts[0].activation

    def __call__(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """Send tokens to their experts, and sum up what comes back.

        Args:
            x: (T, C), the tokens.
            shares: (T, k), how much of each chosen expert's result a token gets.
            chosen: (T, k) int64, the experts of each token.

        Returns:
            (T, C).
        """
        order = chosen.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        numbers = torch.arange(self.n_expert, device=x.device)
        ends = torch.searchsorted(chosen.flatten()[order], numbers, right=True).to(torch.int32)

        gate, up = self.gate_up(x, ends, (order // chosen.shape[1], back))
        weights = _Permuted.apply(shares.flatten(), order, back)
        (y,) = self.down(cheaply(self._gated, gate, up, weights), ends)
        return _Permuted.apply(y, back, order).unflatten(0, chosen.shape).sum(1)

    def _gated(self, gate: Tensor, up: Tensor, weights: Tensor) -> Tensor:
        return self.activation(gate) * up * weights[:, None]


class GroupedLinear:
    """Linear layers with the same input, of every expert, as one grouped product and two of their adapters."""

    def __init__(self, parts: list[list[nn.Module]]) -> None:
        """``parts``: layers with the same input, such as gate and up, each of all experts; changed in place."""
        self.sizes = [layers[0].out_features for layers in parts]
        self.adapters = [layers if isinstance(layers[0], LoRALinear) else None for layers in parts]
        self.weight = _stack_weights(parts, self.sizes)

    def __call__(self, x: Tensor, ends: Tensor, places: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Multiply rows sorted by expert with the experts' weights.

        Args:
            x: the rows (N, in); with ``places``, the tokens (T, in).
            ends: (E,) int32, where the rows of each expert end.
            places: the token (N,) int64 of each row, and (T k,) int64, the rows of each token.

        Returns:
            (N, out) of each part.
        """
        weights, B = [self.weight], None
        if any(self.adapters):
            A, B = self._adapter(x.dtype)
            weights.append(A)
        if places is None:
            products = [grouped_product(x, weight, ends) for weight in weights]
        else:
            products = products_of_tokens(x, *places, weights, ends)
        y = products[0]
        if B is not None:
            y = y + grouped_product(products[1], B, ends)
        return y.split(self.sizes, dim=-1)

    def _adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Stack A (E, R, K), scaled, and B (E, out, R), zero where a part meets another's adapter, in ``dtype``."""
        adapted = [layers for layers in self.adapters if layers is not None]
        A = torch.cat([layers[0].scaling * stack([layer.lora_A for layer in layers]) for layers in adapted], dim=1)
        missing = -A.shape[1] % ALIGNED
        ranks = A.shape[1] + missing
        rows, start = [], 0
        for layers, size in zip(self.adapters, self.sizes, strict=True):
            if layers is None:
                rows.append(A.new_zeros(len(A), size, ranks, dtype=dtype))
                continue
            B = stack([layer.lora_B for layer in layers]).to(dtype)
            end = start + B.shape[2]
            rows.append(F.pad(B, (start, ranks - end)))
            start = end
        return F.pad(A, (0, 0, 0, missing)).to(dtype), torch.cat(rows, dim=1)


def _stack_weights(parts: list[list[nn.Module]], sizes: list[int]) -> Tensor:
    """Move the frozen weights of ``parts`` into one tensor (E, sum of sizes, in), of which each becomes a view."""
    bases = [[layer.base if isinstance(layer, LoRALinear) else layer for layer in layers] for layers in parts]
    first = bases[0][0].weight
    stacked = first.new_empty(len(bases[0]), sum(sizes), first.shape[1])
    for layers, part in zip(bases, stacked.split(sizes, dim=1), strict=True):
        for base, own in zip(layers, part.unbind(), strict=True):
            own.copy_(base.weight.detach())
            base.weight = nn.Parameter(own, requires_grad=False)
    return stacked


# --- the operations ---


class _Permuted(torch.autograd.Function):
    """``x[order]``; backward is a reading as well, by the ``inverse`` order, where indexing would add atomically."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


@torch.library.custom_op("lit_sft::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows x (N, K), those of expert e before ``ends[e]`` (E,) int32, with weight (E, M, K): (N, M).

    An operation of its own: compiled, torch's takes bf16 alone.
    """
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("lit_sft::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Multiply y (N, M), transposed, with x (N, K), the rows of each expert apart: (E, M, K)."""
    return F.grouped_mm(y.T, x, offs=ends)


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return y.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ends = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_x = grouped_product(grad, weight.transpose(-2, -1), ends) if needs_x else None
    grad_weight = grouped_outer(grad, x, ends) if needs_weight else None
    return grad_x, grad_weight, None


grouped_product.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("lit_sft::products_of_tokens", mutates_args=())
def products_of_tokens(
    x: Tensor, tokens: Tensor, back: Tensor, weights: Sequence[Tensor], ends: Tensor
) -> list[Tensor]:
    """Multiply the rows ``x[tokens]`` with each of ``weights``, a frozen one and an adapter's A, as grouped products.

    An operation of its own, so that neither autograd nor the compiler keeps the rows, k times as many as tokens.

    Args:
        x: (T, K), the tokens.
        tokens: (N,) int64, the token of each row, the rows sorted by expert.
        back: (N,) int64, the rows of each token, k = N / T for each.
        weights: (E, M, K) each.
        ends: (E,) int32, where the rows of each expert end.

    Returns:
        (N, M) of each weight.
    """
    rows = x[tokens]
    return [F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends) for weight in weights]


@products_of_tokens.register_fake
def _(x: Tensor, tokens: Tensor, back: Tensor, weights: Sequence[Tensor], ends: Tensor) -> list[Tensor]:
    return [x.new_empty(tokens.shape[0], weight.shape[1]) for weight in weights]


def _keep_tokens(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, tokens, back, weights, ends = inputs
    ctx.n_tokens = x.shape[0]
    ctx.save_for_backward(x if len(weights) > 1 else None, tokens, back, ends, *weights)


def _backward_tokens(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, tokens, back, ends, *weights = ctx.saved_tensors
    grad_rows = grouped_product(grads[0].contiguous(), weights[0].transpose(-2, -1), ends)
    grad_weights: list[Tensor | None] = [None]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_rows = grad_rows + grouped_product(grad, weight.transpose(-2, -1), ends)
        grad_weights.append(grouped_outer(grad, x[tokens], ends))
    grad_x = grad_rows[back].unflatten(0, (ctx.n_tokens, -1)).sum(1)
    return grad_x, None, None, grad_weights, None


products_of_tokens.register_autograd(_backward_tokens, setup_context=_keep_tokens)


@torch.library.custom_op("lit_sft::stack", mutates_args=())
def stack(matrices: Sequence[Tensor]) -> Tensor:
    """Stack matrices of one shape; one operation, where the compiler would write a kernel of as many inputs."""
    return torch.stack(list(matrices))


@stack.register_fake
def _(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0].new_empty(len(matrices), *matrices[0].shape)


def _unstack(ctx: Any, grad: Tensor) -> list[Tensor]:
    return list(grad.unbind())


stack.register_autograd(_unstack)
