"""Multimodal bases: what leaves them fits the very model that their config.json names, under its own names."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_families import logits_of, token_ids
from test_lora import filled_adapter
from wrapped_models import WRAPPED, make_wrapped

from lit_sft import load_model
from lit_sft.args import ConvertArgs, ConvertLitArgs, ExportHFArgs, ExportPeftArgs, ImportPeftArgs, LoRAArgs, MergeArgs
from lit_sft.checkpoint import adapter_facts, save_adapter
from lit_sft.convert import convert_checkpoint
from lit_sft.export import convert_lit_checkpoint, export_hf
from lit_sft.merge import merge_checkpoint
from lit_sft.peft import export_peft
from lit_sft.peft_import import import_peft

IDS = token_ids(40).clamp(max=156)  # the last ids stand for images
SPELLINGS = [(name, spelling) for name, wrapped in WRAPPED.items() for spelling in wrapped.spellings]
COMPLAINTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def converted(directory: Path) -> Path:
    return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))


def loaded(directory: Path) -> torch.nn.Module:
    """The model of the class that config.json names, every weight found in the files and none left over."""
    import transformers

    (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(
        directory, output_loading_info=True, local_files_only=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info[kind] for kind in COMPLAINTS), info
    return model.eval()


def adapter_of(base: Path, directory: Path, **lora: object) -> torch.Tensor:
    """Save a random adapter; gives the logits with it."""
    args = LoRAArgs(**{"lora_r": 4, "lora_alpha": 6} | lora)
    model = filled_adapter(base, args)
    save_adapter(directory, model, args, adapter_facts(base, {"prompt_style": "plain", "stop_ids": [2]}))
    with torch.no_grad():
        return model(IDS)


def exported(adapter: Path, out: Path) -> Path:
    return export_peft(ExportPeftArgs(lora_path=str(adapter), out_dir=str(out)))


def imported(peft_dir: Path, base: Path, out: Path) -> Path:
    args = ImportPeftArgs(peft_dir=str(peft_dir), checkpoint_dir=str(base), out_dir=str(out), prompt_style="plain")
    return import_peft(args)


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of the base with the adapter as peft reads it: no key left over, none of its layers without one."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(loaded(base), adapter)
        result = model.load_adapter(adapter, "again")
    assert not result.missing_keys and not result.unexpected_keys
    layers = [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]
    keys = [name for name in load_file(adapter / "adapter_model.safetensors") if ".lora_A." in name]
    assert len(layers) == len(keys) > 0
    return logits_of(model.eval(), IDS)


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_the_text_model_is_read_whatever_its_files_call_it(tmp_path: Path, name: str, spelling: str) -> None:
    reference = make_wrapped(tmp_path, WRAPPED[name], spelling)
    with torch.no_grad():
        logits = load_model(converted(tmp_path))(IDS)
    assert (logits - logits_of(reference, IDS)).abs().max() < 1e-5
    assert torch.equal(logits_of(loaded(tmp_path), IDS), logits_of(reference, IDS))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_an_adapter_is_loaded_by_peft_beside_its_own_base(
    tmp_path: Path, name: str, spelling: str, head: bool
) -> None:
    """And comes back bit by bit, and leaves again under the same names."""
    make_wrapped(tmp_path / "hub", WRAPPED[name], spelling)
    base = converted(tmp_path / "hub")
    expected = adapter_of(base, tmp_path / "adapter", lora_head=head)
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    assert (expected - logits_of(loaded(base), IDS)).abs().max() > 1e-2
    assert (with_peft(base, out) - expected).abs().max() < 2e-5
    back = imported(out, base, tmp_path / "back")
    assert (back / "adapter.safetensors").read_bytes() == (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    again = exported(back, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()
