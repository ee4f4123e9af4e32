"""Every family and variant against transformers: tiny, random, norms and biases moved off their neutral values."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_variants import GEMMA3, SHAPE, VARIANTS, Variant, gemma3_rope, old_spelling
from safetensors.torch import load_file, save_file

from lit_sft import GPT, KVCache, attention, load_model
from lit_sft.args import ConvertArgs, FullTrainArgs
from lit_sft.attention import Layout
from lit_sft.batches import Row
from lit_sft.config import ModelConfig
from lit_sft.convert import convert_checkpoint, source_weights, to_hf, to_lit
from lit_sft.families import find_family
from lit_sft.loop import summed_loss
from lit_sft.loss import cross_entropy_sum
from lit_sft.runtime import launch

LENGTH = 96


def make_reference(directory: Path, variant: Variant, seed: int = 0, **config: object) -> torch.nn.Module:
    """Save a random model as transformers does, and give it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    hf_config = AutoConfig.for_model(variant.model_type, **{**SHAPE, **variant.config, **config})
    hf_config._attn_implementation = variant.attention
    model = AutoModelForCausalLM.from_config(hf_config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    if variant.edit:
        path = directory / "config.json"
        path.write_text(json.dumps(variant.edit(json.loads(path.read_text()))))
    return model


def convert_dir(directory: Path) -> Path:
    return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))


