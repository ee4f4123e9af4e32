"""Experts as grouped products against the loop, transformers and peft; no synchronisation, nothing kept twice."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from family_variants import VARIANTS
from test_families import logits_of, token_ids
from test_gpu import NO_GPU
from test_lora import filled_adapter
from test_peft import adapter_of, base_of, exported, with_peft
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_sft import GPT, ModelConfig, experts, load_model
from lit_sft.args import LoRAArgs
from lit_sft.attention import Layout
from lit_sft.checkpoint import save_adapter
from lit_sft.experts import GroupedExperts, group_experts
from lit_sft.live_bytes import LiveBytes
from lit_sft.lora import LoRALinear, apply_lora, lora_state_dict
from lit_sft.model import MoE
from lit_sft.quantize import is_quantized, place_quantized, quantized

MIXTURES = [name for name, variant in VARIANTS.items() if variant.model_type in ("mixtral", "qwen3_moe")]
SHAPE = {"vocab_size": 50, "block_size": 64, "n_layer": 2, "n_embd": 32, "head_size": 8, "intermediate_size": 48}
SHAPE |= {"n_head": 4, "n_query_groups": 2, "n_expert": 6, "n_expert_per_token": 2}
LONELY = 3  # an expert that no token chooses


def make_model(dtype: torch.dtype, lora_args: dict | None = None, **fields: object) -> GPT:
    """A model with adapters, their B not zero either."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | fields)).to(dtype)
    apply_lora(model, LoRAArgs(**{"lora_r": 3} | (lora_args or {})), seed=0)
    with torch.no_grad():
        for name, parameter in lora_state_dict(model).items():
            if name.endswith("B"):
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def regroup(model: GPT) -> GPT:
    """Group the experts on a CPU too, however few they are."""
    for block in model.blocks:
        assert experts._can_group(block.mlp)
        block.mlp.grouped = GroupedExperts(block.mlp)
    return model


def make_mixture(dtype: torch.dtype, parts: str, rank: int, **fields: object) -> MoE:
    """A mixture alone, with adapters on ``parts`` of each expert; its input's channel 0 keeps tokens off an expert."""
    mixture = make_model(dtype, {"lora_r": rank}, **fields).blocks[0].mlp
    mixture.router.weight.data[LONELY, 0] = -100
    for expert in mixture.experts:
        for name in {"gate", "up", "down"} - set(parts.split()):
            setattr(expert, name, getattr(expert, name).base)
    return mixture


