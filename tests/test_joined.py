"""Layers joined in one product against the same layers apart: forward, every gradient, names, memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from spans import spans_on_a_cpu  # noqa: F401 (a fixture)
from test_compile import compile_lightly, quantize_model  # noqa: F401 (the first is a fixture)
from test_model import make_model
from torch import Tensor, nn
from torch.library import opcheck

from lit_sft import KVCache, joined, kernels
from lit_sft.args import LoRAArgs
from lit_sft.attention import Layout
from lit_sft.experts import GroupedExperts
from lit_sft.joined import Joined, join_products
from lit_sft.lora import LoRALinear, apply_lora, lora_state_dict, merge_lora
from lit_sft.model import GPT
from lit_sft.quantize import quantized, to_fp8

OFF = {f"lora_{part}": False for part in ("query", "key", "value", "projection", "mlp")}
MHA, GQA = {"n_head": 4, "n_query_groups": 4}, {"n_head": 4, "n_query_groups": 2}
BIASES = {"qkv_bias": True, "projection_bias": True, "mlp_bias": True}
CASES = {
    "multi-head": (MHA, {}),
    "grouped-query": (GQA, {}),
    "biases": (GQA | BIASES, {}),
    "query and value alone": (GQA, OFF | {"lora_query": True, "lora_value": True}),
    "key alone, biases": (GQA | BIASES, OFF | {"lora_key": True}),
    "projection alone": (GQA, OFF | {"lora_projection": True}),
    "mlp alone, biases": (GQA | BIASES, OFF | {"lora_mlp": True}),
    "head too, tied": (GQA | {"tie_embeddings": True}, {"lora_head": True}),
    "gelu": (GQA | {"activation": "gelu"}, {}),
    "gelu_tanh": (GQA | {"activation": "gelu_tanh"}, {}),
    "parallel residual, no gate": (
        MHA | BIASES | {"parallel_residual": True, "shared_norm": True, "norm": "layer", "gated_mlp": False,
                        "activation": "gelu", "rotary_size": 4}, {}),
    "norms of heads": (GQA | {"qk_norm": "head", "post_norm": True}, {}),
    "norms of queries and keys whole": (GQA | {"qk_norm": "full"}, {}),
    "a norm for each head": (GQA | {"qk_norm": "each_head", "norm": "layer"}, {}),
    "windows": (GQA | {"sliding_window": 4, "sliding_layers": (True, False, True)}, {}),
    "soft caps": (GQA | {"attention_softcap": 1.0, "logits_softcap": 2.0}, {}),
    "alibi": (MHA | {"alibi": True, "rotary_size": 0}, {}),
    "experts": (GQA | {"n_expert": 4, "n_expert_per_token": 2}, {}),
}  # fmt: skip
ROWS = [
    Layout([13]),
    Layout([9, 1, 7]),
    Layout([4, 3, 2, 3, 1, 5], [None, 0, 1, 2, 1, None]),  # three beginnings deep
]


def adapted_model(fields: dict, lora: dict, kind: str | None = None) -> GPT:
    model = make_model(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    model = model if kind is None else quantize_model(model.float(), kind)
    apply_lora(model, LoRAArgs(**({"lora_r": 3} | lora)), seed=0)
    for number, parameter in enumerate(lora_state_dict(model).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def trained(model: GPT) -> list[Tensor]:
    """States of each of ROWS, an answer in between, and the gradients that all rows leave."""
    found = []
    for number, layout in enumerate(ROWS):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 50, (1, sum(layout.lengths)), generator=generator)
        states = model.train().hidden_states(ids, layout)
        (states * torch.randn(states.shape, generator=generator).to(states)).sum().backward()
        found.append(states.detach())
        with torch.no_grad():
            model.eval()
            cache = KVCache(model.config, 2, 8, torch.device("cpu"), states.dtype)
            found += [model(ids[:, :5].expand(2, -1), cache), model(ids[:, 5:6].expand(2, -1), cache)]
    return found + [p.grad for p in lora_state_dict(model).values() if p.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    assert len(found) == len(expected) and all(x.norm() > 0 for x in expected)
    return all((a - b).norm() <= tolerance * b.norm() for a, b in zip(found, expected, strict=True))


def joins(model: GPT) -> list[object]:
    """What computes in place of layers in the first block."""
    return [m.joined for m in model.blocks[0].modules() if getattr(m, "joined", None) is not None]


@pytest.mark.parametrize("name", CASES)
def test_joined_layers_compute_what_they_do_apart(name: str) -> None:
    """In fp64: rows and answers, all gradients of the adapters; names, values and where each weight is held."""
    apart, together = (adapted_model(*CASES[name]) for _ in range(2))
    before = {key: value.clone() for key, value in together.state_dict().items()}
    n_bytes = sum(s.nbytes() for s in storages(together.parameters()))
    join_products(together)
    assert joins(together)
    assert together.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in together.state_dict().items())
    products = [product for way in joins(together) for product in way.products]
    held = storages([*together.parameters(), *(tensor for product in products for tensor in product.frozen)])
    assert sum(s.nbytes() for s in held) == n_bytes, "a weight is there twice"
    calls: list[int] = []
    adapted = joined.adapted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined, "adapted", lambda *args: calls.append(1) or adapted(*args))
        found = trained(together)
    assert calls and equal(found, trained(apart), 1e-10)


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_joining_trains_nothing_more_and_holds_nothing_twice(kind: str | None) -> None:
    model = adapted_model(GQA, {}, kind)
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    join_products(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == learned
    attn = model.blocks[0].attn
    bases = [layer.base for layer in (attn.query, attn.key, attn.value)]
    own = storages([base.weight if kind is None else base.bits for base in bases])
    (matrix,) = storages([attn.joined.product.frozen[0]])
    assert [s.data_ptr() for s in own] == [matrix.data_ptr()]


def storages(tensors: object) -> list[torch.UntypedStorage]:
    return list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("biases", True),
        ("query and value alone", False),
        pytest.param("norms of heads", True, marks=pytest.mark.slow),
        pytest.param("norms of heads", False, marks=pytest.mark.slow),
        pytest.param("parallel residual, no gate", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_they_do_as_well(
    name: str,
    spans: bool,
    compile_lightly: Callable[[str], None],  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    expected = trained(adapted_model(*CASES[name]))
    if spans:
        request.getfixturevalue("spans_on_a_cpu")
    compile_lightly("aot_eager")
    model = adapted_model(*CASES[name])
    join_products(model)
    model.compile_blocks()
    assert equal(trained(model), expected, 1e-10)


@pytest.mark.parametrize("name", ["biases", "query and value alone", "projection alone", "mlp alone, biases"])
@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-4), ("nf4-dq", 1e-4), ("fp8", 0.08)])
def test_quantized_models_compute_the_same(name: str, kind: str, tolerance: float) -> None:
    """NF4 to fp32's rounding. In FP8 a gradient is rounded for all layers at once rather than for each: 2 to 4 %."""
    fields, lora = CASES[name]
    wide = {"n_embd": 64, "head_size": 16, "intermediate_size": 128}
    apart, together = (adapted_model(fields | wide, lora, kind) for _ in range(2))
    join_products(together)
    assert joins(together) and equal(trained(together), trained(apart), tolerance)


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("kind", ["fp8", "nf4", "nf4-dq"])
def test_one_quantized_product(kind: str, n_layers: int) -> None:
    """Against fp64 with the stored weights: NF4 to fp32's rounding.

    FP8 rounds inputs and gradients to 2⁻⁴ of themselves at most, in a sum by 2.6 % of its norm; adapters are exact.
    """
    generator = torch.Generator().manual_seed(0)
    layers = []
    for size in (64, 32, 32)[:n_layers]:
        weight = torch.randn(size, 128, generator=generator) / 16
        layer = LoRALinear(quantized(weight, kind), LoRAArgs(lora_r=4), None, 0)
        nn.init.normal_(layer.lora_A, std=0.1, generator=generator)
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
        layer.base.bias = nn.Parameter(torch.randn(size, generator=generator), requires_grad=False)
        layers.append(layer)
    product = Joined(layers)
    x = torch.randn(1, 50, 128, generator=generator, requires_grad=True)
    y = torch.cat(product(x), dim=-1)
    upstream = torch.randn(y.shape, generator=generator)
    y.backward(upstream)
    exact_x = x.detach().double().requires_grad_()
    exact = []
    for layer in layers:
        A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        low = exact_x @ A.T * layer.scaling
        whole = exact_x @ layer.base.weight(torch.float64).T + low @ B.T + layer.base.bias.double()
        exact.append((A, B, whole))
    torch.cat([whole for *_, whole in exact], dim=-1).backward(upstream.double())
    bound = 0.03 if kind == "fp8" else 1e-6
    assert equal([y.detach(), x.grad], [torch.cat([w for *_, w in exact], -1).detach(), exact_x.grad], bound)
    grads = [grad for layer in layers for grad in (layer.lora_A.grad, layer.lora_B.grad)]
    assert equal(grads, [p.grad for A, B, _ in exact for p in (A, B)], 1e-5)


