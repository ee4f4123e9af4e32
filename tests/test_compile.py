"""Compiled blocks: the same numbers, and compiled once, not for every row."""

from collections.abc import Callable

import pytest
import torch
from spans import spans_on_a_cpu  # noqa: F401 (a fixture)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from lit_sft import recompute
from lit_sft.args import LoRAArgs, LoRATrainArgs
from lit_sft.attention import Layout
from lit_sft.batches import Row, Step
from lit_sft.config import ModelConfig
from lit_sft.joined import join_products
from lit_sft.loop import train_step, validate
from lit_sft.lora import apply_lora, lora_state_dict
from lit_sft.model import GPT
from lit_sft.optim import build_optimizer, master_parameters
from lit_sft.quantize import is_quantized, place_quantized, quantized
from lit_sft.runtime import launch

SHAPE = {
    "vocab_size": 50,
    "n_embd": 24,
    "n_layer": 4,
    "n_head": 3,
    "n_query_groups": 1,
    "head_size": 8,
    "block_size": 64,
}
MODELS = {
    "grouped-query": {"intermediate_size": 40},
    "parallel": {"intermediate_size": 40, "parallel_residual": True, "norm": "layer", "gated_mlp": False,
                 "activation": "gelu"},
    "windows": {"intermediate_size": 40, "sliding_window": 4, "sliding_layers": (False, True) * 2, "qk_norm": "head",
                "post_norm": True},
}  # fmt: skip
ROWS = [
    Layout([9, 5]),
    Layout([3, 17, 2]),
    Layout([6, 4, 8], [None, 0, 0]),
    Layout([31]),
    Layout([2, 2, 2, 2, 5, 7]),
]


@pytest.fixture
def compile_lightly(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Callable], None]:
    """Compile with another backend than the one that makes kernels, which takes a minute."""
    compile_module = nn.Module.compile

    def use(backend: str | Callable) -> None:
        monkeypatch.setattr(nn.Module, "compile", lambda self, **flags: compile_module(self, backend=backend, **flags))
        torch._dynamo.reset()
        counters.clear()

    return use


def quantize_model(model: GPT, kind: str | None) -> GPT:
    """The same model with its blocks' linear layers in fewer bits; None: as it is."""
    for name, parameter in list(model.named_parameters()):
        if kind is not None and is_quantized(model, name):
            place_quantized(model, name, quantized(parameter.detach(), kind))
    return model


