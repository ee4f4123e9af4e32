"""Streamed blocks are the resident ones, bit by bit, and take no more of the device than they say."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_compile import compile_lightly, losses_and_gradients  # noqa: F401 (a fixture)
from test_estimate import BLOCK, CONFIG, N_ADAPTER, row_of, settings
from test_loop import data, lora_args, read_metrics  # noqa: F401 (data is a fixture)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune import lora
from lit_sft import load_model
from lit_sft.args import EstimateArgs, LoRAArgs, LoRATrainArgs
from lit_sft.attention import Layout
from lit_sft.batches import TrainSteps, ValRows
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.estimate import measure
from lit_sft.fitting import CUDA_CONTEXT, Plan
from lit_sft.generate import generate
from lit_sft.joined import join_products
from lit_sft.loop import train_step, validate
from lit_sft.lora import apply_lora, lora_state_dict, merge_lora
from lit_sft.model import GPT
from lit_sft.offload import StreamedBlocks, _frozen, stream_blocks
from lit_sft.optim import build_optimizer, master_parameters
from lit_sft.quantize import QuantizedLinear
from lit_sft.runtime import BASE_DTYPE, autocast, launch
from lit_sft.shards import Shards

N_LAYER = 5


class LateCopies:
    """A GPU's copies at their worst: NaNs until someone waits."""

    def __init__(self) -> None:
        self.sources: list[Tensor] = []
        """Of each copy that was started, in order."""

    def start(self, target: Tensor, source: Tensor) -> list[Tensor]:
        target.fill_(0xFF)
        self.sources.append(source)
        return [target, source]

    def wait(self, copied: list[Tensor]) -> None:
        if copied:
            target, source = copied
            target.copy_(source)
            copied.clear()


def stream(model: GPT) -> StreamedBlocks:
    """``stream_blocks`` with late copies, nothing in the places yet but NaNs."""
    streamed = stream_blocks(model)
    streamed.copies = LateCopies()
    for place in (streamed.here, streamed.other):
        place.buffer.fill_(0xFF)
    return streamed