def token_ids(n: int = LENGTH, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch, n), generator=torch.Generator().manual_seed(seed))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def logits_of(reference: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return reference(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    reference = make_reference(tmp_path, VARIANTS[name])
    expected = logits_of(reference, token_ids())
    model = load_model(convert_dir(tmp_path))
    with torch.no_grad():
        assert (model(token_ids()) - expected).abs().max() < 1e-5
        # what a run in bf16-true has around it: every tensor's dtype is said where it is made
        plain = model(token_ids()), model.hidden_states(token_ids(batch=1), Layout([70, 26]))
        with default_dtype(torch.bfloat16):
            again = model(token_ids()), model.hidden_states(token_ids(batch=1), Layout([70, 26]))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))
    weights = model.state_dict()
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]  # without the tie it would be another
    shape = json.loads((tmp_path / "model_config.json").read_text())
    shape = {k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()}
    for switch, fields in VARIANTS[name].off.items():
        assert any(shape[k] != v for k, v in fields.items()), f"{switch} is off already"
        off = GPT(ModelConfig(**{**shape, **fields})).eval()
        known = {k: v for k, v in weights.items() if k in off.state_dict() and v.shape == off.state_dict()[k].shape}
        off.load_state_dict(known, strict=False)
        with torch.no_grad():
            moved = (off(token_ids()) - expected).abs().max()
        assert not moved < 1e-3, f"{switch} turned off moves the logits by {moved:.1e} only"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_row_has_the_logits_transformers_gives_each_example(tmp_path: Path, name: str) -> None:
    reference = make_reference(tmp_path, VARIANTS[name])
    model = load_model(convert_dir(tmp_path))
    lengths = [40, 1, 7, 48]
    row = token_ids(sum(lengths), batch=1)
    with torch.no_grad():
        packed = model.logits(model.hidden_states(row, Layout(lengths)))
    for logits, part in zip(packed.split(lengths, 1), row.split(lengths, 1), strict=True):
        assert (logits - logits_of(reference, part)).abs().max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_shared_prefix_has_the_logits_transformers_gives_each_example(tmp_path: Path, name: str) -> None:
    """Three examples begin with 28 tokens that the row holds once, two of them with 6 more; the windows end in between.

    None is longer than the context before longrope's scaling: beyond it tokens are not shared.
    """
    reference = make_reference(tmp_path, VARIANTS[name])
    model = load_model(convert_dir(tmp_path))
    layout = Layout([28, 9, 6, 1, 10, 15], [None, 0, 0, 2, 2, None])
    row = token_ids(sum(layout.lengths), batch=1)
    with torch.no_grad():
        shared = model.logits(model.hidden_states(row, layout))
    logits, parts = shared.split(layout.lengths, 1), row.split(layout.lengths, 1)
    for chain in layout.chains:
        expected = logits_of(reference, torch.cat([parts[i] for i in chain], 1))
        assert (torch.cat([logits[i] for i in chain], 1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunks", [[1] * 40, [30, 1, 1, 8]])
def test_decoding_with_the_cache_equals_the_full_forward(tmp_path: Path, name: str, chunks: list[int]) -> None:
    reference = make_reference(tmp_path, VARIANTS[name])
    model, ids = load_model(convert_dir(tmp_path)), token_ids(40)
    cache = KVCache(model.config, 2, 40, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = torch.cat([model(part, cache=cache) for part in ids.split(chunks, 1)], 1)
    assert (pieces - logits_of(reference, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_the_way_back_gives_every_bit(tmp_path: Path, name: str) -> None:
    make_reference(tmp_path, VARIANTS[name])
    original = load_file(tmp_path / "model.safetensors")
    family = find_family(json.loads((tmp_path / "config.json").read_text()))
    config = ModelConfig.from_dir(convert_dir(tmp_path))
    back = to_hf(to_lit(source_weights(tmp_path), family, config, None), family, config)
    assert {w.name for w in back} == set(original)
    for weight in back:
        tensor = weight.load()
        assert tensor.shape == weight.shape and torch.equal(tensor, original[weight.name]), weight.name


@pytest.mark.parametrize("naming", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("silent", [False, True])
def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path, naming: str, silent: bool) -> None:
    """Old and new names of its files, the vision tower left out; what leaves is the text model, which loads."""
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 157, "boi_token_index": 158, "eoi_token_index": 159, "mm_tokens_per_image": 4}
    text = SHAPE | GEMMA3 | gemma3_rope(1e4, rope_type="linear", factor=8.0)
    hf_config = Gemma3Config(text_config=text, vision_config=vision, **tokens)
    hf_config._attn_implementation = hf_config.text_config._attn_implementation = "eager"
    reference = Gemma3ForConditionalGeneration(hf_config).eval()
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in weights)
    renamed = {name.replace("language_model.model.", naming): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    if silent:  # as published: only what differs from the class's defaults, rotary fields as of old
        config["text_config"] = old_spelling()(config["text_config"])
        for name in ("rope_theta", "rope_local_base_freq", "tie_word_embeddings"):
            del config["text_config"][name]
        del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, ids = load_model(convert_dir(tmp_path)), token_ids().clamp(max=156)
    expected = logits_of(reference, ids)
    with torch.no_grad():
        assert (model(ids) - expected).abs().max() < 1e-5
    family = find_family(config)
    text_dir = tmp_path / "text"
    text_dir.mkdir()
    back = to_hf(to_lit(source_weights(tmp_path), family, model.config, None), family, model.config)
    save_file({w.name: w.load().clone() for w in back}, text_dir / "model.safetensors", {"format": "pt"})
    (text_dir / "config.json").write_text(json.dumps(family.exported_config(config)))
    alone, notes = AutoModelForCausalLM.from_pretrained(
        text_dir, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(alone).__name__ == "Gemma3ForCausalLM"
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(alone.eval(), ids), expected)


# Falcon-7B's single key head gets another kernel in transformers; StableLM-2-12B adds the MLP to what attention and the
# residual gave, in this order; Mixtral's shares of experts stay fp32 in transformers 5, not in 4 nor in Mistral's code
BFLOAT16 = (
    *("neox", "falcon 40b", "stablelm 3b", "mistral 0.1", "phi 3", "llama grouped-query", "qwen2", "qwen3"),
    *("qwen3-moe", "gemma", "gemma2", "gemma3", "smollm3", "olmo2"),
    "stablelm 2, norms of queries and keys, sequential",
)


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_rounded_where_transformers_rounds(tmp_path: Path, name: str) -> None:
    """With the same attention kernel the logits have the same bits; elsewhere they may differ by a tenth of rounding.

    What rounding does to the logits at all is measured as transformers' own distance from fp32 with the same weights.
    Rounding in another place moves them by as much again: rotary embedding or norms done otherwise do so here.
    """
    from transformers import AutoModelForCausalLM

    make_reference(tmp_path, VARIANTS[name])
    model = load_model(convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path), dtype="bfloat16")))
    kernel = "eager" if model.config.attention_softcap else "sdpa"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=kernel).eval()
    narrow, wide = logits_of(reference, token_ids()), logits_of(reference.float(), token_ids())
    rounding = (narrow - wide).abs().mean()
    with torch.no_grad():
        assert (model(token_ids()).float() - narrow).abs().mean() <= 0.1 * rounding
        if model.config.norm == "rms":
            model.config = replace(model.config, round_late=not model.config.round_late)
            assert (model(token_ids()).float() - narrow).abs().mean() > 0.5 * rounding
        if model.config.embedding_scale != 1:
            model.config = replace(model.config, round_late=False)
            states = model.wte(token_ids()) * model.config.embedding_scale  # the factor itself not rounded
            assert not torch.equal(states, reference.bfloat16().get_input_embeddings()(token_ids()))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2 window"])
