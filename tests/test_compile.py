"""Compiled blocks: the same numbers, and compiled once, not for every row."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lit_sft.args import LoRAArgs
from lit_sft.attention import Layout
from lit_sft.config import ModelConfig
from lit_sft.lora import apply_lora, lora_state_dict
from lit_sft.model import GPT
from lit_sft.quantize import is_quantized, place_quantized, quantized

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
def compile_lightly(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Compile with another backend than the one that makes kernels, which takes a minute."""
    compile_module = nn.Module.compile

    def use(backend: str) -> None:
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