@pytest.fixture
def deep(checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with more blocks than places."""
    return checkpoint("deep", num_hidden_layers=N_LAYER)


def train(base: Path, data_dir: Path, streamed: bool, joined: bool, n_steps: int = 2, **flags: object) -> list:
    """All that some steps, with validations and answers between them, leave behind."""
    rows = {"micro_batch_tokens": 900, "global_batch_size": 10}
    args = lora_args(data_dir, Path("unused"), **rows, activation_checkpointing="all", **flags)
    fabric = launch(args)
    dtype = BASE_DTYPE[args.precision or "32-true"]
    model = load_model(base, dtype=dtype, quantize=args.quantize, offload=streamed)
    model.checkpoint_every = args.checkpoint_every
    dropout = apply_lora(model, args, args.seed)
    if joined:
        join_products(model)
    if streamed:
        stream(model)
    optimizer = build_optimizer(model, master_parameters(model), args)
    share = not args.lora_dropout
    steps = TrainSteps(Shards(data_dir, "train"), args, share_prefix=share)
    val_rows = ValRows(Shards(data_dir, "val"), 900, share_prefix=share)
    assert any(row.layout.parents for row in steps[1].rows) == share
    left = []
    for number in range(1, n_steps + 1):
        record = train_step(fabric, model, optimizer, 2e-3, steps[number], args, dropout)
        left += [record["loss"], record["grad_norm"], validate(fabric, model, val_rows)]
        with autocast(fabric):
            left += list(generate(model, [5, 6, 7], 4, ()))
    left += list(lora_state_dict(model).values()) + tree_leaves(optimizer.state_dict()["state"])
    if args.quantize is None:
        merge_lora(model)
        left += list(model.state_dict().values())
    return left


def equal(ours: list, theirs: list) -> bool:
    """Whether two lists of tensors and numbers are the same bits."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


BASES = {
    "fp32": {},
    "bf16": {"precision": "bf16-true"},
    "mixed": {"precision": "bf16-mixed"},
    "fp8": {"quantize": "fp8", "precision": "bf16-true"},
    "nf4": {"quantize": "nf4"},
    "nf4-dq": {"quantize": "nf4-dq", "precision": "bf16-true"},
}
PARTS = {
    "all": {},
    "some": {"lora_key": False, "lora_projection": False, "lora_mlp": False, "lora_head": True},
    "dropout": {"lora_dropout": 0.1},
}


CASES = [*((kind, "all") for kind in BASES), ("fp32", "some"), ("nf4", "some"), ("fp8", "dropout")]


@pytest.mark.parametrize(
    ("kind", "parts", "joined"),
    [(*case, joined) for case in CASES for joined in (False, True) if not (joined and case[0] == "mixed")],
)
def test_streamed_steps_are_the_resident_ones(
    data: tuple[Path, Path],  # noqa: F811
    deep: Path,
    kind: str,
    parts: str,
    joined: bool,
) -> None:
    """Losses, gradients' norms, validations, answers, adapters, optimizer and merged model, with stale places NaN."""
    flags = BASES[kind] | PARTS[parts]
    plain = train(deep, data[1], False, joined, **flags)
    assert equal(plain, train(deep, data[1], True, joined, **flags))
    assert not equal(plain, train(deep, data[1], False, joined, **flags, seed=1))


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_models_of_few_blocks(data: tuple[Path, Path], checkpoint: Callable[..., Path], n_layer: int) -> None:  # noqa: F811
    base = checkpoint(f"of {n_layer}", num_hidden_layers=n_layer)
    assert equal(train(base, data[1], False, False, 1), train(base, data[1], True, False, 1))


def tiny(**config: object) -> GPT:
    """A random model of five blocks with adapters that are not zero."""
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 50, "n_layer": N_LAYER, "n_embd": 32, "n_head": 4, "n_query_groups": 2}
    model = GPT(ModelConfig(**shape, head_size=8, intermediate_size=48, **config))
    apply_lora(model, LoRAArgs(lora_r=3), seed=0)
    for number, parameter in enumerate(lora_state_dict(model).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model.train()


def gradients(model: GPT, n_rows: int = 1) -> list[Tensor]:
    """The loss and gradients of rows of random ids."""
    losses = []
    for number in range(n_rows):
        ids = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(number))
        loss = model.hidden_states(ids, Layout([9, 31])).cumsum(1).square().mean()
        loss.backward()
        losses.append(loss.detach())
    return losses + [p.grad for p in lora_state_dict(model).values()]


def test_a_mixture_of_experts_keeps_its_routers_on_the_device() -> None:
    experts = {"n_expert": 4, "n_expert_per_token": 2}
    resident, model = tiny(**experts), tiny(**experts)
    resident.checkpoint_every = 1
    streamed = stream(model)
    # None where no token was sent to an expert
    ours, theirs = ([x for x in gradients(m, 3) if x is not None] for m in (model, resident))
    assert equal(ours, theirs)
    assert len(streamed.blocks[0].parts) == 4 + 4 * 3


def test_two_copies_of_each_block_a_row() -> None:
    """None where both passes meet, and where a row follows another; each before its block is asked for."""
    model = tiny()
    streamed = stream(model)
    sources, visit, asked_for = streamed.copies.sources, streamed.visit, []

    def visit_and_look(number: int) -> None:
        asked_for.append([streamed.here.block, streamed.other.block].count(number))
        visit(number)

    streamed.visit = visit_and_look
    gradients(model, 1)
    numbers = [next(i for i, b in enumerate(streamed.blocks) if b.buffer is source) for source in sources]
    assert numbers == [0, 1, 2, 3, 4, 2, 1, 0]
    assert asked_for == [0] + [1] * (2 * N_LAYER - 1)
    sources.clear()
    gradients(model, 4)
    assert len(sources) == 4 * 2 * (N_LAYER - 2)
    model.eval()
    with torch.no_grad():
        sources.clear()
        for _ in range(3):
            model(torch.arange(8)[None])
    assert len(sources) == 3 * N_LAYER - 1  # the second block was there already