def test_windows_hold_across_the_chunks_of_long_rows(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_reference(tmp_path, VARIANTS[name])
    model = load_model(convert_dir(tmp_path))
    monkeypatch.setattr(attention, "CHUNK_QUERIES", 20)  # no divisor of the length, and less than the window
    with torch.no_grad():
        assert (model(token_ids()) - logits_of(reference, token_ids())).abs().max() < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_summed_loss_and_gradients_with_soft_caps_are_those_of_transformers(tmp_path: Path, shared: bool) -> None:
    """Of a packed row: the sum over its examples, each on its own in transformers, whose mean counts its labels.

    ``shared``: the last two examples go on from the first 30 tokens of the first, which the row holds once.
    """
    reference = make_reference(tmp_path, VARIANTS["gemma2"])
    model, fabric = load_model(convert_dir(tmp_path)), launch(FullTrainArgs(device="cpu"))
    assert model.config.logits_softcap
    lengths, parents = [30, 10, 7, 49], [None, 0, 0, 0] if shared else [None] * 4
    ids = token_ids(sum(lengths), batch=1)[0]
    starts = [sum(lengths[:i]) for i in range(4)]
    positions, labels, expected = [], [], 0.0
    for i, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        own = torch.arange(start, start + n)
        seen = own if parents[i] is None else torch.cat([torch.arange(30), own])
        learned = ids[seen].clone()
        learned[: len(seen) - n + 3] = -100  # of each segment the fourth token is the first to be predicted
        loss = reference(input_ids=ids[None, seen], labels=learned[None]).loss
        expected = expected + loss * (learned != -100).sum()
        positions += (own[3:] - 1).tolist()
        labels += ids[own[3:]].tolist()
    expected.backward()
    row = Row(ids, Layout(lengths, parents), torch.tensor(positions), torch.tensor(labels), None, [0, 1, 2, 3])
    total = summed_loss(fabric, model.train(), row)
    total.backward()
    assert abs(total.item() - expected.item()) < 1e-6 * expected.item()
    names = find_family(json.loads((tmp_path / "config.json").read_text())).names(model.config)
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = theirs[names.hf_name(name)]
        assert (parameter.grad - grad).abs().max() < 1e-4 * grad.abs().max(), name
    hidden = model.hidden_states(ids[None], row.layout)[0, row.positions]
    uncapped = cross_entropy_sum(hidden, model.lm_head, row.labels)
    assert abs(uncapped.item() - expected.item()) > 1e-3 * expected.item()