def losses_and_gradients(
    config: dict, compiled: bool, p: float, every: int, kind: str | None
) -> tuple[list[torch.Tensor], list]:
    """Of each of ROWS, twice over."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(SHAPE | config)))
    model = model.double() if kind is None else quantize_model(model, kind)
    dropout = apply_lora(model, LoRAArgs(lora_r=3, lora_dropout=p), seed=0)
    for i, (name, parameter) in enumerate(lora_state_dict(model).items()):
        if name.endswith("B"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    model.checkpoint_every = every
    if compiled:
        model.compile_blocks()
    model.train()
    losses, gradients = [], []
    for number, layout in enumerate(ROWS * 2):
        length = sum(layout.lengths)
        ids = torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(number))
        dropout.begin_row(1, list(range(len(layout.lengths))), layout.lengths, torch.device("cpu"))
        loss = model.hidden_states(ids, layout).square().mean()
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad for p in lora_state_dict(model).values()]
    with torch.no_grad():  # an answer with a cache, as sampled between steps
        from lit_sft.model import KVCache

        cache = KVCache(model.config, 1, 8, torch.device("cpu"), model.wte.weight.dtype)
        losses += [model.eval()(ids[:, :5], cache).sum(), model(ids[:, 5:6], cache).sum()]
    return losses, gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "p", "every", "kind"),
    [
        ("grouped-query", 0.0, 0, None),
        ("parallel", 0.0, 1, None),
        ("windows", 0.2, 3, None),
        ("grouped-query", 0.0, 0, "fp8"),
        ("grouped-query", 0.0, 0, "nf4"),
    ],
)
def test_compiled_blocks_compute_the_same_and_are_compiled_once(
    name: str, p: float, every: int, kind: str | None, compile_lightly: Callable[[str], None]
) -> None:
    compile_lightly("aot_eager")
    plain = losses_and_gradients(MODELS[name], False, p, every, kind)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = losses_and_gradients(MODELS[name], True, p, every, kind)
    for ours, theirs in zip(plain[0] + plain[1], compiled[0] + compiled[1], strict=True):
        assert (ours - theirs).norm() <= (1e-11 if kind is None else 1e-4) * ours.norm()
    # what lies before and behind attention, not more for four layers and five layouts
    assert 0 < counters["stats"]["unique_graphs"] <= 8, dict(counters["stats"])


# --- as a GPU runs them: joined products, attention inside the block, bfloat16 ---


def bf16_model(**fields: object) -> GPT:
    torch.manual_seed(0)
    shape = SHAPE | {"n_embd": 64, "n_head": 4, "n_query_groups": 4, "head_size": 16, "intermediate_size": 176}
    model = GPT(ModelConfig(**(shape | fields))).bfloat16()
    apply_lora(model, LoRAArgs(lora_r=4), seed=0)
    for i, parameter in enumerate(lora_state_dict(model).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.05
    join_products(model)
    return model


def make_step(number: int, layouts: list[Layout]) -> Step:
    rows = []
    for layout in layouts:
        ids = torch.randint(0, 50, (sum(layout.lengths),), generator=torch.Generator().manual_seed(len(rows)))
        positions = torch.arange(len(ids) - 1)
        rows.append(Row(ids, layout, positions, ids[1:], None, list(range(len(layout.lengths)))))
    return Step(number, 1, [0], rows, sum(row.n_labels for row in rows), sum(len(row.input_ids) for row in rows))


def plain_rows(number: int) -> list[Layout]:
    return [Layout([9 + number, 5]), Layout([3, 17, 2 + 3 * number])]


def shared_rows(number: int) -> list[Layout]:
    return [Layout([6 + number, 4, 8, 5], [None, 0, 0, None]), Layout([5, 4 + number, 3, 2, 2], [None, 0, 1, 2, 1])]


@pytest.mark.usefixtures("spans_on_a_cpu")
@pytest.mark.parametrize("every", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))])
def test_a_run_in_bfloat16_has_one_graph_for_each_kind_of_row(every: int, compile_lightly: Callable) -> None:
    """Of training without and with shared segments and of validation: one, the first block's and what recomputes too.

    Fabric's own bf16-true sets torch's default dtype around the forward pass alone: a backward pass that computes
    blocks again would find another one, and compile all of them again.
    """
    compile_lightly("aot_eager")
    args = LoRATrainArgs(data_dir="unused", out_dir="unused", precision="bf16-true", device="cpu", compile=True)
    fabric, model = launch(args), bf16_model()
    model.checkpoint_every = every
    model.compile_blocks()
    optimizer = build_optimizer(model, master_parameters(model), args)
    graphs, losses = [], []
    for number in range(4):
        for layouts in (plain_rows(number), shared_rows(number)):
            losses.append(train_step(fabric, model, optimizer, 1e-3, make_step(1, layouts), args, None)["loss"])
            graphs.append(counters["stats"]["unique_graphs"])
        validate(fabric, model, make_step(1, plain_rows(number)).rows)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 3] + [3] * 9
    assert losses[-2] < losses[0]


class Kept:
    """A compiler's backend that counts what each graph's forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[tuple, int]]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        def forward(lowered: torch.fx.GraphModule, _: list) -> Callable:
            (output,) = lowered.graph.find_nodes(op="output")
            _, *saved = dict.fromkeys(output.args[0])  # the block's result comes first
            values = [node.meta["val"] for node in saved]
            self.shapes.append([(tuple(v.shape), v.dtype.itemsize) for v in values if isinstance(v, Tensor)])
            return make_boxed_func(lowered)

        return aot_autograd(
            fw_compiler=forward,
            bw_compiler=lambda lowered, _: make_boxed_func(lowered),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),  # a layer norm is then what can be made again
        )(graph, inputs)

    def per_token(self) -> float:
        """Bytes a token and block, of tensors whose size depends on the number of tokens."""
        (shapes,) = self.shapes
        sizes = [torch.Size(int(n) for n in shape) for shape, _ in shapes]
        symbolic = [any(isinstance(n, torch.SymInt) for n in shape) for shape, _ in shapes]
        total = sum(size.numel() * shape[1] for size, shape, ok in zip(sizes, shapes, symbolic, strict=True) if ok)
        return total / TOKENS


TOKENS = 61


@pytest.mark.usefixtures("spans_on_a_cpu")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"n_query_groups": 2, "post_norm": True}, marks=pytest.mark.slow),
        pytest.param({"norm": "layer", "gated_mlp": False}, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_keep_no_more_than_eager_ones(
    fields: dict, compile_lightly: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes a token for the backward pass, at most 3 % more than what ``recomputing`` keeps.

    The compiler's partitioner makes norms and activations again only where it may recompute what lies in memory.
    """
    kept: dict[int, Tensor] = {}
    pack = recompute._Session.pack

    def counted(session: recompute._Session, tensor: Tensor) -> object:
        packed = pack(session, tensor)
        if isinstance(packed, Tensor) and TOKENS in packed.shape:
            kept[packed.untyped_storage()._cdata] = packed.detach()
        return packed

    layout = Layout([20, 1, TOKENS - 21])
    ids = torch.randint(0, 50, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    eager = bf16_model(n_layer=1, **fields).train()
    with monkeypatch.context() as patch:
        patch.setattr(recompute._Session, "pack", counted)
        eager.hidden_states(ids, layout)
    n_eager = sum(storage.untyped_storage().nbytes() for storage in kept.values()) / TOKENS
    backend = Kept()
    compile_lightly(backend)
    compiled = bf16_model(n_layer=1, **fields).train()
    compiled.compile_blocks()
    compiled.hidden_states(ids, layout).sum().backward()
    assert 0 < backend.per_token() <= 1.03 * n_eager
