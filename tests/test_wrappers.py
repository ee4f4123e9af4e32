"""Multimodal bases: what leaves them fits the very model that their config.json names, under its own names."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import logits_of, token_ids
from test_lora import filled_adapter
from test_peft import TOKENIZER
from wrapped_models import OLD, WRAPPED, make_wrapped

from lit_sft import load_model
from lit_sft.args import ConvertArgs, ConvertLitArgs, ExportHFArgs, ExportPeftArgs, ImportPeftArgs, LoRAArgs, MergeArgs
from lit_sft.checkpoint import adapter_facts, save_adapter
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.export import convert_lit_checkpoint, export_hf
from lit_sft.families import FAMILIES, find_family
from lit_sft.families.wrappers import WRAPPERS
from lit_sft.merge import merge_checkpoint
from lit_sft.peft import export_peft
from lit_sft.peft_import import import_peft
from lit_sft.verify import convert_verified

IDS = token_ids(40).clamp(max=156)  # the last ids stand for images
SPELLINGS = [(name, spelling) for name, wrapped in WRAPPED.items() for spelling in wrapped.spellings]
EXPERTS = ("internvl of qwen3-moe", "llava of mixtral")
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


@pytest.mark.parametrize("name", ["llava onevision of qwen2, tied", "qwen2.5-vl tied"])
def test_a_head_that_the_text_config_alone_ties(tmp_path: Path, name: str) -> None:
    """As files of before transformers 5 have it."""
    reference = make_wrapped(tmp_path, WRAPPED[name])
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(loaded(tmp_path), IDS), logits_of(reference, IDS))
    with torch.no_grad():
        assert (load_model(converted(tmp_path))(IDS) - logits_of(reference, IDS)).abs().max() < 1e-5
    out = export_hf(ExportHFArgs(checkpoint_dir=str(tmp_path), out_dir=str(tmp_path / "out")))
    assert torch.equal(logits_of(loaded(out), IDS), logits_of(reference, IDS))


def test_files_of_the_base_model_alone(tmp_path: Path) -> None:
    """What the class without a head saved in transformers 4: the head is the embedding."""
    reference = make_wrapped(tmp_path, WRAPPED["gemma3"])
    path = tmp_path / "model.safetensors"
    save_file({name.replace(OLD, "language_model."): w for name, w in load_file(path).items()}, path, {"format": "pt"})
    assert torch.equal(logits_of(loaded(tmp_path), IDS), logits_of(reference, IDS))
    base = converted(tmp_path)
    expected = adapter_of(base, tmp_path / "adapter")
    with torch.no_grad():
        assert (load_model(base)(IDS) - logits_of(reference, IDS)).abs().max() < 1e-5
    assert (with_peft(base, exported(tmp_path / "adapter", tmp_path / "peft")) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl tied"])
def test_a_config_of_before_text_config_was_nested(tmp_path: Path, name: str) -> None:
    """As published: all fields side by side, and positions shared out under the old names."""
    reference = make_wrapped(tmp_path, WRAPPED[name])
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(text | config | scaling))
    assert torch.equal(logits_of(loaded(tmp_path), IDS), logits_of(reference, IDS))
    with torch.no_grad():
        assert (load_model(converted(tmp_path))(IDS) - logits_of(reference, IDS)).abs().max() < 1e-5
    out = export_hf(ExportHFArgs(checkpoint_dir=str(tmp_path), out_dir=str(tmp_path / "out")))
    assert (logits_of(loaded(out), IDS) - logits_of(reference, IDS)).abs().max() < 1e-5


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_an_adapter_is_loaded_by_peft_beside_its_own_base(tmp_path: Path, name: str, spelling: str, head: bool) -> None:
    """And comes back bit by bit, and leaves again under the same names."""
    make_wrapped(tmp_path / "hub", WRAPPED[name], spelling)
    base = converted(tmp_path / "hub")
    expected = adapter_of(base, tmp_path / "adapter", lora_head=head, lora_mlp=name not in EXPERTS)
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    assert (expected - logits_of(loaded(base), IDS)).abs().max() > 1e-2
    assert (with_peft(base, out) - expected).abs().max() < 2e-5
    back = imported(out, base, tmp_path / "back")
    assert (back / "adapter.safetensors").read_bytes() == (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    again = exported(back, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_of_experts_in_a_wrapper_are_refused(tmp_path: Path, name: str) -> None:
    """peft makes those of today's stacked experts of them, but only where the whole model is one of experts."""
    make_wrapped(tmp_path / "hub", WRAPPED[name])
    adapter_of(converted(tmp_path / "hub"), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"finds no experts inside \w+ForConditionalGeneration.* merge .*export_hf.py"):
        exported(tmp_path / "adapter", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_untrained_adapters_of_a_vision_tower_are_left_out_trained_ones_refused(tmp_path: Path) -> None:
    """peft adapts every layer with the end of a name, the tower's too, which a run on texts leaves at zero."""
    from peft import LoraConfig, get_peft_model

    make_wrapped(tmp_path / "hub", WRAPPED["gemma3"])
    base = converted(tmp_path / "hub")
    torch.manual_seed(5)
    model = get_peft_model(loaded(base), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name and "language_model" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tower = [name for name in load_file(path) if "vision_tower" in name and "lora_B" in name]
    assert tower
    (base / "tokenizer.json").write_text(TOKENIZER)
    ours = imported(tmp_path / "peft", base, tmp_path / "ours")
    with torch.no_grad():
        assert (load_model(base, ours)(IDS) - logits_of(model, IDS)).abs().max() < 2e-5
    save_file(load_file(path) | {tower[0]: torch.ones_like(load_file(path)[tower[0]])}, path)
    with pytest.raises(InputError, match=r"vision_tower.* can have no adapter here; merge it with peft instead"):
        imported(tmp_path / "peft", base, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("naming", ["model.", "language_model.model.", "model.language_model."])
def test_adapters_of_every_naming_come_in(tmp_path: Path, naming: str, alone: bool) -> None:
    """Of the text model alone, and of the whole in transformers before and since 4.52; to the whole and to the text."""
    make_wrapped(tmp_path / "hub", WRAPPED["mistral3"])
    base = converted(tmp_path / "hub")
    expected = adapter_of(base, tmp_path / "adapter", lora_head=True)
    out = exported(tmp_path / "adapter", tmp_path / "peft")
    path = out / "adapter_model.safetensors"
    renamed = {name.replace("model.language_model.", naming): tensor for name, tensor in load_file(path).items()}
    if naming == "language_model.model.":
        renamed = {name.replace(".lm_head.", ".language_model.lm_head."): tensor for name, tensor in renamed.items()}
    save_file(renamed, path)
    if alone:
        base = converted(export_hf(ExportHFArgs(checkpoint_dir=str(base), out_dir=str(tmp_path / "alone"))))
    back = imported(out, base, tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(load_model(base, back)(IDS), expected)
    assert (with_peft(base, exported(back, tmp_path / "again")) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_model_leaves_alone_and_loads(tmp_path: Path, name: str) -> None:
    """As it is, merged on the way, and merged before: with the text model's own config.json, every weight there."""
    reference = make_wrapped(tmp_path / "hub", WRAPPED[name])
    base = converted(tmp_path / "hub")
    out = export_hf(ExportHFArgs(checkpoint_dir=str(base), out_dir=str(tmp_path / "out")))
    assert torch.equal(logits_of(loaded(out), IDS), logits_of(reference, IDS))
    assert not json.loads((out / "config.json").read_text()).keys() & {"text_config", "vision_config", "audio_config"}
    expected = adapter_of(base, tmp_path / "adapter")
    at_once = export_hf(ExportHFArgs(lora_path=str(tmp_path / "adapter"), out_dir=str(tmp_path / "at_once")))
    assert (logits_of(loaded(at_once), IDS) - expected).abs().max() < 1e-4
    merged = merge_checkpoint(MergeArgs(lora_path=str(tmp_path / "adapter"), out_dir=str(tmp_path / "merged")))
    later = export_hf(ExportHFArgs(checkpoint_dir=str(merged), out_dir=str(tmp_path / "later")))
    for file in ("config.json", "model.safetensors"):
        assert (at_once / file).read_bytes() == (later / file).read_bytes()
    with torch.no_grad():
        assert torch.equal(load_model(converted(out))(IDS), load_model(base)(IDS))


def test_an_adapter_can_leave_for_the_text_model_alone(tmp_path: Path) -> None:
    """Its weights are the same, so that the adapter's base may be either."""
    make_wrapped(tmp_path / "hub", WRAPPED["gemma3"])
    base = converted(tmp_path / "hub")
    expected = adapter_of(base, tmp_path / "adapter")
    alone = converted(export_hf(ExportHFArgs(checkpoint_dir=str(base), out_dir=str(tmp_path / "alone"))))
    args = {"lora_path": str(tmp_path / "adapter"), "checkpoint_dir": str(alone), "out_dir": str(tmp_path / "peft")}
    out = export_peft(ExportPeftArgs(**args))
    assert (with_peft(alone, out) - expected).abs().max() < 2e-5


def test_an_adapter_of_a_merged_model_fits_what_that_is_exported_as(tmp_path: Path) -> None:
    """The rest of the multimodal model is gone from it, and its config.json says so."""
    make_wrapped(tmp_path / "hub", WRAPPED["gemma3"])
    adapter_of(converted(tmp_path / "hub"), tmp_path / "first")
    merged = merge_checkpoint(MergeArgs(lora_path=str(tmp_path / "first"), out_dir=str(tmp_path / "merged")))
    expected = adapter_of(merged, tmp_path / "second")
    whole = export_hf(ExportHFArgs(checkpoint_dir=str(merged), out_dir=str(tmp_path / "whole")))
    assert (with_peft(whole, exported(tmp_path / "second", tmp_path / "peft")) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_one_file_of_weights_is_named_as_the_bases_own(tmp_path: Path, name: str, spelling: str, kind: str) -> None:
    """Beside the config.json of the base transformers finds the whole text model in it."""
    reference = make_wrapped(tmp_path / "hub", WRAPPED[name], spelling)
    original = load_file(tmp_path / "hub" / "model.safetensors")
    base, out = converted(tmp_path / "hub"), tmp_path / "out" / ("model.safetensors" if kind != ".bin" else "x.bin")
    convert_lit_checkpoint(ConvertLitArgs(checkpoint_path=str(base), output_path=str(out)))
    weights = load_file(out) if kind == ".safetensors" else torch.load(out, weights_only=True)
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items())
    assert sum("layers" in name for name in weights) > 10
    if kind == ".safetensors":
        (out.parent / "config.json").write_bytes((base / "config.json").read_bytes())
        model, info = type(reference).from_pretrained(
            out.parent, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        assert not info["unexpected_keys"] and all(
            any(part in name for part in ("vision", "visual", "tower", "projector", "connector", "aligner", "newline"))
            for name in info["missing_keys"]
        )
        assert torch.equal(logits_of(model.eval(), IDS), logits_of(reference, IDS))


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "voxtral", "idefics3"])
def test_a_conversion_is_verified_against_the_whole_model(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    make_wrapped(tmp_path, WRAPPED[name])
    convert_verified(ConvertArgs(checkpoint_dir=str(tmp_path)))
    assert "verified: 256 positions" in capsys.readouterr().out


def test_silent_fields_of_a_text_config_mean_what_transformers_means() -> None:
    from transformers import AutoConfig

    named = [family for family in FAMILIES if family.defaults]
    assert {family.name for family in named} >= {"Llama", "Mistral", "Qwen2", "Qwen3"}
    for family in named:
        config = AutoConfig.for_model(family.model_types[0])
        assert family.defaults == {name: getattr(config, name) for name in family.defaults}


def test_the_class_of_a_wrappers_tokenizer_is_transformers_own() -> None:
    from transformers.models.auto import tokenization_auto as auto

    for wrapper in WRAPPERS:
        registered = auto.TOKENIZER_MAPPING_NAMES.get(wrapper.model_type)
        assert wrapper.tokenizer_class == registered, wrapper.architecture
        holds = wrapper.model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        assert not holds or registered == "TokenizersBackend", wrapper.architecture
        config = {"architectures": [wrapper.architecture], "text_config": {}}
        assert find_family(config).tokenizer_class == registered


# as published by llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf: what differs from the defaults alone
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {"hidden_size": 1024, "model_type": "clip_vision_model", "num_hidden_layers": 24},
}


def test_a_published_config_with_silent_fields(tmp_path: Path) -> None:
    config = find_family(LLAVA).read_config(LLAVA)
    shape = (config.n_layer, config.n_embd, config.n_head, config.n_query_groups, config.intermediate_size)
    assert shape == (32, 4096, 32, 32, 11008) and config.vocab_size == 32064 and not config.tie_embeddings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["MllamaForConditionalGeneration"]}, "MllamaForConditionalGeneration.* is no known family"),
        ({"architectures": ["PaliGemmaForConditionalGeneration"]}, "is no known family"),
        ({"text_config": None}, "text_config is None, not the object that LlavaForConditionalGeneration needs"),
        ({"text_config": {"model_type": "cohere"}}, "text_config has model_type 'cohere', no text model that is known"),
        ({"text_config": {"model_type": "falcon"}}, "text_config has model_type 'falcon', no text model"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_no_wrapper_of_a_known_text_model_is_refused(change: dict, says: str) -> None:
    content = LLAVA | change
    with pytest.raises(InputError, match=says):
        find_family(content).read_config(content)