def tokens(dtype: torch.dtype, n: int = 40) -> Tensor:
    x = torch.randn(1, n, SHAPE["n_embd"], generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    return x.to(dtype).requires_grad_()


def results(mixture: MoE, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients; of what no gradient came to, zeros."""
    y = mixture(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (y * weights).sum().backward()
    trained = {name: p for name, p in mixture.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    return {"y": y.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize(
    ("parts", "rank", "fields"),
    [
        ("gate up down", 3, {}),
        ("gate up down", 8, {"normalize_experts": False, "n_expert_per_token": 3}),
        ("up", 3, {"n_expert_per_token": 1, "activation": "gelu_tanh"}),
        ("gate down", 4, {}),
        ("", 4, {}),
    ],
)
def test_output_and_gradients_are_those_of_the_loop(parts: str, rank: int, fields: dict) -> None:
    """In fp32, against the loop in fp64; an expert without tokens gets zeros."""
    exact = results(make_mixture(torch.float64, parts, rank, **fields), tokens(torch.float64))
    mixture = make_mixture(torch.float32, parts, rank, **fields)
    mixture.grouped = GroupedExperts(mixture)
    found = results(mixture, tokens(torch.float32))
    assert found.keys() == exact.keys() and len(found) == 2 + 2 * SHAPE["n_expert"] * len(parts.split())
    lonely = [name for name in found if f"experts.{LONELY}." in name]
    assert len(lonely) == 2 * len(parts.split()) and not any(found[name].any() for name in lonely)
    for name, expected in exact.items():
        assert (found[name] - expected).norm() <= 1e-6 * expected.norm(), name
        assert name in lonely or expected.norm() > 1e-3, f"{name}: nothing to compare"


@pytest.mark.parametrize("every", [0, 1])
def test_a_model_in_training_is_the_one_with_loops(every: int) -> None:
    """With what is made again backward, and checkpointed blocks."""
    found = []
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(1))
    for model in (make_model(torch.float32), regroup(make_model(torch.float32))):
        model.checkpoint_every = every
        states = model.hidden_states(ids, Layout([12, 8]))
        (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in lora_state_dict(model).values()]
        found.append([states.detach(), *gradients])
    for plain, grouped in zip(*found, strict=True):
        assert (plain - grouped).norm() <= 1e-5 * plain.norm()


class Logits(nn.Module):
    """In place of a router, so that rounding moves no token to another expert."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


@contextmanager
def without_waits(device: str) -> Iterator[None]:
    """Let torch raise where the host waits for a GPU; before Hopper its grouped products do."""
    watched = device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    if watched:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_bf16_on_a_device_is_the_loop_in_fp64(device: str) -> None:
    """Forward and backward, an expert without tokens included; a GPU is not waited for."""
    logits = torch.randn(40, SHAPE["n_expert"], generator=torch.Generator().manual_seed(3)).bfloat16()
    logits[:, LONELY] = -100
    found = []
    for where, dtype in (("cpu", torch.float64), (device, torch.bfloat16)):
        mixture = make_mixture(dtype, "gate up down", 3)
        mixture.router = Logits(logits.to(dtype))
        x = tokens(torch.bfloat16).detach().to(where, dtype).requires_grad_()
        mixture.to(where)
        if dtype == torch.bfloat16:
            mixture.grouped = GroupedExperts(mixture)
        upstream = torch.ones_like(x)
        with without_waits(where):
            y = mixture(x)
            y.backward(upstream)
        trained = {name: p.grad for name, p in mixture.named_parameters() if p.requires_grad}
        found.append({"y": y.detach(), "x": x.grad} | trained)
    for name, expected in found[0].items():
        error = found[1][name].double().cpu() - (0 if expected is None else expected)
        assert error.norm() <= (0 if expected is None else 0.02 * expected.norm()), name


# --- other libraries ---


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_equal_those_of_transformers_and_of_peft(tmp_path: Path, name: str) -> None:
    reference, base = base_of(tmp_path / "hub", name)
    ids = token_ids()
    with torch.no_grad():
        model = regroup(load_model(base).requires_grad_(False))
        assert (model(ids) - logits_of(reference, ids)).abs().max() < 1e-5
    args = {"lora_r": 4, "lora_alpha": 6}
    adapter_of(base, tmp_path / "adapter", **args)
    model = regroup(filled_adapter(base, LoRAArgs(**args)))
    with torch.no_grad():
        logits = model(token_ids(40))
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    assert (with_peft(reference, out) - logits).abs().max() < 2e-5


# --- what a GPU must not wait for ---

WAITS = ("nonzero", "_local_scalar_dense", "unique", "bincount", "masked_select", "is_nonzero", "equal")
ATOMIC = (
    "index_add",
    "index_put",
    "scatter_add",
    "scatter_reduce",
    "index_select_backward",
    "embedding_dense_backward",
)


class Operations(TorchDispatchMode):
    """Notes the name of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, names: tuple[str, ...]) -> int:
        return sum(any(name in operation for name in names) for operation in self.names)


def operations_of(mixture: MoE) -> Operations:
    """Those of one forward and backward pass."""
    x = tokens(torch.bfloat16)
    upstream = torch.ones_like(x)
    with Operations() as operations:
        mixture(x).backward(upstream)
    return operations


def test_nothing_waits_for_the_device_or_adds_atomically() -> None:
    loop = operations_of(make_mixture(torch.bfloat16, "gate up down", 8))
    assert loop.count(WAITS) == SHAPE["n_expert"] and loop.count(ATOMIC) > 0, "what is looked for is not found"
    mixture = make_mixture(torch.bfloat16, "gate up down", 8)
    mixture.grouped = GroupedExperts(mixture)
    grouped = operations_of(mixture)
    assert grouped.count(WAITS) == 0 and grouped.count(ATOMIC) == 0
    assert grouped.count(("grouped_outer",)) == 4, "frozen weights get no gradient"


def without_values(grouped: bool, **fields: object) -> GPT:
    """A bf16 model with adapters, made under a mode whose tensors have shapes only."""
    with torch.device("meta"):
        model = GPT(ModelConfig(**SHAPE | fields))
    weights = {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    apply_lora(model, LoRAArgs(lora_r=8), 0)
    return (regroup(model) if grouped else model).train()


@pytest.mark.parametrize("grouped", [False, True])
def test_nothing_asks_for_values(grouped: bool) -> None:
    """Where there are none: a list made of a tensor, which no operation shows on a CPU, fails too."""
    with FakeTensorMode(), nullcontext() if grouped else pytest.raises(DynamicOutputShapeException):
        mixture = without_values(grouped).blocks[0].mlp
        mixture(tokens(torch.bfloat16)).sum().backward()


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_ranks_are_filled_up_to_what_a_gpu_reads_at_once(rank: int) -> None:
    grouped = GroupedExperts(make_mixture(torch.bfloat16, "gate up down", rank))
    for linear in (grouped.gate_up, grouped.down):
        A, B = linear._adapter(torch.bfloat16)
        n_parts = len(linear.sizes)
        assert A.shape[1] == B.shape[2] == -(-n_parts * rank // 8) * 8
        assert not A[:, n_parts * rank :].any() and not B[..., n_parts * rank :].any()
        for each in (A, B, linear.weight):
            assert each.is_contiguous() and each.shape[-1] % 8 == 0


# --- compiled ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_whole_for_rows_of_any_length(dtype: torch.dtype) -> None:
    """Fullgraph, one graph for all lengths and both layers; rows with another number of tokens an expert included."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = regroup(make_model(dtype)), regroup(make_model(dtype))
    for block in compiled.blocks:
        block.mlp.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    for n in (20, 33, 7):
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            y = tokens(dtype, n)
            for block in model.blocks:
                y = block.mlp(y)
            y.sum().backward()
            found.append([y.detach(), *(p.grad for block in model.blocks for p in block.mlp.parameters())])
        for expected, ours in zip(*found, strict=True):
            assert (expected is None) == (ours is None)
            assert expected is None or (ours - expected).norm() <= 1e-6 * expected.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_blocks_are_compiled_where_experts_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    loop, grouped = make_model(torch.bfloat16), regroup(make_model(torch.bfloat16))
    loop.compile_blocks()
    assert not compiled and not loop.compiled
    grouped.compile_blocks()
    assert compiled == list(grouped.blocks) and grouped.compiled


# --- memory and disk ---


def test_the_adapter_and_the_weights_stay_and_nothing_is_twice_in_memory(tmp_path: Path) -> None:
    plain, model = make_model(torch.bfloat16), regroup(make_model(torch.bfloat16))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.numel() * p.itemsize for p in plain.parameters())
    for block in model.blocks:
        grouped = block.mlp.grouped
        for weight in (grouped.gate_up.weight, grouped.down.weight):
            assert weight.untyped_storage().data_ptr() in storages
    saved = []
    for number, each in enumerate((plain, model)):
        save_adapter(tmp_path / str(number), each, LoRAArgs(lora_r=3), {})
        saved.append((tmp_path / str(number) / "adapter.safetensors").read_bytes())
    assert saved[0] == saved[1] and b"blocks.0.mlp.experts.3.gate.lora_A" in saved[0]


def kept(grouped: bool, **fields: object) -> int:
    """Bytes a token that a training step keeps between forward and backward."""
    with LiveBytes(1000, 8) as live:
        model = without_values(grouped, **{"n_layer": 1, "block_size": 1024, "n_expert": 8} | fields)
        before = live.now
        states = model.hidden_states(torch.zeros(1, 1000, dtype=torch.int64))
        bytes_kept = live.now - before
        states.sum().backward()
    return bytes_kept // 1000


def test_what_is_kept_for_backward_does_not_hold_each_token_once_an_expert() -> None:
    """Experts of one hidden unit: what grows with the experts of a token is narrow."""
    narrow = {"n_embd": 256, "intermediate_size": 8}
    one, four = (kept(True, n_expert_per_token=k, **narrow) for k in (1, 4))
    assert four - one < 3 * 2 * 256, "a token's row or result is kept once for each of its experts"


def test_memory_of_a_step_is_counted_and_is_not_more_than_the_loops() -> None:
    assert 0 < kept(True, n_expert_per_token=4) <= kept(False, n_expert_per_token=4)


# --- which mixtures ---


@pytest.mark.parametrize(
    ("dtype", "fields", "lora_args", "grouped"),
    [
        (torch.bfloat16, {"n_expert": 32}, {}, True),
        (torch.float32, {"n_expert": 32}, {}, True),
        (torch.float32, {"n_expert": 32}, {"lora_mlp": False}, True),
        (torch.bfloat16, {"n_expert": 31}, {}, False),
        (torch.float64, {"n_expert": 32}, {}, False),
        (torch.bfloat16, {"n_expert": 32, "intermediate_size": 44}, {}, False),
        (torch.bfloat16, {"n_expert": 32, "mlp_bias": True}, {}, False),
        (torch.bfloat16, {"n_expert": 32, "gated_mlp": False}, {}, False),
        (torch.bfloat16, {"n_expert": 32}, {"lora_dropout": 0.1}, False),
        (torch.bfloat16, {"n_expert": 0, "n_expert_per_token": 0}, {}, None),
    ],
)
def test_mixtures_that_are_grouped(dtype: torch.dtype, fields: dict, lora_args: dict, grouped: bool | None) -> None:
    model = make_model(dtype, lora_args, **fields)
    group_experts(model)
    found = {isinstance(block.mlp.grouped, GroupedExperts) for block in model.blocks if isinstance(block.mlp, MoE)}
    assert found == (set() if grouped is None else {grouped})


def test_quantized_and_trained_experts_stay_a_loop() -> None:
    model = make_model(torch.bfloat16, n_expert=32)
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(True)
    for name, parameter in list(model.blocks[1].named_parameters()):
        full = f"blocks.1.{name}"
        if is_quantized(model, full):
            place_quantized(model, full, quantized(parameter.detach(), "fp8"))
    assert isinstance(model.blocks[1].mlp.experts[0].gate, LoRALinear)
    group_experts(model)
    assert [block.mlp.grouped for block in model.blocks] == [None, None]
