"""LoRA (Hu et al. 2021, arXiv 2106.09685): small trainable matrices beside frozen linear layers."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sft.args import LoRAArgs
from lit_sft.model import GPT, MoE
from lit_sft.quantize import QuantizedLinear
from lit_sft.recompute import cheaply
from lit_sft.upload import upload

ADAPTER_KEYS = ("lora_A", "lora_B")


class LoRALinear(nn.Module):
    """A linear layer and its adapter: ``x Wᵀ + b + (alpha / r) (dropout(x) Aᵀ) Bᵀ``.

    A (r, in) and B (out, r) are kept in fp32 (fp64 over an fp64 base), and rounded to the input's dtype for products.
    """

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        args: LoRAArgs,
        dropout: Callable[[Tensor, Tensor], Tensor] | None,
        number: int,
        device: torch.device | None = None,
    ) -> None:
        """``device``: of the adapter; None: that of the weights, which may stay in the host's memory."""
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling = args.lora_alpha / args.lora_r
        self.dropout = dropout
        stored = base.weight if isinstance(base, nn.Linear) else torch.empty(0, device=next(base.buffers()).device)
        device = device or stored.device
        # a tensor, for which a compiled block need not be compiled anew in each layer
        self.register_buffer("number", torch.tensor(number, device=device), persistent=False)
        kept = {"device": device, "dtype": torch.promote_types(stored.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.zeros(args.lora_r, base.in_features, **kept))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, args.lora_r, **kept))
        self.joined: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        """The same as one operation, where ``join_products`` has made one for this layer alone."""

    def reset_adapter(self, generator: torch.Generator) -> None:
        """A uniform in ±1/√in, B zero: the adapter starts as no change at all."""
        bound = 1 / math.sqrt(self.in_features)
        start = torch.empty(self.lora_A.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(start)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if self.joined is not None:
            return self.joined(x)[0]
        dropped = cheaply(self._drop, x) if self.training and self.dropout is not None else x
        low_rank = F.linear(dropped, self.lora_A.to(x.dtype))
        y = self.base(x)
        product = self.lora_B.to(y.dtype).T
        flat = y.reshape(-1, self.out_features), low_rank.reshape(-1, product.shape[0])
        return torch.addmm(*flat, product, alpha=self.scaling).view(y.shape)

    def _drop(self, x: Tensor) -> Tensor:
        return self.dropout(x, self.number)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: (out, in), in the adapter's dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)


class ExampleDropout:
    """Dropout whose masks follow from (seed, step, example, position) and never from packing or device.

    The training loop announces each row with ``begin_row``; every layer then hashes its own mask. The mixing function
    is "lowbias32" (C. Wellons, 2018), on 32 bits held in int64 since torch has no unsigned shifts everywhere.
    """

    def __init__(self, p: float, seed: int) -> None:
        self.p, self.seed = p, seed
        self.token_keys: Tensor | None = None

    def of_expert(self, mixture: MoE, expert: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The same dropout for the layers of one expert, which see the tokens that the router chose for it."""
        return lambda x, number: self(x, number, mixture.tokens_of[expert])

    def begin_row(self, step: int, examples: list[int], lengths: list[int], device: torch.device) -> None:
        """Set the keys of the row's tokens: (T,) int64, one hash for each token of each example."""
        if self.p == 0:
            return
        run = _mix(_mix(torch.tensor(self.seed)) + step)
        example_keys = _mix(run + torch.tensor(examples)).repeat_interleave(torch.tensor(lengths))
        positions = torch.cat([torch.arange(n) for n in lengths])
        self.token_keys = upload({"keys": _mix(example_keys + positions)}, device)["keys"]

    def __call__(self, x: Tensor, number: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Drop from x (1, T, C), a row, or (N, C), the ``tokens`` (N,) of it, with the mask of layer ``number`` ()."""
        keys = self.token_keys if self.token_keys is None or tokens is None else self.token_keys[tokens]
        if keys is None or x.shape[-2] != len(keys):
            raise RuntimeError("LoRA dropout was given tokens of a row that begin_row did not announce")
        channels = torch.arange(x.shape[-1], device=x.device) * 0x9E3779B9 + number
        bits = _mix(keys[:, None] ^ _mix(channels)[None, :])
        return x * (bits >= self.p * 2**32) / (1 - self.p)


def _mix(x: Tensor) -> Tensor:
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def apply_lora(model: GPT, args: LoRAArgs, seed: int) -> ExampleDropout:
    """Freeze ``model`` and put adapters on the linear layers that ``args`` names, in place.

    The adapters' start follows from ``seed`` alone. Returns the dropout that the adapters share.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    dropout = ExampleDropout(args.lora_dropout, seed)
    parts = args.parts()
    wanted = [name for name in ("query", "key", "value", "projection") if parts[name]]
    wanted += ["gate", "up", "down"] if parts["mlp"] else []
    wanted += ["lm_head"] if parts["head"] else []
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    mixtures = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    for number, (name, base) in enumerate(linears):
        parent, _, child = name.rpartition(".")
        if child in wanted:
            mixture, _, expert = parent.rpartition(".experts.")
            own = dropout.of_expert(mixtures[mixture], int(expert)) if mixture else dropout
            # the head sees only the labelled positions of a row, and is not dropped from
            own = None if child == "lm_head" or args.lora_dropout == 0 else own
            adapted = LoRALinear(base, args, own, number, model.wte.weight.device)
            adapted.reset_adapter(generator)
            setattr(model.get_submodule(parent), child, adapted)
    return dropout


def lora_state_dict(model: GPT) -> dict[str, Tensor]:
    """The adapter's tensors by name, ``blocks.0.attn.query.lora_A`` and so on."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ADAPTER_KEYS}


@torch.no_grad()
def merge_lora(model: GPT) -> None:
    """Add each adapter to its base weight, computed in fp32 or better, and put plain linear layers back, in place.

    A head that shares its tensor with the embedding gets one of its own: only the head was adapted. Joined products and
    grouped experts are parted: they would go on to compute with what there was before.
    """
    for module, way in [(m, way) for m in model.modules() for way in ("joined", "grouped") if hasattr(m, way)]:
        setattr(module, way, None)
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]:
        merged = nn.Linear(module.in_features, module.out_features, bias=module.base.bias is not None, device="meta")
        weight = module.base.weight.to(module.lora_A) + module.delta()
        merged.weight = nn.Parameter(weight.to(module.base.weight.dtype), requires_grad=False)
        merged.bias = module.base.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, merged)
        if child == "lm_head":
            model.config = replace(model.config, tie_embeddings=False)