def test_what_drops_out_of_its_inputs_stays_apart() -> None:
    model = adapted_model(GQA, {"lora_dropout": 0.1})
    join_products(model)
    assert not joins(model)


def test_many_ranks_are_joined_layer_by_layer() -> None:
    """Zeros of B beyond a tile cost more than reading x once saves: 3 · 100 do, 2 · 100 do not."""
    model = adapted_model(GQA, {"lora_r": 100})
    join_products(model)
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    assert attn.joined is None and mlp.joined is not None
    assert all(isinstance(layer.joined, Joined) for layer in (attn.query, attn.key, attn.value, attn.projection))
    assert equal(trained(model), trained(adapted_model(GQA, {"lora_r": 100})), 1e-10)


def test_merged_and_copied_afterwards() -> None:
    """Merging in the process that trained: what computes then are the merged weights. A copy has its own adapters."""
    model = adapted_model(GQA | BIASES, {})
    join_products(model)
    ids = torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        copied = copy.deepcopy(model)
        merge_lora(model)
        assert not joins(model) and (model(ids) - expected).abs().max() < 1e-12
        for layer in (model.blocks[0].attn.query, model.blocks[0].mlp.up):
            layer.weight.zero_()
        assert (model(ids) - expected).abs().max() > 1e-3
        assert torch.equal(copied(ids), expected)
        copied.blocks[0].attn.query.lora_B.zero_()
        assert (copied(ids) - expected).abs().max() > 1e-3


