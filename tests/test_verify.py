"""--verify: right conversions pass, wrong ones leave nothing that is used, and what cannot be verified says so."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf_llama
from family_variants import VARIANTS
from safetensors.torch import load_file, save_file
from test_families import make_reference

from lit_sft import convert, load_model, verify
from lit_sft.args import ConvertArgs
from lit_sft.errors import InputError, RunFailed
from lit_sft.families import llama
from lit_sft.families.fields import Fields
from lit_sft.verify import convert_verified, fixed_ids


def args(directory: Path, **fields: object) -> ConvertArgs:
    return ConvertArgs(checkpoint_dir=str(directory), verify=True, **fields)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama grouped-query", None),
        ("gemma2", "bfloat16"),
        ("gemma3", "bfloat16"),
        ("falcon rw", None),
        ("falcon 40b", "float16"),
        ("qwen3-moe", None),
        ("phi 4 mini", None),
        ("neox", "bfloat16"),
    ],
)
def test_what_converts_right_is_said_to(
    tmp_path: Path, name: str, dtype: str | None, capsys: pytest.CaptureFixture
) -> None:
    """Weights rounded on the way are compared with the same rounded weights."""
    make_reference(tmp_path, VARIANTS[name])
    convert_verified(args(tmp_path, dtype=dtype))
    assert "verified: 256 positions" in capsys.readouterr().out
    load_model(tmp_path)


def test_a_vocabulary_that_config_json_forgot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_hf_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 390}))
    convert_verified(args(tmp_path))
    assert "verified: 256 positions" in capsys.readouterr().out


def test_what_was_trained_in_16_bits_is_compared_in_32(tmp_path: Path) -> None:
    make_hf_llama(tmp_path).half().save_pretrained(tmp_path)
    convert_verified(args(tmp_path))
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float16}


@pytest.mark.parametrize("again", [False, True])
def test_a_wrong_conversion_fails_and_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """Two matrices of one shape in each other's place; also where a good conversion had been before."""
    make_hf_llama(tmp_path)
    if again:
        convert_verified(args(tmp_path))
    names = llama.weight_map
    gate, up = "blocks.{}.mlp.gate.weight", "blocks.{}.mlp.up.weight"
    swapped = {gate: up, up: gate}
    object.__setattr__(llama.FAMILY, "weight_map", lambda c: {k: swapped.get(v, v) for k, v in names(c).items()})
    monkeypatch.setattr(convert, "find_family", lambda hf_config: llama.FAMILY)
    try:
        with pytest.raises(RunFailed, match="computes other logits than transformers: they differ by up to"):
            convert_verified(args(tmp_path))
    finally:
        object.__setattr__(llama.FAMILY, "weight_map", names)
    with pytest.raises(InputError, match="not a converted checkpoint"):
        load_model(tmp_path)


def test_a_switch_that_is_not_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are right and one number of the shape is not."""
    make_reference(tmp_path, VARIANTS["gemma2"])

    def forget(fields: Fields, *_: object) -> dict:
        fields.read |= {"sliding_window", "layer_types"}
        return {}

    monkeypatch.setattr("lit_sft.families.gemma2.read_window", forget)
    with pytest.raises(RunFailed):
        convert_verified(args(tmp_path))


def test_not_a_number_is_no_match(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match="differ by up to nan"):
        convert_verified(args(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel"}, "has no .*RWForCausalLM.* never run"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama9"}, "has no .* never run"),
        ({"rope_condense_ratio": 8}, "transformers ignores rope_condense_ratio"),
    ],
)
def test_what_transformers_does_not_know_is_said_before_anything_is_written(
    tmp_path: Path, change: dict, message: str
) -> None:
    make_hf_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        convert_verified(args(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_without_transformers_or_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_llama(tmp_path)
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(InputError, match=r"pip install 'lit-sft\[verify\]'"):
            convert_verified(args(tmp_path))
    monkeypatch.setattr(verify, "_free_memory", lambda: 400_000)
    with pytest.raises(InputError, match=r"needs about 0.0 GB of memory .* 0.0 GB are free"):
        convert_verified(args(tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(verify, "_free_memory", lambda: None)
    convert_verified(args(tmp_path))


def test_ids_are_spread_over_the_vocabulary() -> None:
    for vocab_size in (160, 256, 32000, 262208):
        ids = fixed_ids(vocab_size)
        assert ids.shape == (1, 256) and ids.min() >= 0 and vocab_size - vocab_size // 200 - 2 <= ids.max() < vocab_size
        assert len(ids.unique()) == min(vocab_size, 256)
