"""Frozen base weights in fewer bits: NF4 (4) and FP8 (8). Adapters, norms, embeddings and head stay as they are.

Only the frozen product is approximate; its gradient with respect to the input is that of the product it stands for.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.errors import InputError
from lit_sft.kernels import transposed
from lit_sft.model import GPT

NF4, NF4_DOUBLE, FP8 = "nf4", "nf4-dq", "fp8"
FP8_DTYPE = torch.float8_e4m3fn
FP8_MOST = torch.finfo(FP8_DTYPE).max
CPU_SCALES_ROWS = torch.__version__ >= (2, 12)
"""True where a CPU's FP8 product takes a scale for each row; torch 2.11's takes one for all."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weights are held in fewer bits."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class NF4Linear(QuantizedLinear):
    """Weights as one of sixteen quantiles of a normal distribution, scaled by 64s (Dettmers et al. 2023)."""

    def __init__(self, weight: Tensor, double: bool) -> None:
        """``double``: the scales are quantized as well."""
        super().__init__(weight)
        packed, self.state = _bitsandbytes().quantize_4bit(
            weight.flatten(),  # bitsandbytes 0.50 spoils blocks on a CPU where rows do not end with a block
            blocksize=64,
            quant_type="nf4",
            compress_statistics=double,
        )
        self.register_buffer("packed", packed, persistent=False)

    def scales(self) -> list[Tensor]:
        """The scales of each 64 weights; quantized ones with what they are scaled by and shifted by in turn."""
        if self.state.state2 is None:
            return [self.state.absmax]
        return [self.state.absmax, self.state.state2.absmax, self.state.state2.code, self.state.offset]

    def frozen(self) -> list[Tensor]:
        """The bits, and ``scales``."""
        return [self.packed, *self.scales()]

    def hold(self, frozen: list[Tensor]) -> None:
        """Compute with these copies of ``frozen``."""
        self.packed, self.state.absmax, *nested = frozen
        if nested:
            self.state.state2.absmax, self.state.state2.code, self.state.offset = nested

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights (out, in) that the bits stand for."""
        weight = _bitsandbytes().dequantize_4bit(self.packed, self.state)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return _NF4Product.apply(x, self)


class FP8Linear(QuantizedLinear):
    """Weights and inputs in FP8 (E4M3), a scale for each row of either; products in FP8 forward and backward."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        bits, scale = to_fp8(weight)
        self.register_buffer("bits", bits, persistent=False)
        self.register_buffer("scale", scale.T.contiguous(), persistent=False)  # (1, out)

    def frozen(self) -> list[Tensor]:
        """The bits, and their scales."""
        return [self.bits, self.scale]

    def hold(self, frozen: list[Tensor]) -> None:
        """Compute with these copies of ``frozen``."""
        self.bits, self.scale = frozen

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights (out, in) that the bits stand for."""
        return (self.bits.float() * self.scale.T).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return _FP8Product.apply(x.reshape(-1, self.in_features), self.bits, self.scale).view(*x.shape[:-1], -1)


class _NF4Product(torch.autograd.Function):
    """A product with weights that are widened for it and again for its gradient: only the bits are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight(grad.dtype), None


