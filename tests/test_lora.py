import math
from pathlib import Path

import pytest
import torch
from conftest import make_hf_llama
from torch import nn

from lit_sft import load_model
from lit_sft.args import ConvertArgs, LoRAArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.families.llama import FAMILY
from lit_sft.lora import ExampleDropout, LoRALinear, apply_lora, lora_state_dict, merge_lora
from lit_sft.model import GPT

LINEARS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj", "head": "lm_head"}


def filled_adapter(directory: Path, args: LoRAArgs) -> GPT:
    """The converted model with an adapter whose B is not zero either."""
    model = load_model(directory)
    apply_lora(model, args, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in lora_state_dict(model).items():
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def to_peft(model: GPT, reference: object, args: LoRAArgs) -> object:
    """The same adapter in peft, around transformers' model."""
    from peft import LoraConfig, get_peft_model

    parts = args.parts()
    targets = [theirs for ours, theirs in LINEARS.items() if parts[ours]]
    targets += ["gate_proj", "up_proj", "down_proj"] if parts["mlp"] else []
    config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets)
    wrapped = get_peft_model(reference, config)
    theirs = dict(wrapped.named_parameters())
    state = lora_state_dict(model)
    assert len(state) == sum("lora_" in name for name in theirs)
    with torch.no_grad():
        for name, tensor in state.items():
            module, _, matrix = name.rpartition(".")
            hf = FAMILY.names(model.config).hf_name(f"{module}.weight").removesuffix(".weight")
            theirs[f"base_model.model.{hf}.{matrix}.default.weight"].copy_(tensor)
    return wrapped


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"lora_head": True},
        {"lora_key": False, "lora_projection": False, "lora_mlp": False},
        {"lora_query": False, "lora_value": False, "lora_r": 3, "lora_alpha": 7},
    ],
)
def test_logits_equal_those_of_peft_and_of_the_merged_model(tmp_path: Path, parts: dict) -> None:
    reference = make_hf_llama(tmp_path)
    directory = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path)))
    args = LoRAArgs(**parts)
    model = filled_adapter(directory, args)
    ids = torch.randint(0, 400, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, base = model(ids), load_model(directory)(ids)
        expected = to_peft(model, reference, args)(ids).logits
        assert (logits - expected).abs().max() < 1e-5
        assert (logits - base).abs().max() > 1e-2
        merge_lora(model)
        assert (model(ids) - expected).abs().max() < 1e-5
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert model.state_dict().keys() == load_model(directory).state_dict().keys()


def test_merging_an_adapted_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    make_hf_llama(tmp_path, tie_word_embeddings=True)
    directory = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path)))
    model = filled_adapter(directory, LoRAArgs(lora_head=True))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before = model(ids)
        merge_lora(model)
        assert torch.allclose(model(ids), before, atol=1e-5)
    assert torch.equal(model.wte.weight, load_model(directory).wte.weight)
    assert not model.config.tie_embeddings and not torch.equal(model.lm_head.weight, model.wte.weight)


def test_the_start_is_no_change_and_uniform_within_its_bound(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    directory = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path)))
    model, again, other = (load_model(directory) for _ in range(3))
    for m, seed in ((model, 5), (again, 5), (other, 6)):
        apply_lora(m, LoRAArgs(), seed)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), load_model(directory)(ids))
    a = model.blocks[0].mlp.down.lora_A
    assert a.shape == (16, 96) and a.abs().max() <= 1 / math.sqrt(96) < 1.05 * a.abs().max()
    assert abs(a.std().item() * math.sqrt(96) - 1 / math.sqrt(3)) < 0.05
    assert torch.equal(a, again.blocks[0].mlp.down.lora_A) and not torch.equal(a, other.blocks[0].mlp.down.lora_A)


def test_only_the_adapter_trains_in_fp32_beside_a_bf16_base(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    directory = convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path)))
    model = load_model(directory, dtype=torch.bfloat16)
    apply_lora(model, LoRAArgs(), 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_state_dict(model)) and len(trained) == 2 * 2 * 7
    assert all(p.dtype == (torch.float32 if n in trained else torch.bfloat16) for n, p in model.named_parameters())
    model(torch.arange(9)[None]).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_state_dict(model).values())


def dropped(
    lengths: list[int], examples: list[int], step: int = 1, number: int = 0, seed: int = 9
) -> list[torch.Tensor]:
    """The mask of each example of a row, (length, 40)."""
    dropout = ExampleDropout(0.25, seed)
    dropout.begin_row(step, examples, lengths, torch.device("cpu"))
    return list(dropout(torch.ones(1, sum(lengths), 40), number)[0].split(lengths))


def test_dropout_masks_follow_the_example_and_not_the_packing() -> None:
    one, two, three = dropped([30, 20, 50], [4, 7, 1])
    for other, index in ((one, 4), (two, 7), (three, 1)):
        assert torch.equal(dropped([len(other)], [index])[0], other)
    assert not torch.equal(dropped([30], [4], step=2)[0], one)
    assert not torch.equal(dropped([30], [4], number=1)[0], one)
    assert not torch.equal(dropped([30], [4], seed=8)[0], one)
    assert not torch.equal(one[:20], two)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    (mask,) = dropped([5000], [0])
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((mask == 0).double().mean().item() - 0.25) < 0.005
    for dim in (0, 1):  # no token and no channel is favoured
        shares = (mask == 0).double().mean(dim)
        assert (shares - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / mask.shape[dim])
    columns = (mask == 0).double() - 0.25
    correlation = (columns.T @ columns) / len(mask) / 0.1875 - torch.eye(40, dtype=torch.float64)
    assert correlation.abs().max() < 0.08


def test_dropout_refuses_tokens_it_was_not_told_of() -> None:
    layer = LoRALinear(nn.Linear(4, 4), LoRAArgs(lora_dropout=0.5), ExampleDropout(0.5, 0), 0).train()
    with pytest.raises(RuntimeError, match="begin_row"):
        layer(torch.ones(1, 3, 4))
    assert torch.isfinite(layer.eval()(torch.ones(1, 3, 4))).all()


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_inputs_of_any_dimension(shape: tuple[int, ...]) -> None:
    layer = LoRALinear(nn.Linear(6, 5), LoRAArgs(lora_r=2), None, 0)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape)
    assert torch.allclose(layer(x), layer.base(x) + x @ layer.delta().T, atol=1e-5)
