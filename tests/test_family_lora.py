"""LoRA on every family and variant: where adapters go, that they train, that merged weights leave the toolkit right."""

import json
from pathlib import Path

import pytest
import torch
from family_variants import VARIANTS
from safetensors.torch import save_file
from test_families import convert_dir, logits_of, make_reference, token_ids

from lit_sft import GPT, load_model
from lit_sft.args import LoRAArgs
from lit_sft.attention import Layout
from lit_sft.convert import to_hf
from lit_sft.families import find_family
from lit_sft.lora import ExampleDropout, apply_lora, lora_state_dict, merge_lora
from lit_sft.loss import cross_entropy_sum
from lit_sft.weights import Weight

LENGTHS = [30, 9, 21]


def adapted(directory: Path, dtype: torch.dtype, dropout: float = 0.0) -> tuple[GPT, ExampleDropout]:
    """The converted model, its adapters' B not zero either."""
    model = load_model(directory, dtype=dtype)
    masks = apply_lora(model, LoRAArgs(lora_r=4, lora_alpha=8, lora_dropout=dropout), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in lora_state_dict(model).items():
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model, masks


def gradients(model: GPT, masks: ExampleDropout, rows: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of three examples, packed into ``rows`` of them."""
    model.train().zero_grad()
    parts, total = token_ids(sum(LENGTHS), batch=1)[0].split(LENGTHS), 0.0
    for row in rows:
        lengths = [LENGTHS[i] for i in row]
        masks.begin_row(1, row, lengths, torch.device("cpu"))
        hidden = model.hidden_states(torch.cat([parts[i] for i in row])[None], Layout(lengths))[0]
        before = torch.cat([states[:-1] for states in hidden.split(lengths)])
        labels = torch.cat([parts[i][1:] for i in row])
        loss = cross_entropy_sum(before, model.lm_head, labels, softcap=model.config.logits_softcap)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in lora_state_dict(model).items() if p.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_train_alike_however_examples_are_packed(tmp_path: Path, name: str) -> None:
    """In fp64 and with dropout, whose masks follow the tokens to the experts that they are sent to."""
    make_reference(tmp_path, VARIANTS[name])
    directory = convert_dir(tmp_path)
    model, masks = adapted(directory, torch.float64, dropout=0.2)
    config = model.config
    mlp = ["gate", "up", "down"] if config.gated_mlp else ["up", "down"]
    mlps = [f"mlp.experts.{i}.{part}" for i in range(config.n_expert) for part in mlp] or [f"mlp.{p}" for p in mlp]
    parts = [*(f"attn.{part}" for part in ("query", "key", "value", "projection")), *mlps]
    state = lora_state_dict(model)
    assert {n.rpartition(".")[0] for n in state} == {f"blocks.{i}.{p}" for i in range(config.n_layer) for p in parts}
    loss, packed = gradients(model, masks, [[0, 1, 2]])
    assert packed.keys() == state.keys() and torch.tensor(loss).isfinite()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in packed.values())
    other, apart = gradients(model, masks, [[2], [0, 1]])
    assert abs(loss - other) < 1e-10 * abs(loss)
    for parameter, gradient in packed.items():
        assert torch.allclose(gradient, apart[parameter], rtol=1e-8, atol=1e-10), parameter
    for parameter, gradient in gradients(*adapted(directory, torch.float64), [[0, 1, 2]])[1].items():
        assert (gradient - packed[parameter]).abs().max() > 1e-3 * gradient.abs().max(), f"{parameter} drops nothing"


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_weights_are_the_adapted_model_in_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    reference = make_reference(tmp_path, VARIANTS[name])
    family = find_family(json.loads((tmp_path / "config.json").read_text()))
    model, _ = adapted(convert_dir(tmp_path), torch.float32)
    model.eval()
    with torch.no_grad():
        logits = model(token_ids())
        assert (logits - logits_of(reference, token_ids())).abs().max() > 1e-2
        merge_lora(model)
        assert (model(token_ids()) - logits).abs().max() < 2e-5
    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    weights = [Weight(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in state.items()]
    out = tmp_path / "out"
    reference.config.save_pretrained(out)
    merged = {w.name: w.load().contiguous() for w in to_hf(weights, family, model.config)}
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation=VARIANTS[name].attention)
    assert (logits_of(loaded, token_ids()) - logits).abs().max() < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_bf16_base_trains_finitely(tmp_path: Path, name: str) -> None:
    make_reference(tmp_path, VARIANTS[name])
    model, masks = adapted(convert_dir(tmp_path), torch.bfloat16)
    loss, found = gradients(model, masks, [[0, 1], [2]])
    exact, _ = gradients(*adapted(tmp_path, torch.float32), [[0, 1], [2]])
    assert abs(loss - exact) < 0.05 * exact
    assert found and all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
