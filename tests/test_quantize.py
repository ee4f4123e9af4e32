"""NF4 and FP8 against the library's own product and fp64: errors stated, gradients exactly those of the product."""

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from conftest import make_hf_llama
from torch import nn

from lit_sft import load_model, quantize
from lit_sft.args import ConvertArgs, LoRAArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.lora import apply_lora, lora_state_dict
from lit_sft.quantize import QuantizedLinear, is_quantized, quantized, to_fp8

KINDS = ["nf4", "nf4-dq", "bnb.nf4", "bnb.nf4-dq", "fp8"]
ERROR = {"nf4": 0.11, "fp8": 0.045}  # of one product; NF4's weights alone 9.3 %, FP8 3.5 %


def inputs(n: int = 96, k: int = 256, m: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, k, generator=generator) / k**0.5
    return torch.randn(2, n, k, generator=generator), weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product(kind: str, dtype: torch.dtype) -> None:
    x, weight = inputs()
    expected = x.double() @ weight.double().T
    y = quantized(weight.to(dtype), kind)(x.to(dtype))
    assert y.dtype == dtype and y.shape == expected.shape
    error = ((y - expected).norm() / expected.norm()).item()
    assert 0.005 < error < ERROR["fp8" if kind == "fp8" else "nf4"], error


@pytest.mark.parametrize("shape", [(64, 160), (96, 96), (256, 688), (10, 30), (192, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_of_any_shape_is_as_near(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = quantized(weight.to(dtype), "nf4").weight(torch.float32)
    assert 0.08 < (stored - weight).norm() / weight.norm() < 0.1


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_the_librarys(double: bool) -> None:
    x, weight = inputs()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    expected = x @ functional.dequantize_4bit(packed, state).T
    layer = quantized(weight, "nf4-dq" if double else "nf4")
    assert torch.equal(layer(x), expected)
    assert sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers()) == weight.numel() / 2


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_gradient_is_that_of_the_product_with_the_stored_weights(kind: str) -> None:
    x, weight = inputs()
    layer = quantized(weight, kind)
    x.requires_grad_()
    grad = torch.randn(2, 96, 192, generator=torch.Generator().manual_seed(1))
    layer(x).backward(grad)
    expected = grad.double() @ layer.weight(torch.float64)
    error = ((x.grad - expected).norm() / expected.norm()).item()
    assert error < (1e-6 if kind == "nf4" else 0.04), error


def test_fp8_on_a_cpu_whose_product_scales_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's takes one scale for all: there the same product is computed in fp32."""
    results = []
    for scales_rows in (True, False):
        monkeypatch.setattr(quantize, "CPU_SCALES_ROWS", scales_rows)
        if not scales_rows:
            monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("takes no scales of rows there"))
        x, weight = inputs()
        y = quantized(weight, "fp8")(x.requires_grad_())
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        results.append((y.detach(), x.grad))
        narrow = quantized(weight.bfloat16(), "fp8")(x.detach().bfloat16())
        assert narrow.dtype == torch.bfloat16 and (narrow - y).norm() < 0.03 * y.norm()
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_rows_of_any_size_survive_fp8() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [3e38, 1.0], [448.0, -1.0]])
    bits, scale = to_fp8(x)
    back = bits.float() * scale
    assert back.isfinite().all() and torch.equal(back[0], torch.zeros(2))
    assert torch.allclose(back[2:, 0], x[2:, 0], rtol=1e-6)


def model_dir(directory: Path, **config: object) -> Path:
    make_hf_llama(directory, hidden_size=128, intermediate_size=256, initializer_range=0.09, **config)
    return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp8"])
def test_a_model_and_its_adapter(tmp_path: Path, kind: str) -> None:
    """Blocks are narrow, all else untouched; logits near the original's; only adapters get gradients, near its own."""
    directory = model_dir(tmp_path, attention_bias=True)
    plain, narrow = load_model(directory), load_model(directory, quantize=kind)
    kinds = {name: m for name, m in narrow.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(kinds) == 2 * 7 and not any(isinstance(m, nn.Linear) for m in narrow.blocks.modules())
    assert torch.equal(narrow.blocks[0].attn.query.bias, plain.blocks[0].attn.query.bias)
    assert torch.equal(narrow.lm_head.weight, plain.lm_head.weight)
    ids = torch.randint(0, 400, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = ((narrow(ids) - plain(ids)).norm() / plain(ids).norm()).item()
    assert 0.001 < error < (0.15 if kind == "fp8" else 0.3), error  # two layers on: three times that of one product
    gradients = []
    for model in (plain, narrow):
        apply_lora(model, LoRAArgs(lora_r=4), seed=0)
        for i, (name, p) in enumerate(lora_state_dict(model).items()):
            if name.endswith("B"):
                nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(i))
        model.train()
        nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(lora_state_dict(model))
        gradients.append(torch.cat([p.grad.flatten() for p in lora_state_dict(model).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def test_experts_are_narrow_and_the_router_is_not(tmp_path: Path) -> None:
    from test_model import make_model

    model = make_model(n_head=4, n_query_groups=2, n_expert=4, n_expert_per_token=2)
    names = [name for name, _ in model.named_parameters() if is_quantized(model, name)]
    assert len(names) == 3 * (4 + 4 * 3) and not any("router" in name or "norm" in name for name in names)


def test_the_wide_model_never_exists_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is narrow before the next is read."""
    from lit_sft import checkpoint

    directory, alive, most = model_dir(tmp_path, num_hidden_layers=6), [], []
    original = checkpoint._stored_weights

    def watched(*args: object):
        import weakref

        for name, tensor in original(*args):
            if name.startswith("blocks.") and tensor.dim() == 2:
                tensor = tensor.clone()
                alive.append(weakref.ref(tensor))
            most.append(sum(ref() is not None for ref in alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(checkpoint, "_stored_weights", watched)
    load_model(directory, quantize="nf4")
    assert len(alive) == 6 * 7 and max(most) <= 2


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="pip install"):
        quantized(inputs()[1], "nf4")