def test_after_an_error_the_next_row_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, model = tiny(), tiny()
    resident.checkpoint_every = 1
    stream(model)
    broken = model.blocks[2].mlp

    def out_of_memory(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(broken, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model)
    assert equal(gradients(model), gradients(resident))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_compiled_blocks_may_be_streamed(
    kind: str,
    compile_lightly: Callable[[str], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same as when each block is resident, joined and compiled, in no more graphs than two for one."""
    from torch._dynamo.utils import counters

    compile_blocks, before = GPT.compile_blocks, [join_products]

    def prepare_and_compile(model: GPT) -> None:
        for prepare in before:
            prepare(model)
        compile_blocks(model)

    monkeypatch.setattr(GPT, "compile_blocks", prepare_and_compile)
    compile_lightly("aot_eager")
    losses, grads = losses_and_gradients({"intermediate_size": 40}, True, 0.0, 1, kind)
    few = counters["stats"]["unique_graphs"]
    before.append(stream)
    compile_lightly("aot_eager")
    streamed_losses, streamed_grads = losses_and_gradients({"intermediate_size": 40}, True, 0.0, 1, kind)
    assert few < counters["stats"]["unique_graphs"] <= 2 * few
    assert equal(losses + grads, streamed_losses + streamed_grads)


# --- what is where ---


def test_loading_leaves_the_blocks_weights_on_the_host(deep: Path) -> None:
    """The device here is the one of tensors without contents, so that nothing is there by mistake."""
    model = load_model(deep, device="meta", offload=True)
    apply_lora(model, LoRAArgs(), 0)
    on_host = {name for name, p in model.named_parameters() if p.device.type == "cpu"}
    linear = {name for name, _ in model.named_parameters() if name.endswith(".base.weight")}
    assert on_host == linear and len(linear) == 7 * N_LAYER


def storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


@pytest.mark.parametrize("kind", [None, "fp8", "nf4-dq"])
@pytest.mark.parametrize("joined", [False, True])
def test_the_device_holds_two_places_and_what_is_small(deep: Path, kind: str | None, joined: bool) -> None:
    """Every weight that a block refers to is in the host's buffer or in the place that holds the block."""
    model = load_model(deep, quantize=kind, offload=True)
    apply_lora(model, LoRAArgs(lora_key=False), 0)
    if joined:
        join_products(model)
    streamed = stream(model)
    gradients(model.train())
    places = {place.block: place.buffer for place in (streamed.here, streamed.other)}
    assert places.keys() == {0, 1}
    for number, (own, block) in enumerate(zip(streamed.blocks, model.blocks, strict=True)):
        host, place = storages([own.buffer]), storages([places[number]] if number in places else [])
        computing = storages([tensor for part in own.parts for tensor in _frozen(part)])
        assert computing <= (place or host), "the first two blocks were the last to be computed"
        linears = [module for module in block.modules() if isinstance(module, nn.Linear | QuantizedLinear)]
        assert len(linears) == 7
        weights = [tensor for layer in linears for tensor in _frozen(layer) if tensor.numel() > 100]
        assert storages(weights) <= host | place, "no copy is anywhere else"
    assert len({buffer.numel() for buffer in places.values()} | {max(b.buffer.numel() for b in streamed.blocks)}) == 1


# --- runs ---


def test_a_run_may_go_on_with_and_without(data: tuple[Path, Path], tmp_path: Path, capsys) -> None:  # noqa: F811
    settings = {"micro_batch_tokens": 700, "max_steps": 4, "eval_interval": 2, "activation_checkpointing": "all"}
    lora.main(lora_args(data[1], tmp_path / "whole", **settings))
    for order in ((False, True), (True, False)):
        out = tmp_path / str(order)
        lora.main(lora_args(data[1], out, **settings, max_time=1e-9, offload=order[0], rehearse=order[0]))
        lora.main(lora_args(data[1], out, **settings, offload=order[1]))
        assert f"offload {order[1]} instead of {order[0]}" in capsys.readouterr().out
        whole, cut = ([r["loss"] for r in read_metrics(folder)] for folder in (tmp_path / "whole", out))
        assert len(cut) == 4 and cut == whole
        adapters = [folder / "adapter" / "adapter.safetensors" for folder in (tmp_path / "whole", out)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize(
    ("kind", "flags", "named"),
    [
        (LoRATrainArgs, {"devices": 2}, "--devices 2"),
        (LoRATrainArgs, {"activation_checkpointing": "2"}, "--activation_checkpointing 2"),
        (LoRATrainArgs, {"activation_checkpointing": "auto"}, "--activation_checkpointing auto"),
        (EstimateArgs, {"full": True, "data_dir": "data"}, "--full"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(kind: type, flags: dict, named: str) -> None:
    kind(**flags)
    with pytest.raises(InputError) as refused:
        kind(**flags, offload=True)
    assert named in str(refused.value) and "--offload" in str(refused.value)


def test_a_refusal_is_one_line_and_exits_with_2() -> None:
    command = [sys.executable, ROOT / "finetune" / "lora.py", "--offload", "true", "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --offload") and done.stderr.count("\n") == 1


# --- memory before the run ---


def test_the_estimate_counts_two_places_and_one_block() -> None:
    row = row_of([100, 60])
    resident, offload = (measure(settings(activation_checkpointing="all", offload=o), CONFIG, row) for o in (0, 1))
    assert resident.weights - offload.weights == 4 * (6 - 2) * BLOCK
    assert (offload.trained, offload.optimizer) == (resident.trained, resident.optimizer)
    inputs = 4 * 160 * 64
    assert offload.host == 6 * (1 << (4 * BLOCK - 1).bit_length()) + 6 * (1 << (inputs - 1).bit_length())
    assert resident.host == 0
    deep = measure(settings(offload=True), replace(CONFIG, n_layer=60), row)
    assert deep.weights - offload.weights == 4 * 54 * 2 * 64, "norms alone"
    gradients = 4 * 54 * N_ADAPTER // 6
    assert deep.activations - offload.activations <= gradients, "and no block's input"


LLAMA_2 = {"block_size": 16_384, "vocab_size": 32_000, "head_size": 128}
SIZES = {
    "7B": (32, 4096, 32, 32, 11_008),
    "13B": (40, 5120, 40, 40, 13_824),
    "70B": (80, 8192, 64, 8, 28_672),
}


def planned(size: str, n_tokens: int, **flags: object) -> Plan:
    names = ("n_layer", "n_embd", "n_head", "n_query_groups", "intermediate_size")
    config = ModelConfig(**LLAMA_2, **dict(zip(names, SIZES[size], strict=True)))
    args = LoRATrainArgs(precision="bf16-true", quantize="nf4", micro_batch_tokens=n_tokens, **flags)
    return Plan(args, config, None, False, "cuda", 0)


@pytest.mark.parametrize(
    ("size", "n_tokens", "gigabytes"),
    [("7B", 4096, 4)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("13B", 8192, 6), ("70B", 16_384, 24))],
)
def test_large_models_are_predicted_to_fit_small_cards(size: str, n_tokens: int, gigabytes: int) -> None:
    pytest.importorskip("bitsandbytes")
    plan = planned(size, n_tokens, offload=True)
    assert plan.needed(plan.args)[2] + CUDA_CONTEXT < gigabytes * 1e9


def test_it_is_offered_last_and_where_nothing_else_fits() -> None:
    config = replace(CONFIG, n_layer=20)
    args = LoRATrainArgs(precision="bf16-true", quantize="fp8", micro_batch_tokens=256)
    plan = Plan(args, config, None, False, "cuda", 1 << 40)
    assert not any("offload" in flags for flags, _ in plan.choices(256))
    tight = replace(plan, room=plan.needed(replace(args, offload=True))[2])
    *others, (flags, needed) = tight.choices(256)
    assert "--offload true" in flags and needed <= tight.room
    assert others and not any("offload" in flags or needed <= tight.room for flags, needed in others)
    assert "--offload true" in tight.advice(256)
    assert not any("offload" in flags for flags, _ in replace(tight, device="cpu").choices(256))
    (flags, _) = next(replace(tight, args=replace(args, offload=True)).choices(256))
    assert flags == "as asked"