class _FP8Product(torch.autograd.Function):
    """X (N, in) times frozen FP8 weights ``bits`` (out, in), scaled by ``scale`` (1, out); the input is not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(bits, scale)
        return fp8_product(*to_fp8(x), bits, scale, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        bits, scale = ctx.saved_tensors
        return fp8_gradient(*to_fp8(grad * scale.to(grad.dtype)), bits, grad.dtype), None, None


def widen_nf4(packed: list[Tensor], scales: list[Tensor], out_features: list[int], dtype: torch.dtype) -> Tensor:
    """The weights of several NF4 layers with the same input, one below the other.

    Args:
        packed: bits of each layer.
        scales: ``NF4Linear.scales`` of each, one behind the other.
        out_features: rows of each layer's weight.
        dtype: of the result.

    Returns:
        (sum of out_features, in).
    """
    functional = _bitsandbytes()
    in_features = 2 * packed[0].numel() // out_features[0]
    weight = torch.empty(sum(out_features), in_features, dtype=dtype, device=packed[0].device)
    per_layer = len(scales) // len(packed)
    for number, (bits, rows) in enumerate(zip(packed, weight.split(out_features), strict=True)):
        absmax, *nested = scales[number * per_layer : (number + 1) * per_layer]
        if nested:
            outer, code, offset = nested
            absmax = functional.dequantize_blockwise(absmax, absmax=outer, code=code, blocksize=256) + offset
        state = functional.QuantState(absmax, rows.shape, blocksize=64, quant_type=NF4, dtype=dtype)
        rows.copy_(functional.dequantize_4bit(bits, state))  # whose out= is missing on a CPU
    return weight


def fp8_product(rows: Tensor, row_scale: Tensor, bits: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (M, in), of ``to_fp8``, times weights bits (out, in) scaled by ``scale`` (1, out): (M, out) in ``dtype``."""
    return _scaled_mm(rows, bits.T, row_scale, scale, dtype)


def fp8_gradient(rows: Tensor, row_scale: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the input: (M, in) in ``dtype``.

    ``rows`` (M, out), of ``to_fp8``, are the output's gradient times the weights' scales, which are folded into it
    because the sum now runs over the weights' rows.
    """
    columns = transposed(bits).T  # the second operand's sums must run along memory
    ones = row_scale.new_ones(1, bits.shape[1])
    return _scaled_mm(rows, columns, row_scale, ones, dtype)


def _scaled_mm(rows: Tensor, bits: Tensor, row_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (M, K) times bits (K, N), scaled by (M, 1) and (1, N)."""
    if not rows.is_cuda and not CPU_SCALES_ROWS:
        return (rows.float() @ bits.float() * row_scale * scale).to(dtype)
    narrow = torch.bfloat16 if rows.is_cuda else dtype  # all that CUDA's product gives
    # sums in the tensor cores' own bits: kept in fp32 they were measured to take up to a sixth longer on an H100
    y = torch._scaled_mm(rows, bits, scale_a=row_scale, scale_b=scale, out_dtype=narrow, use_fast_accum=rows.is_cuda)
    return y.to(dtype)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (N, K) as FP8, and the scales (N, 1) in fp32 that bring it back: each row uses the whole range."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / FP8_MOST
    return (x.float() / scale).to(FP8_DTYPE), scale


def quantized(weight: Tensor, kind: str) -> QuantizedLinear:
    """The layer that computes with ``weight`` (out, in) as ``kind`` stores it; InputError when it cannot."""
    kind = kind.removeprefix("bnb.")  # Lit-GPT's spelling, after the library
    if kind == FP8:
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise InputError("--quantize fp8 needs a GPU that multiplies in FP8: Ada, Hopper or later; use nf4")
        if weight.is_cuda and (weight.shape[0] % 16 or weight.shape[1] % 16):
            raise InputError(f"--quantize fp8: a weight of {tuple(weight.shape)} is not a multiple of 16 both ways")
        torch.compiler.allow_in_graph(_FP8Product)  # whose inside Dynamo of torch 2.13 fails on with rows of any length
        return FP8Linear(weight)
    return NF4Linear(weight, double=kind == NF4_DOUBLE)


def is_quantized(model: GPT, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer of a block: those are quantized; a router's choice is not."""
    module, _, part = name.rpartition(".")
    linear = name.startswith("blocks.") and part == "weight" and isinstance(model.get_submodule(module), nn.Linear)
    return linear and not module.endswith(".router")


def place_quantized(model: GPT, name: str, layer: QuantizedLinear) -> None:
    """Put ``layer`` where the linear layer was whose weight is called ``name``, with the bias of that."""
    module = name.removesuffix(".weight")
    parent, _, child = module.rpartition(".")
    layer.bias = model.get_submodule(module).bias
    setattr(model.get_submodule(parent), child, layer)


def has_nf4() -> bool:
    """Whether the library that NF4 needs is installed."""
    return find_spec("bitsandbytes") is not None


def _bitsandbytes():
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise InputError("--quantize nf4 needs bitsandbytes: pip install 'lit-sft[nf4]'") from None
    return functional