def test_grouped_experts_are_parted_by_merging_too() -> None:
    model = adapted_model(GQA | {"n_expert": 4, "n_expert_per_token": 2}, {}).float()
    for block in model.blocks:
        block.mlp.grouped = GroupedExperts(block.mlp)
    ids = torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        merge_lora(model)
        assert (model(ids) - expected).abs().max() < 1e-4
        for expert in model.blocks[0].mlp.experts:
            expert.up.weight.zero_()
        assert (model(ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ROWS)
def test_heads_are_turned_back_from_rows_as_the_kernel_reads_them(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel knows the distance between rows alone: within one, heads have to lie one behind the other."""
    seen: list[bool] = []
    plain = kernels.turn

    def as_the_kernel(source: Tensor, target: Tensor, *others: object) -> None:
        seen.append(source.stride()[1:] == (source.shape[2], 1))
        assert target.stride()[1:] == (target.shape[2], 1)
        plain(source.as_strided(source.shape, (source.stride(0), source.shape[2], 1)), target, *others)

    monkeypatch.setattr(kernels, "turn", as_the_kernel)
    model = adapted_model(GQA, {})
    join_products(model)
    ids = torch.randint(0, 50, (1, sum(layout.lengths)))
    model.train().hidden_states(ids, layout).square().cumsum(1).sum().backward()
    assert len(seen) == 3 * 3 * 2 and all(seen)


# --- the operations ---


def operands(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def adapted_inputs(how: str) -> tuple[list, list[Tensor], list[Tensor]]:
    """X, its source and how, weights of two layers (48, 64), and the adapter."""
    source, weight, A, B = operands((7, 128), (48, 64), (5, 64), (48, 5))
    x = kernels.gated(source, how) if how else source[:, :64].contiguous()
    leaf = (source if how else x).requires_grad_()
    adapter = [A.requires_grad_(), B.requires_grad_()]
    return [x.detach() if how else leaf, leaf if how else None, how], weight.split([32, 16]), adapter


# what compares inputs before and after knows no FP8 on a CPU
BUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def nf4_inputs(weights: list[Tensor], kind: str) -> list:
    layers = [quantized(weight, kind) for weight in weights]
    return [[layer.packed for layer in layers], [s for layer in layers for s in layer.scales()], [32, 16]]


@pytest.mark.parametrize("how", ["", "silu", "gelu", "gelu_tanh"])
def test_operations_are_what_the_compiler_takes_them_for(how: str) -> None:
    """Schema, gradient, shapes on fake tensors, and all of it compiled with sizes unknown."""
    first, weights, adapter = adapted_inputs(how)
    opcheck(joined.adapted, (*first, torch.cat(weights), *adapter))
    bits, scale = to_fp8(torch.cat(weights))
    inputs = *first, *to_fp8(first[0].detach()), bits, scale.T.contiguous(), *adapter
    opcheck(joined.adapted_fp8, inputs, test_utils=BUT_SCHEMA)
    for kind in ("nf4", "nf4-dq"):
        opcheck(joined.adapted_nf4, (*first, *nf4_inputs(weights, kind), *adapter))


def test_operations_of_the_backward_pass_too() -> None:
    grad, low, up, weight = operands((7, 48), (7, 5), (5, 64), (48, 64))
    opcheck(joined.sum_of_products, (grad, weight, low, up))
    bits, _ = to_fp8(weight)
    opcheck(joined.sum_of_products_fp8, (*to_fp8(grad), bits, low, up), test_utils=BUT_SCHEMA)
    for kind in ("nf4", "nf4-dq"):
        opcheck(joined.sum_of_products_nf4, (grad, *nf4_inputs(weight.split([32, 16]), kind), low, up))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_operations_of_the_kernels_too(activation: str) -> None:
    gate_up, grad = operands((7, 32), (7, 16))
    opcheck(kernels.gated_backward, (gate_up, grad, activation))
    y, angles = operands((7, 8 * 6), (7, 3))
    opcheck(kernels.split_heads, (y.requires_grad_(), angles.cos(), angles.sin(), 4, 2))
    heads = operands((7, 4, 6), (7, 2, 6), (7, 2, 6))
    opcheck(kernels.join_heads, (*heads, angles.cos(), angles.sin()))
