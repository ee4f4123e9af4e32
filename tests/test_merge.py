import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_lora import filled_adapter, to_peft

from lit_sft import Tokenizer, load_model, merge
from lit_sft.args import LoRAArgs, MergeArgs
from lit_sft.checkpoint import adapter_facts, save_adapter
from lit_sft.errors import InputError, RunFailed
from lit_sft.lora import LoRALinear
from lit_sft.merge import merge_checkpoint

IDS = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))


def adapter_of(base: Path, directory: Path, **lora: object) -> Path:
    args = LoRAArgs(**lora)
    save_adapter(
        directory, filled_adapter(base, args), args, adapter_facts(base, {"prompt_style": "hermes", "stop_ids": [2]})
    )
    return directory


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("head", [False, True])
def test_the_merged_checkpoint_says_the_same(
    checkpoint: Callable[..., Path], tmp_path: Path, config: dict, head: bool
) -> None:
    base = checkpoint(**config)
    adapter = adapter_of(base, tmp_path / "adapter", lora_r=4, lora_alpha=6, lora_head=head)
    out = merge_checkpoint(MergeArgs(lora_path=str(adapter), out_dir=str(tmp_path / "merged")))
    with torch.no_grad():
        merged = load_model(out)(IDS)
        assert torch.allclose(merged, load_model(base, adapter)(IDS), atol=1e-5)
        assert (merged - load_model(base)(IDS)).abs().max() > 1e-2
    assert Tokenizer(out).fingerprint == Tokenizer(base).fingerprint
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["facts"]["prompt_style"] == "hermes" and manifest["facts"]["stop_ids"] == [2]
    tied = bool(config) and not head
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied


def test_merged_weights_are_those_of_peft(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base = checkpoint()
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merge_checkpoint(MergeArgs(lora_path=str(adapter), out_dir=str(tmp_path / "merged")))
    reference = to_peft(load_model(base, adapter), LlamaForCausalLM.from_pretrained(base), LoRAArgs())
    theirs, ours = reference.merge_and_unload().state_dict(), load_model(out).state_dict()
    assert torch.allclose(ours["blocks.1.mlp.down.weight"], theirs["model.layers.1.mlp.down_proj.weight"], atol=1e-6)
    assert torch.allclose(ours["blocks.0.attn.key.weight"], theirs["model.layers.0.self_attn.k_proj.weight"], atol=1e-6)


def test_a_wrong_merge_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaling doubled while merging, as a real bug would: nothing is written."""
    base = checkpoint()
    adapter = adapter_of(base, tmp_path / "adapter")
    right = LoRALinear.delta
    monkeypatch.setattr(LoRALinear, "delta", lambda self: 2 * right(self))
    with pytest.raises(RunFailed, match="nothing was written"):
        merge_checkpoint(MergeArgs(lora_path=str(adapter), out_dir=str(tmp_path / "merged")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "checkpoints"]


def test_a_base_in_bf16_is_merged_in_fp32_and_rounded_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from lit_sft.args import ConvertArgs
    from lit_sft.convert import convert_checkpoint

    base = convert_checkpoint(ConvertArgs(checkpoint_dir=str(checkpoint()), dtype="bfloat16"))
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merge_checkpoint(MergeArgs(lora_path=str(adapter), out_dir=str(tmp_path / "merged")))
    layer = load_model(base, adapter).blocks[0].mlp.up
    expected = (layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).bfloat16()
    differing = (load_model(out).blocks[0].mlp.up.weight != expected).double().mean().item()
    assert differing < 0.001  # fp32 and fp64 round a handful of ties apart


@pytest.mark.parametrize("where", ["base", "other", "foreign", "file"])
def test_what_is_in_the_way_is_left_alone(checkpoint: Callable[..., Path], tmp_path: Path, where: str) -> None:
    base = checkpoint()
    adapter = adapter_of(base, tmp_path / "adapter")
    other = checkpoint("other")
    out = {"base": base, "other": other, "foreign": tmp_path / "mine", "file": tmp_path / "file"}[where]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="not an empty folder; name another"):
        merge_checkpoint(MergeArgs(lora_path=str(adapter), out_dir=str(out)))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    load_model(base)
    assert (other / "model.safetensors").is_file()  # the Hub's own file


def test_the_probe_fits_short_contexts(checkpoint: Callable[..., Path]) -> None:
    assert merge.probe(load_model(checkpoint(max_position_embeddings=16))).shape == (2, 16, 400)
